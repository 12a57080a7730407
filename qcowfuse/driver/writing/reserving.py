"""Setting space aside for a guest range (fallocate): later writes there find room, and nothing that is read changes.

1. A cluster that reads as zeroes gets a host cluster with real space below it, and goes on reading as zeroes: by its
   zero flag, or with versions that have none by zeroes in it.
2. What shows through from a backing file, is shared with a snapshot, or compressed, would need a new cluster for its
   first write: it is copied into one now. An extended entry shows what is below through its cluster, uncopied.
3. What the image owns already gets the space that it lacks, and keeps its contents.
4. Space comes first, then the link, in one step without an await: a failure gives the clusters back, and their space.
   What earlier steps have set aside stays; so a range that can't fit is refused before the first.
5. Each step claims its clusters, as a write does.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import trio

from ...format.entries import ClusterKind
from ...format.reserve_plan import n_absent, n_not_owned, owned_run, reserve_clusters
from ..layers.data_file import DataClusters
from ..layers.host_run import HostRun
from ..layers.mapping import Mapping
from ..layers.table_cache import L2Slice, TableCache
from ..layers.usage import Usage
from ..reading.reader import ChainReader
from .allocation import Allocator
from .guarded_clusters import MetadataClusters
from .writer import Writer

MAX_RESERVED_AT_ONCE = 256
"""Clusters of one step."""


class Reserver:
    """Sets space aside in the top layer of a chain; what it has to copy, ``writer`` does. ``changing`` surrounds each
    step."""

    def __init__(
        self,
        *,
        mapping: Mapping,
        reader: ChainReader,
        cache: TableCache,
        writer: Writer,
        allocator: Allocator,
        metadata: MetadataClusters,
        usage: Usage,
        changing: Callable[[], AbstractAsyncContextManager[object]],
        data_clusters: DataClusters | None = None,
    ) -> None:
        self._mapping = mapping
        self._reader = reader
        self._cache = cache
        self._writer = writer
        self._allocator = allocator
        self._metadata = metadata
        self._usage = usage
        self._changing = changing
        self._data = mapping.data
        self._data_clusters = data_clusters
        self._cluster_size = mapping.geometry.cluster_size
        self._cluster_bits = mapping.geometry.cluster_bits
        entry_format = mapping.entry_format
        self._has_zero_flag = bool(entry_format.reads_zero)
        self._links_zeroes = self._has_zero_flag or mapping.encrypted is None

    async def reserve(self, guest_offset: int, n_bytes: int) -> None:
        """Set space aside for the whole range, step by step, each an operation in flight of its own. Raises OSError
        (ENOSPC: nothing is taken where it is sure from the start that there is not enough), CorruptImageError."""
        if n_bytes > self._data.free_bytes() + self._data.allocated_bytes():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._data.name)
        end = guest_offset + n_bytes
        while guest_offset < end:
            async with self._changing():
                guest_offset += await self.reserve_some(guest_offset, end - guest_offset)
            await trio.lowlevel.checkpoint()

    async def reserve_some(self, guest_offset: int, n_bytes: int) -> int:
        """Set space aside for the start of a range; returns how many bytes that was, 0 after having waited for a
        claim. Raises OSError (ENOSPC), CorruptImageError."""
        mapping, claims = self._mapping, self._writer.claims
        start = guest_offset & -self._cluster_size
        end = min(guest_offset + n_bytes, mapping.slice_end(guest_offset))
        n_clusters = min(end - start + self._cluster_size - 1 >> self._cluster_bits, MAX_RESERVED_AT_ONCE)
        slice_ = await self._writer.writable_slice(start)
        try:
            if not slice_.has_space:
                await self._writer.secure(slice_, start, n_clusters)
            first = start >> self._cluster_bits
            conflict = claims.first_conflict(first, first + n_clusters)
            if conflict is not None:
                await conflict.released.wait()
                return 0
            host_offset, n_owned = owned_run(slice_.entries, mapping.entry_format, mapping.index(start), n_clusters)
            claim = claims.take(first, first + (n_owned or n_clusters))
            try:
                if n_owned:
                    await self._secure(guest_offset=start, host_offset=host_offset, n_clusters=n_owned)
                    n_done = n_owned
                else:
                    n_done = await self._take(slice_, start, n_clusters)
            finally:
                claims.release(claim)
        finally:
            self._cache.unpin(slice_)
        return min(start + (n_done << self._cluster_bits), end) - guest_offset

    async def _secure(self, *, guest_offset: int, host_offset: int, n_clusters: int) -> None:
        """Real space for clusters that are linked. Where the file system can't tell they have what they have."""
        n_bytes = n_clusters << self._cluster_bits
        if self._data_clusters is None:
            self._metadata.check(host_offset, n_bytes, "space for guest data")
        else:
            self._data_clusters.check(guest_offset=guest_offset, host_offset=host_offset)
        await self._data.allocate(host_offset, n_bytes)

    async def _take(self, slice_: L2Slice, start: int, n_clusters: int) -> int:
        """Clusters for the first of those that own none; returns for how many."""
        mapping = self._mapping
        index = mapping.index(start)
        n_whole = n_absent(slice_.entries, mapping.entry_format, index, n_clusters)
        if n_whole and mapping.entry_format.is_extended:
            return await self._link_new(slice_, start, n_whole)
        n_covered = min(n_clusters << self._cluster_bits, mapping.size - start)
        extent = (await self._reader.lookup(start, n_covered))[0]
        if extent.kind == ClusterKind.ZERO and self._links_zeroes:
            is_all = extent.n_bytes == n_covered
            n_zeroes = n_clusters if is_all else extent.n_bytes >> self._cluster_bits
            n_zeroes = min(n_zeroes, n_not_owned(slice_.entries, mapping.entry_format, index, n_clusters))
            if n_zeroes:
                return await self._link_new(slice_, start, n_zeroes)
        await self._writer.copy_cluster(slice_, start)
        return 1

    async def _link_new(self, slice_: L2Slice, start: int, n_clusters: int) -> int:
        """New clusters below what reads as zeroes (extended entries: below anything); returns for how many."""
        mapping = self._mapping
        if self._data_clusters is None:
            run = await self._allocator.allocate(n_clusters)
        else:
            run = self._data_clusters.take(start, n_clusters)
        n_bytes = run.n_clusters << self._cluster_bits
        try:
            await self._make_space(run, n_bytes)
        except BaseException:
            if self._data_clusters is None:
                await self._writer.give_back(run)
            raise
        index = mapping.index(start)
        words = mapping.entry_format.words
        let_go = reserve_clusters(slice_.entries, mapping.entry_format, index, run.n_clusters, run.host_offset)
        self._cache.mark_dirty(slice_, index * words, (index + run.n_clusters) * words)
        for entry in let_go:
            self._writer.unlink(entry, 0)
        if not self._has_zero_flag:
            self._usage.add(start, min(n_bytes, mapping.size - start))
        return run.n_clusters

    async def _make_space(self, run: HostRun, n_bytes: int) -> None:
        must_be_zero = not self._has_zero_flag or self._writer.has_raw_data_file
        if must_be_zero or not await self._data.allocate(run.host_offset, n_bytes):
            await self._data.write_zeroes(run.host_offset, n_bytes)
