"""Host clusters: which are free, taking them, giving them back.

Two allocators with one face (:class:`Allocator`): :class:`RefcountAllocator` for QCOW2, and
:class:`~.append_allocation.AppendAllocator` for version 1, which has no refcounts and only ever grows.

1. Taking and giving back are plain functions on memory; a refcount block that is needed and not in memory is
   asked for by :class:`BlockMissing`, loaded by the awaiting caller, and the step is done again from its start. So is
   space of the file system for what a flush will have to write, by :class:`SpaceMissing`, before anything changes.
2. A new refcount block, and a larger refcount table, exist in memory only until :meth:`take_dirty` hands them to
   the ordering rules. A block describes its own cluster.
3. A run is fresh when it lies behind the file's end at open and behind everything taken since.
4. The search starts at the lowest cluster that may be free and never looks at what lies below.
5. Behind a limit that :meth:`hold_back` sets, and :meth:`let_in` takes away, clusters are taken only once it is known
   which are in use although their counts are 0 (:mod:`.unguarded`); those never are.
6. A count in memory is never lower than the references that the image file may hold at that moment: counts are
   raised before a link and lowered after the unlink is durable (R1, R3).
"""

from __future__ import annotations

import errno
from array import array
from collections import OrderedDict
from contextlib import suppress
from typing import NamedTuple, Protocol

import trio

from ...errors import CorruptImageError
from ...format.entries import MAX_HOST_OFFSET, serialise_table
from ...format.geometry import divide_up, round_up
from ...format.refcounts import (
    REFCOUNT_TABLE_OFFSET_MASK,
    decremented,
    empty_refcounts,
    entries_per_block,
    parse_refcounts,
    serialise_refcounts,
)
from ...storage.base import Storage
from ..layers.host_run import HostRun
from .guarded_clusters import MetadataClusters
from .metadata_space import LEAST_WRITE, MetadataSpace

MAX_REFCOUNT_TABLE_BYTES = 8 << 20
BLOCK_CACHE_BYTES = 8 << 20
_SECTOR_ENTRIES = 64
_MAX_TRIES = 16


class MetadataWrite(NamedTuple):
    """Bytes for one place of the image file."""

    host_offset: int
    data: bytes


class DirtyRefcounts(NamedTuple):
    """What :meth:`take_dirty` hands out: ``blocks`` first, then (when they are durable) ``table``, which is
    empty unless blocks were added. ``moved_table``: a grown table to be written with the blocks; ``table`` then
    is the header field that points at it."""

    blocks: list[MetadataWrite]
    moved_table: list[MetadataWrite]
    table: list[MetadataWrite]


class BlockMissing(Exception):  # noqa: N818 - not an error: the answer "load this first"
    """The refcount block ``block_index`` has to be loaded."""

    def __init__(self, block_index: int) -> None:
        self.block_index = block_index


class SpaceMissing(Exception):  # noqa: N818 - as above: "set space aside first"
    """``places`` (host offset, bytes) of the image file need space that is their own."""

    def __init__(self, places: list[tuple[int, int]]) -> None:
        self.places = places


def merged(runs: list[HostRun], cluster_size: int) -> list[HostRun]:
    """The same clusters, each as often, in as few runs as that takes."""
    result: list[HostRun] = []
    for run in sorted(runs):
        last = result[-1] if result else None
        if last is not None and last.host_offset + last.n_clusters * cluster_size == run.host_offset:
            result[-1] = HostRun(last.host_offset, last.n_clusters + run.n_clusters)
        else:
            result.append(HostRun(run.host_offset, run.n_clusters))
    return result


