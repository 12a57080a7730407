"""Zeroing and discarding a guest range, one step at a time.

1. Whole clusters are zeroed by their entries alone, in one step without an await; it waits for claims like a write.
   What is less than a cluster, and what the format has no entry for, is written as zeroes.
2. A step is some hundred clusters, and what reads as zeroes and has nothing to give back is passed over. Others get
   their turn between the steps of a long range, and may write there: then their data stays, or is zeroed, as if they
   had come after the whole, or before it.
3. A discard gives back what clusters that read as zeroes own, too.
4. A raw data file is the disk as it stands: it is zeroed itself, and its entries stay.
"""

from __future__ import annotations

from contextlib import suppress

from ...format.entries import ClusterKind
from ...format.presence import n_without
from ...format.zero_plan import can_zero_by_entry, discard_owned, zero_clusters
from ..layers.data_file import DataClusters
from ..layers.holes import HoleFinder
from ..layers.host_run import HostRun
from ..layers.mapping import Mapping
from ..layers.table_cache import L2Slice, TableCache
from ..layers.usage import Usage
from ..reading.reader import ChainReader
from .new_tables import ZEROES
from .write_back import WriteBack
from .writer import Writer

MAX_ZEROED_AT_ONCE = 1024
"""Clusters that one step zeroes, times layers of the chain, each of which may have to be asked for every cluster:
0.3 ms of processor time where all are owned alone, 2 ms elsewhere."""


