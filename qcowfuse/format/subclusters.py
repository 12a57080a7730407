"""Extended L2 entries: clusters of 32 subclusters, each allocated, zero or neither on its own.

1. An entry is two words in the slice's array: the standard entry and a bitmap, bits 0 to 31 "allocated", bits 32 to
   63 "reads as zeroes", never both for one subcluster. Bit 0 of the first word, the zero flag of standard entries,
   means nothing here, and neither does the bitmap of a compressed cluster; both should be 0, and are passed over.
2. A subcluster that is allocated lies at its own place inside the host cluster; one that is neither falls through
   to the backing chain even where the host cluster exists.
3. A write fills whole subclusters: the ones it touches, no more, as long as the host cluster is owned alone or
   absent. A shared or compressed cluster is copied as a whole.

Source: qcow2 specification, "Extended L2 Entries"; QEMU's qcow2_get_subcluster_type().
"""

from __future__ import annotations

from array import array

from ..errors import CorruptImageError
from .cow_plan import MAX_CLUSTERS_PER_ALLOCATION, Action, CowPlan
from .entries import MAX_HOST_OFFSET, ClusterKind, EntryFormat
from .extents import Run

SUBCLUSTERS = 32
SUBCLUSTER_BITS = 5
ALL_ALLOCATED = (1 << 32) - 1
ALL_ZERO = ALL_ALLOCATED << 32


def _mask(first: int, end: int) -> int:
    """Bits ``first`` to ``end`` (exclusive)."""
    return (1 << end) - (1 << first)


def check_entry(entry: int, bitmap: int, entry_format: EntryFormat) -> None:
    """Raises CorruptImageError for an entry that no valid image holds."""
    host_offset = entry & entry_format.offset_mask
    if entry & entry_format.compressed:
        if entry_format.has_data_file:
            raise CorruptImageError("L2 entry", None, f"{entry:#018x}: compressed, with an external data file")
        return
    if host_offset & ((1 << entry_format.cluster_bits) - 1) or host_offset >= MAX_HOST_OFFSET:
        raise CorruptImageError("L2 entry", None, f"{entry:#018x}: host offset is not cluster aligned")
    if bitmap & bitmap >> 32 & ALL_ALLOCATED:
        raise CorruptImageError("L2 entry", None, f"{bitmap:#018x}: subclusters both allocated and zero")
    if bitmap & ALL_ALLOCATED and not entry & entry_format.cluster_mask:
        raise CorruptImageError("L2 entry", None, f"{bitmap:#018x}: allocated subclusters without a cluster")


def _kind(bitmap: int, subcluster: int) -> ClusterKind:
    if bitmap >> subcluster & 1:
        return ClusterKind.DATA
    return ClusterKind.ZERO if bitmap >> 32 + subcluster & 1 else ClusterKind.UNALLOCATED


def lookup_run_extended(
    entries: array[int], entry_format: EntryFormat, index: int, in_cluster: int, n_bytes: int
) -> Run:
    """As :func:`~qcowfuse.format.extents.lookup_run`, for extended entries; ``index`` counts entries."""
    cluster_bits = entry_format.cluster_bits
    cluster_size = 1 << cluster_bits
    shift = cluster_bits - SUBCLUSTER_BITS
    entry, bitmap = entries[2 * index], entries[2 * index + 1]
    check_entry(entry, bitmap, entry_format)
    end = in_cluster + n_bytes
    if entry & entry_format.compressed:
        return Run(ClusterKind.COMPRESSED, entry, min(cluster_size, end) - in_cluster)
    subcluster = in_cluster >> shift
    kind = _kind(bitmap, subcluster)
    host_offset = entry & entry_format.offset_mask
    n_entries = len(entries) // 2
    covered = subcluster + 1 << shift
    while covered < end:
        subcluster += 1
        if subcluster == SUBCLUSTERS:
            index += 1
            if index == n_entries:
                break
            following, bitmap = entries[2 * index], entries[2 * index + 1]
            check_entry(following, bitmap, entry_format)
            if following & entry_format.compressed:
                break
            if kind is ClusterKind.DATA and following & entry_format.offset_mask != host_offset + covered:
                break
            subcluster = 0
        if _kind(bitmap, subcluster) is not kind:
            break
        covered += 1 << shift
    value = host_offset + in_cluster if kind is ClusterKind.DATA else 0
    return Run(kind, value, min(covered, end) - in_cluster)


