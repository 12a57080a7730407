"""Very many numbers of clusters in ascending order: a set of them, and sorting them in little memory.

1. What is sorted is an array of 4 or 8 bytes an item. Python's own integers take ten times as much: no more than
   one run of items is ever a list of them.
2. Sorted runs lie in mappings of their own, and the kernel has the pages back that have been merged: sorting takes
   little more than what it makes. Freed memory of the heap would stay with the process.
"""

from __future__ import annotations

import mmap
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator

_RUN = 1 << 16
_SAMPLES = 64
"""Of each run; as many of them as there are runs are merged at a time, some :data:`_RUN` items."""


class SortedClusters:
    """A large set of clusters that changes little: the part of a set's interface that is needed here."""

    __slots__ = ("_added", "_removed", "_sorted")

    def __init__(self, clusters: array[int]) -> None:
        """``clusters`` in ascending order; the same one may be there more than once."""
        self._sorted = clusters
        self._added: set[int] = set()
        self._removed: set[int] = set()

    def isdisjoint(self, clusters: range) -> bool:
        """Whether none of ``clusters`` (step 1) is in the set."""
        known = self._sorted
        index = bisect_left(known, clusters.start)
        while index < len(known) and known[index] < clusters.stop:
            if known[index] not in self._removed:
                return False
            index += 1
        return self._added.isdisjoint(clusters)

    def update(self, clusters: Iterable[int]) -> None:
        """Add them."""
        for cluster in clusters:
            self._removed.discard(cluster)
            index = bisect_left(self._sorted, cluster)
            if index == len(self._sorted) or self._sorted[index] != cluster:
                self._added.add(cluster)

    def difference_update(self, clusters: Iterable[int]) -> None:
        """Take them out."""
        for cluster in clusters:
            self._added.discard(cluster)
            index = bisect_left(self._sorted, cluster)
            if index < len(self._sorted) and self._sorted[index] == cluster:
                self._removed.add(cluster)


class _Run:
    """Items in ascending order, which are taken from the start."""

    __slots__ = ("_memory", "_n_released", "_start", "items")

    def __init__(self, items: array[int]) -> None:
        size = items.itemsize * len(items)
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
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


def sorted_array(parts: Iterable[array[int]]) -> array[int]:
    """The items of all ``parts`` in ascending order, each as often as it is there."""
    runs = [_Run(run) for run in _sorted_runs(parts)]
    typecode = "Q" if any(run.items.itemsize > 4 for run in runs) else "I"
    samples = sorted(value for run in runs for value in run.items[_RUN // _SAMPLES :: _RUN // _SAMPLES].tolist())
    found = array(typecode)
    for pivot in [*samples[_SAMPLES::_SAMPLES], None]:
        items: list[int] = []
        for run in runs:
            items += run.take(pivot)
        items.sort()
        found.extend(array(typecode, items))
    return found


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
