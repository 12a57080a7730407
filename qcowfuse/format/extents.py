"""Extents: runs of guest bytes that are read or written the same way.

1. A run never reaches beyond what was asked for, and never beyond one L2 slice.
2. Runs of data clusters that lie back to back in the host file are one run: one system call later.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import NamedTuple

from .entries import ClusterKind, EntryFormat

MISS = -1
"""Kind of a run whose L2 slice is not in memory."""


class Run(NamedTuple):
    """``n_bytes`` of guest bytes of one ``kind`` (a ClusterKind, or MISS).

    ``value`` is the host offset of the first byte for DATA and ENCRYPTED, the L2 entry for COMPRESSED, else 0.
    """

    kind: int
    value: int
    n_bytes: int


class Extent(NamedTuple):
    """A run after the backing chain was resolved: ``layer`` is the index of the layer that holds the bytes."""

    kind: int
    layer: int
    value: int
    guest_offset: int
    n_bytes: int


def clipped(extents: Iterable[Extent], guest_offset: int, n_bytes: int) -> list[Extent]:
    """What of ``extents`` lies in a guest range."""
    end = guest_offset + n_bytes
    found = []
    for extent in extents:
        first = max(extent.guest_offset, guest_offset)
        n_here = min(extent.guest_offset + extent.n_bytes, end) - first
        if n_here > 0:
            # A compressed cluster is named by its entry, whatever part of it is wanted.
            has_place = extent.kind == ClusterKind.DATA or extent.kind == ClusterKind.ENCRYPTED
            value = extent.value + first - extent.guest_offset if has_place else extent.value
            found.append(Extent(extent.kind, extent.layer, value, first, n_here))
    return found


def lookup_run(entries: array[int], entry_format: EntryFormat, index: int, in_cluster: int, n_bytes: int) -> Run:
    """The run at byte ``in_cluster`` of the cluster of ``entries[index]``, at most ``n_bytes`` long.

    Raises CorruptImageError for an impossible entry.
    """
    cluster_size = 1 << entry_format.cluster_bits
    entry = entries[index]
    end = in_cluster + n_bytes
    covered = cluster_size
    n_entries = len(entries)
    not_plain = entry_format.not_plain
    offset_mask = entry_format.offset_mask
    host_offset = entry & offset_mask
    if not entry & not_plain and host_offset:
        entry_format.classify(entry)
        expected = host_offset + cluster_size
        while covered < end:
            index += 1
            if index == n_entries:
                break
            entry = entries[index]
            if entry & not_plain or entry & offset_mask != expected:
                break
            expected += cluster_size
            covered += cluster_size
        return Run(ClusterKind.DATA, host_offset + in_cluster, min(covered, end) - in_cluster)
    kind = entry_format.classify(entry)
    if kind is ClusterKind.COMPRESSED:
        return Run(kind, entry, min(cluster_size, end) - in_cluster)
    if kind is ClusterKind.DATA:  # host offset 0, with an external data file
        return Run(kind, in_cluster, min(cluster_size, end) - in_cluster)
    while covered < end:
        index += 1
        if index == n_entries:
            break
        following = entries[index]
        if following != entry and (not kind or entry_format.classify(following) is not kind):
            break
        covered += cluster_size
    return Run(kind, 0, min(covered, end) - in_cluster)


def count_data(entries: array[int], entry_format: EntryFormat, *, needs_holes: bool) -> int | None:
    """How many clusters of a slice of standard entries hold data, at C speed; None where this does not tell, also
    because some are unallocated and it matters which (``needs_holes``)."""
    if entry_format.is_extended:
        return None
    n_unallocated = entries.count(0)
    if n_unallocated and needs_holes:
        return None
    if entry_format.version == 1:
        return len(entries) - n_unallocated
    # Of each entry the byte with the zero flag and the byte with the compressed flag, as numbers of many bytes.
    raw = entries.tobytes()
    low, high = (0, 7) if sys.byteorder == "little" else (7, 0)
    zero = int.from_bytes(raw[low::8], "big")
    compressed = int.from_bytes(raw[high::8], "big") >> 6
    n_zero = (zero & ~compressed & int.from_bytes(b"\1" * len(entries), "big")).bit_count()
    return len(entries) - n_unallocated - n_zero