def plan_write_extended(
    entries: array[int], entry_format: EntryFormat, index: int, in_cluster: int, n_bytes: int
) -> CowPlan:
    """As :func:`~qcowfuse.format.cow_plan.plan_write`, for extended entries.

    IN_PLACE: all touched subclusters are allocated in contiguous owned clusters. REUSE: one owned cluster, of which
    some touched subclusters are not allocated yet. ALLOCATE: clusters without a host cluster together, a shared or
    compressed one alone and whole.
    """
    cluster_bits = entry_format.cluster_bits
    cluster_size = 1 << cluster_bits
    shift = cluster_bits - SUBCLUSTER_BITS
    sub_mask = (1 << shift) - 1
    entry, bitmap = entries[2 * index], entries[2 * index + 1]
    check_entry(entry, bitmap, entry_format)
    host_offset = 0 if entry & entry_format.compressed else entry & entry_format.offset_mask
    has_cluster = bool(entry & entry_format.cluster_mask and not entry & entry_format.compressed)
    served = min(n_bytes, cluster_size - in_cluster)
    first, last = in_cluster >> shift, (in_cluster + served - 1) >> shift
    if has_cluster and entry & entry_format.copied:
        touched = _mask(first, last + 1)
        if bitmap & touched == touched:
            return _in_place(entries, entry_format, index, in_cluster, n_bytes, host_offset)
        head = 0 if bitmap >> first & 1 else in_cluster & sub_mask
        tail = 0 if bitmap >> last & 1 else -(in_cluster + served) & sub_mask
        return CowPlan(Action.REUSE, 1, host_offset, head, served, tail)
    if has_cluster or entry & entry_format.compressed:
        return CowPlan(Action.ALLOCATE, 1, 0, in_cluster, served, cluster_size - in_cluster - served)
    wanted = min((in_cluster + n_bytes + cluster_size - 1) >> cluster_bits, len(entries) // 2 - index)
    n_clusters = 1
    while n_clusters < min(wanted, MAX_CLUSTERS_PER_ALLOCATION):
        following = entries[2 * (index + n_clusters)]
        check_entry(following, entries[2 * (index + n_clusters) + 1], entry_format)
        if following & (entry_format.compressed | entry_format.cluster_mask):
            break
        n_clusters += 1
    served = min(n_bytes, (n_clusters << cluster_bits) - in_cluster)
    return CowPlan(Action.ALLOCATE, n_clusters, 0, in_cluster & sub_mask, served, -(in_cluster + served) & sub_mask)


def _in_place(
    entries: array[int], entry_format: EntryFormat, index: int, in_cluster: int, n_bytes: int, host_offset: int
) -> CowPlan:
    cluster_bits = entry_format.cluster_bits
    shift = cluster_bits - SUBCLUSTER_BITS
    end = in_cluster + n_bytes
    n_clusters = 1
    while n_clusters << cluster_bits < end and 2 * (index + n_clusters) < len(entries):
        entry, bitmap = entries[2 * (index + n_clusters)], entries[2 * (index + n_clusters) + 1]
        check_entry(entry, bitmap, entry_format)
        left = min(end - (n_clusters << cluster_bits), 1 << cluster_bits)
        touched = _mask(0, (left - 1 >> shift) + 1)
        if (
            entry & entry_format.compressed
            or not entry & entry_format.copied
            or entry & entry_format.offset_mask != host_offset + (n_clusters << cluster_bits)
            or bitmap & touched != touched
        ):
            break
        n_clusters += 1
    served = min(n_bytes, (n_clusters << cluster_bits) - in_cluster)
    return CowPlan(Action.IN_PLACE, n_clusters, host_offset, 0, served, 0)


def link_extended(
    entries: array[int],
    entry_format: EntryFormat,
    index: int,
    *,
    host_offset: int,
    in_cluster: int,
    n_bytes: int,
) -> None:
    """Make the subclusters of ``n_bytes`` from byte ``in_cluster`` of the cluster at ``index`` allocated in the
    contiguous host clusters from ``host_offset`` on. The range must be whole subclusters, but for those at its ends
    that are allocated already."""
    cluster_bits = entry_format.cluster_bits
    cluster_size = 1 << cluster_bits
    shift = cluster_bits - SUBCLUSTER_BITS
    while n_bytes > 0:
        here = min(n_bytes, cluster_size - in_cluster)
        touched = _mask(in_cluster >> shift, (in_cluster + here - 1 >> shift) + 1)
        bitmap = 0 if entries[2 * index] & entry_format.compressed else entries[2 * index + 1]
        entries[2 * index] = host_offset | entry_format.copied
        entries[2 * index + 1] = (bitmap | touched) & ~(touched << 32)
        n_bytes -= here
        in_cluster = 0
        index += 1
        host_offset += cluster_size
