"""Counting the clusters of plain L2 tables: each entry has an aligned offset or none, and flags that it may have.

1. Tables are looked at in columns of bytes: those in which the clusters follow each other take some comparisons.
2. Other clusters are counted in runs. Where the runs of a table are short, a map of the place where its clusters lie
   is made first: a guest writes here and there, and what it has written lies in few places. Where that is no small
   place, they are counted one by one.
3. That a cluster reads as zeroes is no matter here: it has its host cluster, or none, as any other.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from ..format.all_runs import ascending_runs, n_ascending_runs
from ..format.entries import OFFSET_MASK, masked, parse_table
from .counted_refcounts import ReferenceCounts

_SHORT = 8
"""Clusters of a run, on average, below which a map is made, or they are counted one by one."""
_MOST_MAPPED = 4
"""Clusters of a map for each that is in use."""


class PlainTable:
    """What was found in a table. ``first_page`` and ``last_page``: of the counts that were raised. ``is_empty``: all
    entries are 0, or zeroes without a cluster; ``is_copied``: all others have the COPIED flag, and no entry without
    a cluster has it."""

    __slots__ = (
        "beyond",
        "first_page",
        "is_copied",
        "is_empty",
        "last_page",
        "n_allocated",
        "n_fragmented",
        "overflowed",
    )

    def __init__(self) -> None:
        self.n_allocated = 0
        self.n_fragmented = 0
        self.first_page = 1 << 62
        self.last_page = -1
        self.overflowed: list[int] = []
        self.beyond: list[int] = []
        self.is_empty = False
        self.is_copied = False


class PlainTables:
    """The tables of an image with clusters of ``2**cluster_bits`` bytes, counted in ``counts``. Clusters at or past
    cluster ``limit`` are only listed. ``has_zeroes``: entries may have the zero flag."""

    def __init__(self, counts: ReferenceCounts, cluster_bits: int, limit: int, *, has_zeroes: bool) -> None:
        self._counts = counts
        self._cluster_bits = cluster_bits
        self._limit = limit
        self._has_zeroes = has_zeroes
        self._n_entries = n_entries = (1 << cluster_bits) // 8
        self._zeroes = bytes(1 << cluster_bits)
        self._no_flags = bytes(n_entries)
        # The two columns that change where clusters follow each other, from cluster 0 on, and then from the start.
        self._column, odd_bits = 7 - cluster_bits // 8, cluster_bits % 8
        steps = bytes(value << odd_bits for value in range(256 >> odd_bits))
        self._even = steps
        self._period = len(steps)
        self._low = steps * (n_entries // self._period + 2)
        high = b"".join(bytes([value]) * self._period for value in range(256))
        self._high = high + (high * (n_entries // len(high) + 1))[:n_entries]

    def count(self, raw: bytes) -> PlainTable | None:
        """Count the clusters of a table, as it stands in the file; None where it is not plain, and nothing is
        counted. Raises FormatError where the counts take too much memory."""
        found = PlainTable()
        if raw == self._zeroes:
            found.is_empty = True
            return found
        flags, zero_flags = raw[0::8], raw[7::8]
        if flags.translate(None, b"\0\x80") or raw[self._column :: 8].translate(None, self._even):
            return None
        if any(raw[place::8] != self._no_flags for place in range(self._column + 1, 7)):
            return None
        if zero_flags != self._no_flags:
            if not self._has_zeroes or zero_flags.translate(None, b"\0\1"):
                return None
            plain = bytearray(raw)
            plain[7::8] = self._no_flags
            raw = bytes(plain)
            if raw == self._zeroes:
                found.is_empty = True
                return found
        if not self._count_one_run(raw, found):
            self._count_any(parse_table(raw), found)
        found.is_copied &= flags.count(0x80) == found.n_allocated
        return found

    def _count_one_run(self, raw: bytes, found: PlainTable) -> bool:
        """Whether all clusters follow each other in the file, and are counted."""
        n_entries, column = self._n_entries, self._column
        ends = int.from_bytes(raw[:8], "big"), int.from_bytes(raw[-8:], "big")
        first, last = ((entry & OFFSET_MASK) >> self._cluster_bits for entry in ends)
        if not first or last - first != n_entries - 1 or last >= self._limit:
            return False
        place = first % self._period
        if raw[column::8] != self._low[place : place + n_entries]:
            return False
        place = first % (256 * self._period)
        if raw[column - 1 :: 8] != self._high[place : place + n_entries]:
            return False
        if any(raw[place::8] != part for place, part in enumerate(self._upper_columns(ends[0], first, last))):
            return False
        found.overflowed = self._counts.add_run(first, n_entries)
        found.n_allocated = n_entries
        found.first_page, found.last_page = first >> self._counts.page_bits, last >> self._counts.page_bits
        found.is_copied = True
        return True

    def _upper_columns(self, first_entry: int, first: int, last: int) -> Iterator[bytes]:
        """What a table has that is one run, in the columns before the two that change most."""
        step = 256 * self._period
        parts: list[tuple[bytes, int]] = []
        cluster = first
        while cluster <= last:
            n_here = min(step - cluster % step, last + 1 - cluster)
            entry = first_entry + (cluster - first << self._cluster_bits)
            parts.append((entry.to_bytes(8, "big"), n_here))
            cluster += n_here
        for place in range(self._column - 1):
            yield b"".join(entry[place : place + 1] * n_here for entry, n_here in parts)

    def _count_any(self, words: array[int], found: PlainTable) -> None:
        counts, limit = self._counts, self._limit
        clusters = masked(words, OFFSET_MASK & -1 << self._cluster_bits, self._cluster_bits)
        found.is_copied = True
        if not all(clusters):
            n_in_use = len(words) - words.count(0)
            clusters = array("Q", filter(None, clusters))
            found.is_copied = len(clusters) == n_in_use
        found.n_allocated = len(clusters)
        if not clusters:
            return
        n_runs = n_ascending_runs(clusters)
        found.n_fragmented = n_runs - 1
        last = max(clusters)
        if last >= limit:
            found.beyond = [cluster for cluster in clusters if cluster >= limit]
            clusters = array("Q", [cluster for cluster in clusters if cluster < limit])
            if not clusters:
                return
            n_runs, last = n_ascending_runs(clusters), max(clusters)
        first = min(clusters)
        found.first_page, found.last_page = first >> counts.page_bits, last >> counts.page_bits
        if n_runs * _SHORT < len(clusters):
            found.overflowed = counts.add_runs(_runs(clusters))
        elif last - first >= _MOST_MAPPED * len(clusters) or not _count_by_map(counts, clusters, first, last):
            found.overflowed = counts.add_each(clusters)


def _count_by_map(counts: ReferenceCounts, clusters: array[int], first: int, last: int) -> bool:
    """Count them all, or none and return False: some count may be too high, or a cluster be there twice."""
    references = array(counts.empty.typecode, bytes((last - first + 1) * counts.empty.itemsize))
    for cluster in clusters:
        references[cluster - first] = 1
    return references.tobytes().count(1) == len(clusters) and counts.add_map(first, references)


def _runs(clusters: array[int]) -> Iterator[tuple[int, int]]:
    """First cluster and length of each run."""
    firsts = ascending_runs(clusters)
    firsts.append(len(clusters))
    for number in range(len(firsts) - 1):
        first = firsts[number]
        yield clusters[first], firsts[number + 1] - first
