"""An L1 table that is read part by part when it is asked for: of layers that are never written.

1. A part that is not in memory reads as :data:`NOT_HERE`, which looks like "there is an L2 table": a caller that
   needs to know awaits :meth:`PagedTable.load` first, and plain functions need not wait.
2. All tables of a chain share one :class:`TableParts`, which bounds what they take together. A part that is all
   zero costs next to nothing.
3. Tables up to :data:`MAX_HELD` bytes, as nearly all images have them, are read as a whole and stay in memory.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import overload

from ..format.entries import parse_table
from ..format.geometry import WORD_SIZE
from ..storage.base import Storage, pread

PART_ENTRIES = 1 << 13
MAX_HELD = PART_ENTRIES * WORD_SIZE
"""Bytes of an L1 table that is read as a whole: 4 TiB of disk with clusters of 64 KiB."""
MAX_PARTS_BYTES = 16 << 20
"""Memory for parts of the tables of one chain."""
NOT_HERE = (1 << 64) - 1
_MAX_PARTS_PASSED = 64
_ZEROES = bytes(PART_ENTRIES * WORD_SIZE)
_ZERO_PART_BYTES = 256
"""What the mere knowledge of a part costs."""


class TableParts:
    """The parts in memory, by table and number; the latest ones stay. ``zeroes`` is every part that is all zero."""

    def __init__(self) -> None:
        self._parts: OrderedDict[tuple[int, int], array[int]] = OrderedDict()
        self._n_bytes = 0
        self._n_tables = 0
        self.zeroes = array("Q", _ZEROES)

    def new_table(self) -> int:
        """A number for the first half of the keys of one table."""
        self._n_tables += 1
        return self._n_tables

    def get(self, key: tuple[int, int]) -> array[int] | None:
        """The part, if it is here."""
        part = self._parts.get(key)
        if part is not None:
            self._parts.move_to_end(key)
        return part

    def is_zero(self, part: array[int]) -> bool:
        """Whether it is one of those that are known to be all zero."""
        return part is self.zeroes

    def put(self, key: tuple[int, int], part: array[int]) -> None:
        """Keep a part, and drop old ones for it."""
        if key in self._parts:
            return
        self._parts[key] = part
        self._n_bytes += self._cost(part)
        while self._n_bytes > MAX_PARTS_BYTES:
            _, dropped = self._parts.popitem(last=False)
            self._n_bytes -= self._cost(dropped)

    def _cost(self, part: array[int]) -> int:
        return _ZERO_PART_BYTES if part is self.zeroes else len(part) * WORD_SIZE + _ZERO_PART_BYTES


class PagedTable:
    """A table of ``n_entries``, of which the first ``n_stored`` stand at ``host_offset`` and the others are zero."""

    def __init__(
        self, storage: Storage, parts: TableParts, host_offset: int, n_entries: int, n_stored: int | None = None
    ) -> None:
        self._storage = storage
        self._parts = parts
        self._number = parts.new_table()
        self._host_offset = host_offset
        self._n_entries = n_entries
        self._n_stored = n_entries if n_stored is None else min(n_stored, n_entries)
        self.has_warned = False
        """For the caller that reads through the table: whether the log has said that the end of the file is lost."""

    def __len__(self) -> int:
        return self._n_entries

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> array[int]: ...
    def __getitem__(self, index: int | slice) -> int | array[int]:
        if isinstance(index, int):
            if not 0 <= index < self._n_entries:
                raise IndexError(index)
            part = self._parts.get((self._number, index // PART_ENTRIES))
            return NOT_HERE if part is None else part[index % PART_ENTRIES]
        start, stop, _ = index.indices(self._n_entries)
        found = array("Q")
        while start < stop:
            number, first = divmod(start, PART_ENTRIES)
            n_here = min(PART_ENTRIES - first, stop - start)
            part = self._parts.get((self._number, number))
            found += array("Q", [NOT_HERE]) * n_here if part is None else part[first : first + n_here]
            start += n_here
        return found

    def empty_until(self, first: int, end: int) -> int:
        """The first entry from ``first`` to ``end`` that is not zero or not in memory, ``end`` if there is none.
        Looks at a bounded number of parts: what it comes to may be zero, too."""
        index = first
        for _ in range(_MAX_PARTS_PASSED):
            if index >= end:
                break
            number, in_part = divmod(index, PART_ENTRIES)
            part = self._parts.get((self._number, number))
            if part is None:
                break
            stop = min(PART_ENTRIES, end - number * PART_ENTRIES)
            if not self._parts.is_zero(part):
                used = next((place for place in range(in_part, stop) if part[place]), None)
                if used is not None:
                    return number * PART_ENTRIES + used
            index = number * PART_ENTRIES + stop
        return index

    async def load(self, index: int) -> int:
        """The entry, read if need be together with its part. Raises OSError."""
        number = index // PART_ENTRIES
        part = self._parts.get((self._number, number))
        if part is None:
            first = number * PART_ENTRIES
            n_bytes = max(min(PART_ENTRIES, self._n_stored - first), 0) * WORD_SIZE
            data = await pread(self._storage, self._host_offset + first * WORD_SIZE, n_bytes) if n_bytes else b""
            if data == _ZEROES[:n_bytes]:  # one look at all bytes: a chain may have 15,000 such parts
                part = self._parts.zeroes
            else:
                part = parse_table(data)
                part.frombytes(bytes(PART_ENTRIES * WORD_SIZE - n_bytes))
            self._parts.put((self._number, number), part)
        return part[index % PART_ENTRIES]
