"""Writes that are done in one step, without an await: where all that they need is in memory and the storage writes at
once.

1. Nobody can be in between. So such a write needs neither pin nor claim; it waits for nobody's claim either, but is
   left to :mod:`.writer`.
2. A write to clusters that read as zeroes is one: nothing of the old bytes is needed, head and tail are zeroes. So is
   a write in place, as far as :mod:`.requests` has no quicker way for it, and one to subclusters around which all is
   zeroes.
3. Where a large write lies in one place and is written as it is, another thread may make it: :meth:`place_of` says
   where. That changes no entry and no count.
4. Rules 2, 5 and 6 of :mod:`.writer` hold here, too.
"""

from __future__ import annotations

import sys

from ...buffer import Buffer
from ...errors import CorruptImageError
from ...format.cow_plan import MAX_CLUSTERS_PER_ALLOCATION, Action, CowPlan, shortened
from ...format.entries import ClusterKind
from ...storage.base import of_whole_pages
from ..layers.data_file import DataClusters
from ..layers.host_run import HostRun
from ..layers.mapping import Mapping, Missing, lookup_chain
from ..layers.table_cache import LAYER_BITS, L2Slice, TableCache
from ..layers.usage import Usage
from ..reading.reader import ChainReader
from .allocation import Allocator
from .guarded_clusters import MetadataClusters
from .new_tables import ZEROES
from .writer import Writer


