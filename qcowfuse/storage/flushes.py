"""The flushes of a file on a disk, by io_uring or in a thread: begun where nobody can sleep, ended by the next one.

1. A flush by io_uring that was begun at once and did not end in a short wait goes on. The next
   :meth:`DiskFlushes.flush` waits for it, and begins another one where the file has changed since it began.
2. How a flush has ended is known to :class:`~.durability.Durability` as soon as anybody looks; a failure is final,
   also where nobody looks for long.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import suppress

from .durability import Durability
from .ring import Ring, RingRequest, flush_result


class DiskFlushes:
    """``fd`` gives the descriptor, ``is_changing`` says whether something may be changing the file, ``run`` is a call
    with the descriptor in a thread. The caller holds :attr:`Durability.lock`, or awaits nothing while it is free.
    """

    def __init__(
        self,
        durability: Durability,
        *,
        fd: Callable[[], int],
        is_changing: Callable[[], bool],
        run: Callable[[Callable[[int], object]], Awaitable[object]],
        ring: Ring | None,
    ) -> None:
        """``ring``: None where no flush may go by io_uring (rule 3 of :mod:`.ring`)."""
        self._durability = durability
        self._fd = fd
        self._is_changing = is_changing
        self._run = run
        self._ring = ring
        self._begun: RingRequest | None = None
        self._n_changes = 0

    def try_flush(self) -> bool:
        """Whether every change that has ended is durable, now or after a short wait; False: nothing is promised, and
        a flush may go on (rule 1)."""
        if self._is_changing():
            return False
        if self._durability.is_complete(in_flight=False):
            return True
        if self._begun is not None:
            return False
        begun = self._begin(n_own=0)
        if begun is None or begun.result is None:
            return False
        try:
            return self._settle(begun.result)
        except OSError:
            return False  # which the next flush tells of

    async def flush(self) -> None:
        """Make every change that has ended durable. Raises OSError, which is final."""
        durability = self._durability
        if self._begun is not None:
            await self._end()
            if durability.is_complete(in_flight=self._is_changing()):
                return
        if self._begin(n_own=1) is not None and await self._end():
            return
        durability.count()
        n_changes = durability.n_changes(in_flight=self._is_changing())
        try:
            await self._run(os.fdatasync)
        except OSError as error:
            durability.keep_failure(error)
            raise
        durability.note_flush(n_changes)

    async def abandon(self) -> None:
        """Wait for a flush that goes on (rule 1): the descriptor may be closed then."""
        with suppress(OSError):
            await self._end()

    def _begin(self, *, n_own: int) -> RingRequest | None:
        """Begin one by io_uring; None where that can't be."""
        if self._ring is None:
            return None
        n_changes = self._durability.n_changes(in_flight=self._is_changing())
        begun = self._begun = self._ring.begin_flush(self._fd(), n_own=n_own)
        if begun is not None:
            self._durability.count()
            self._n_changes = n_changes
        return begun

    async def _end(self) -> bool:
        """Wait for the one that was begun, if there is one; whether it was made. Raises OSError."""
        return self._begun is not None and self._settle(await self._begun.end())

    def _settle(self, result: int) -> bool:
        self._begun = None
        try:
            is_made = flush_result(result)
        except OSError as error:
            self._durability.keep_failure(error)
            raise
        if is_made:
            self._durability.note_flush(self._n_changes)
        return is_made
