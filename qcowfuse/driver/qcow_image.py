"""A QCOW image, version 1, 2 or 3, as a virtual disk that is read and written.

One class serves all versions: they differ in values (:class:`~qcowfuse.format.entries.EntryFormat`), in how
host clusters are found (:class:`~qcowfuse.driver.allocation.Allocator`) and in the header bits; the way of a
request is the same.

The way of a write that is not in place:

    load the L2 slice, pin it -> plan (pure) -> claim -> allocate (the count is raised, in memory)
    -> read head and tail -> ONE vectored write of head + data + tail -> link (no await) -> give up the claim

1. Between the plan and the claim, and inside the link, there is no await: nothing can run in between.
2. Zeroes around the data are not written where the host clusters were never written: they read as zeroes.
3. An error or a cancellation at any await leaves "not linked" (the clusters are given back) or "linked and
   complete".
4. ``try_read`` and ``try_write`` answer only what needs no waiting and changes no metadata.
5. Metadata that is found impossible freezes the image: no write after that, the corrupt bit set on disk where
   the version has one; what was written before is still flushed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

import trio

from ..errors import CorruptImageError, OutOfRangeError, QcowFuseError, ReadOnlyImageError
from ..format.cow_plan import Action, CowPlan, plan_write, shortened
from ..format.entries import ClusterKind
from ..format.geometry import MAX_CLUSTER_BITS
from ..format.subclusters import link_extended, plan_write_extended
from ..storage.base import Buffer, Storage
from .allocation import Allocator, HostRun
from .claims import Claims
from .header_bits import HeaderBits
from .mapping import Mapping
from .metadata import MetadataClusters
from .ordering import Ordering
from .reading import ChainReader
from .table_cache import LAYER_BITS, L2Slice, TableCache
from .usage import Usage

log = logging.getLogger(__name__)
_ZEROES = memoryview(bytes(1 << MAX_CLUSTER_BITS))
_SHORT_READ = "request for {n_bytes} bytes at {guest_offset:#x} of a disk of {size} bytes"


class QcowImage:
    """See the module docstring; implements the Image protocol. Made by :func:`~qcowfuse.driver.chain.open_image`."""

    def __init__(
        self,
        *,
        path: str,
        format_name: str,
        mapping: Mapping,
        reader: ChainReader,
        cache: TableCache,
        storages: Sequence[Storage],
        allocator: Allocator | None,
        metadata: MetadataClusters,
        l1_table_offset: int,
        header_bits: HeaderBits | None,
    ) -> None:
        self.path = path
        self.format_name = format_name
        self.size = mapping.size
        self.cluster_size = mapping.geometry.cluster_size
        self._mapping = mapping
        self._reader = reader
        self._cache = cache
        self._storages = tuple(storages)
        self._storage = mapping.storage
        self._plan_write = plan_write_extended if mapping.entry_format.is_extended else plan_write
        self._usage = Usage(reader.layers, self._storage)
        self._frozen: Exception | None = None
        self._closed = False
        self._allocator = allocator
        self._metadata = metadata
        self._claims = Claims()
        self._table_lock = trio.Lock()
        self._begin_lock = trio.Lock()
        self._header_bits = header_bits
        self._writable = allocator is not None
        self._begun = False
        self._ordering: Ordering | None = None
        if allocator is not None:
            self._ordering = Ordering(
                storage=self._storage,
                mapping=mapping,
                l1_table_offset=l1_table_offset,
                allocator=allocator,
                cache=cache,
            )
            cache.write_back = self._ordering.write_back
        # What the hot path asks of the objects above, looked up once.
        self._slices = cache.slices
        self._slice_shift = mapping.slice_shift
        self._slice_mask = mapping.slice_mask
        self._cluster_bits = mapping.geometry.cluster_bits
        self._cluster_mask = self.cluster_size - 1
        self._not_plain = mapping.entry_format.not_plain
        self._offset_mask = mapping.entry_format.offset_mask
        self._in_place_mask = mapping.entry_format.in_place_mask
        self._in_place_value = mapping.entry_format.in_place_value
        self._metadata_clusters = metadata.clusters
        self._try_pread = self._storage.try_pread
        self._try_pwritev = self._storage.try_pwritev

    @property
    def read_only(self) -> bool:
        """See Image."""
        return (
            not self._writable
            or self._frozen is not None
            or (self._ordering is not None and self._ordering.failure is not None)
        )

    def try_read(self, guest_offset: int, n_bytes: int) -> Buffer | None:
        """See Image."""
        slice_ = self._slices.get(guest_offset >> self._slice_shift << LAYER_BITS)
        if slice_ is not None:
            entry = slice_.entries[guest_offset >> self._cluster_bits & self._slice_mask]
            host_offset = entry & self._offset_mask
            in_cluster = guest_offset & self._cluster_mask
            if (
                not entry & self._not_plain
                and host_offset
                and in_cluster + n_bytes <= self.cluster_size
                and 0 <= guest_offset <= self.size - n_bytes
            ):
                cache = self._cache
                cache.hits += 1
                if slice_ is not cache.newest:
                    cache.touch(slice_)
                return self._try_pread(host_offset + in_cluster, n_bytes)
        if not 0 <= guest_offset <= self.size - n_bytes:
            return None
        try:
            return self._reader.try_read(guest_offset, n_bytes)
        except CorruptImageError:
            return None  # read() meets it again and can mark the image

    async def read(self, guest_offset: int, n_bytes: int) -> Buffer:
        """See Image."""
        self._check_range(guest_offset, n_bytes)
        if not n_bytes:
            return b""
        generations = None if self._ordering is None else self._ordering.generations
        generation = 0 if generations is None else generations.enter()
        try:
            return await self._reader.read(guest_offset, n_bytes)
        except CorruptImageError as error:
            await self._freeze(error)
            raise
        finally:
            if generations is not None:
                generations.leave(generation)

    def try_write(self, guest_offset: int, data: Buffer) -> bool:
        """See Image."""
        if not self._begun:
            return False
        slice_ = self._slices.get(guest_offset >> self._slice_shift << LAYER_BITS)
        if slice_ is None:
            return False
        n_bytes = len(data)
        index = guest_offset >> self._cluster_bits & self._slice_mask
        entries = slice_.entries
        entry = entries[index]
        host_offset = entry & self._offset_mask
        if entry & self._in_place_mask != self._in_place_value or not host_offset:
            return False
        in_cluster = guest_offset & self._cluster_mask
        if not 0 <= guest_offset <= self.size - n_bytes:
            return False
        end = in_cluster + n_bytes
        host_cluster = host_offset >> self._cluster_bits
        if not self._metadata_clusters.isdisjoint(
            range(host_cluster, host_cluster + (end + self._cluster_mask >> self._cluster_bits))
        ):
            return False
        covered = cluster_size = self.cluster_size
        while covered < end:
            index += 1
            if (
                index > self._slice_mask
                or entries[index] & self._in_place_mask != self._in_place_value
                or entries[index] & self._offset_mask != host_offset + covered
            ):
                return False
            covered += cluster_size
        ordering = self._ordering
        if self._frozen is not None or ordering is None or ordering.failure is not None:
            return False
        cache = self._cache
        cache.hits += 1
        if slice_ is not cache.newest:
            cache.touch(slice_)
        return self._try_pwritev(host_offset + in_cluster, (data,))

    async def write(self, guest_offset: int, data: Buffer) -> None:
        """See Image."""
        self._check_range(guest_offset, len(data))
        ordering = self._require_writable()
        generation = ordering.generations.enter()
        try:
            if not self._begun:
                await self._begin_writing()
            view = memoryview(data)
            position = 0
            while position < len(view):
                position += await self._write_some(ordering, guest_offset + position, view[position:])
                if position < len(view):
                    self._require_writable()
        except CorruptImageError as error:
            await self._freeze(error)
            raise
        finally:
            ordering.generations.leave(generation)

    async def flush(self) -> None:
        """See Image."""
        if self._ordering is not None:
            await self._ordering.flush()

    def allocated_bytes(self) -> int:
        """See Image."""
        return self._usage.allocated_bytes

    async def count_allocated(self) -> None:
        """Find out what :meth:`allocated_bytes` is; until this has ended it is an estimate. Reads every L2 table
        once, past the cache. Raises OSError, FormatError."""
        await self._usage.count()

    def free_host_bytes(self) -> int:
        """See Image."""
        return self._storage.free_bytes()

    def statistics(self) -> dict[str, int]:
        """See Image."""
        cache, decoded = self._cache, self._reader.decoded
        counters = {
            "l2_cache.budget_bytes": cache.budget,
            "l2_cache.used_bytes": cache.used,
            "l2_cache.slices": len(cache.slices),
            "l2_cache.hits": cache.hits,
            "l2_cache.misses": cache.misses,
            "l2_cache.evictions": cache.evictions,
            "l2_cache.write_backs": cache.write_backs,
            "decoded_clusters.hits": decoded.hits,
            "decoded_clusters.misses": decoded.misses,
            "image.read_only": int(self.read_only),
        }
        for storage in self._storages:
            for name, value in storage.counters.as_dict().items():
                counters[f"backend.{name}"] = counters.get(f"backend.{name}", 0) + value
        return counters

    async def aclose(self) -> None:
        """See Image."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._ordering is not None and self._begun:
                await self._ordering.flush()
                if self._ordering.is_dirty:  # the counts of what the first one has unlinked
                    await self._ordering.flush()
        finally:
            with trio.CancelScope(shield=True):
                for storage in self._storages:
                    await storage.aclose()

    def _check_range(self, guest_offset: int, n_bytes: int) -> None:
        if guest_offset < 0 or n_bytes < 0 or guest_offset + n_bytes > self.size:
            detail = _SHORT_READ.format(n_bytes=n_bytes, guest_offset=guest_offset, size=self.size)
            raise OutOfRangeError(detail)

    def _require_writable(self) -> Ordering:
        if self._ordering is None:
            raise ReadOnlyImageError(f"{self.path}: opened read-only")
        if self._frozen is not None:
            raise ReadOnlyImageError(f"{self.path}: read-only since: {self._frozen}")
        if self._ordering.failure is not None:
            raise ReadOnlyImageError(f"{self.path}: read-only since a flush failed: {self._ordering.failure}")
        return self._ordering

    async def _begin_writing(self) -> None:
        """R5: header bits that the first write makes untrue are cleared before it, durably."""
        async with self._begin_lock:
            if self._begun:
                return
            if self._header_bits is not None:
                await self._header_bits.before_first_write()
            self._begun = True

    async def _freeze(self, error: CorruptImageError) -> None:
        if self._frozen is not None or not self._writable:
            return
        self._frozen = error
        log.error("%s: %s; the image is read-only from now on", self.path, error)
        if self._header_bits is not None:
            with suppress(OSError):
                await self._header_bits.mark_corrupt()

    async def _writable_slice(self, ordering: Ordering, guest_offset: int) -> L2Slice:
        """The slice that maps ``guest_offset``, pinned, in a table that this image owns alone."""
        mapping = self._mapping
        l1_index = mapping.l1_index(guest_offset)
        if not self._owns_table(l1_index):
            async with self._table_lock:
                if not self._owns_table(l1_index):
                    await self._make_table(ordering, l1_index)
        slice_ = mapping.cached_slice(guest_offset)
        if slice_ is None:
            return await mapping.load(guest_offset)
        slice_.n_pins += 1
        return slice_

    def _owns_table(self, l1_index: int) -> bool:
        entry_format = self._mapping.entry_format
        entry = self._mapping.l1_table[l1_index]
        return bool(entry & entry_format.l1_offset_mask) and entry & entry_format.copied == entry_format.copied

    async def _make_table(self, ordering: Ordering, l1_index: int) -> None:
        """A new L2 table, empty or a copy of one that is shared; linked in memory, on disk by the next flush."""
        mapping = self._mapping
        allocator = self._allocator
        assert allocator is not None
        table_size = mapping.geometry.l2_table_size
        old = mapping.entry_format.l1_host_offset(mapping.l1_table[l1_index])
        run = await self._allocate_table(allocator, -(-table_size // self.cluster_size))
        try:
            self._metadata.add(run.host_offset, table_size)
            contents: Buffer = _ZEROES[:table_size]
            if old:
                contents = await self._storage.pread(old, table_size)
            await self._pwritev(run.host_offset, [contents])
        except BaseException:
            self._metadata.discard(run.host_offset, table_size)
            await self._give_back(allocator, run)
            raise
        ordering.link_table(l1_index, run.host_offset)
        if old:
            ordering.unlink_cluster(HostRun(old, 1))
            self._metadata.discard(old, table_size)

    async def _allocate_table(self, allocator: Allocator, n_clusters: int) -> HostRun:
        """Contiguous clusters for one table: exactly one, but for version 1 with tables larger than clusters."""
        run = await allocator.allocate(n_clusters)
        assert run.n_clusters == n_clusters
        return run

    async def _write_some(self, ordering: Ordering, guest_offset: int, view: memoryview) -> int:
        """Write what one plan covers; returns how many bytes that was, 0 after having waited for a claim."""
        mapping = self._mapping
        slice_ = await self._writable_slice(ordering, guest_offset)
        try:
            plan = self._plan_write(
                slice_.entries,
                mapping.entry_format,
                mapping.index(guest_offset),
                guest_offset & self._cluster_mask,
                len(view),
            )
            if plan.action is not Action.ALLOCATE:
                self._metadata.check(plan.host_offset, plan.n_clusters << self._cluster_bits, "a guest write")
            if plan.action is Action.IN_PLACE:
                await self._pwritev(plan.host_offset + (guest_offset & self._cluster_mask), [view[: plan.n_bytes]])
                return plan.n_bytes
            first = guest_offset >> self._cluster_bits
            conflict = self._claims.first_conflict(first, first + plan.n_clusters)
            if conflict is not None:
                if conflict.start <= first:
                    await conflict.released.wait()
                    return 0
                plan = shortened(plan, conflict.start - first, guest_offset & self._cluster_mask, self._cluster_bits)
            claim = self._claims.take(first, first + plan.n_clusters)
            try:
                return await self._allocate_and_link(ordering, plan, slice_, guest_offset, view)
            finally:
                self._claims.release(claim)
        finally:
            self._cache.unpin(slice_)

    async def _allocate_and_link(
        self, ordering: Ordering, plan: CowPlan, slice_: L2Slice, guest_offset: int, view: memoryview
    ) -> int:
        allocator = self._allocator
        assert allocator is not None
        start = guest_offset - plan.head
        run: HostRun | None = None
        host_offset = plan.host_offset
        if plan.action is Action.ALLOCATE:
            run = await allocator.allocate(plan.n_clusters)
            host_offset = run.host_offset
            if run.n_clusters < plan.n_clusters:
                plan = shortened(plan, run.n_clusters, guest_offset & self._cluster_mask, self._cluster_bits)
        try:
            n_covered = min(plan.head + plan.n_bytes + plan.tail, self.size - start)
            extents = await self._reader.lookup(start, n_covered)
            head = await self._old_bytes(start, plan.head)
            tail = await self._old_bytes(guest_offset + plan.n_bytes, plan.tail)
            buffers: list[Buffer] = [view[: plan.n_bytes]]
            skipped = 0
            if head is not None:
                buffers.insert(0, head)
            elif run is not None and run.is_fresh:
                skipped = plan.head
            else:
                buffers.insert(0, _ZEROES[: plan.head])
            if tail is not None:
                buffers.append(tail)
            elif run is None or not run.is_fresh:
                buffers.append(_ZEROES[: plan.tail])
            write_offset = host_offset + (start & self._cluster_mask) + skipped
            await self._pwritev(write_offset, [part for part in buffers if len(part)])
        except BaseException:
            if run is not None:
                await self._give_back(allocator, run)
            raise
        self._link(ordering, slice_, start, host_offset, plan)
        n_holes = sum(extent.n_bytes for extent in extents if extent.kind == ClusterKind.ZERO)
        self._usage.add(start, n_holes)
        return plan.n_bytes

    def _link(self, ordering: Ordering, slice_: L2Slice, start: int, host_offset: int, plan: CowPlan) -> None:
        """Point the entries of a plan whose bytes begin at guest offset ``start`` at the clusters written."""
        entries = slice_.entries
        entry_format = self._mapping.entry_format
        words = entry_format.words
        first = self._mapping.index(start) * words
        end = first + plan.n_clusters * words
        replaced = entries[first:end:words]
        if entry_format.is_extended:
            link_extended(
                entries,
                entry_format,
                self._mapping.index(start),
                host_offset=host_offset,
                in_cluster=start & self._cluster_mask,
                n_bytes=plan.head + plan.n_bytes + plan.tail,
            )
        else:
            for number in range(plan.n_clusters):
                entries[first + number] = entry_format.data_entry(host_offset + (number << self._cluster_bits))
        self._cache.mark_dirty(slice_, first, end)
        for number, old in enumerate(replaced):
            if old:
                self._unlink(ordering, old, host_offset + (number << self._cluster_bits))

    def _unlink(self, ordering: Ordering, old: int, new_offset: int) -> None:
        """Note the host clusters that an overwritten entry referred to. Version 1 counts nothing: they are lost."""
        entry_format = self._mapping.entry_format
        if entry_format.version == 1:
            return
        if old & entry_format.compressed:
            where = entry_format.compressed_cluster(old)
            first = where.host_offset >> self._cluster_bits
            last = (where.host_offset + where.n_bytes - 1) >> self._cluster_bits
            ordering.unlink_cluster(HostRun(first << self._cluster_bits, last - first + 1))
        elif entry_format.host_offset(old) not in (0, new_offset):
            ordering.unlink_cluster(HostRun(entry_format.host_offset(old), 1))

    async def _old_bytes(self, guest_offset: int, n_bytes: int) -> Buffer | None:
        """What the guest sees now, zeroes past the end of the disk; None where all of it is zeroes."""
        inside = min(n_bytes, max(self.size - guest_offset, 0))
        if not inside:
            return None
        extents = await self._reader.lookup(guest_offset, inside)
        if len(extents) == 1 and extents[0].kind == ClusterKind.ZERO:
            return None
        old = await self._reader.read(guest_offset, inside)
        return old if inside == n_bytes else bytes(old) + bytes(n_bytes - inside)

    async def _pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        if not self._try_pwritev(host_offset, buffers):
            await self._storage.pwritev(host_offset, buffers)

    async def _give_back(self, allocator: Allocator, run: HostRun) -> None:
        """Clusters that were taken and never linked. Should even this fail they are leaked, and no more."""
        with trio.CancelScope(shield=True), suppress(OSError, QcowFuseError):
            await allocator.release([run])