class Allocator(Protocol):
    """What the write path and the ordering rules need of host cluster management."""

    @property
    def space(self) -> MetadataSpace:
        """Which metadata of the image file has its space."""

    async def allocate(self, n_clusters: int) -> HostRun:
        """Take 1 to ``n_clusters`` contiguous clusters. Raises OSError, CorruptImageError."""

    def try_allocate(self, n_clusters: int) -> HostRun | None:
        """:meth:`allocate` where nothing has to be read for it, else None."""

    def give_back(self, run: HostRun) -> None:
        """Undo a :meth:`try_allocate`, before anything else has happened."""

    async def allocate_exactly(self, n_clusters: int) -> HostRun:
        """Take ``n_clusters`` contiguous clusters, for a table. Raises as :meth:`allocate`."""

    async def release(self, runs: list[HostRun], *, punch: bool = False) -> None:
        """Lower the count of every cluster in the runs by one. All or, on an exception, a part.

        ``punch``: the space of clusters that become free is given back to the file system, before they do.
        """

    def take_dirty(self) -> DirtyRefcounts:
        """Everything that the image file lacks, in one step; from now on it counts as written."""

    def put_back(self) -> None:
        """What :meth:`take_dirty` handed out last could not be written: it is dirty again."""

    def written(self) -> None:
        """What :meth:`take_dirty` handed out last has been written: it may be read back from the file."""

    def take_unlinked(self) -> list[HostRun]:
        """Clusters of moved structures that are free once the last :meth:`take_dirty` is durable."""

    @property
    def is_dirty(self) -> bool:
        """Whether :meth:`take_dirty` would hand out anything."""

    def dirty_bytes(self) -> int:
        """How much that would be, at most."""


