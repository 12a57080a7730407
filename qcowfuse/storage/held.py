"""A lock that is taken without a turn of the event loop where it is free.

A flush on a fast disk takes little longer than such a turn.
"""

from __future__ import annotations

from types import TracebackType

import trio


class Held:
    """``async with Held(lock):``, as ``async with lock:``. A cancellation is seen before the lock is taken."""

    __slots__ = ("_lock",)

    def __init__(self, lock: trio.Lock) -> None:
        self._lock = lock

    async def __aenter__(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
