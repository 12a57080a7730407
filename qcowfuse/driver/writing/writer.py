"""Writing to a QCOW image: one guest range at a time, by its plan.

The way of a write that is not in place:

    load the L2 slice, pin it -> plan (pure) -> claim -> allocate (the count is raised, in memory)
    -> read head and tail -> ONE vectored write of head + data + tail -> link (no await) -> give up the claim

1. Between the plan and the claim, and inside the link, there is no await: nothing can run in between.
2. Zeroes around the data are not written where the host clusters were never written: they read as zeroes.
3. An error or a cancellation at any await leaves "not linked" (the clusters are given back) or "linked and
   complete".
4. What needs no waiting at all is done in one step by :mod:`.writer_at_once`.
5. With an external data file, data goes to its own place there (:mod:`~qcowfuse.driver.layers.data_file`). What a
   failed write has left in a raw one is linked, on either way.
6. Guest data of an encrypted layer goes through its cipher, zeroes too: a hole would not decrypt to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import trio

from ...buffer import Buffer
from ...errors import QcowFuseError
from ...format.cow_plan import Action, CowPlan, plan_write, shortened
from ...format.entries import ClusterKind
from ...format.extents import Extent, clipped
from ...format.subclusters import link_extended, plan_write_extended
from ..layers.data_file import DataClusters
from ..layers.host_run import HostRun
from ..layers.mapping import Mapping
from ..layers.range_claims import Claims
from ..layers.table_cache import LAYER_BITS, L2Slice, TableCache
from ..layers.usage import Usage
from ..reading.reader import ChainReader
from .allocation import Allocator
from .guarded_clusters import MetadataClusters
from .new_tables import ZEROES, NewTables
from .write_back import WriteBack


class Writer:
    """Executes plans on the top layer of a chain."""

    def __init__(
        self,
        *,
        mapping: Mapping,
        reader: ChainReader,
        cache: TableCache,
        allocator: Allocator,
        metadata: MetadataClusters,
        write_back: WriteBack,
        usage: Usage,
        data_clusters: DataClusters | None = None,
    ) -> None:
        self.cluster_size = mapping.geometry.cluster_size
        self._mapping = mapping
        self._reader = reader
        self._cache = cache
        self._allocator = allocator
        self._space = allocator.space
        self._metadata = metadata
        self._write_back = write_back
        self._usage = usage
        self._storage = mapping.storage
        self._data = mapping.data
        self._data_clusters = data_clusters
        self.has_raw_data_file = data_clusters is not None and data_clusters.is_raw
        self._encrypted = mapping.encrypted
        self._holes_are_zeroes = mapping.encrypted is None
        self._write_data = self._write_plain if mapping.encrypted is None else mapping.encrypted.write
        self.claims = Claims()
        self.tables = NewTables(
            mapping=mapping,
            cache=cache,
            allocator=allocator,
            metadata=metadata,
            write_back=write_back,
            give_back=self.give_back,
        )
        self._owns_table = self.tables.owns
        self.plan_write = plan_write_extended if mapping.entry_format.is_extended else plan_write
        self._cluster_bits = mapping.geometry.cluster_bits
        self._slice_shift = mapping.slice_shift
        self._l1_shift = mapping.geometry.l1_shift
        self._words = mapping.entry_format.words
        self._cluster_mask = self.cluster_size - 1
        self._try_pwritev = mapping.data.try_pwritev

    async def writable_slice(self, guest_offset: int) -> L2Slice:
        """The slice that maps ``guest_offset``, pinned, in a table that this image owns alone."""
        if self._space.has_reserve:
            await self._space.relieve()
        mapping = self._mapping
        l1_index = mapping.l1_index(guest_offset)
        if not self._owns_table(l1_index):
            await self.tables.make(l1_index)
        if self._metadata.shared:
            table = mapping.entry_format.l1_host_offset(mapping.l1_table[l1_index])
            self._metadata.check_own(table, mapping.geometry.l2_table_size, "L2 table")
        slice_ = mapping.cached_slice(guest_offset)
        if slice_ is None:
            return await mapping.load(guest_offset)
        slice_.n_pins += 1
        return slice_

    def slice_at_hand(self, guest_offset: int) -> L2Slice | None:
        """:meth:`writable_slice`, not pinned, where it is in memory and has its space in the file; else None."""
        if self._metadata.shared or not self._owns_table(guest_offset >> self._l1_shift):
            return None
        slice_ = self._cache.slices.get(guest_offset >> self._slice_shift << LAYER_BITS)
        return slice_ if slice_ is not None and slice_.has_space else None

    async def secure(self, slice_: L2Slice, guest_offset: int, n_clusters: int) -> None:
        """Give a slice its space in the file, before entries of it change. Raises OSError (ENOSPC), unless these
        entries lie where no hole can be: discarding helps where the disk is full."""
        mapping = self._mapping
        table = mapping.entry_format.l1_host_offset(mapping.l1_table[slice_.l1_index])
        start = mapping.slice_host_offset(slice_.slice_number)
        geometry = mapping.geometry
        try:
            await self._space.secure_part(start, geometry.slice_size, of=table, of_bytes=geometry.l2_table_size)
        except OSError:
            index, words = mapping.index(guest_offset), mapping.entry_format.words
            if not slice_.trust(index * words, (index + n_clusters) * words):
                raise
        else:
            slice_.has_space = True

    def check_place(self, plan: CowPlan, guest_offset: int) -> None:
        """Raises CorruptImageError where the clusters of a plan that allocates none are not for guest data."""
        if self._data_clusters is None:
            self._metadata.check(plan.host_offset, plan.n_clusters << self._cluster_bits, "a guest write")
        else:
            self._data_clusters.check(guest_offset=guest_offset & ~self._cluster_mask, host_offset=plan.host_offset)

    async def write_some(self, guest_offset: int, view: memoryview) -> int:
        """Write what one plan covers; returns how many bytes that was, 0 after having waited for a claim."""
        slice_ = await self.writable_slice(guest_offset)
        try:
            plan = self._plan(slice_, guest_offset, len(view))
            if not slice_.has_space and plan.action is not Action.IN_PLACE:
                end = min(guest_offset + len(view), self._mapping.slice_end(guest_offset)) + self._cluster_mask
                n_clusters = (end >> self._cluster_bits) - (guest_offset >> self._cluster_bits)
                await self.secure(slice_, guest_offset, n_clusters)
                plan = self._plan(slice_, guest_offset, len(view))
            if plan.action is not Action.ALLOCATE:
                self.check_place(plan, guest_offset)
            if plan.action is Action.IN_PLACE:
                host_offset = plan.host_offset + (guest_offset & self._cluster_mask)
                await self._write_data([view[: plan.n_bytes]], host_offset=host_offset, guest_offset=guest_offset)
                return plan.n_bytes
            first = guest_offset >> self._cluster_bits
            conflict = self.claims.first_conflict(first, first + plan.n_clusters)
            if conflict is not None:
                if conflict.start <= first:
                    await conflict.released.wait()
                    return 0
                plan = shortened(plan, conflict.start - first, guest_offset & self._cluster_mask, self._cluster_bits)
            claim = self.claims.take(first, first + plan.n_clusters)
            try:
                return await self._allocate_and_link(plan, slice_, guest_offset, view)
            finally:
                self.claims.release(claim)
        finally:
            self._cache.unpin(slice_)

    def _plan(self, slice_: L2Slice, guest_offset: int, n_bytes: int) -> CowPlan:
        index, in_cluster = self._mapping.index(guest_offset), guest_offset & self._cluster_mask
        return self.plan_write(slice_.entries, self._mapping.entry_format, index, in_cluster, n_bytes)

    async def link_some(self, guest_offset: int, n_bytes: int) -> int:
        """Link the start of a range of a raw data file as it stands; returns how many bytes that was. Needs no claim:
        a write that is on its way goes to the same place and makes the same link."""
        slice_ = await self.writable_slice(guest_offset)
        try:
            end = min(guest_offset + n_bytes, self._mapping.slice_end(guest_offset))
            start = guest_offset & ~self._cluster_mask
            n_clusters = end - start + self._cluster_mask >> self._cluster_bits
            if not slice_.has_space:
                await self.secure(slice_, start, n_clusters)
            extents = await self._reader.lookup(
                start, min(n_clusters << self._cluster_bits, self._mapping.size - start)
            )
            plan = CowPlan(Action.ALLOCATE, n_clusters, start, 0, n_clusters << self._cluster_bits, 0)
            self.link(slice_, plan, guest_offset=start, host_offset=start)
        finally:
            self._cache.unpin(slice_)
        self._usage.add(start, sum(extent.n_bytes for extent in extents if extent.kind == ClusterKind.ZERO))
        return end - guest_offset

    async def copy_cluster(self, slice_: L2Slice, start: int) -> None:
        """Put what the guest sees in a cluster, which the caller has claimed, into a new one of its own."""
        plan = CowPlan(Action.ALLOCATE, 1, 0, 0, 0, self.cluster_size)
        await self._allocate_and_link(plan, slice_, start, memoryview(b""))

    async def _allocate_and_link(self, plan: CowPlan, slice_: L2Slice, guest_offset: int, view: memoryview) -> int:
        start = guest_offset - plan.head
        run: HostRun | None = None
        host_offset = plan.host_offset
        if plan.action is Action.ALLOCATE:
            if self._data_clusters is None:
                run = await self._allocator.allocate(plan.n_clusters)
            else:
                if not self._space.is_ready:
                    await self._space.prepare()
                run = self._data_clusters.take(guest_offset & ~self._cluster_mask, plan.n_clusters)
            host_offset = run.host_offset
            if run.n_clusters < plan.n_clusters:
                plan = shortened(plan, run.n_clusters, guest_offset & self._cluster_mask, self._cluster_bits)
        try:
            n_covered = min(plan.head + plan.n_bytes + plan.tail, self._mapping.size - start)
            extents = await self._reader.lookup(start, n_covered)
            # Nobody changes them meanwhile: the clusters are claimed, and what lies below is never written.
            head = await self._old_bytes(extents, start, plan.head)
            tail = await self._old_bytes(extents, guest_offset + plan.n_bytes, plan.tail)
            buffers: list[Buffer] = [view[: plan.n_bytes]]
            skipped = 0
            if head is not None:
                buffers.insert(0, head)
            elif run is not None and run.is_fresh and self._holes_are_zeroes:
                skipped = plan.head
            else:
                buffers.insert(0, ZEROES[: plan.head])
            if tail is not None:
                buffers.append(tail)
            elif run is None or not run.is_fresh or not self._holes_are_zeroes:
                buffers.append(ZEROES[: plan.tail])
            write_offset = host_offset + (start & self._cluster_mask) + skipped
            parts = [part for part in buffers if len(part)]
            await self._write_data(parts, host_offset=write_offset, guest_offset=start + skipped)
        except BaseException as error:
            if self._data_clusters is not None:
                if self._data_clusters.is_raw and not isinstance(error, QcowFuseError):
                    self.link(slice_, plan, guest_offset=start, host_offset=host_offset)
            elif run is not None:
                await self.give_back(run)
            raise
        self.link(slice_, plan, guest_offset=start, host_offset=host_offset)
        n_holes = sum(extent.n_bytes for extent in extents if extent.kind == ClusterKind.ZERO)
        self._usage.add(start, n_holes)
        return plan.n_bytes

    def link(self, slice_: L2Slice, plan: CowPlan, *, guest_offset: int, host_offset: int) -> None:
        """Point the entries of a plan whose bytes begin at ``guest_offset`` at the clusters written."""
        entries = slice_.entries
        entry_format = self._mapping.entry_format
        words = self._words
        first = (guest_offset >> self._cluster_bits & self._mapping.slice_mask) * words
        end = first + plan.n_clusters * words
        replaced = entries[first:end:words]
        if entry_format.is_extended:
            link_extended(
                entries,
                entry_format,
                self._mapping.index(guest_offset),
                host_offset=host_offset,
                in_cluster=guest_offset & self._cluster_mask,
                n_bytes=plan.head + plan.n_bytes + plan.tail,
            )
        else:
            for number in range(plan.n_clusters):
                entries[first + number] = entry_format.data_entry(host_offset + (number << self._cluster_bits))
        self._cache.mark_dirty(slice_, first, end)
        for number, old in enumerate(replaced):
            if old:
                self.unlink(old, host_offset + (number << self._cluster_bits))

    def unlink(self, old: int, new_offset: int) -> None:
        """Note the host clusters that an overwritten entry referred to. Version 1 counts nothing: they are lost."""
        entry_format = self._mapping.entry_format
        if entry_format.version == 1 or entry_format.has_data_file:
            return
        if old & entry_format.compressed:
            where = entry_format.compressed_cluster(old)
            first = where.host_offset >> self._cluster_bits
            last = (where.host_offset + where.n_bytes - 1) >> self._cluster_bits
            self._write_back.unlink_cluster(HostRun(first << self._cluster_bits, last - first + 1))
        elif entry_format.host_offset(old) not in (0, new_offset):
            self._write_back.unlink_cluster(HostRun(entry_format.host_offset(old), 1))

    async def _old_bytes(self, extents: list[Extent], guest_offset: int, n_bytes: int) -> Buffer | None:
        """What the guest sees now of a range that ``extents`` cover up to the end of the disk, zeroes behind that;
        None where all of it is zeroes."""
        if self.is_zero(extents, guest_offset, n_bytes):
            return None
        inside = min(n_bytes, self._mapping.size - guest_offset)
        old = await self._reader.read_extents(clipped(extents, guest_offset, inside), guest_offset, inside)
        return old if inside == n_bytes else bytes(old) + bytes(n_bytes - inside)

    def is_zero(self, extents: list[Extent], guest_offset: int, n_bytes: int) -> bool:
        """Whether all of a range, as far as it lies in the disk, reads as zeroes; ``extents`` cover it."""
        inside = min(n_bytes, self._mapping.size - guest_offset)
        return inside <= 0 or all(
            extent.kind == ClusterKind.ZERO for extent in clipped(extents, guest_offset, inside)
        )

    async def _write_plain(self, buffers: Sequence[Buffer], *, host_offset: int, guest_offset: int) -> None:
        """Write guest data as it is."""
        if not self._try_pwritev(host_offset, buffers):
            await self._data.pwritev(host_offset, buffers)

    async def give_back(self, run: HostRun) -> None:
        """Clusters that were taken and never linked, with the space that a write which found the disk full has used:
        metadata may need it. Should even this fail they are leaked, and no more."""
        with trio.CancelScope(shield=True), suppress(OSError, QcowFuseError):
            await self._allocator.release([run], punch=True)
