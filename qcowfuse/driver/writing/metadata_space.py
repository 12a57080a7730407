"""Space of the file system below metadata that a later flush has to write, so that the flush does not find the disk
full after the guest was told that its write succeeded.

1. Space is set aside before memory changes, by the function that changes it: for the L2 slice that gets an entry, the
   L1 entry of a new table, a refcount block whose counts are raised, new blocks with the part of the refcount table
   that names them, and whatever moves. An image file may have a hole in any of them: programs that make or copy it
   may skip zeroes.
2. Lowering a count and overwriting an entry that is not 0 need nothing: what holds a byte other than 0 is no hole.
3. Where the file system has no fallocate, the bytes are written again as they are. Rounds of write-back are kept
   out meanwhile (``round_lock``): nothing else writes tables.
4. Where writing over something takes new space (copy on write), some is kept free for it: a round of write-back that
   finds the disk full uses that up, and no cluster is taken before it is kept again. Rounds come so early that it is
   enough.
5. A network file system may tell of a full disk at a flush only: there nothing helps. A round that failed to write
   is tried again.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from ...storage.base import Storage, pread

_UNIT_BITS = 9  # no file system has smaller blocks
_STEP = 64 << 10
_MAX_KNOWN = 1 << 16
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What a write fails with where there is no room for it now, and may be later."""
LEAST_WRITE = 4096
"""Bytes of new space that a shorter write may take where writing over something takes any."""
RESERVE_BYTES = 4 << 20
"""What is kept free on a copy-on-write file system. Half of it may be dirty."""


class MetadataSpace:
    """Which metadata of an image file has its space. One object serves all writers of an image."""

    def __init__(self, storage: Storage) -> None:
        self.round_lock = trio.Lock()
        self.is_ready = False
        """Whether clusters may be taken; else :meth:`prepare` comes first."""
        self._dirty_bytes: Callable[[], int] | None = None
        self._write_back: Callable[[], Awaitable[None]] | None = None
        self.has_reserve = False
        """Whether space is kept free."""
        self._is_ending = False
        self._storage = storage
        self._known: set[int] = set()

    def serve(self, dirty_bytes: Callable[[], int], write_back: Callable[[], Awaitable[None]]) -> None:
        """``dirty_bytes``: what ``write_back``, a round without its last flush, would write over, at most."""
        self._dirty_bytes, self._write_back = dirty_bytes, write_back

    async def prepare(self) -> None:
        """Keep space free for writing over metadata, where that is needed. Raises OSError (ENOSPC)."""
        if not self.is_ready:
            self.has_reserve = await self._storage.keep_free(RESERVE_BYTES)
            self.is_ready = True

    async def relieve(self) -> None:
        """Before a change, where space is kept free: have metadata written back when that would not do for more."""
        if self._dirty_bytes and self._write_back and self._dirty_bytes() > RESERVE_BYTES // 2:
            with suppress(OSError):  # the next allocation or flush will report it
                await self._write_back()

    async def can_help(self, error: OSError) -> bool:
        """Whether a write of metadata that failed may be tried again: it was for want of space, and there is more
        now. Raises OSError."""
        if error.errno not in NO_SPACE or not self.has_reserve:
            return False
        self.has_reserve, self.is_ready = False, self._is_ending
        return await self._storage.keep_free(0)

    async def end(self) -> None:
        """Nothing is kept free any more: the last writes may have it all. Raises OSError."""
        self.is_ready = self._is_ending = True
        if self.has_reserve:
            self.has_reserve = False
            await self._storage.keep_free(0)

    def has(self, host_offset: int, n_bytes: int) -> bool:
        """Whether the bytes are known to have their space; False may be wrong."""
        return self._known.issuperset(_units(host_offset, n_bytes))

    def note_written(self, host_offset: int, n_bytes: int) -> None:
        """The bytes have just been written, all of them, so that they have their space."""
        if len(self._known) > _MAX_KNOWN:
            self._known.clear()
        self._known.update(_units(host_offset, n_bytes))

    def forget(self, host_offset: int, n_bytes: int) -> None:
        """The bytes may become a hole."""
        units = _units(host_offset, n_bytes)
        if len(units) <= len(self._known):
            self._known.difference_update(units)
        else:  # a gigabyte has two million
            self._known = {unit for unit in self._known if unit not in units}

    async def secure(self, host_offset: int, n_bytes: int) -> None:
        """Give the bytes their space, and keep what they hold. Raises OSError (ENOSPC)."""
        if n_bytes <= 0 or self.has(host_offset, n_bytes):
            return
        if not await self._storage.allocate(host_offset, n_bytes):
            async with self.round_lock:
                data = await pread(self._storage, host_offset, n_bytes)
                if not self._storage.try_pwritev(host_offset, (data,)):
                    await self._storage.pwritev(host_offset, (data,))
        self.note_written(host_offset, n_bytes)

    async def secure_part(self, start: int, n_bytes: int, *, of: int, of_bytes: int) -> None:
        """:meth:`secure` for a part of a structure of ``of_bytes`` at ``of``, with what lies around it there up to
        64 KiB: so it takes few calls."""
        if self.has(start, n_bytes):
            return
        first = (start - of) // _STEP * _STEP + of
        end = min(-(-(start + n_bytes - of) // _STEP) * _STEP, of_bytes) + of
        try:
            await self.secure(first, end - first)
        except OSError:
            await self.secure(start, n_bytes)  # the last block may be enough


def _units(host_offset: int, n_bytes: int) -> range:
    return range(host_offset >> _UNIT_BITS, (host_offset + n_bytes - 1 >> _UNIT_BITS) + 1)
