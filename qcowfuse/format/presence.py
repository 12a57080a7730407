"""Which part of an L2 slice holds data, reads as zeroes or is not allocated: one run of it, found at C speed.

1. A run is of one kind, UNALLOCATED, ZERO or DATA, wherever the clusters lie; compressed and encrypted clusters are
   DATA. It never reaches beyond what was asked for or beyond the slice, and may end before its kind does.
2. The first entry of a run is judged as everywhere else, and found corrupt. A run ends before an entry that may be
   corrupt.
3. The entries that follow are looked at in bulk: a comparison with the first one repeated, then byte by byte of all
   the words that must have some bits set and others clear. Only data that is not owned alone (of snapshots, and of
   version 1) is looked at entry by entry: 60 ns each.
"""

from __future__ import annotations

import sys
from array import array
from functools import lru_cache

from .entries import COPIED, MAX_HOST_OFFSET, READS_ZERO, ClusterKind, EntryFormat
from .short_runs import short_run
from .subclusters import ALL_ALLOCATED, ALL_ZERO, SUBCLUSTER_BITS, SUBCLUSTERS, check_entry

_FIRST_LOOK = 64
"""Entries: most runs of a fragmented slice are shorter than this."""
_OWNED_WITHOUT_PLACE = COPIED.to_bytes(8, "little")
_ZERO_WITHOUT_PLACE = (COPIED | READS_ZERO).to_bytes(8, "little")


def presence_run(
    entries: array[int], entry_format: EntryFormat, index: int, in_cluster: int, n_bytes: int
) -> tuple[ClusterKind, int, bool]:
    """The kind of the bytes from byte ``in_cluster`` of the cluster of entry ``index`` on; how many of ``n_bytes``,
    at least one, are of that kind; and whether it is known that data follows a hole, or a hole (zeroes, or not
    allocated) data. Raises CorruptImageError."""
    cluster_bits = entry_format.cluster_bits
    end = in_cluster + n_bytes
    n_wanted = end + (1 << cluster_bits) - 1 >> cluster_bits
    n_there = len(entries) // entry_format.words - index
    if n_wanted > n_there:
        n_wanted = n_there
    short = short_run(entries, entry_format, index, n_wanted)
    if short is not None:
        kind, n_alike, is_followed = short
        covered = n_alike << cluster_bits
        return kind, (end if covered > end else covered) - in_cluster, is_followed
    if entry_format.is_extended:
        return *_extended_run(entries, entry_format, index, in_cluster, n_bytes), False
    entry = entries[index]
    kind = entry_format.classify(entry)
    is_compressed = kind is ClusterKind.COMPRESSED
    if is_compressed:
        kind = ClusterKind.DATA
    n_alike = 1
    look = _FIRST_LOOK
    while n_alike < n_wanted:
        start = index + n_alike
        part = entries[start : start + min(look, n_wanted - n_alike)]
        n_found = _n_like(entry, part, entry_format, kind, is_compressed=is_compressed)
        n_alike += n_found
        if n_found < len(part):
            break
        look = n_wanted
    return kind, min(n_alike << cluster_bits, end) - in_cluster, False


def n_without(entries: array[int], entry_format: EntryFormat, bits: int, index: int, n_clusters: int) -> int:
    """How many of ``n_clusters`` entries from ``index`` on have none of ``bits`` in their first word, up to one that
    has."""
    words = entry_format.words
    n_found = 0
    look = _FIRST_LOOK
    while n_found < n_clusters:
        start = index + n_found
        part = entries[words * start : words * (start + min(look, n_clusters - n_found)) : words]
        if part[0] & bits:
            break
        first = _little_endian(part)
        n_here = _n_repeated(first, part[0])
        if n_here < len(part):
            n_here = _n_matching(first, 0, bits)
        n_found += n_here
        if n_here < len(part):
            break
        look = n_clusters
    return n_found


def n_owned(entries: array[int], entry_format: EntryFormat, index: int, n_clusters: int) -> int:
    """How many of ``n_clusters`` standard entries from ``index`` on have a cluster that is owned alone, with data or
    zeroes, up to one that has not."""
    if entry_format.version == 1 or entry_format.is_extended or entry_format.has_data_file:
        return 0
    words = _little_endian(entries[index : index + n_clusters])
    n_found = _n_matching(words, COPIED, entry_format.not_plain & ~entry_format.reads_zero)
    return min(_before_missing(words, n_found), _before_missing(words, n_found, _ZERO_WITHOUT_PLACE))


def _n_like(
    entry: int, part: array[int], entry_format: EntryFormat, kind: ClusterKind, *, is_compressed: bool
) -> int:
    """How many entries at the start of ``part`` follow ``entry``, of ``kind``."""
    words = _little_endian(part)
    if part[0] == entry:
        n_same = _n_repeated(words, entry)
        if n_same or kind is ClusterKind.UNALLOCATED:
            return n_same
    if kind is ClusterKind.UNALLOCATED:
        return 0  # flags alone: the next look goes on from there
    if is_compressed:
        return _n_matching(words, entry_format.compressed, 0)
    stop = entry_format.not_plain
    if kind is ClusterKind.ZERO:
        return _n_matching(words, entry_format.reads_zero, stop & ~entry_format.reads_zero)
    if entry & entry_format.copied:
        n_found = _n_matching(words, COPIED, stop)
        if entry_format.has_data_file:
            return n_found
        return _before_missing(words, n_found)
    if entry_format.version == 1:
        stop |= MAX_HOST_OFFSET * ((1 << 7) - 1)
    has_place = entry_format.cluster_mask
    for number, following in enumerate(part):
        if following & stop or not following & has_place:
            return number
    return len(part)


