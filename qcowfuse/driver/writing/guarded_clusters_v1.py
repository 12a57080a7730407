"""The metadata of a version 1 image: header, L1 table and L2 tables, none of which need begin at a cluster.

1. All of it is known when the image is opened, from the header and the L1 table; new tables are added.
2. The hot path asks about whole clusters, of data that may lie at any sector. So the set has a cluster more before
   each table. A request that meets one takes the way that waits, which asks :meth:`MetadataV1.check` about the bytes.
3. Tables that overlap each other, the header or the L1 table are damage. Their clusters are ``shared``: no table that
   touches one of them is written.
"""

from __future__ import annotations

import logging
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise

from ...errors import CorruptImageError, FormatError, ImageUsageError
from ...format.entries import EntryFormat, Table, masked
from ...format.header import Qcow1Header
from ...storage.base import Storage
from ...tables.snapshot_table import parts_in_use
from . import guarded_clusters
from .guarded_clusters import MetadataClusters
from .sorted_clusters import SortedClusters, sorted_array

log = logging.getLogger(__name__)
MAX_TABLES = 1 << 21
"""L2 tables of an image that is written, which take 16 MiB: with clusters of 4 KiB they map 4 TiB in use."""
_HEADER_BYTES = 48


class MetadataV1(MetadataClusters):
    """``head``: start and end of the header and of each L1 table. ``tables``: the starts of all L2 tables, in order.
    ``end``: nothing lies behind it yet."""

    __slots__ = ("_head", "_table_size", "_tables", "end")

    def __init__(
        self, cluster_bits: int, *, head: list[tuple[int, int]], tables: array[int], table_size: int
    ) -> None:
        self._head = head
        self._tables = tables
        self._table_size = table_size
        self.end = max([*(end for _, end in head), tables[-1] + table_size if tables else 0])
        shared: set[int] = set()
        for start, end in _overlaps(head, tables, table_size):
            shared.update(range(start >> cluster_bits, (end - 1 >> cluster_bits) + 1))
            if len(shared) > guarded_clusters.MAX_IN_SET:
                raise FormatError("L1 table", None, "L2 tables overlap in too many places")
        before = (1 << cluster_bits) - 1  # data that begins anywhere in the cluster before reaches into this one
        numbers = [
            range(max(start - before, 0) >> cluster_bits, (end - 1 >> cluster_bits) + 1) for start, end in head
        ]
        n_numbers = sum(map(len, numbers)) + len(tables) * ((table_size - 1 >> cluster_bits) + 2)
        clusters: set[int] | SortedClusters = set()
        if n_numbers > guarded_clusters.MAX_IN_SET:
            clusters = _Places(self, cluster_bits)
        super().__init__(cluster_bits, clusters, frozenset(shared))
        if n_numbers <= guarded_clusters.MAX_IN_SET:
            clusters.update(chain.from_iterable(numbers))
            for start in tables:
                clusters.update(self._near(start))

    def add(self, host_offset: int, n_bytes: int) -> None:
        """A new L2 table."""
        self.clusters.update(self._near(host_offset))
        insort(self._tables, host_offset)

    def add_l1(self, host_offset: int, n_bytes: int) -> None:
        """A longer L1 table, beside the one that it replaces."""
        self._head.append((host_offset, host_offset + n_bytes))
        before = min((1 << self._cluster_bits) - 1, host_offset)
        self.clusters.update(self._range(host_offset - before, n_bytes + before))

    def discard(self, host_offset: int, n_bytes: int) -> None:
        """A new table that was not made after all. Its clusters stay in the set: that only costs time."""
        index = bisect_left(self._tables, host_offset)
        if index < len(self._tables) and self._tables[index] == host_offset:
            del self._tables[index]

    def check(self, host_offset: int, n_bytes: int, purpose: str) -> None:
        """See MetadataClusters; for these bytes exactly."""
        if self.has_any(host_offset, host_offset + n_bytes):
            raise CorruptImageError(purpose, host_offset, "would overwrite metadata of the image")

    def has_any(self, start: int, end: int) -> bool:
        """Whether any byte from ``start`` to ``end`` (exclusive) is metadata."""
        index = bisect_left(self._tables, end) - 1
        if index >= 0 and self._tables[index] + self._table_size > start:
            return True
        return any(start < head_end and end > head_start for head_start, head_end in self._head)

    def _near(self, table: int) -> range:
        """The clusters of a table, and the one before."""
        start = max(table - (1 << self._cluster_bits) + 1, 0)
        return self._range(start, table + self._table_size - start)


class _Places(SortedClusters):
    """The same set as a question to the list of tables: what it takes does not grow with the tables."""

    __slots__ = ("_cluster_bits", "_known")

    def __init__(self, known: MetadataV1, cluster_bits: int) -> None:
        super().__init__(0, 0)
        self._known = known
        self._cluster_bits = cluster_bits

    def isdisjoint(self, clusters: range) -> bool:
        """Data in the last of them may reach into the next."""
        return not self._known.has_any(clusters.start << self._cluster_bits, clusters.stop + 1 << self._cluster_bits)

    def update(self, clusters: Iterable[int]) -> None:
        """They are known already."""

    def difference_update(self, clusters: Iterable[int]) -> None:
        """See :meth:`update`."""


def _overlaps(head: list[tuple[int, int]], tables: array[int], table_size: int) -> Iterator[tuple[int, int]]:
    """Start and end of what two structures have in common."""
    for number, (start, end) in enumerate(head):
        for other_start, other_end in head[:number]:
            if start < other_end and other_start < end:
                yield max(start, other_start), min(end, other_end)
        for index in range(bisect_right(tables, start - table_size), bisect_left(tables, end)):
            yield max(start, tables[index]), min(end, tables[index] + table_size)
    for table, following in pairwise(tables):
        if following < table + table_size:
            yield following, table + table_size


def find_metadata_v1(
    storage: Storage, header: Qcow1Header, *, entry_format: EntryFormat, l1_table: Table
) -> MetadataV1:
    """All metadata of an image that is about to be written. Raises FormatError where nothing can be told from it,
    ImageUsageError where there is too much."""
    mask = entry_format.l1_offset_mask
    n_tables = sum(len(part) - part.count(0) for part in parts_in_use(l1_table))
    if n_tables > MAX_TABLES:
        raise ImageUsageError(
            f"{storage.name}: has {n_tables} L2 tables; version 1 with more than {MAX_TABLES} is not written: "
            "serve it read-only (qcowfuse -r)"
        )
    tables = array("Q", sorted_array(array("Q", filter(None, masked(part, mask))) for part in parts_in_use(l1_table)))
    l1_start = header.l1_table_offset
    found = MetadataV1(
        header.cluster_bits,
        head=[(0, _HEADER_BYTES), (l1_start, l1_start + 8 * len(l1_table))],
        tables=tables,
        table_size=8 << header.l2_bits,
    )
    if found.shared:
        log.warning(
            "%s: tables of the image overlap (the first at %#x) and will not be written",
            storage.name,
            min(found.shared) << header.cluster_bits,
        )
    return found
