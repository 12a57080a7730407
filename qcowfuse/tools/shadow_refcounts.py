"""New refcounts beside the old ones: a copy of what changes, which takes effect with one write of the header.

For tools that change the references of many clusters at once while nobody else has the image open.

1. Nothing that the image refers to is overwritten. A refcount block is copied to a free cluster when it is first
   changed, and the refcount table is always a new one, so that the header decides between all old and all new counts.
2. Free is what is free in the old counts: what loses its last reference here is not used again here. The search
   goes upwards only, so that nothing is found twice.
3. In the new counts the blocks and the table that were replaced are free, and the new ones are in use.
4. A count that would fall below 0, rise from 0 or rise beyond what its width holds is refused: the references that
   are counted here were counted before, in any image that is consistent.
5. Blocks are kept in memory up to a limit and written to their new places before they make room; with the last of
   them :meth:`ShadowRefcounts.write` ends it. Until then nothing needs an order, nor a flush.

Memory: :data:`CACHE_BYTES` of counts, which are those of 2 TiB in clusters of 64 KiB with 16 bits each, and the
table, 8 MiB at most, three times.
"""

from __future__ import annotations

import errno
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

from ..driver.layers.host_run import HostRun
from ..driver.writing.guarded_clusters import MetadataClusters
from ..errors import CorruptImageError, ImageUsageError
from ..format.entries import MAX_HOST_OFFSET, serialise_table
from ..format.geometry import WORD_SIZE, divide_up
from ..format.header import Qcow2Header
from ..format.header_fields import MAX_REFCOUNT_TABLE_SIZE
from ..format.refcounts import (
    REFCOUNT_TABLE_OFFSET_MASK,
    empty_refcounts,
    entries_per_block,
    max_refcount,
    parse_refcounts,
    serialise_refcounts,
)
from ..storage.base import Storage, pread

CACHE_BYTES = 64 << 20
"""Counts in memory; without the need to make room nothing is written before all references are counted."""
MIN_BLOCKS = 8


class _Block:
    __slots__ = ("counts", "is_dirty")

    def __init__(self, counts: array[int]) -> None:
        self.counts = counts
        self.is_dirty = False


