"""Host clusters of QCOW2: which are free by their refcounts, taking them, giving them back.

1. A run is fresh when it lies behind the file's end at open and behind everything taken since; on a block device none
   is. Where a device is full, its length is asked for again: it may have been made larger since.
2. The search starts at the lowest cluster that may be free and never looks at what lies below.
3. Behind a limit that :meth:`RefcountAllocator.hold_back` sets, and :meth:`RefcountAllocator.let_in` takes away,
   clusters are taken only once it is known which are in use although their counts are 0 (:mod:`.unguarded`); those
   never are.
"""

from __future__ import annotations

import errno
import os
from array import array
from contextlib import suppress

import trio

from ...errors import CorruptImageError
from ...format.entries import MAX_HOST_OFFSET
from ...format.refcounts import decremented
from ...storage.base import Storage
from ..layers.host_run import HostRun
from .allocation import BlockMissing, DirtyRefcounts, SpaceMissing
from .guarded_clusters import MetadataClusters
from .metadata_space import MetadataSpace
from .refcount_blocks import RefcountBlocks
from .refcount_growth import RefcountGrowth

_MAX_TRIES = 16


class RefcountAllocator:
    """QCOW2. ``table`` is the refcount table as loaded, ``table_offset`` its place in the image file."""

    def __init__(
        self,
        storage: Storage,
        *,
        cluster_bits: int,
        refcount_order: int,
        table: array[int],
        table_offset: int,
        metadata: MetadataClusters,
    ) -> None:
        self.space = MetadataSpace(storage)
        self._storage = storage
        self._metadata = metadata
        self._cluster_bits = cluster_bits
        self._blocks = blocks = RefcountBlocks(
            storage,
            cluster_bits=cluster_bits,
            refcount_order=refcount_order,
            table=table,
            table_offset=table_offset,
            metadata=metadata,
        )
        self._per_block = blocks.per_block
        self._growth = RefcountGrowth(
            storage.name,
            blocks,
            cluster_bits=cluster_bits,
            metadata=metadata,
            space=self.space,
            high_water=0 if storage.is_fixed else storage.size(),
        )
        self._end = self._end_now()
        self._first_maybe_free = self._held_back = 0
        self._in_use: frozenset[int] = frozenset()

    def hold_back(self, cluster: int) -> None:
        """Nothing before ``cluster`` is taken from now on."""
        self._first_maybe_free = self._held_back = cluster

    def let_in(self, in_use: frozenset[int]) -> None:
        """Whatever is free may be taken, but for clusters that are ``in_use``."""
        self._first_maybe_free = self._held_back = 0
        self._in_use = in_use
        if in_use:
            self._growth.high_water = max(self._growth.high_water, max(in_use) + 1 << self._cluster_bits)

    @property
    def is_dirty(self) -> bool:
        """See Allocator."""
        return self._blocks.is_dirty

    def dirty_bytes(self) -> int:
        """See Allocator."""
        return self._blocks.dirty_bytes()

    async def allocate(self, n_clusters: int) -> HostRun:
        """See Allocator."""
        if not self.space.is_ready:
            await self.space.prepare()
        while True:
            try:
                return self._allocate(n_clusters)
            except BlockMissing as missing:
                await self._blocks.load(missing.block_index)
            except SpaceMissing as missing:
                await self._secure(missing)

    def try_allocate(self, n_clusters: int) -> HostRun | None:
        """See Allocator."""
        if not self.space.is_ready:
            return None
        try:
            return self._allocate(n_clusters)
        except (BlockMissing, SpaceMissing):
            return None

    def give_back(self, run: HostRun) -> None:
        """See Allocator."""
        first = run.host_offset >> self._cluster_bits
        for cluster in range(first, first + run.n_clusters):
            self._decrement(cluster)

    async def allocate_exactly(self, n_clusters: int) -> HostRun:
        """See Allocator. Where the file is too fragmented, behind its end; a device has nothing there."""
        if self._storage.is_fixed and n_clusters >= self._per_block and not self._held_back:
            # What new refcount blocks describe begins with the block itself, so that no run is as long.
            with suppress(OSError):
                return await self._allocate_behind(n_clusters)
        surplus: list[HostRun] = []
        found: HostRun | None = None
        try:
            for _ in range(self._end if self._storage.is_fixed else _MAX_TRIES):
                run = await self.allocate(n_clusters - (found.n_clusters if found else 0))
                if found and found.host_offset + (found.n_clusters << self._cluster_bits) == run.host_offset:
                    found = HostRun(found.host_offset, found.n_clusters + run.n_clusters)
                else:
                    if found:
                        surplus.append(found)
                    found = run
                if found.n_clusters == n_clusters:
                    taken, found = found, None
                    return taken
            return await self._allocate_behind(n_clusters)
        finally:
            if found:
                surplus.append(found)
            with trio.CancelScope(shield=True), suppress(OSError, CorruptImageError):
                await self.release(surplus)

    async def _allocate_behind(self, n_clusters: int) -> HostRun:
        """Behind all that is in use. Raises OSError (ENOSPC)."""
        if not self.space.is_ready:
            await self.space.prepare()
        while True:
            try:
                return self._growth.allocate_behind(n_clusters)
            except SpaceMissing as missing:
                await self._secure(missing)

    async def release(self, runs: list[HostRun], *, punch: bool = False) -> None:
        """See Allocator. Raises CorruptImageError where a count was 0 already, and where metadata lies."""
        for run in runs:
            first = run.host_offset >> self._cluster_bits
            self._metadata.check_free(run.host_offset, run.n_clusters << self._cluster_bits)
            if punch:
                await self._punch(first, run.n_clusters)
            end = first + run.n_clusters
            while first < end:
                n_here = min(end - first, self._per_block - first % self._per_block)
                try:
                    self._decrement_all(first, n_here)
                except BlockMissing as missing:
                    await self._blocks.load(missing.block_index)
                    continue
                first += n_here

    async def _punch(self, first: int, n_clusters: int) -> None:
        """Punch holes where the count is 1, while it still keeps the clusters from being taken."""
        start = first
        self.space.forget(first << self._cluster_bits, n_clusters << self._cluster_bits)
        if await self._are_owned(first, n_clusters):
            with suppress(OSError):
                await self._storage.punch_hole(first << self._cluster_bits, n_clusters << self._cluster_bits)
            return
        for cluster in range(first, first + n_clusters + 1):
            if cluster < first + n_clusters and await self.refcount(cluster) == 1:
                continue
            if start < cluster:
                with suppress(OSError):  # space that is not given back is no loss
                    n_bytes = cluster - start << self._cluster_bits
                    await self._storage.punch_hole(start << self._cluster_bits, n_bytes)
            start = cluster + 1

    async def _are_owned(self, first: int, n_clusters: int) -> bool:
        """Whether the count of each of the clusters is 1."""
        end = first + n_clusters
        while first < end:
            if await self.refcount(first) != 1:
                return False
            block_index, index = divmod(first, self._per_block)
            n_here = min(end - first, self._per_block - index)
            if self._blocks.get(block_index).counts[index : index + n_here].count(1) != n_here:
                return False
            first += n_here
        return True

    async def refcount(self, cluster: int) -> int:
        """The count of a host cluster."""
        block_index, index = divmod(cluster, self._per_block)
        if not self._blocks.has(block_index):
            return 0
        while True:
            try:
                return self._blocks.get(block_index).counts[index]
            except BlockMissing as missing:
                await self._blocks.load(missing.block_index)

    async def _secure(self, missing: SpaceMissing) -> None:
        for host_offset, n_bytes in missing.places:
            await self.space.secure(host_offset, n_bytes)

    def _allocate(self, n_clusters: int) -> HostRun:
        cluster = self._first_maybe_free
        while True:
            if cluster >= self._end:
                self._look_behind_end()
                continue
            block_index, index = divmod(cluster, self._per_block)
            if block_index >= len(self._blocks.table):
                self._growth.grow_table(block_index)
            if cluster in self._in_use:
                cluster = self._first_maybe_free = cluster + 1
                continue
            if not self._blocks.has(block_index):
                self._growth.add_block(block_index, cluster)
            block = self._blocks.get(block_index)
            counts = block.counts
            try:
                start = counts.index(0, index)
            except ValueError:
                cluster = self._first_maybe_free = (block_index + 1) * self._per_block
                continue
            first = block_index * self._per_block + start
            if first >= self._end:
                self._look_behind_end()
                continue
            if not block.has_space:
                self._growth.require_space((self._blocks.place(block_index), 1 << self._cluster_bits))
                block.has_space = True
            end = start + 1
            limit = min(start + n_clusters, self._per_block, start + self._end - first)
            while end < limit and not counts[end]:
                end += 1
            if self._in_use:
                if first in self._in_use:
                    cluster = self._first_maybe_free = first
                    continue
                end = next((n for n in range(start, end) if first + n - start in self._in_use), end)
            n_bytes = end - start << self._cluster_bits
            self._metadata.check(first << self._cluster_bits, n_bytes, "a cluster that is free by its refcount")
            self._blocks.set_counts(block_index, block, start, end, 1)
            self._first_maybe_free = first + end - start
            host_offset = first << self._cluster_bits
            is_fresh = host_offset >= self._growth.high_water and not self._storage.is_fixed
            self._growth.high_water = max(self._growth.high_water, host_offset + (end - start << self._cluster_bits))
            return HostRun(host_offset, end - start, is_fresh)

    def _end_now(self) -> int:
        """The first cluster that can't be taken."""
        n_bytes = self._storage.size() if self._storage.is_fixed else MAX_HOST_OFFSET
        return n_bytes >> self._cluster_bits

    def _look_behind_end(self) -> None:
        """Go on where a device has been made larger. Raises OSError (ENOSPC) where it has not."""
        if self._storage.is_fixed:
            self._storage.refresh_size()
            before, self._end = self._end, self._end_now()
            if self._end > before:
                return
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._storage.name)

    def _note_free(self, cluster: int) -> None:
        self._first_maybe_free = max(min(self._first_maybe_free, cluster), self._held_back)

    def _decrement(self, cluster: int) -> None:
        block_index, index = divmod(cluster, self._per_block)
        if not self._blocks.has(block_index):
            decremented(0, cluster)
        block = self._blocks.get(block_index)
        count = decremented(block.counts[index], cluster)
        self._blocks.set_counts(block_index, block, index, index + 1, count)
        if not count:
            self._note_free(cluster)

    def _decrement_all(self, first: int, n_clusters: int) -> None:
        """Clusters of one block: all, or with an exception some or, for BlockMissing, none."""
        block_index, index = divmod(first, self._per_block)
        if n_clusters > 1 and self._blocks.has(block_index):
            block = self._blocks.get(block_index)
            end = index + n_clusters
            if block.counts[index:end].count(1) == n_clusters:
                self._blocks.clear_counts(block_index, block, index, end)
                self._note_free(first)
                return
        for cluster in range(first, first + n_clusters):
            self._decrement(cluster)

    def take_unlinked(self) -> list[HostRun]:
        """See Allocator."""
        unlinked, self._growth.unlinked = self._growth.unlinked, []
        return unlinked

    def take_dirty(self) -> DirtyRefcounts:
        """See Allocator."""
        return self._blocks.take_dirty()

    def put_back(self) -> None:
        """See Allocator."""
        self._blocks.put_back()

    def written(self) -> None:
        """See Allocator."""
        self._blocks.written()
