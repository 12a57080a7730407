"""Runs of standard L2 entries, found and changed at C speed by tools that go through all of them.

1. Entries are looked at as one number of many bytes: clusters that lie back to back, with the same flags, are a ramp
   plus the first entry in each place.
2. A look covers eight times as many entries as the one before, so that a short run costs little, and a table that is
   one run a handful of looks. Runs of less than :data:`MANY` are not looked for.
"""

from __future__ import annotations

import sys
from array import array
from functools import lru_cache

from .entries import COPIED, OFFSET_MASK

MANY = 8
_MOST_WORDS = 1 << 15
_WITHOUT_COPIED = bytes(value & ~(COPIED >> 56) for value in range(256))


def _n_ascending(words: array[int], index: int, step: int) -> int:
    """How many words from ``index`` on are each ``step`` (above 0) more than the one before: at least one."""
    first = words[index]
    n_found, look = 1, MANY
    n_left = len(words) - index
    if first + n_left * step >> 64:
        return 1  # a number that does not fit into a word would be taken for its neighbour's
    while n_found < n_left:
        n_here = min(look, n_left - n_found)
        start = index + n_found
        ramp, ones = _ramp(n_here, step)
        if _as_number(words[start : start + n_here]) == ramp + (first + n_found * step) * ones:
            n_found += n_here
            look = min(8 * look, _MOST_WORDS)
        elif n_here > MANY:
            n_left = n_found + n_here
            look = max(n_here // 8, MANY)
        else:
            while n_found < n_left and words[index + n_found] == first + n_found * step:
                n_found += 1
            break
    return n_found


def n_back_to_back(entries: array[int], index: int, cluster_size: int) -> int:
    """How many clusters from that of entry ``index`` on lie back to back in the file, with the same flags; 1 where
    they are less than :data:`MANY`."""
    last = index + MANY - 1
    if last >= len(entries) or entries[last] != entries[index] + (MANY - 1) * cluster_size:
        return 1
    n_found = _n_ascending(entries, index, cluster_size)
    is_within = (entries[index] & OFFSET_MASK) + n_found * cluster_size <= OFFSET_MASK
    return n_found if n_found >= MANY and is_within else 1


def clear_copied(words: array[int], stride: int) -> bool:
    """Clear the COPIED flag of every ``stride``-th word, the first one included; whether that changed any."""
    raw = bytearray(words.tobytes())
    places = slice(7 if sys.byteorder == "little" else 0, None, 8 * stride)
    before = raw[places]
    after = before.translate(_WITHOUT_COPIED)
    if after == before:
        return False
    raw[places] = after
    words[:] = array("Q", bytes(raw))
    return True


@lru_cache(maxsize=32)
def _ramp(n_words: int, step: int) -> tuple[int, int]:
    """0, ``step``, twice ``step`` ...; and as many times 1."""
    return _as_number(array("Q", range(0, n_words * step, step))), _as_number(array("Q", [1]) * n_words)


def _as_number(words: array[int]) -> int:
    return int.from_bytes(words.tobytes(), sys.byteorder)