class _Block:
    __slots__ = ("counts", "dirty_end", "dirty_start", "has_space")

    def __init__(self, counts: array[int], *, has_space: bool = False) -> None:
        self.counts = counts
        self.has_space = has_space
        self.dirty_start = len(counts)
        self.dirty_end = 0

    def mark_dirty(self, start: int, end: int) -> None:
        self.dirty_start = min(self.dirty_start, start)
        self.dirty_end = max(self.dirty_end, end)


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
        self._order = refcount_order
        self._per_block = entries_per_block(cluster_bits, refcount_order)
        self._table = table
        self._table_offset = table_offset
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._dirty_blocks: set[int] = set()
        self._new_entries: set[int] = set()
        self._table_moved = False
        self._unlinked: list[HostRun] = []
        self._taken: tuple[list[tuple[int, int, int]], set[int], bool] = ([], set(), False)
        self._being_written: set[int] = set()
        self._load_lock = trio.Lock()
        self._high_water = storage.size()
        self._first_maybe_free = self._held_back = 0
        self._in_use: frozenset[int] = frozenset()

    def hold_back(self, cluster: int) -> None:
        """Nothing before ``cluster`` is taken from now on."""
        self._first_maybe_free = self._held_back = cluster

    def let_in(self, in_use: frozenset[int]) -> None:
        """Whatever is free may be taken, but for clusters that are ``in_use``."""
        self._first_maybe_free = self._held_back = 0
        self._in_use = in_use

    @property
    def is_dirty(self) -> bool:
        """See Allocator."""
        return bool(self._dirty_blocks or self._new_entries or self._table_moved)

    def dirty_bytes(self) -> int:
        """See Allocator. A part of a table is taken for a block of any file system."""
        tables = len(self._table) * 8 if self._table_moved else len(self._new_entries) * LEAST_WRITE
        blocks = [self._blocks[block_index] for block_index in self._dirty_blocks]
        n_counts = sum(block.dirty_end - block.dirty_start for block in blocks)
        return (n_counts << self._order >> 3) + 2 * LEAST_WRITE * len(blocks) + tables

    async def allocate(self, n_clusters: int) -> HostRun:
        """See Allocator."""
        if not self.space.is_ready:
            await self.space.prepare()
        while True:
            try:
                return self._allocate(n_clusters)
            except BlockMissing as missing:
                await self._load_block(missing.block_index)
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
        """See Allocator. Where the file is too fragmented, behind its end."""
        surplus: list[HostRun] = []
        found: HostRun | None = None
        try:
            for _ in range(_MAX_TRIES):
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
            while True:
                try:
                    return self._allocate_behind(n_clusters)
                except SpaceMissing as missing:
                    await self._secure(missing)
        finally:
            if found:
                surplus.append(found)
            with trio.CancelScope(shield=True), suppress(OSError, CorruptImageError):
                await self.release(surplus)

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
                    await self._load_block(missing.block_index)
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
            if self._block(block_index).counts[index : index + n_here].count(1) != n_here:
                return False
            first += n_here
        return True

    async def refcount(self, cluster: int) -> int:
        """The count of a host cluster."""
        block_index, index = divmod(cluster, self._per_block)
        if block_index >= len(self._table) or not self._table[block_index] & REFCOUNT_TABLE_OFFSET_MASK:
            return 0
        while True:
            try:
                return self._block(block_index).counts[index]
            except BlockMissing as missing:
                await self._load_block(missing.block_index)

    async def _secure(self, missing: SpaceMissing) -> None:
        for host_offset, n_bytes in missing.places:
            await self.space.secure(host_offset, n_bytes)

    def _require_space(self, *places: tuple[int, int]) -> None:
        missing = [place for place in places if not self.space.has(*place)]
        if missing:
            raise SpaceMissing(missing)

    def _block(self, block_index: int) -> _Block:
        block = self._blocks.get(block_index)
        if block is None:
            raise BlockMissing(block_index)
        return block

    async def _load_block(self, block_index: int) -> None:
        # One at a time: a second read of a block could end after the first was changed, written and dropped again.
        async with self._load_lock:
            if block_index not in self._blocks:
                await self._read_block(block_index)

    async def _read_block(self, block_index: int) -> None:
        cluster_size = 1 << self._cluster_bits
        host_offset = self._table[block_index] & REFCOUNT_TABLE_OFFSET_MASK
        if host_offset & (cluster_size - 1) or host_offset >= MAX_HOST_OFFSET:
            raise CorruptImageError(
                "refcount table", self._table_offset + 8 * block_index, f"impossible entry {host_offset:#x}"
            )
        if host_offset >= self._storage.size():
            raise CorruptImageError("refcount block", host_offset, "lies past the end of the image file")
        self._metadata.check_own(host_offset, cluster_size, "refcount block")
        data = self._storage.try_pread(host_offset, cluster_size)
        if data is None:
            data = await self._storage.pread(host_offset, cluster_size)
        self._blocks[block_index] = block = _Block(parse_refcounts(data, self._order))
        keep = max(4, BLOCK_CACHE_BYTES // (block.counts.itemsize * self._per_block))
        while len(self._blocks) > keep:
            for victim in self._blocks:
                if not (victim in self._dirty_blocks or victim in self._being_written or victim == block_index):
                    del self._blocks[victim]
                    break
            else:
                break

    def _set(self, block_index: int, block: _Block, start: int, end: int, count: int) -> None:
        for index in range(start, end):
            block.counts[index] = count
        block.mark_dirty(start, end)
        self._dirty_blocks.add(block_index)

    def _allocate(self, n_clusters: int) -> HostRun:
        cluster = self._first_maybe_free
        while True:
            if cluster + n_clusters > MAX_HOST_OFFSET >> self._cluster_bits:
                raise OSError(errno.ENOSPC, "the image file cannot take another cluster", self._storage.name)
            block_index, index = divmod(cluster, self._per_block)
            if block_index >= len(self._table):
                self._grow_table(block_index)
            if cluster in self._in_use:
                cluster = self._first_maybe_free = cluster + 1
                continue
            if not self._table[block_index] & REFCOUNT_TABLE_OFFSET_MASK:
                self._add_block(block_index, cluster)
            block = self._block(block_index)
            counts = block.counts
            try:
                start = counts.index(0, index)
            except ValueError:
                cluster = self._first_maybe_free = (block_index + 1) * self._per_block
                continue
            if not block.has_space:
                block_offset = self._table[block_index] & REFCOUNT_TABLE_OFFSET_MASK
                self._require_space((block_offset, 1 << self._cluster_bits))
                block.has_space = True
            end = start + 1
            limit = min(start + n_clusters, self._per_block)
            while end < limit and not counts[end]:
                end += 1
            first = block_index * self._per_block + start
            if self._in_use:
                if first in self._in_use:
                    cluster = self._first_maybe_free = first
                    continue
                end = next((n for n in range(start, end) if first + n - start in self._in_use), end)
            n_bytes = end - start << self._cluster_bits
            self._metadata.check(first << self._cluster_bits, n_bytes, "a cluster that is free by its refcount")
            self._set(block_index, block, start, end, 1)
            self._first_maybe_free = first + end - start
            host_offset = first << self._cluster_bits
            is_fresh = host_offset >= self._high_water
            self._high_water = max(self._high_water, host_offset + (end - start << self._cluster_bits))
            return HostRun(host_offset, end - start, is_fresh)

    def _add_block(self, block_index: int, cluster: int) -> None:
        """A new block for a range that has none, in that range's ``cluster``, which it marks as used."""
        cluster_size = 1 << self._cluster_bits
        self._metadata.check_own(self._table_offset, len(self._table) * 8, "refcount table")
        self._metadata.check(cluster * cluster_size, cluster_size, "a new refcount block")
        self._require_space((cluster * cluster_size, cluster_size), self._table_part(block_index, 1))
        self._metadata.add(cluster * cluster_size, cluster_size)
        block = _Block(empty_refcounts(self._cluster_bits, self._order), has_space=True)
        self._blocks[block_index] = block
        self._table[block_index] = cluster << self._cluster_bits
        self._new_entries.add(block_index)
        self._set(block_index, block, cluster % self._per_block, cluster % self._per_block + 1, 1)
        block.mark_dirty(0, self._per_block)
        self._high_water = max(self._high_water, (cluster + 1) << self._cluster_bits)

    def _grow_table(self, needed_index: int) -> None:
        """Move the refcount table to a larger place behind everything, with the blocks that describe it."""
        cluster_size = 1 << self._cluster_bits
        entries_per_cluster = cluster_size // 8
        first_block = max(self._first_unused_block(), needed_index)
        start = first_block * self._per_block
        n_table = n_blocks = 1
        while True:
            entries = max(first_block + n_blocks, len(self._table) * 3 // 2)
            wanted_table = divide_up(entries, entries_per_cluster)
            wanted_blocks = divide_up(wanted_table + n_blocks, self._per_block)
            if wanted_table <= n_table and wanted_blocks <= n_blocks:
                break
            n_table, n_blocks = max(n_table, wanted_table), max(n_blocks, wanted_blocks)
        if n_table * cluster_size > MAX_REFCOUNT_TABLE_BYTES:
            raise OSError(errno.ENOSPC, "the image's refcount table cannot grow beyond 8 MiB", self._storage.name)
        self._metadata.check(start * cluster_size, (n_table + n_blocks) * cluster_size, "a larger refcount table")
        self._require_space((start * cluster_size, (n_table + n_blocks) * cluster_size))
        self._metadata.add(start * cluster_size, (n_table + n_blocks) * cluster_size)
        old = HostRun(self._table_offset, divide_up(len(self._table) * 8, cluster_size))
        self._table.extend(array("Q", bytes(8 * (n_table * entries_per_cluster - len(self._table)))))
        self._add_blocks_behind(first_block, n_blocks, n_table)
        self._table_offset = start << self._cluster_bits
        self._table_moved = True
        self._unlinked.append(old)
        self._metadata.discard(old.host_offset, old.n_clusters * cluster_size)

    def _first_unused_block(self) -> int:
        """The first range of clusters that has no refcount block and lies, with all that follow, behind the file."""
        used = len(self._table)
        while used and not self._table[used - 1] & REFCOUNT_TABLE_OFFSET_MASK:
            used -= 1
        # Not the file's size: that grows with space that is set aside, before anything is there.
        return max(used, divide_up(divide_up(self._high_water, 1 << self._cluster_bits), self._per_block))

    def _table_part(self, first_block: int, n_blocks: int) -> tuple[int, int]:
        """Where the sectors of the refcount table lie that name ``n_blocks`` blocks."""
        start = first_block // _SECTOR_ENTRIES * _SECTOR_ENTRIES
        end = min(round_up(first_block + n_blocks, _SECTOR_ENTRIES), len(self._table))
        return self._table_offset + 8 * start, 8 * (end - start)

    def _add_blocks_behind(self, first_block: int, n_blocks: int, n_clusters: int) -> None:
        """New blocks for the ranges from ``first_block`` on, behind ``n_clusters`` that are taken there as well."""
        start = first_block * self._per_block
        for number in range(n_blocks):
            block = _Block(empty_refcounts(self._cluster_bits, self._order), has_space=True)
            block_index = first_block + number
            self._blocks[block_index] = block
            self._table[block_index] = (start + n_clusters + number) << self._cluster_bits
            in_use = min(max(n_clusters + n_blocks - number * self._per_block, 0), self._per_block)
            self._set(block_index, block, 0, in_use, 1)
            block.mark_dirty(0, self._per_block)
        self._high_water = max(self._high_water, (start + n_clusters + n_blocks) << self._cluster_bits)

    def _allocate_behind(self, n_clusters: int) -> HostRun:
        """Contiguous clusters behind everything, and behind them the new blocks that describe both."""
        n_blocks = 1
        while n_blocks * self._per_block < n_clusters + n_blocks:
            n_blocks = divide_up(n_clusters + n_blocks, self._per_block)
        while (first_block := self._first_unused_block()) + n_blocks > len(self._table):
            self._grow_table(first_block + n_blocks - 1)
        host_offset = first_block * self._per_block << self._cluster_bits
        n_bytes = n_clusters << self._cluster_bits
        if host_offset + n_bytes + (n_blocks << self._cluster_bits) > MAX_HOST_OFFSET:
            raise OSError(errno.ENOSPC, "the image file cannot take another table", self._storage.name)
        blocks = (host_offset + n_bytes, n_blocks << self._cluster_bits)
        self._require_space(blocks, self._table_part(first_block, n_blocks))
        self._metadata.add(*blocks)
        self._new_entries.update(range(first_block, first_block + n_blocks))
        self._add_blocks_behind(first_block, n_blocks, n_clusters)
        return HostRun(host_offset, n_clusters)

    def _decrement(self, cluster: int) -> None:
        block_index, index = divmod(cluster, self._per_block)
        if block_index >= len(self._table) or not self._table[block_index] & REFCOUNT_TABLE_OFFSET_MASK:
            decremented(0, cluster)
        block = self._block(block_index)
        count = decremented(block.counts[index], cluster)
        self._set(block_index, block, index, index + 1, count)
        if not count:
            self._first_maybe_free = max(min(self._first_maybe_free, cluster), self._held_back)

    def _decrement_all(self, first: int, n_clusters: int) -> None:
        """Clusters of one block: all, or with an exception some or, for BlockMissing, none."""
        block_index, index = divmod(first, self._per_block)
        if (
            n_clusters > 1
            and block_index < len(self._table)
            and self._table[block_index] & REFCOUNT_TABLE_OFFSET_MASK
        ):
            block = self._block(block_index)
            end = index + n_clusters
            if block.counts[index:end].count(1) == n_clusters:
                block.counts[index:end] = array(block.counts.typecode, bytes(n_clusters * block.counts.itemsize))
                block.mark_dirty(index, end)
                self._dirty_blocks.add(block_index)
                self._first_maybe_free = min(self._first_maybe_free, first)
                return
        for cluster in range(first, first + n_clusters):
            self._decrement(cluster)

    def take_dirty(self) -> DirtyRefcounts:
        """See Allocator."""
        blocks: list[MetadataWrite] = []
        taken: list[tuple[int, int, int]] = []
        per_sector = max(4096 >> self._order, 1)
        for block_index in sorted(self._dirty_blocks):
            block = self._blocks[block_index]
            start = block.dirty_start // per_sector * per_sector
            end = min(round_up(block.dirty_end, per_sector), self._per_block)
            host_offset = (self._table[block_index] & REFCOUNT_TABLE_OFFSET_MASK) + (start << self._order >> 3)
            blocks.append(MetadataWrite(host_offset, serialise_refcounts(block.counts, self._order, start, end)))
            taken.append((block_index, block.dirty_start, block.dirty_end))
            block.dirty_start, block.dirty_end = self._per_block, 0
        moved: list[MetadataWrite] = []
        table: list[MetadataWrite] = []
        if self._table_moved:
            moved.append(MetadataWrite(self._table_offset, serialise_table(self._table, 0, len(self._table))))
            n_clusters = len(self._table) * 8 >> self._cluster_bits
            pointer = self._table_offset.to_bytes(8, "big") + n_clusters.to_bytes(4, "big")
            table.append(MetadataWrite(48, pointer))
        else:
            for sector in sorted({index // _SECTOR_ENTRIES for index in self._new_entries}):
                start = sector * _SECTOR_ENTRIES
                end = min(start + _SECTOR_ENTRIES, len(self._table))
                table.append(MetadataWrite(self._table_offset + 8 * start, serialise_table(self._table, start, end)))
        self._taken = (taken, self._new_entries, self._table_moved)
        self._being_written = self._dirty_blocks
        self._dirty_blocks = set()
        self._new_entries = set()
        self._table_moved = False
        return DirtyRefcounts(blocks, moved, table)

    def put_back(self) -> None:
        """See Allocator."""
        taken, new_entries, table_moved = self._taken
        for block_index, start, end in taken:
            self._blocks[block_index].mark_dirty(start, end)
            self._dirty_blocks.add(block_index)
        self._new_entries |= new_entries
        self._table_moved |= table_moved
        self._taken = ([], set(), False)
        self._being_written = set()

    def written(self) -> None:
        """See Allocator."""
        self._taken = ([], set(), False)
        self._being_written = set()

    def take_unlinked(self) -> list[HostRun]:
        """See Allocator."""
        unlinked, self._unlinked = self._unlinked, []
        return unlinked
