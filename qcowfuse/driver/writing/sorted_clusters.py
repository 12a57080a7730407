"""Very many numbers of clusters in ascending order: a set of them, and sorting them in little memory.

1. What is sorted is an array of 4 or 8 bytes an item. Python's own integers take ten times as much: no more than
   one run of items is ever a list of them.
2. Sorted runs lie in mappings of their own, and so does the set. The kernel has the pages of a run back that have
   been merged, and gives those of the set when they are filled: sorting takes little more than what it makes. Freed
   memory of the heap would stay with the process, and an array that grows is there twice while it moves.
"""

from __future__ import annotations

import mmap
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import chain

_RUN = 1 << 14
_LOW_HALF = 0 if sys.byteorder == "little" else 1
_SAMPLES = 64
"""Of each run; as many of them as there are runs are merged at a time, some :data:`_RUN` items."""


class SortedClusters:
    """A large set of clusters that changes little: the part of a set's interface that is needed here.

    The clusters are in groups by the high part of their number; of each there is only the low part, in 2 bytes, or in
    4 where one of them is beyond 2^32.
    """

    __slots__ = ("_added", "_low", "_n_clusters", "_removed", "_shift", "_starts")

    def __init__(self, n_clusters: int, highest: int) -> None:
        """Room for ``n_clusters``, none of them above ``highest``, which is below 2^48."""
        self._shift = 16 if highest < 1 << 32 else 32
        n_bytes = max(n_clusters, 1) * self._shift // 8
        self._low: memoryview[int] = memoryview(_mapping(n_bytes)).cast("H" if self._shift == 16 else "I")
        self._n_clusters = 0
        self._starts = array("I")
        self._added: set[int] = set()
        self._removed: set[int] = set()

    def append(self, clusters: list[int]) -> None:
        """Fill the room: ``clusters`` in ascending order, and none below those that are there. The same one may come
        more than once."""
        start = 0
        while start < len(clusters):
            group = clusters[start] >> self._shift
            while len(self._starts) <= group:
                self._starts.append(self._n_clusters + start)
            start = bisect_left(clusters, group + 1 << self._shift, start)
        if self._shift == 16:
            low = memoryview(array("I", clusters)).cast("B").cast("H")[_LOW_HALF::2]
        else:
            low = memoryview(array("Q", clusters)).cast("B").cast("I")[_LOW_HALF::2]
        end = self._n_clusters + len(clusters)
        self._low[self._n_clusters : end] = low
        self._n_clusters = end

    def __contains__(self, cluster: int) -> bool:
        """Whether it is in the set."""
        return not self.isdisjoint(range(cluster, cluster + 1))

    def isdisjoint(self, clusters: range) -> bool:
        """Whether none of ``clusters`` (step 1) is in the set."""
        if self._has_sorted(clusters.start, clusters.stop) and (
            not self._removed
            or any(self._is_sorted_in(cluster) for cluster in clusters if cluster not in self._removed)
        ):
            return False
        return self._added.isdisjoint(clusters)

    def update(self, clusters: Iterable[int]) -> None:
        """Add them."""
        for cluster in clusters:
            self._removed.discard(cluster)
            if not self._is_sorted_in(cluster):
                self._added.add(cluster)

    def difference_update(self, clusters: Iterable[int]) -> None:
        """Take them out."""
        for cluster in clusters:
            self._added.discard(cluster)
            if self._is_sorted_in(cluster):
                self._removed.add(cluster)

    def _is_sorted_in(self, cluster: int) -> bool:
        return self._has_sorted(cluster, cluster + 1)

    def _has_sorted(self, first: int, end: int) -> bool:
        """Whether one of the clusters from ``first`` on that are below ``end`` was put here in order."""
        group, starts = first >> self._shift, self._starts
        if end - 1 >> self._shift != group:
            return self._index(first) < self._index(end)
        if group >= len(starts):
            return False
        group_end = starts[group + 1] if group + 1 < len(starts) else self._n_clusters
        base = group << self._shift
        index = bisect_left(self._low, first - base, starts[group], group_end)
        return index < group_end and self._low[index] < end - base

    def _index(self, cluster: int) -> int:
        """How many that were put here in order are below ``cluster``."""
        group, starts = cluster >> self._shift, self._starts
        if group >= len(starts):
            return self._n_clusters
        end = starts[group + 1] if group + 1 < len(starts) else self._n_clusters
        return bisect_left(self._low, cluster & (1 << self._shift) - 1, starts[group], end)


