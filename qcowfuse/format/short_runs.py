"""Short runs of an L2 slice, found with one regular expression over its bytes.

1. A run is found by one call into C, which costs a tenth of the looks of :mod:`.presence`; per entry it costs more,
   so that runs of more than :data:`MAX_SHORT` entries are left to those.
2. To compile the expression takes 1 ms, so that this comes after some looks: few short commands have as many.
3. Only entries that are valid for sure, and of one kind as a whole, are matched, without bits that should be 0. All
   others are left to be judged by themselves.
4. The same match tells whether data ends where a hole (zeroes, or not allocated) begins, and the other way round, by
   the same rule for the entry that follows. So a search for the end of a run takes one look.
"""

from __future__ import annotations

import re
import sys
from array import array
from functools import lru_cache

from .entries import READS_ZERO, ClusterKind, EntryFormat

MAX_SHORT = 64
COMPILED_AFTER = 32
"""Looks, at images of one format."""
_RESERVED = 0xFE
_KINDS = (
    (ClusterKind.DATA, False),
    (ClusterKind.DATA, True),
    (ClusterKind.ZERO, False),
    (ClusterKind.ZERO, True),
    (ClusterKind.UNALLOCATED, False),
    (ClusterKind.UNALLOCATED, True),
)
"""By the number of the last group that matched."""


def short_run(
    entries: array[int], entry_format: EntryFormat, index: int, n_wanted: int
) -> tuple[ClusterKind, int, bool] | None:
    """Kind and length of the run of whole clusters at ``index``, at most ``n_wanted``, and whether those wanted go on
    with a hole behind data, or with data behind a hole, for sure. None where the run may be longer than that,
    or where the first entry is no plain case; compressed clusters are DATA."""
    expression = _expression(entry_format)
    runs, shift = expression.runs, expression.shift
    if runs is None:
        expression.count()
        return None
    found = runs.match(entries, index << shift, index + n_wanted << shift)
    if found is None:
        return None
    n_found = (found.end() >> shift) - index
    if n_found == MAX_SHORT and n_found < n_wanted:
        return None
    kind, is_followed = _KINDS[(found.lastindex or 1) - 1]
    return kind, n_found, is_followed


class _Expression:
    """``runs`` is None until it is compiled, or for ever; ``shift`` is log2 of the bytes of an entry."""

    __slots__ = ("_format", "_n_asked", "runs", "shift")

    def __init__(self, entry_format: EntryFormat) -> None:
        self.runs: re.Pattern[bytes] | None = None
        self.shift = 4 if entry_format.is_extended else 3
        self._format = entry_format
        self._n_asked = 0

    def count(self) -> None:
        """One more look could have used it."""
        self._n_asked += 1
        if self._n_asked == COMPILED_AFTER and self._format.version > 1 and sys.byteorder == "little":
            self.runs = _runs(self._format)


@lru_cache(maxsize=16)
def _expression(entry_format: EntryFormat) -> _Expression:
    return _Expression(entry_format)


def _runs(entry_format: EntryFormat) -> re.Pattern[bytes]:
    """An expression with one group for each of :data:`_KINDS`; those of what is followed are empty."""
    stop = entry_format.compressed | entry_format.misaligned | _RESERVED
    place = b"(?!" + _word(0, entry_format.cluster_mask) + b")"
    data = place + _word(0, stop | READS_ZERO)
    compressed = _word(entry_format.compressed, 0)
    if entry_format.is_extended:
        stop |= READS_ZERO
        data += rb"\xff{4}\x00{4}"
        compressed += b".{8}"
        zero = _word(0, stop) + rb"\x00{4}\xff{4}"
        unallocated = _word(0, stop) + rb"\x00{8}"
    else:
        zero = _word(READS_ZERO, stop) if entry_format.reads_zero else b"(?!)"
        unallocated = rb"\x00{8}"
    if not entry_format.has_data_file:
        data = b"(?:" + data + b"|" + compressed + b")"
    hole = zero + b"|" + unallocated
    kinds = ((data, hole), (zero, data), (unallocated, data))
    runs = (b"((?:%b){1,%d})(?:(?=%b)())?" % (entry, MAX_SHORT, following) for entry, following in kinds)
    return re.compile(b"|".join(runs), re.DOTALL)


def _word(must_be_set: int, must_be_clear: int) -> bytes:
    """An expression for words, lowest byte first, that have all of the one bits and none of the others."""
    expression = b""
    for place in range(0, 64, 8):
        wanted, unwanted = must_be_set >> place & 0xFF, must_be_clear >> place & 0xFF
        if not wanted | unwanted:
            expression += b"."
            continue
        fitting = [value for value in range(256) if value & wanted == wanted and not value & unwanted]
        first = [value for value in fitting if value - 1 not in fitting]
        last = [value for value in fitting if value + 1 not in fitting]
        expression += b"[" + b"".join(rb"\x%02x-\x%02x" % ends for ends in zip(first, last, strict=True)) + b"]"
    return expression