class Zeroer:
    """Zeroes the top layer of a chain; what it has to write, ``writer`` does."""

    def __init__(
        self,
        *,
        mapping: Mapping,
        reader: ChainReader,
        cache: TableCache,
        writer: Writer,
        write_back: WriteBack,
        usage: Usage,
        data_clusters: DataClusters | None = None,
    ) -> None:
        self._mapping = mapping
        self._reader = reader
        self._cache = cache
        self._writer = writer
        self._write_back = write_back
        self._usage = usage
        self._data = mapping.data
        self._data_clusters = data_clusters
        self._holes = HoleFinder(reader.layers)
        self._cluster_size = mapping.geometry.cluster_size
        self._cluster_bits = mapping.geometry.cluster_bits
        self._cluster_mask = self._cluster_size - 1
        self._zeroes_by_entry = can_zero_by_entry(mapping.entry_format, may_fall_through=len(reader.layers) == 1)

    async def zero_some(self, guest_offset: int, n_bytes: int, *, unmap: bool) -> int:
        """Zero the start of a range; returns how many bytes that was, 0 after having waited for a claim.

        ``unmap``: whole clusters may give their space back.
        """
        writer = self._writer
        in_cluster = guest_offset & self._cluster_mask
        if not writer.has_raw_data_file and (n_absent := await self._zeroes_without_tables(guest_offset, n_bytes)):
            return n_absent
        n_bytes = min(n_bytes, self._mapping.slice_end(guest_offset) - guest_offset)
        if writer.has_raw_data_file:
            return await self._zero_raw(guest_offset, n_bytes, unmap=unmap)
        reaches_end = guest_offset + n_bytes == self._mapping.size
        n_clusters = (n_bytes + (self._cluster_mask if reaches_end else 0)) >> self._cluster_bits
        if in_cluster or not n_clusters or not self._zeroes_by_entry:
            here = self._cluster_size - in_cluster if self._zeroes_by_entry else len(ZEROES)
            return await self._write_zeroes(guest_offset, min(n_bytes, here))
        n_clusters = min(n_clusters, (1 << self._mapping.slice_bits) - self._mapping.index(guest_offset))
        n_zeroes = await self._zeroes_at(guest_offset, n_bytes)
        if n_zeroes >= self._cluster_size or n_zeroes == n_bytes:
            # A cluster that is only begun may hold data behind the range.
            n_whole = n_clusters if n_zeroes == n_bytes else n_zeroes >> self._cluster_bits
            n_free = await self._without_space(guest_offset, n_whole) if unmap else n_whole
            if n_free == n_whole:
                return n_zeroes if n_zeroes == n_bytes else n_whole << self._cluster_bits
            if n_free:
                return n_free << self._cluster_bits
            n_clusters = n_whole
        n_clusters = min(n_clusters, max(MAX_ZEROED_AT_ONCE // len(self._reader.layers), 1))
        n_covered = min(n_clusters << self._cluster_bits, self._mapping.size - guest_offset)
        slice_ = await writer.writable_slice(guest_offset)
        try:
            if not slice_.has_space:
                await writer.secure(slice_, guest_offset, n_clusters)
            first = guest_offset >> self._cluster_bits
            conflict = writer.claims.first_conflict(first, first + n_clusters)
            if conflict is not None:
                await conflict.released.wait()
                return 0
            claim = writer.claims.take(first, first + n_clusters)
            try:
                extents = await self._reader.lookup(guest_offset, n_covered)
                if unmap and self._data_clusters is not None:
                    await self._punch(guest_offset, n_covered)
                self.zero_entries(slice_, guest_offset, n_clusters, unmap=unmap)
            finally:
                writer.claims.release(claim)
        finally:
            self._cache.unpin(slice_)
        n_data = sum(extent.n_bytes for extent in extents if extent.kind != ClusterKind.ZERO)
        self._usage.add(guest_offset, -n_data)
        return n_covered

    def zero_entries(self, slice_: L2Slice, guest_offset: int, n_clusters: int, *, unmap: bool) -> None:
        """Zero clusters, all in one slice, by their entries; nobody else is at work on them."""
        entry_format = self._mapping.entry_format
        index = self._mapping.index(guest_offset)
        runs = discard_owned(slice_.entries, entry_format, index, n_clusters) if unmap else None
        let_go: list[int] = []
        if runs is None:
            let_go = zero_clusters(slice_.entries, entry_format, index, n_clusters, unmap=unmap)
        self._cache.mark_dirty(slice_, index * entry_format.words, (index + n_clusters) * entry_format.words)
        for host_offset, n_here in runs or ():
            self._write_back.unlink_cluster(HostRun(host_offset, n_here))
        for entry in let_go:
            self._writer.unlink(entry, 0)

    async def _zero_raw(self, guest_offset: int, n_bytes: int, *, unmap: bool) -> int:
        """Zero the start of a range in a raw data file; the entries stay as they are."""
        extent = (await self._reader.lookup(guest_offset, n_bytes))[0]
        if extent.kind == ClusterKind.DATA:
            await self._data.write_zeroes(guest_offset, extent.n_bytes, unmap=unmap)
        elif unmap:
            await self._punch(guest_offset, extent.n_bytes)
        return extent.n_bytes

    async def _punch(self, guest_offset: int, n_bytes: int) -> None:
        """Give back space in the data file, before entries let go of it: the place is in use until that is durable,
        in a raw data file for ever."""
        with suppress(OSError):  # space that is not given back is no loss
            await self._data.punch_hole(guest_offset, n_bytes, in_use=True)

    async def _zeroes_at(self, guest_offset: int, n_bytes: int) -> int:
        """How many bytes from there on read as zeroes; a whole cluster of them is enough to know."""
        n_zeroes = 0
        while n_zeroes < min(n_bytes, self._cluster_size):
            is_data, n_found = await self._holes.find(guest_offset + n_zeroes, n_bytes - n_zeroes, keep=True)
            if is_data:
                break
            n_zeroes += n_found
        return n_zeroes

    async def _zeroes_without_tables(self, guest_offset: int, n_bytes: int) -> int:
        """How many bytes from there on read as zeroes because no layer has anything there, where that is more than a
        slice: a disk may have thousands of tables less than it could."""
        empty_until = self._mapping.empty_until(guest_offset, guest_offset + n_bytes)
        if empty_until <= self._mapping.slice_end(guest_offset):
            return 0
        n_zeroes = await self._zeroes_at(guest_offset, empty_until - guest_offset)
        return n_zeroes if n_zeroes == n_bytes else n_zeroes & ~self._cluster_mask

    async def _without_space(self, guest_offset: int, n_clusters: int) -> int:
        """How many of the clusters, all in one slice, have nothing to give back, up to the first one that has."""
        mapping = self._mapping
        slice_ = self._cache.slices.get(mapping.key(guest_offset))
        if slice_ is None:
            if not mapping.slice_host_offset(guest_offset >> mapping.slice_shift):
                return n_clusters
            slice_ = await mapping.load(guest_offset)
            self._cache.unpin(slice_)
        return self.n_without_space(slice_, guest_offset, n_clusters)

    def n_without_space(self, slice_: L2Slice, guest_offset: int, n_clusters: int) -> int:
        """How many of the clusters, all in one slice, have nothing to give back, up to the first one that has."""
        entry_format = self._mapping.entry_format
        owns = entry_format.cluster_mask | entry_format.compressed
        return n_without(slice_.entries, entry_format, owns, self._mapping.index(guest_offset), n_clusters)

    async def _write_zeroes(self, guest_offset: int, n_bytes: int) -> int:
        """Zeroes as data, but for what reads as zeroes already."""
        extent = (await self._reader.lookup(guest_offset, n_bytes))[0]
        if extent.kind == ClusterKind.ZERO:
            return extent.n_bytes
        return await self._writer.write_some(guest_offset, ZEROES[:n_bytes])