def _extended_run(
    entries: array[int], entry_format: EntryFormat, index: int, in_cluster: int, n_bytes: int
) -> tuple[ClusterKind, int]:
    cluster_bits = entry_format.cluster_bits
    shift = cluster_bits - SUBCLUSTER_BITS
    entry, bitmap = entries[2 * index], entries[2 * index + 1]
    check_entry(entry, bitmap, entry_format)
    end = in_cluster + n_bytes
    is_compressed = bool(entry & entry_format.compressed)
    if is_compressed:
        kind, covered = ClusterKind.DATA, 1 << cluster_bits
    else:
        subcluster = in_cluster >> shift
        allocated, zero = bitmap & ALL_ALLOCATED, bitmap >> SUBCLUSTERS
        if allocated >> subcluster & 1:
            kind, others = ClusterKind.DATA, ~allocated
        elif zero >> subcluster & 1:
            kind, others = ClusterKind.ZERO, ~zero
        else:
            kind, others = ClusterKind.UNALLOCATED, allocated | zero
        others = (others | 1 << SUBCLUSTERS) >> subcluster
        covered = subcluster + (others & -others).bit_length() - 1 << shift
    n_wanted = min(end + (1 << cluster_bits) - 1 >> cluster_bits, len(entries) // 2 - index)
    if covered == 1 << cluster_bits:
        n_alike = 1
        look = _FIRST_LOOK
        while n_alike < n_wanted:
            start, stop = 2 * (index + n_alike), 2 * (index + min(n_alike + look, n_wanted))
            words, bitmaps = entries[start:stop:2], entries[start + 1 : stop : 2]
            n_found = _n_like_extended(entry, words, bitmaps, entry_format, kind, is_compressed=is_compressed)
            n_alike += n_found
            if n_found < len(words):
                break
            look = n_wanted
        covered = n_alike << cluster_bits
    return kind, min(covered, end) - in_cluster


def _n_like_extended(
    entry: int,
    part: array[int],
    bitmaps: array[int],
    entry_format: EntryFormat,
    kind: ClusterKind,
    *,
    is_compressed: bool,
) -> int:
    """How many whole clusters at the start are of ``kind``; less where telling takes more than a look at bytes."""
    words = _little_endian(part)
    if is_compressed:
        return _n_matching(words, entry_format.compressed, 0)
    stop = entry_format.compressed | entry_format.misaligned
    if kind is ClusterKind.DATA:
        n_found = _n_repeated(_little_endian(bitmaps), ALL_ALLOCATED)
        if entry & entry_format.copied:
            n_found = min(n_found, _n_matching(words, COPIED, stop | READS_ZERO))  # a bit that should be 0
            return n_found if entry_format.has_data_file else _before_missing(words, n_found)
        has_place = entry_format.cluster_mask
        for number in range(n_found):
            if part[number] & stop or not part[number] & has_place:
                return number
        return n_found
    bitmap = ALL_ZERO if kind is ClusterKind.ZERO else 0
    return min(_n_repeated(_little_endian(bitmaps), bitmap), _n_matching(words, 0, stop))


def _little_endian(part: array[int]) -> bytes:
    if sys.byteorder == "big":
        part = part[:]
        part.byteswap()
    return part.tobytes()


@lru_cache(maxsize=16)
def _repeated(word: int, n_bytes: int) -> bytes:
    return word.to_bytes(8, "little") * (n_bytes // 8)


def _n_repeated(words: bytes, word: int) -> int:
    """How many words at the start are ``word``."""
    expected = word.to_bytes(8, "little")
    if len(words) <= 8 * _FIRST_LOOK or words[:8] != expected:
        pattern = expected * (len(words) // 8)
    else:
        pattern = _repeated(word, len(words))
    if words == pattern:
        return len(words) // 8
    low, high = 0, len(words)  # all is alike up to low, but not up to high
    while high - low > 8:
        middle = (low + high) // 16 * 8
        if words[low:middle] == pattern[low:middle]:
            low = middle
        else:
            high = middle
    return low // 8


@lru_cache(maxsize=64)
def _columns(must_be_set: int, must_be_clear: int) -> tuple[tuple[int, bytes], ...]:
    """For each byte of a word that matters, a table that makes 1 of what is wrong there, else 0."""
    columns = []
    for place in range(8):
        wanted, unwanted = must_be_set >> 8 * place & 0xFF, must_be_clear >> 8 * place & 0xFF
        if wanted | unwanted:
            columns.append((place, bytes(value & wanted != wanted or bool(value & unwanted) for value in range(256))))
    return tuple(columns)


def _n_matching(words: bytes, must_be_set: int, must_be_clear: int) -> int:
    """How many words at the start have all of the one bits and none of the others."""
    n_found = len(words) // 8
    for place, wrong in _columns(must_be_set, must_be_clear):
        first = words[place : 8 * n_found : 8].translate(wrong).find(1)
        if first >= 0:
            n_found = first
    return n_found


def _before_missing(words: bytes, n_words: int, without_place: bytes = _OWNED_WITHOUT_PLACE) -> int:
    """How many of ``n_words`` words that all have the COPIED flag come before one without an offset. No other place
    looks the same: the flags of the word before are among the eight bytes there."""
    place = words.find(without_place, 0, 8 * n_words)
    return n_words if place < 0 else place // 8
