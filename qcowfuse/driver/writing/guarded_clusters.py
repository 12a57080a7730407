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
instead: 2 bytes a table, 4 where the file has more than 2^32 clusters, and 0.5 microseconds more a look-up. A 1 TiB
disk is kept in a set with 64 KiB clusters (2 MiB), in an array with 4 KiB clusters (1 MiB, where a set has 50; making
it takes 0.15 s and 2 MiB more).
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Iterator
from contextlib import aclosing
from itertools import pairwise

from ...errors import CorruptImageError, FormatError, ImageUsageError
from ...format.entries import MAX_HOST_OFFSET, OFFSET_MASK, Table, masked
from ...format.header import Qcow2Header
from ...format.header_fields import CRYPT_LUKS
from ...format.refcounts import REFCOUNT_TABLE_OFFSET_MASK
from ...storage.base import Storage
from ...tables.snapshot_table import each_snapshot_l1_place, parts_in_use
from .sorted_clusters import SortedClusters, SortedRuns, pivots

log = logging.getLogger(__name__)
MAX_IN_SET = 100_000
_CHUNK = 1 << 16
MAX_FAR_TABLES = 1 << 20
"""In a file of more than 2^32 clusters, which is 2 TiB with clusters of 512 bytes."""
MAX_SNAPSHOT_L1_CLUSTERS = 1 << 20
"""Clusters of all L1 tables of snapshots; an image with more of them can't be guarded and is not written to."""


class MetadataClusters:
    """A set of host clusters; a hot path may ask ``clusters`` directly, by ``in`` or ``isdisjoint``. ``shared`` are
    those that several structures have claimed."""

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

    def add_l1(self, host_offset: int, n_bytes: int) -> None:
        """The bytes are an L1 table from now on."""
        self.add(host_offset, n_bytes)

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
    has been looked at. Raises FormatError (snapshot table), ImageUsageError (more
    tables than can be guarded), OSError."""
    snapshots_bytes = 0
    snapshot_tables: list[tuple[int, int]] = []
    async with aclosing(each_snapshot_l1_place(storage, header)) as entries:
        async for (l1_table_offset, l1_size), n_bytes in entries:
            snapshots_bytes = n_bytes
            if l1_size:
                snapshot_tables.append((l1_table_offset, l1_size * 8))
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
    clusters, shared = _put_together(
        storage.name,
        SortedRuns(_other_clusters(places, refcount_table, bits)),
        SortedRuns(_clusters_of_tables(l1_table, bits)),
    )
    if shared:
        log.warning(
            "%s: two structures of the image lie on the same cluster (%d of them, the first at %#x) and will not be "
            "written; qcowfuse-img check says more",
            storage.name,
            len(shared),
            min(shared) << bits,
        )
    return MetadataClusters(bits, clusters, frozenset(shared))


def _put_together(name: str, others: SortedRuns, tables: SortedRuns) -> tuple[set[int] | SortedClusters, set[int]]:
    """Every cluster, and those that two of ``others`` have in common, or one of them and an L2 table.
    Raises ImageUsageError."""
    n_clusters, highest = len(others) + len(tables), max(others.highest, tables.highest)
    if n_clusters > MAX_FAR_TABLES and highest >> 32:
        raise ImageUsageError(
            f"{name}: has {n_clusters} tables, and some lie so far behind in the file that they would take too much "
            "memory to be guarded; serve it read-only (qcowfuse -r)"
        )
    clusters: set[int] | SortedClusters
    clusters = set() if n_clusters <= MAX_IN_SET else SortedClusters(n_clusters, highest)
    shared: set[int] = set()
    for pivot in pivots(others, tables):
        first, second = others.take(pivot), tables.take(pivot)
        known = set(first)
        if len(known) < len(first):
            shared.update(cluster for cluster, following in pairwise(first) if cluster == following)
        shared |= known.intersection(second)
        second += first
        if isinstance(clusters, set):
            clusters.update(second)
        else:
            second.sort()
            clusters.append(second)
    return clusters, shared


def _other_clusters(
    places: Iterable[tuple[int, int]], refcount_table: array[int], cluster_bits: int
) -> Iterator[array[int]]:
    """Those of the structures at ``places`` and of the refcount blocks, each as often as something claims it."""
    for place in places:
        clusters = _clusters(*place, cluster_bits)
        for start in range(0, len(clusters), _CHUNK):
            yield array("Q", clusters[start : start + _CHUNK])
    for part in parts_in_use(refcount_table):
        blocks = masked(part, _aligned(REFCOUNT_TABLE_OFFSET_MASK, cluster_bits), cluster_bits)
        # Nothing can be written where an impossible entry points, and nothing is read from there.
        yield array("Q", (block for block in blocks if 0 < block < MAX_HOST_OFFSET >> cluster_bits))


def _clusters_of_tables(l1_table: Table, cluster_bits: int) -> Iterator[array[int]]:
    """Those of the L2 tables; several L1 entries may name the same one."""
    for part in parts_in_use(l1_table):
        clusters = set(masked(part, _aligned(OFFSET_MASK, cluster_bits), cluster_bits))
        clusters.discard(0)
        yield array("Q", clusters)


def _aligned(mask: int, cluster_bits: int) -> int:
    return mask >> cluster_bits << cluster_bits


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
