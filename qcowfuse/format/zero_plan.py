"""What zeroing or discarding whole clusters does to their L2 entries, as a pure function.

1. A zeroed range always reads as zeroes afterwards, whatever the backing file holds: discard is write zeroes
   with the leave to give space back.
2. ``unmap`` True: the cluster is let go. False: a cluster that is owned alone keeps its place and is only flagged.
   Shared and compressed clusters are let go in either case.
3. Version 3 has a zero flag. Version 2 has none: there an entry may only become 0, and only where nothing below
   can show through (``may_fall_through``). Version 1 gives nothing back: its clusters are overwritten.
4. What reads as zeroes may own host clusters all the same, and a discard gives those back too. Whether it does is
   told from all entries at once, as one large number, because most zeroes own nothing.

Source: QEMU's discard_in_l2_slice() and zero_in_l2_slice().
"""

from __future__ import annotations

import sys
from array import array

from .entries import READS_ZERO, ClusterKind, EntryFormat
from .presence import n_owned
from .subclusters import ALL_ZERO, check_entry


def can_zero_by_entry(entry_format: EntryFormat, *, may_fall_through: bool) -> bool:
    """Whether an L2 entry of this format can say "zeroes"; if not, zeroes have to be written."""
    return entry_format.version >= 3 or (entry_format.version == 2 and may_fall_through)


def clusters_to_give_back(
    entries: array[int], entry_format: EntryFormat, index: int, n_clusters: int
) -> tuple[int, int]:
    """Of ``n_clusters`` entries from ``index`` on: how many do not own a host cluster before the first one does, and
    how many do from there on. The second number is 0 where none does."""
    words = entry_format.words
    part = entries[index * words : (index + n_clusters) * words]
    owns = entry_format.cluster_mask | entry_format.compressed
    found = int.from_bytes(part.tobytes(), "little") & int.from_bytes(
        (owns.to_bytes(8, sys.byteorder) + bytes(8 * (words - 1))) * n_clusters, "little"
    )
    if not found:
        return n_clusters, 0
    first = ((found & -found).bit_length() - 1) // (64 * words)
    end = first + 1
    while end < n_clusters and part[end * words] & owns:
        end += 1
    return first, end - first


def discard_owned(
    entries: array[int], entry_format: EntryFormat, index: int, n_clusters: int
) -> list[tuple[int, int]] | None:
    """What :func:`zero_clusters` does with ``unmap``, for a tenth of the time, where all clusters are owned alone,
    with data or zeroes: host offset and number of the clusters that are let go, in runs. None, and nothing is
    changed, where some are not."""
    if n_owned(entries, entry_format, index, n_clusters) < n_clusters:
        return None
    part = entries[index : index + n_clusters]
    cluster_size = 1 << entry_format.cluster_bits
    runs: list[tuple[int, int]] = []
    first = expected = part[0]
    for entry in part:
        if entry != expected:
            runs.append((first & entry_format.offset_mask, expected - first >> entry_format.cluster_bits))
            first = expected = entry
        expected += cluster_size
    runs.append((first & entry_format.offset_mask, expected - first >> entry_format.cluster_bits))
    zero = READS_ZERO if entry_format.version >= 3 else 0
    entries[index : index + n_clusters] = array("Q", [zero]) * n_clusters
    return runs


def zero_clusters(
    entries: array[int], entry_format: EntryFormat, index: int, n_clusters: int, *, unmap: bool
) -> list[int]:
    """Make ``n_clusters`` entries from ``index`` on read as zeroes; gives the first words of those entries that let
    go of host clusters. Raises CorruptImageError before anything is changed.
    """
    if entry_format.is_extended:
        return _zero_extended(entries, entry_format, index, n_clusters, unmap=unmap)
    for number in range(index, index + n_clusters):
        entry_format.classify(entries[number])
    let_go = []
    zero = READS_ZERO if entry_format.version >= 3 else 0
    owned = entry_format.copied
    for number in range(index, index + n_clusters):
        entry = entries[number]
        keeps = zero and not unmap and not entry & entry_format.compressed
        if keeps and entry & owned and entry & entry_format.cluster_mask:
            entries[number] = entry | zero
            continue
        if entry_format.classify(entry) is ClusterKind.COMPRESSED or entry & entry_format.cluster_mask:
            let_go.append(entry)
        entries[number] = zero
    return let_go


def _zero_extended(
    entries: array[int], entry_format: EntryFormat, index: int, n_clusters: int, *, unmap: bool
) -> list[int]:
    for number in range(index, index + n_clusters):
        check_entry(entries[2 * number], entries[2 * number + 1], entry_format)
    let_go = []
    for number in range(index, index + n_clusters):
        entry = entries[2 * number]
        has_cluster = bool(entry & (entry_format.compressed | entry_format.cluster_mask))
        keeps = not unmap and entry & entry_format.copied and not entry & entry_format.compressed
        if has_cluster and not keeps:
            let_go.append(entry)
            entry = 0
        entries[2 * number] = entry if has_cluster else 0
        entries[2 * number + 1] = ALL_ZERO
    return let_go
