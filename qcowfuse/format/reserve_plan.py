"""What setting space aside finds in L2 entries, and what it makes of them, as pure functions.

1. An entry owns its cluster when it refers to one that is not compressed and that nobody else refers to.
2. A cluster that is set aside reads as before: by the zero flag; without one (versions 1 and 2) the host cluster
   holds zeroes; extended entries keep their bitmap, and show what is below where neither of its bits is set.

``index`` counts entries. Each raises CorruptImageError for an impossible entry.
"""

from __future__ import annotations

from array import array

from .entries import EntryFormat
from .subclusters import check_entry


def _has_cluster(entries: array[int], entry_format: EntryFormat, index: int) -> bool:
    entry = entries[index * entry_format.words]
    if entry_format.is_extended:
        check_entry(entry, entries[2 * index + 1], entry_format)
    else:
        entry_format.classify(entry)
    return bool(entry & entry_format.cluster_mask) and not entry & entry_format.compressed


def _is_owned(entries: array[int], entry_format: EntryFormat, index: int) -> bool:
    entry = entries[index * entry_format.words]
    return entry & entry_format.copied == entry_format.copied and _has_cluster(entries, entry_format, index)


def owned_run(entries: array[int], entry_format: EntryFormat, index: int, n_clusters: int) -> tuple[int, int]:
    """The host offset, and how many clusters from ``index`` on are owned and contiguous there, which may be 0."""
    host_offset = entries[index * entry_format.words] & entry_format.offset_mask
    number = 0
    while number < n_clusters and _is_owned(entries, entry_format, index + number):
        here = entries[(index + number) * entry_format.words] & entry_format.offset_mask
        if here != host_offset + (number << entry_format.cluster_bits):
            break
        number += 1
    return host_offset, number


def n_not_owned(entries: array[int], entry_format: EntryFormat, index: int, n_clusters: int) -> int:
    """How many clusters from ``index`` on are not owned."""
    for number in range(n_clusters):
        if _is_owned(entries, entry_format, index + number):
            return number
    return n_clusters


def n_absent(entries: array[int], entry_format: EntryFormat, index: int, n_clusters: int) -> int:
    """How many entries from ``index`` on refer to no cluster at all."""
    for number in range(n_clusters):
        here = index + number
        if _has_cluster(entries, entry_format, here) or entries[here * entry_format.words] & entry_format.compressed:
            return number
    return n_clusters


def reserve_clusters(
    entries: array[int], entry_format: EntryFormat, index: int, n_clusters: int, host_offset: int
) -> list[int]:
    """Put contiguous host clusters from ``host_offset`` on below entries that read as zeroes (extended: that refer to
    no data); gives the first words of those that let go of another one."""
    words = entry_format.words
    flag = 0 if entry_format.is_extended else entry_format.reads_zero
    let_go = []
    for number in range(n_clusters):
        place = (index + number) * words
        if entries[place] & entry_format.cluster_mask:
            let_go.append(entries[place])
        entries[place] = entry_format.data_entry(host_offset + (number << entry_format.cluster_bits)) | flag
    return let_go
