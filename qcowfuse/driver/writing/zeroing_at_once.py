"""Zeroing and discarding a range in one go, where all that it takes is in memory and is little work.

1. The whole of a range is looked through before any of it is changed, run by run. What reads as zeroes and has
   nothing to give back is passed over, a whole slice or more with one look; runs with data are let go of by their
   entries, those that are owned alone with one call.
2. Parts of clusters with data, at the ends of a range, are written as zeroes. That comes first, since it may fail:
   then nothing else was changed.
3. What would have to wait is left to :mod:`.zeroing`: a slice that is not in memory or has no space in the file yet,
   a cluster that a write is making, an external data file, clusters that can't be zeroed by their entries. So is what
   is much work.
"""

from __future__ import annotations

from typing import NamedTuple

from ...format.zero_plan import can_zero_by_entry
from ..image import StartWrite
from ..layers.holes import HoleFinder
from ..layers.mapping import Mapping
from ..layers.table_cache import L2Slice, TableCache
from ..layers.usage import Usage
from ..reading.reader import ChainReader
from .new_tables import ZEROES
from .writer import Writer
from .zeroing import Zeroer

MAX_CLUSTERS = 1024
"""Clusters that are let go of: 0.3 ms of processor time where they are owned alone, 2 ms elsewhere."""
MAX_ENTRIES = 1 << 17
"""L2 entries that are looked at, where each look counts for :data:`_LOOK` more: 0.3 to 1 ms, 3 ms at most. A layer
below another counts for all entries that it may have been asked for."""
_LOOK = 512


class _Run(NamedTuple):
    """``n_clusters`` at ``guest_offset``, all in ``slice``; ``n_data`` of their bytes hold data now."""

    slice: L2Slice
    guest_offset: int
    n_clusters: int
    n_data: int


class Plan:
    """``runs`` are zeroed by their entries, ``parts`` (guest offset, bytes) lie inside of a cluster each."""

    def __init__(self, *, unmap: bool) -> None:
        self.unmap = unmap
        self.runs: list[_Run] = []
        self.parts: list[tuple[int, int]] = []
        self.n_clusters = 0
        self.n_left = MAX_ENTRIES


class ZeroerAtOnce:
    """Zeroes the top layer of a chain, as ``zeroer`` would; ``start_write`` writes zeroes as data."""

    def __init__(
        self,
        zeroer: Zeroer,
        *,
        mapping: Mapping,
        reader: ChainReader,
        cache: TableCache,
        writer: Writer,
        usage: Usage,
        start_write: StartWrite,
    ) -> None:
        self._zeroer = zeroer
        self._mapping = mapping
        self._cache = cache
        self._writer = writer
        self._usage = usage
        self._start_write = start_write
        self._find = HoleFinder(reader.layers).try_find
        self._n_below = sum(isinstance(layer, Mapping) for layer in reader.layers) - 1
        self._cluster_bits = mapping.geometry.cluster_bits
        self._cluster_mask = (1 << self._cluster_bits) - 1
        self._may_use_entries = can_zero_by_entry(mapping.entry_format, may_fall_through=len(reader.layers) == 1)

    def zero(self, plan: Plan) -> bool:
        """Whether all was zeroed of a plan that has just been made; if not, nothing but a part of a cluster may be.
        Raises OSError, ReadOnlyImageError."""
        for start, n_here in plan.parts:
            pending = self._start_write(start, ZEROES[:n_here])
            if pending is not None:
                pending.abandon()
                return False
        for run in plan.runs:
            self._cache.use(run.slice)
            self._zeroer.zero_entries(run.slice, run.guest_offset, run.n_clusters, unmap=plan.unmap)
            self._usage.add(run.guest_offset, -run.n_data)
        return True

    def plan(self, guest_offset: int, n_bytes: int, *, unmap: bool) -> Plan | None:
        """What there is to do in a range inside of the disk, None by rule 3. Raises CorruptImageError."""
        if self._mapping.entry_format.has_data_file:
            return None
        plan = Plan(unmap=unmap)
        position, end = guest_offset, guest_offset + n_bytes
        size, mask = self._mapping.size, self._cluster_mask
        whole_end = end if end == size else end & ~mask
        while position < end:
            found = self._look(plan, position, end)
            if found is None:
                return None
            is_data, n_found = found
            stop = position + n_found
            if position & mask or position >= whole_end:
                # Inside of a cluster that the range does not cover.
                stop = min(stop, (position | mask) + 1)
                if is_data:
                    plan.parts.append((position, stop - position))
            else:
                stop = min(stop, whole_end)
                if stop & mask and stop < whole_end:  # a cluster is of one kind in part
                    stop &= ~mask
                if stop == position:
                    n_data = self._data_bytes(plan, position, min(position + mask + 1, size))
                    stop = min(position + mask + 1, whole_end)
                    if n_data is None or not self._take(plan, position, stop, n_data):
                        return None
                elif is_data:
                    if not self._take(plan, position, stop, stop - position):
                        return None
                elif unmap and not self._give_back(plan, position, stop):
                    return None
            position = stop
        return plan

    def _look(self, plan: Plan, position: int, end: int) -> tuple[bool, int] | None:
        """Whether there is data, and for how many bytes that holds; None where that is not known, or where enough has
        been looked at for this plan."""
        if plan.n_left <= 0:
            return None
        found = self._find(position, end - position)
        if found is None:
            return None
        is_data, n_bytes, _ = found
        bits, most = self._cluster_bits, self._mapping.slice_mask
        plan.n_left -= _LOOK + min(n_bytes >> bits, most)
        plan.n_left -= self._n_below * (_LOOK + min(end - position >> bits, most))
        return is_data, n_bytes

    def _take(self, plan: Plan, start: int, stop: int, n_data: int) -> bool:
        """Zero whole clusters by their entries, all in one slice; whether that is possible."""
        n_clusters = stop - start + self._cluster_mask >> self._cluster_bits
        plan.n_clusters += n_clusters
        first = start >> self._cluster_bits
        slice_ = self._writer.slice_at_hand(start)
        if (
            not self._may_use_entries
            or plan.n_clusters > MAX_CLUSTERS
            or slice_ is None
            or stop > self._mapping.slice_end(start)
            or self._writer.claims.first_conflict(first, first + n_clusters)
        ):
            return False
        plan.runs.append(_Run(slice_, start, n_clusters, n_data))
        return True

    def _give_back(self, plan: Plan, start: int, stop: int) -> bool:
        """Let go of what clusters that read as zeroes own; whether that is possible."""
        slice_ = self._cache.slices.get(self._mapping.key(start))
        if slice_ is None:
            return True  # there is no table, else nothing had been found out
        n_clusters = stop - start + self._cluster_mask >> self._cluster_bits
        n_free = self._zeroer.n_without_space(slice_, start, n_clusters)
        return n_free == n_clusters or self._take(plan, start + (n_free << self._cluster_bits), stop, 0)

    def _data_bytes(self, plan: Plan, position: int, end: int) -> int | None:
        """How many bytes of a cluster hold data, None where that is not known."""
        n_data = 0
        while position < end:
            found = self._look(plan, position, end)
            if found is None:
                return None
            n_data += found[1] if found[0] else 0
            position += found[1]
        return n_data
