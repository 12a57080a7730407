"""Which host clusters hold live metadata, so that nothing is written on top of it.

1. Known are the header, the active L1 and L2 tables, the refcount table and its blocks, the snapshot table, the L1
   tables of the snapshots, the bitmap directory (all that QEMU's default overlap check knows) and the LUKS area.
2. A cluster is added before anything is written to it as metadata, and taken out when memory no longer refers to it;
   its refcount keeps it from being used again until that is durable.
3. Two structures on one cluster, as damaged images have them, are found when the image is opened. Such a cluster
   stays guarded for good: neither structure is written any more, the first attempt freezes the image, and it is
   never given back. Only one thing may be shared: an L2 table by several L1 entries, and an L1 table by snapshots.
4. Version 1 has neither refcounts nor aligned tables: its allocator only ever appends, and nothing is checked.

Memory: a set costs 60 to 90 bytes a table, so that beyond :data:`MAX_IN_SET` of them there is a sorted array
instead: 8 bytes a table, and 0.4 microseconds more a look-up. A 1 TiB disk is kept in a set with 64 KiB clusters
(2 MiB), in an array with 4 KiB clusters (5 MiB, where a set has 50; making it takes 0.2 s and 25 MiB more).
"""

from __future__ import annotations

import logging
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from contextlib import aclosing
from itertools import pairwise

from ...errors import CorruptImageError, FormatError
from ...format.entries import OFFSET_MASK, Table
from ...format.header import Qcow2Header
from ...format.header_fields import CRYPT_LUKS
from ...format.refcounts import REFCOUNT_TABLE_OFFSET_MASK
from ...storage.base import Storage
from ...tables.snapshot_table import each_snapshot

log = logging.getLogger(__name__)
MAX_IN_SET = 100_000
_CHUNK = 1 << 16
MAX_SNAPSHOT_L1_CLUSTERS = 1 << 20
"""Clusters of all L1 tables of snapshots; an image with more of them can't be guarded and is not written to."""


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


class MetadataClusters:
    """A set of host clusters; ``clusters.isdisjoint`` may be asked directly by a hot path. ``shared`` are those that
    several structures have claimed."""

    __slots__ = ("_cluster_bits", "clusters", "shared")

    def __init__(
        self,
        cluster_bits: int,
        clusters: set[int] | SortedClusters | None = None,
        shared: frozenset[int] = frozenset(),
    ) -> None:
        self._cluster_bits = cluster_bits
        self.clusters: set[int] | SortedClusters = set() if clusters is None else clusters
        self.shared = shared

    def add(self, host_offset: int, n_bytes: int) -> None:
        """The bytes are metadata from now on."""
        self.clusters.update(self._range(host_offset, n_bytes))

    def discard(self, host_offset: int, n_bytes: int) -> None:
        """The bytes are no longer metadata."""
        clusters = self._range(host_offset, n_bytes)
        self.clusters.difference_update(clusters)
        if self.shared:
            self.clusters.update(self.shared.intersection(clusters))

    def check(self, host_offset: int, n_bytes: int, purpose: str) -> None:
        """Raises CorruptImageError where the bytes touch metadata; ``purpose`` is what was to be put there."""
        if self.clusters.isdisjoint(self._range(host_offset, n_bytes)):
            return
        raise CorruptImageError(purpose, host_offset, "would overwrite metadata of the image")

    def check_each(self, clusters: Iterable[int], purpose: str) -> None:
        """As :meth:`check`, for many clusters, wherever they are."""
        if isinstance(self.clusters, set):
            clusters = self.clusters.intersection(clusters)
        for cluster in clusters:
            self.check(cluster << self._cluster_bits, 1, purpose)

    def check_own(self, host_offset: int, n_bytes: int, structure: str) -> None:
        """Before ``structure``, metadata too, is changed: raises CorruptImageError where another one lies there."""
        if self.shared and not self.shared.isdisjoint(self._range(host_offset, n_bytes)):
            raise CorruptImageError(structure, host_offset, "lies on top of other metadata of the image")

    def check_free(self, host_offset: int, n_bytes: int) -> None:
        """Before a reference to the bytes is given up: raises CorruptImageError where metadata lies there."""
        self.check(host_offset, n_bytes, "giving back a cluster")

    def _range(self, host_offset: int, n_bytes: int) -> range:
        return range(host_offset >> self._cluster_bits, (host_offset + n_bytes - 1 >> self._cluster_bits) + 1)


