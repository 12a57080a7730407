"""The calls of one storage that go on in a thread or in a ring: counted, so that closing can wait for them.

1. Once :attr:`CallsInFlight.is_closing` is set, no call begins: its descriptor may be another file's soon (EBADF).
2. A call in flight is waited for, cancelled or not: it uses the descriptor and the caller's buffers.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import trio

from ..buffer import Buffer
from .blocking import read_all, read_all_into, write_all
from .workers import WorkerPool

T = TypeVar("T")

_MANY_BYTES = 128 << 10
"""From here on the memory of a delivery is kept for the next one: new memory costs as much as the read."""
_LARGEST_KEPT = 1 << 20
_MAX_KEPT = 4


class CallsInFlight:
    """Of the storage with ``name``, by the threads of ``pool``, which is given up in the end."""

    def __init__(self, pool: WorkerPool, name: str) -> None:
        self.pool = pool
        self._name = name
        self.n = 0
        """How many there are."""
        self._idle = trio.Event()
        self._spare: list[bytearray] = []
        self.is_closing = False

    @contextmanager
    def counted(self) -> Iterator[None]:
        """A call from the beginning to the end of the block. Raises OSError (EBADF, rule 1)."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)`` in a thread. Raises OSError."""
        self._enter()
        try:
            return await self.pool.run(function, *args)
        finally:
            self._leave()

    def start_delivery(
        self,
        fd: int,
        host_offset: int,
        n_bytes: int,
        deliver: Callable[[bytes | memoryview], None],
        on_end: Callable[[Exception | None], None],
    ) -> bool:
        """:meth:`Storage.start_delivery` with a descriptor. Raises nothing."""
        return self._start(partial(self._deliver, fd, host_offset, n_bytes, deliver), on_end)

    def start_pwrite(
        self,
        fd: int,
        host_offset: int,
        data: Buffer,
        on_written: Callable[[], None],
        on_end: Callable[[Exception | None], None],
    ) -> bool:
        """:meth:`Storage.start_pwrite` with a descriptor. Raises nothing."""

        def write() -> None:
            write_all(fd, host_offset, (data,))
            on_written()

        return self._start(write, on_end)

    def _start(self, function: Callable[[], None], on_end: Callable[[Exception | None], None]) -> bool:
        """Have a thread call ``function``; False where none may, or can. Raises nothing."""
        if self.is_closing:
            return False
        self._enter()

        def end(error: BaseException | None) -> None:
            self._leave()
            on_end(error if error is None or isinstance(error, Exception) else OSError(errno.EIO, repr(error)))

        try:
            self.pool.start(function, on_end=end)
        except RuntimeError:  # there is no thread: a task can wait for one
            self._leave()
            return False
        return True

    def _deliver(
        self, fd: int, host_offset: int, n_bytes: int, deliver: Callable[[bytes | memoryview], None]
    ) -> None:
        """Runs in a thread. Taking from a list and adding to it are single steps to other threads."""
        if not _MANY_BYTES <= n_bytes <= _LARGEST_KEPT:
            deliver(read_all(fd, host_offset, n_bytes))
            return
        try:
            memory = self._spare.pop()
        except IndexError:
            memory = bytearray(_LARGEST_KEPT)
        with memoryview(memory)[:n_bytes] as part:
            read_all_into(fd, host_offset, part)
            deliver(part)
        if len(self._spare) < _MAX_KEPT:
            self._spare.append(memory)

    def refuse_if_closing(self) -> None:
        """Raises OSError (EBADF, rule 1)."""
        if self.is_closing:
            raise OSError(errno.EBADF, "storage is closed", self._name)

    def _enter(self) -> None:
        self.refuse_if_closing()
        self.n += 1

    def _leave(self) -> None:
        self.n -= 1
        if self.n == 0 and self.is_closing:
            self._idle.set()

    async def close(self) -> None:
        """Let no more calls begin, wait for those in flight, and give up the pool. A cancellation waits. To be called
        once."""
        self.is_closing = True
        with trio.CancelScope(shield=True):
            if self.n:
                await self._idle.wait()
        self.pool.release()
