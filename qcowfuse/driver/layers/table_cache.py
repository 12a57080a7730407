"""The LRU cache of L2 slices, shared by all layers of a backing chain within one budget.

1. A hit is one dictionary look-up. The key of a slice is ``slice_number << LAYER_BITS | layer``, where the slice
   number counts slices over the guest's address space: a table that moves in the image file keeps its key.
2. A miss is one load however many wait for it. A load that fails or is cancelled leaves nothing behind, and one
   of the tasks that waited tries again.
3. A pinned slice is never evicted, nor is a dirty one: it is written back by the ordering rules first.
4. With a budget of 0 nothing clean outlives its last pin.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import trio

from ...format.geometry import SECTOR_WORDS

LAYER_BITS = 8
MIN_DIRTY_BYTES = 1 << 20
"""Dirty slices may pile up to this many bytes even where the budget is smaller; then they are written back."""


class L2Slice:
    """A part of an L2 table in memory. ``entries`` is the truth for the guest; ``dirty_start`` to ``dirty_end``
    (indices) is what the image file does not have yet. ``has_space``: no hole is below it in the file, for sure;
    where that is False, only the sectors of ``no_holes`` are ever dirty."""

    __slots__ = (
        "dirty_end",
        "dirty_start",
        "entries",
        "has_space",
        "key",
        "l1_index",
        "n_pins",
        "no_holes",
        "slice_number",
    )

    def __init__(self, key: int, slice_number: int, l1_index: int, entries: array[int]) -> None:
        self.key = key
        self.slice_number = slice_number
        self.l1_index = l1_index
        self.entries = entries
        self.has_space = False
        self.no_holes: frozenset[int] = frozenset()
        self.n_pins = 0
        self.dirty_start = len(entries)
        self.dirty_end = 0

    @property
    def is_dirty(self) -> bool:
        """Whether the image file lacks some of the entries."""
        return self.dirty_start < self.dirty_end

    def trust(self, start: int, end: int) -> bool:
        """Let entries ``start`` to ``end`` change without space of their own, if each of their sectors holds one that
        is not 0: that is no hole. Returns whether it is so."""
        sectors = range(start // SECTOR_WORDS, -(-end // SECTOR_WORDS))
        for number in sectors:
            is_used = any(self.entries[number * SECTOR_WORDS : (number + 1) * SECTOR_WORDS])
            if not is_used and number not in self.no_holes:
                return False
        self.no_holes |= frozenset(sectors)
        return True

    def dirty_sectors(self) -> list[tuple[int, int]]:
        """Ranges of entries, whole sectors, that the image file has to get."""
        first, end = self.dirty_start // SECTOR_WORDS, -(-self.dirty_end // SECTOR_WORDS)
        if self.has_space:
            return [(first * SECTOR_WORDS, min(end * SECTOR_WORDS, len(self.entries)))]
        sectors = sorted(self.no_holes.intersection(range(first, end)))
        return [(n * SECTOR_WORDS, min((n + 1) * SECTOR_WORDS, len(self.entries))) for n in sectors]

    def mark_dirty(self, start: int, end: int) -> None:
        """Entries ``start`` to ``end`` (exclusive) have changed."""
        self.dirty_start = min(self.dirty_start, start)
        self.dirty_end = max(self.dirty_end, end)

    def mark_clean(self) -> None:
        """All changes have been taken for writing."""
        self.dirty_start = len(self.entries)
        self.dirty_end = 0


class TableCache:
    """See the module docstring. ``budget`` in bytes of L2 entries; ``hits``, ``misses``, ``evictions`` and
    ``write_backs`` count from the moment the image was opened."""

    __slots__ = (
        "_loading",
        "budget",
        "dirty",
        "evictions",
        "hits",
        "misses",
        "newest",
        "slices",
        "used",
        "write_back",
        "write_backs",
    )

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.slices: OrderedDict[int, L2Slice] = OrderedDict()
        self.newest: L2Slice | None = None
        self.dirty: dict[int, L2Slice] = {}
        self.used = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self.write_backs = 0
        self.write_back: Callable[[], Awaitable[None]] | None = None
        self._loading: dict[int, trio.Event | None] = {}
        """By key; an event only where somebody waits."""

    def get(self, key: int) -> L2Slice | None:
        """The slice, now the most recently used one, or None."""
        slice_ = self.slices.get(key)
        if slice_ is not None:
            self.hits += 1
            if slice_ is not self.newest:
                self.touch(slice_)
        return slice_

    def use(self, slice_: L2Slice) -> None:
        """Count a slice that was found without :meth:`get`."""
        self.hits += 1
        if slice_ is not self.newest:
            self.touch(slice_)

    def touch(self, slice_: L2Slice) -> None:
        """Make it the most recently used one."""
        self.slices.move_to_end(slice_.key)
        self.newest = slice_

    async def load(self, key: int, read_slice: Callable[[], Awaitable[L2Slice]]) -> L2Slice:
        """The slice, pinned; read by ``read_slice`` unless it is there by now. Raises what that raises."""
        while True:
            slice_ = self.slices.get(key)
            if slice_ is not None:
                slice_.n_pins += 1
                self.touch(slice_)
                return slice_
            if key not in self._loading:
                break
            await self._wait_for(key)
        self.misses += 1
        self._loading[key] = None
        try:
            await self._make_room()
            slice_ = await read_slice()
            self.insert(slice_)
        finally:
            event = self._loading.pop(key)
            if event is not None:
                event.set()
        return slice_

    async def _wait_for(self, key: int) -> None:
        """Until a load has ended, in whatever way."""
        import trio

        event = self._loading[key]
        if event is None:
            event = self._loading[key] = trio.Event()
        await event.wait()

    def insert(self, slice_: L2Slice) -> None:
        """Take in a slice that is not there yet, pinned once."""
        assert slice_.key not in self.slices
        slice_.n_pins += 1
        self.slices[slice_.key] = slice_
        self.newest = slice_
        self.used += slice_.entries.itemsize * len(slice_.entries)
        self._evict_clean()

    def unpin(self, slice_: L2Slice) -> None:
        """Give back one pin."""
        slice_.n_pins -= 1
        if self.used > self.budget and not slice_.n_pins:
            self._evict_clean()

    def mark_dirty(self, slice_: L2Slice, start: int, end: int) -> None:
        """Entries ``start`` to ``end`` of a slice changed in memory."""
        slice_.mark_dirty(start, end)
        self.dirty[slice_.key] = slice_

    def has_room_for_new(self, key: int) -> bool:
        """Whether a slice that will be dirty may be taken in by :meth:`insert`: it is not there nor on its way, and
        nothing has to be written back first."""
        return key not in self.slices and key not in self._loading and not self._has_much_dirty()

    def _has_much_dirty(self) -> bool:
        if not self.dirty:
            return False
        n_bytes = len(self.dirty) * 8 * len(next(iter(self.dirty.values())).entries)
        return n_bytes > max(self.budget // 2, MIN_DIRTY_BYTES)

    async def _make_room(self) -> None:
        """Before a load: have dirty slices written back when they alone exceed what may be kept."""
        if self.write_back is not None and self._has_much_dirty():
            with suppress(OSError):  # nothing is lost, and a reader need not hear of it: fsync will
                await self.write_back()
            self._evict_clean()

    def _evict_clean(self) -> None:
        while self.used > self.budget:
            for victim in self.slices.values():
                if not victim.n_pins and victim.dirty_start >= victim.dirty_end:
                    break
            else:
                return
            del self.slices[victim.key]
            if victim is self.newest:
                self.newest = None
            self.used -= 8 * len(victim.entries)
            self.evictions += 1