async def find_metadata(
    storage: Storage, header: Qcow2Header, *, l1_table: Table, refcount_table: array[int]
) -> MetadataClusters:
    """The metadata of an image that is about to be written, but for the bitmap directory, which may be added when it
    has been looked at. Raises FormatError (snapshot table), OSError."""
    snapshots_bytes = 0
    snapshot_tables: list[tuple[int, int]] = []
    async with aclosing(each_snapshot(storage, header)) as entries:
        async for snapshot, n_bytes in entries:
            snapshots_bytes = n_bytes
            if snapshot.l1_size:
                snapshot_tables.append((snapshot.l1_table_offset, snapshot.l1_size * 8))
    bits = header.cluster_bits
    places = [
        (0, 1),
        (header.l1_table_offset, header.l1_size * 8),
        (header.refcount_table_offset, header.refcount_table_clusters << bits),
        (header.snapshots_offset, snapshots_bytes),
        *_united(snapshot_tables, bits),
    ]
    if header.crypt_method == CRYPT_LUKS:
        from ...format.luks import luks_area

        places.append(luks_area(header.extensions))
    others = array("Q")
    for place in places:
        others.extend(_clusters(*place, bits))
    blocks = (entry & REFCOUNT_TABLE_OFFSET_MASK for entry in filter(None, refcount_table))
    others.extend(offset >> bits for offset in blocks if offset)
    others = sorted_array([others])
    tables = sorted_array(
        [_tables_of(l1_table[start : start + _CHUNK], bits) for start in range(0, len(l1_table), _CHUNK)]
    )
    shared = {cluster for cluster, following in pairwise(others) if cluster == following}
    shared.update(cluster for cluster in others if _contains(tables, cluster))
    if shared:
        log.warning(
            "%s: two structures of the image lie on the same cluster (%d of them, the first at %#x) and will not be "
            "written; qcowfuse-img check says more",
            storage.name,
            len(shared),
            min(shared) << bits,
        )
    clusters: set[int] | SortedClusters
    if len(others) + len(tables) > MAX_IN_SET:
        everything = [tables, others]
        del tables, others
        clusters = SortedClusters(sorted_array(everything))
    else:
        clusters = {*others, *tables}
    return MetadataClusters(bits, clusters, frozenset(shared))


def _tables_of(entries: Table, cluster_bits: int) -> array[int]:
    """The clusters of the L2 tables of a part of an L1 table, each once, in order."""
    if not any(entries):
        return array("I")
    clusters = sorted({(entry & OFFSET_MASK) >> cluster_bits for entry in set(entries)} - {0})
    return _compact(clusters)


def _compact(clusters: list[int]) -> array[int]:
    """In 4 bytes each if that is enough; ``clusters`` are in ascending order."""
    return array("I" if not clusters or clusters[-1] < 1 << 32 else "Q", clusters)


def sorted_array(parts: list[array[int]]) -> array[int]:
    """The items of all ``parts``, which are given up for it, in ascending order. A Python list of them all would take
    five times the memory, so it is done range by range."""
    runs: list[array[int]] = []
    while parts:
        part = parts.pop()
        runs += [_compact(sorted(part[start : start + _CHUNK])) for start in range(0, len(part), _CHUNK)]
        del part
    typecode = "Q" if any(run.typecode == "Q" for run in runs) else "I"
    samples = sorted(value for run in runs for value in run[_CHUNK // 64 :: _CHUNK // 64])
    pivots = samples[64::64]
    found = array(typecode)
    for pivot in [*pivots, None]:
        items: list[int] = []
        for run in runs:
            end = len(run) if pivot is None else bisect_left(run, pivot)
            items.extend(run[:end])
            del run[:end]
        items.sort()
        found.extend(array(typecode, items))
    return found


def _united(tables: list[tuple[int, int]], cluster_bits: int) -> list[tuple[int, int]]:
    """Offset and length of L1 tables of snapshots, each byte once."""
    places: list[tuple[int, int]] = []
    for start, size in sorted(tables):
        end = start + size
        if places and start < sum(places[-1]):
            start, known = places.pop()
            end = max(end, start + known)
        places.append((start, end - start))
    if sum(size for _, size in places) >> cluster_bits > MAX_SNAPSHOT_L1_CLUSTERS:
        raise FormatError("snapshot table", None, "L1 tables of snapshots are too large to be guarded")
    return places


def _clusters(host_offset: int, n_bytes: int, cluster_bits: int) -> range:
    if not n_bytes:
        return range(0)
    return range(host_offset >> cluster_bits, (host_offset + n_bytes - 1 >> cluster_bits) + 1)


def _contains(clusters: array[int], cluster: int) -> bool:
    index = bisect_left(clusters, cluster)
    return index < len(clusters) and clusters[index] == cluster