class ShadowRefcounts:
    """See the module docstring. ``table``: the refcount table in force; ``metadata``: what no free cluster may be."""

    def __init__(self, storage: Storage, header: Qcow2Header, table: array[int], metadata: MetadataClusters) -> None:
        self._storage = storage
        self._metadata = metadata
        self._cluster_bits = header.cluster_bits
        self._cluster_size = 1 << header.cluster_bits
        self._order = header.refcount_order
        self._max_count = max_refcount(header.refcount_order)
        n_per_block = entries_per_block(header.cluster_bits, header.refcount_order)
        self.block_bits = n_per_block.bit_length() - 1
        self.block_mask = n_per_block - 1
        # As far as a refcount table of the largest size reaches.
        self._max_clusters = min(
            MAX_HOST_OFFSET >> header.cluster_bits, MAX_REFCOUNT_TABLE_SIZE // WORD_SIZE << self.block_bits
        )
        self._old_table = table
        self._old_run = HostRun(header.refcount_table_offset, header.refcount_table_clusters)
        self._table = table[:]
        self._places: dict[int, int] = {}
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        empty = empty_refcounts(header.cluster_bits, header.refcount_order)
        self._max_blocks = max(CACHE_BYTES // (len(empty) * empty.itemsize), MIN_BLOCKS)
        self._cursor = 0
        self._first_taken = 1 << 64
        self._taken_starts = array("Q")
        self._taken_ends = array("Q")
        self._old_at_cursor: tuple[int, array[int]] = (-1, empty)

    # Counts

    async def peek(self, block_index: int) -> array[int]:
        """The new counts of a block, to be looked at before the next await. Raises CorruptImageError, OSError."""
        block = self._blocks.get(block_index)
        if block is None:
            block = await self._load(block_index)
        else:
            self._blocks.move_to_end(block_index)
        return block.counts

    async def block(self, block_index: int, *, may_add: bool = False) -> array[int]:
        """The new counts of a block, to be changed before the next await. Where there is none, all counts are 0:
        CorruptImageError, unless it ``may_add`` one. Raises as :meth:`peek`, OSError(ENOSPC)."""
        if not may_add and block_index not in self._places and not self._old_place(block_index):
            cluster = block_index << self.block_bits
            raise CorruptImageError(
                "refcount", None, f"0 for host clusters from {cluster:#x} on, which are referred to"
            )
        while True:
            block = self._blocks.get(block_index)
            if block is None:
                block = await self._load(block_index)
            block.is_dirty = True
            if block_index in self._places:
                self._blocks.move_to_end(block_index)
                return block.counts
            # Without a place it stays in memory; and the place that is found may be counted in this very block.
            self._places[block_index] = 0
            run = await self.take(1, "a refcount block")
            self._places[block_index] = run.host_offset
            if block_index >= len(self._table):
                self._table.extend(array("Q", bytes(WORD_SIZE * (block_index + 1 - len(self._table)))))
            self._table[block_index] = run.host_offset

    async def count(self, cluster: int) -> int:
        """The new count of a host cluster."""
        return (await self.peek(cluster >> self.block_bits))[cluster & self.block_mask]

    async def add(self, host_offset: int, n_bytes: int, delta: int, *, is_new: bool = False) -> None:
        """``delta`` references more or less to each cluster of a range, or with 0 just see that there are some;
        ``is_new``: one that was taken here. Raises CorruptImageError, ImageUsageError (refcounts too narrow),
        OSError."""
        if not n_bytes:
            return
        cluster = host_offset >> self._cluster_bits
        end = (host_offset + n_bytes - 1 >> self._cluster_bits) + 1
        while cluster < end:
            counts = await (self.block if delta else self.peek)(cluster >> self.block_bits)
            index = cluster & self.block_mask
            n_here = min(end - cluster, len(counts) - index)
            self._add_in_block(counts, index, cluster, n_here, delta, is_new=is_new)
            cluster += n_here

    def _add_in_block(
        self, counts: array[int], index: int, cluster: int, n_clusters: int, delta: int, *, is_new: bool
    ) -> None:
        before = counts[index : index + n_clusters]
        is_apart = cluster + n_clusters <= self._first_taken or cluster >= self._cursor
        if (is_new or is_apart) and before == before[:1] * n_clusters:
            after = self.changed(before[0], delta, cluster, is_new=is_new)
            counts[index : index + n_clusters] = array(counts.typecode, (after,)) * n_clusters
            return
        for number, count in enumerate(before):
            counts[index + number] = self.changed(count, delta, cluster + number, is_new=is_new)

    def changed(self, count: int, delta: int, cluster: int, *, is_new: bool = False) -> int:
        """``count`` with ``delta`` references more. Raises CorruptImageError, ImageUsageError."""
        if self._first_taken <= cluster < self._cursor and not is_new:
            self.check_not_taken(cluster)
        if count < 1 or count + delta < 0:
            raise CorruptImageError(
                "refcount", None, f"{count} for host cluster {cluster:#x}, which is referred to more often than that"
            )
        if count + delta > self._max_count:
            raise ImageUsageError(
                f"host cluster {cluster:#x} has {count} references and its refcount of {1 << self._order} bits holds "
                f"no more than {self._max_count}"
            )
        return count + delta

    def check_not_taken(self, cluster: int) -> None:
        """Raises CorruptImageError for a reference of the image to a cluster that was free and is taken by now."""
        if self._first_taken <= cluster < self._cursor:
            index = bisect_right(self._taken_starts, cluster) - 1
            if cluster < self._taken_ends[index]:
                raise CorruptImageError("refcount", None, f"0 for host cluster {cluster:#x}, which is referred to")

    async def _load(self, block_index: int) -> _Block:
        while len(self._blocks) >= self._max_blocks:
            victim, block = self._blocks.popitem(last=False)
            if block.is_dirty:
                if not self._places[victim]:  # a place is being looked for: its turn comes again
                    self._blocks[victim] = block
                    continue
                await self._write_block(victim, block)
        place = self._places.get(block_index) or self._old_place(block_index)
        self._blocks[block_index] = block = _Block(await self._read_block(place))
        return block

    def _old_place(self, block_index: int) -> int:
        if block_index >= len(self._old_table):
            return 0
        return self._old_table[block_index] & REFCOUNT_TABLE_OFFSET_MASK

    async def _read_block(self, host_offset: int) -> array[int]:
        if not host_offset:
            return empty_refcounts(self._cluster_bits, self._order)
        if host_offset & (self._cluster_size - 1) or host_offset >= MAX_HOST_OFFSET:
            raise CorruptImageError("refcount table", None, f"impossible entry {host_offset:#x}")
        if host_offset >= self._storage.size():
            raise CorruptImageError("refcount block", host_offset, "lies past the end of the image file")
        return parse_refcounts(await pread(self._storage, host_offset, self._cluster_size), self._order)

    async def _write_block(self, block_index: int, block: _Block) -> None:
        data = serialise_refcounts(block.counts, self._order, 0, len(block.counts))
        await self._storage.pwritev(self._places[block_index], (data,))
        block.is_dirty = False

    # Places

    async def take(self, n_clusters: int, purpose: str) -> HostRun:
        """Contiguous free clusters, now with one reference each. Raises OSError(ENOSPC), CorruptImageError."""
        start = cluster = self._cursor
        while cluster - start < n_clusters:
            if cluster + n_clusters > self._max_clusters:
                raise OSError(errno.ENOSPC, "the image file cannot take another cluster", self._storage.name)
            counts = await self._old_counts(cluster >> self.block_bits)
            index = cluster & self.block_mask
            if not counts[index]:
                cluster += 1
                continue
            try:
                start = cluster = cluster - index + counts.index(0, index)
            except ValueError:
                start = cluster = cluster - index + len(counts)
        self._cursor = start + n_clusters
        if self._taken_ends and self._taken_ends[-1] == start:
            self._taken_ends[-1] = self._cursor
        else:
            self._taken_starts.append(start)
            self._taken_ends.append(self._cursor)
            self._first_taken = self._taken_starts[0]
        host_offset = start << self._cluster_bits
        self._metadata.check(host_offset, n_clusters << self._cluster_bits, f"{purpose}, in a cluster that is free,")
        for cluster in range(start, self._cursor):
            counts = await self.block(cluster >> self.block_bits, may_add=True)
            if counts[cluster & self.block_mask]:
                raise CorruptImageError("refcount", None, f"host cluster {cluster:#x} is in use, but its count was 0")
            counts[cluster & self.block_mask] = 1
        return HostRun(host_offset, n_clusters)

    async def _old_counts(self, block_index: int) -> array[int]:
        known, counts = self._old_at_cursor
        if known != block_index:
            counts = await self._read_block(self._old_place(block_index))
            self._old_at_cursor = block_index, counts
        return counts

    # The end

    async def write(self) -> HostRun:
        """Write all that is not written yet; returns the new refcount table, for the header to point at after the
        next flush. Nothing may be changed any more. Raises OSError, CorruptImageError."""
        await self.add(self._old_run.host_offset, self._old_run.n_clusters << self._cluster_bits, -1)
        n_released = 0
        run = HostRun(0, 0)
        while True:
            # Each step may replace another block.
            if n_released < len(self._places):
                for block_index in list(self._places)[n_released:]:
                    n_released += 1
                    if old_place := self._old_place(block_index):
                        await self.add(old_place, self._cluster_size, -1)
                continue
            n_needed = divide_up(len(self._table) * WORD_SIZE, self._cluster_size)
            if run.n_clusters >= n_needed:
                break
            if n_needed << self._cluster_bits > MAX_REFCOUNT_TABLE_SIZE:
                raise OSError(errno.ENOSPC, "the image's refcount table cannot grow beyond 8 MiB", self._storage.name)
            await self.add(run.host_offset, run.n_clusters << self._cluster_bits, -1, is_new=True)
            run = await self.take(n_needed, "a refcount table")
        for block_index, block in self._blocks.items():
            if block.is_dirty:
                await self._write_block(block_index, block)
        n_entries = run.n_clusters << self._cluster_bits >> 3
        self._table.extend(array("Q", bytes(WORD_SIZE * (n_entries - len(self._table)))))
        await self._storage.pwritev(run.host_offset, (serialise_table(self._table, 0, n_entries),))
        return run

    async def freed(self) -> AsyncIterator[HostRun]:
        """After :meth:`write`: what the old counts have in use and the new ones do not. The old blocks and the old
        table come last, so that what is yielded may be overwritten at once."""
        old_metadata = {self._old_place(block_index) >> self._cluster_bits for block_index in self._places}
        old_metadata.discard(0)
        first = self._old_run.host_offset >> self._cluster_bits
        old_metadata.update(range(first, first + self._old_run.n_clusters))
        last: list[int] = []
        for block_index in sorted(self._places):
            old_place = self._old_place(block_index)
            if not old_place:
                continue
            old, new = await self._read_block(old_place), await self.peek(block_index)
            start = block_index << self.block_bits
            free = [start + index for index in _zeroes(new) if old[index]]
            last += [cluster for cluster in free if cluster in old_metadata]
            for run in self._runs([cluster for cluster in free if cluster not in old_metadata]):
                yield run
        for run in self._runs(last):
            yield run

    def _runs(self, clusters: list[int]) -> list[HostRun]:
        runs: list[tuple[int, int]] = []
        for cluster in sorted(clusters):
            if runs and runs[-1][1] == cluster:
                runs[-1] = runs[-1][0], cluster + 1
            else:
                runs.append((cluster, cluster + 1))
        return [HostRun(start << self._cluster_bits, end - start) for start, end in runs]


def _zeroes(counts: array[int]) -> Iterator[int]:
    """Where a count is 0, found at C speed where there are few."""
    index = -1
    with suppress(ValueError):
        while True:
            index = counts.index(0, index + 1)
            yield index