class WriterAtOnce:
    """Writes to the top layer of a chain, as ``writer`` would."""

    def __init__(
        self,
        writer: Writer,
        *,
        mapping: Mapping,
        reader: ChainReader,
        cache: TableCache,
        allocator: Allocator,
        metadata: MetadataClusters,
        usage: Usage,
        data_clusters: DataClusters | None,
    ) -> None:
        self._mapping = mapping
        self._reader = reader
        self._cache = cache
        self._allocator = allocator
        self._space = allocator.space
        self._metadata = metadata
        self._usage = usage
        self._data_clusters = data_clusters
        self._has_raw_data_file = writer.has_raw_data_file
        self._encrypted = mapping.encrypted
        self._holes_are_zeroes = mapping.encrypted is None
        self._claims = writer.claims
        self._link = writer.link
        self._check_place = writer.check_place
        self._is_zero = writer.is_zero
        self._owns_table = writer.tables.owns
        self._try_make = writer.tables.try_make
        self._plan_write = writer.plan_write
        self._has_plain_entries = len(reader.layers) == 1 and not mapping.entry_format.is_extended
        self._cluster_bits = mapping.geometry.cluster_bits
        self._cluster_mask = mapping.geometry.cluster_size - 1
        self._slice_shift = mapping.slice_shift
        self._l1_shift = mapping.geometry.l1_shift
        self._try_pwritev = mapping.data.try_pwritev
        self.too_long = sys.maxsize
        """Bytes that the storage of plain data did not write at once: it is not asked for so many again."""

    def write_some(self, guest_offset: int, view: memoryview) -> int:
        """:meth:`.writer.Writer.write_some` in one step; 0 where it has to be awaited.

        Raises OSError, CorruptImageError.
        """
        mapping = self._mapping
        if len(view) >= self.too_long or self._metadata.shared:
            return 0
        slice_ = self._cache.slices.get(guest_offset >> self._slice_shift << LAYER_BITS)
        if slice_ is None or not self._owns_table(guest_offset >> self._l1_shift):
            made = self._try_make(guest_offset) if slice_ is None else None
            if made is None:
                return 0
            try:
                return self.write_some(guest_offset, view)
            finally:
                self._cache.unpin(made)
        in_cluster = guest_offset & self._cluster_mask
        index = guest_offset >> self._cluster_bits & mapping.slice_mask
        start = guest_offset - in_cluster
        n_bytes = len(view)
        n_clusters = in_cluster + n_bytes + self._cluster_mask >> self._cluster_bits
        entries = slice_.entries
        is_new = self._has_plain_entries and n_clusters <= min(len(entries) - index, MAX_CLUSTERS_PER_ALLOCATION)
        if is_new and not any(entries[index : index + n_clusters]):
            # The usual case, where nothing lies below: what the general way finds out, for a tenth of its time.
            if not slice_.has_space:
                return 0
            tail = (n_clusters << self._cluster_bits) - in_cluster - n_bytes
            plan = CowPlan(Action.ALLOCATE, n_clusters, 0, in_cluster, n_bytes, tail)
            n_holes = min(n_clusters << self._cluster_bits, mapping.size - start)
        else:
            plan = self._plan_write(entries, mapping.entry_format, index, in_cluster, n_bytes)
            if plan.action is Action.IN_PLACE:
                return self._try_in_place(plan, slice_, guest_offset, view)
            if not slice_.has_space:
                return 0
            start = guest_offset - plan.head
            n_covered = min(plan.head + plan.n_bytes + plan.tail, mapping.size - start)
            try:
                extents = lookup_chain(self._reader.layers, start, n_covered)
            except Missing:
                return 0
            n_holes = sum(extent.n_bytes for extent in extents if extent.kind == ClusterKind.ZERO)
            if plan.action is Action.REUSE:
                self._check_place(plan, guest_offset)
                tail_start = guest_offset + plan.n_bytes
                if not self._is_zero(extents, start, plan.head) or not self._is_zero(extents, tail_start, plan.tail):
                    return 0
            elif n_holes < n_covered:
                return 0
        first = guest_offset >> self._cluster_bits
        if self._claims.first_conflict(first, first + plan.n_clusters):
            return 0
        n_written = plan.head + plan.n_bytes + plan.tail
        if self._encrypted is not None and not self._encrypted.may_write_at_once(n_written):
            return 0
        run = self._take_at_once(plan, guest_offset)
        if run is None:
            return 0
        is_written = False
        try:
            plan = shortened(plan, run.n_clusters, in_cluster, self._cluster_bits)
            parts: list[Buffer] = [view[: plan.n_bytes]]
            host_offset = run.host_offset + (start & self._cluster_mask)
            if run.is_fresh and self._holes_are_zeroes:
                host_offset += plan.head
            else:
                parts = [part for part in (ZEROES[: plan.head], *parts, ZEROES[: plan.tail]) if len(part)]
            if self._encrypted is not None:
                is_written = self._encrypted.try_write(parts, host_offset=host_offset, guest_offset=start)
            elif (n_parts := sum(map(len, parts))) < self.too_long:
                is_written = self._try_pwritev(host_offset, parts)
                if not is_written and of_whole_pages(host_offset, n_parts):
                    self.too_long = n_parts
        except OSError:
            if self._has_raw_data_file:
                self._link(slice_, plan, guest_offset=start, host_offset=run.host_offset)
            raise
        finally:
            if not is_written and self._data_clusters is None and plan.action is Action.ALLOCATE:
                self._allocator.give_back(run)
        if not is_written:
            return 0
        self._cache.use(slice_)
        self._link(slice_, plan, guest_offset=start, host_offset=run.host_offset)
        self._usage.add(start, min(n_holes, plan.head + plan.n_bytes + plan.tail))
        return plan.n_bytes

    def _take_at_once(self, plan: CowPlan, guest_offset: int) -> HostRun | None:
        """Clusters for the data at ``guest_offset``, if that takes no waiting."""
        if plan.action is Action.REUSE:
            return None if self._space.has_reserve else HostRun(plan.host_offset, plan.n_clusters)
        if self._data_clusters is None:
            return self._allocator.try_allocate(plan.n_clusters)
        if not self._space.is_ready or self._space.has_reserve:
            return None
        return self._data_clusters.take(guest_offset & ~self._cluster_mask, plan.n_clusters)

    def _try_in_place(self, plan: CowPlan, slice_: L2Slice, guest_offset: int, view: memoryview) -> int:
        """What a write does with clusters that are written in place; 0 where that has to wait."""
        n_bytes, encrypted = plan.n_bytes, self._encrypted
        if n_bytes >= self.too_long or (encrypted is not None and not encrypted.may_write_at_once(n_bytes)):
            return 0
        self._check_place(plan, guest_offset)
        host_offset = plan.host_offset + (guest_offset & self._cluster_mask)
        if encrypted is not None:
            if not encrypted.try_write([view[:n_bytes]], host_offset=host_offset, guest_offset=guest_offset):
                return 0
        elif not self._try_pwritev(host_offset, [view[:n_bytes]]):
            if of_whole_pages(host_offset, n_bytes):
                self.too_long = n_bytes
            return 0
        self._cache.use(slice_)
        return n_bytes

    def place_of(self, guest_offset: int, n_bytes: int) -> int | None:
        """The host offset of ``n_bytes`` that lie in one place, may be written there, and are written as they are
        (rule 3); None for all others, where something has to be loaded first, and where an entry is impossible."""
        mapping = self._mapping
        slice_ = self._cache.slices.get(guest_offset >> self._slice_shift << LAYER_BITS)
        if (
            slice_ is None
            or self._encrypted is not None
            or self._metadata.shared
            or not self._owns_table(guest_offset >> self._l1_shift)
        ):
            return None
        in_cluster = guest_offset & self._cluster_mask
        index = guest_offset >> self._cluster_bits & mapping.slice_mask
        try:
            plan = self._plan_write(slice_.entries, mapping.entry_format, index, in_cluster, n_bytes)
            if plan.action is not Action.IN_PLACE or plan.n_bytes < n_bytes:
                return None
            self._check_place(plan, guest_offset)
        except CorruptImageError:  # whoever writes there marks the image
            return None
        self._cache.use(slice_)
        return plan.host_offset + in_cluster
