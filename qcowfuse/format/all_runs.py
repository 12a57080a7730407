"""All runs of an L2 table or slice at once, by arithmetic on its words as one number: for tools that go through all.

1. Neighbours are one run where both are not allocated, or zeroes without a host cluster, or compressed, or where both
   are data, or both zeroes, and their host clusters lie back to back. No run could be longer.
2. A slice in which any entry is impossible, or has more than its word says (extended entries, an external data file),
   is left to those that look at entries one by one.
"""

from __future__ import annotations

import sys
from array import array
from functools import lru_cache
from itertools import compress
from typing import NamedTuple

from .entries import COMPRESSED, MAX_HOST_OFFSET, READS_ZERO, EntryFormat

_WORD_BITS = 64
_TO_FLAG = bytes([0, *[1] * 255])


class AllRuns(NamedTuple):
    """``firsts``: the index of the first entry of each run; ``words``: what it is. 0: not allocated; COMPRESSED, and
    nothing else; host offset and READS_ZERO, or one of them."""

    firsts: array[int]
    words: array[int]


def all_runs(entries: array[int], entry_format: EntryFormat) -> AllRuns | None:
    """The runs of a slice; None where rule 2 says so."""
    if entry_format.is_extended or entry_format.has_data_file:
        return None
    n_entries = len(entries)
    number = _as_number(entries)
    if not number:
        return AllRuns(array("I", [0]), array("Q", [0]))
    compressed = number >> entry_format.compressed.bit_length() - 1 & _repeated(1, n_entries)
    if compressed:
        number ^= number & (compressed << _WORD_BITS) - compressed
    place = entry_format.offset_mask & MAX_HOST_OFFSET - 1
    refused = entry_format.misaligned | entry_format.offset_mask ^ place
    if entry_format.version > 1 and not entry_format.reads_zero:
        refused |= READS_ZERO
    if number & _repeated(refused, n_entries):
        return None
    n_pairs = n_entries - 1
    pairs = (1 << _WORD_BITS * n_pairs) - 1
    words = number & _repeated(place | entry_format.reads_zero, n_entries)
    if compressed:
        words |= compressed << COMPRESSED.bit_length() - 1
    before, following = words & pairs, words >> _WORD_BITS
    is_ascending = following ^ before + _repeated(1 << entry_format.cluster_bits, n_pairs)
    is_placed = _flags(before & _repeated(place, n_pairs), n_pairs)
    every_flag = _every_flag(n_pairs)
    if not is_ascending and is_placed == every_flag:
        return AllRuns(array("I", [0]), array("Q", [words & (1 << _WORD_BITS) - 1]))
    differs = _flags(is_ascending, n_pairs) & is_placed
    if is_placed != every_flag:
        differs |= _flags(following ^ before, n_pairs) & (is_placed ^ every_flag)
    is_first = b"\1" + differs.to_bytes(n_pairs, "little")
    firsts = array("I", compress(range(n_entries), is_first))
    return AllRuns(firsts, array("Q", compress(_as_words(words, n_entries), is_first)))


def ascending_runs(numbers: array[int]) -> array[int]:
    """The index of the first of each run of numbers below 2**63 that are each one more than the one before."""
    if not numbers:
        return array("I")
    n_pairs = len(numbers) - 1
    is_first = b"\1" + _jumps(numbers).to_bytes(n_pairs, "little")
    return array("I", compress(range(n_pairs + 1), is_first))


def n_ascending_runs(numbers: array[int]) -> int:
    """How many there are, in less time."""
    return 1 + _jumps(numbers).bit_count() if numbers else 0


def _jumps(numbers: array[int]) -> int:
    """A byte of 1 for each number but the first that is not one more than the one before, else of 0."""
    n_pairs = len(numbers) - 1
    number = _as_number(numbers)
    before = number & (1 << _WORD_BITS * n_pairs) - 1
    differs = number >> _WORD_BITS ^ before + _repeated(1, n_pairs)
    return _flags(differs, n_pairs) if differs else 0


@lru_cache(maxsize=32)
def _repeated(word: int, n_words: int) -> int:
    """The same word for each."""
    return int.from_bytes(word.to_bytes(8, "little") * n_words, "little")


@lru_cache(maxsize=8)
def _every_flag(n_words: int) -> int:
    return int.from_bytes(b"\1" * n_words, "little")


def _flags(number: int, n_words: int) -> int:
    """A byte of 1 for each word that is not 0, else of 0."""
    for shift in (32, 16, 8):
        number |= number >> shift  # what comes from the next word never gets to the lowest byte
    return int.from_bytes(number.to_bytes(8 * n_words, "little")[::8].translate(_TO_FLAG), "little")


def _as_number(entries: array[int]) -> int:
    """The first entry is the lowest word."""
    if sys.byteorder == "big":
        entries = entries[:]
        entries.byteswap()
    return int.from_bytes(entries.tobytes(), "little")


def _as_words(number: int, n_words: int) -> array[int]:
    words = array("Q", number.to_bytes(8 * n_words, "little"))
    if sys.byteorder == "big":
        words.byteswap()
    return words