class _Run:
    """Items in ascending order, which are taken from the start."""

    __slots__ = ("_memory", "_n_released", "_start", "items")

    def __init__(self, items: array[int]) -> None:
        self._memory = _mapping(items.itemsize * len(items))
        self._memory[:] = memoryview(items).cast("B")
        self.items = memoryview(self._memory).cast("I" if items.typecode == "I" else "Q")
        self._start = 0
        self._n_released = 0

    def take(self, pivot: int | None) -> list[int]:
        """All that are below ``pivot``; None for all."""
        end = len(self.items) if pivot is None else bisect_left(self.items, pivot, self._start)
        taken = self.items[self._start : end].tolist()
        self._start = end
        used = end * self.items.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
        if used > self._n_released:
            self._memory.madvise(mmap.MADV_DONTNEED, self._n_released, used - self._n_released)
            self._n_released = used
        return taken


class SortedRuns:
    """All items of ``parts``, to be taken once in ascending order."""

    def __init__(self, parts: Iterable[array[int]]) -> None:
        self._runs = [_Run(run) for run in _sorted_runs(parts)]

    def __len__(self) -> int:
        return sum(len(run.items) for run in self._runs)

    @property
    def highest(self) -> int:
        """The last of all, 0 where there is none."""
        return max((run.items[-1] for run in self._runs), default=0)

    def samples(self) -> list[int]:
        """Every so many items of each run; not the same ones of each, or runs that are alike were cut unevenly."""
        step = _RUN // _SAMPLES
        starts = range(0, 97 * len(self._runs), 97)
        return [
            value
            for start, run in zip(starts, self._runs, strict=True)
            for value in run.items[start % step :: step].tolist()
        ]

    def take(self, pivot: int | None) -> list[int]:
        """Those below ``pivot`` that were not taken before, in ascending order; None for all."""
        items: list[int] = []
        for run in self._runs:
            items += run.take(pivot)
        items.sort()
        return items


def pivots(*merged: SortedRuns) -> list[int | None]:
    """Where to cut, so that what is taken from all of ``merged`` at a time is some :data:`_RUN` items. None is the
    last."""
    samples = sorted(chain.from_iterable(runs.samples() for runs in merged))
    return [*samples[_SAMPLES::_SAMPLES], None]


def sorted_array(parts: Iterable[array[int]]) -> array[int]:
    """The items of all ``parts`` in ascending order, each as often as it is there."""
    runs = SortedRuns(parts)
    typecode = "I" if runs.highest < 1 << 32 else "Q"
    found = array(typecode)
    for pivot in pivots(runs):
        found.extend(array(typecode, runs.take(pivot)))
    return found


def _mapping(n_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _sorted_runs(parts: Iterable[array[int]]) -> Iterator[array[int]]:
    buffer = array("Q")
    for part in parts:
        start = 0
        while start < len(part):
            more = part[start : start + _RUN - len(buffer)]
            start += len(more)
            buffer.extend(more if more.typecode == "Q" else array("Q", more))
            if len(buffer) == _RUN:
                yield _compact(sorted(buffer))
                buffer = array("Q")
    if buffer:
        yield _compact(sorted(buffer))


def _compact(items: list[int]) -> array[int]:
    """In 4 bytes each if that is enough; ``items`` are in ascending order."""
    return array("I" if items[-1] < 1 << 32 else "Q", items)
