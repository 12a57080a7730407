"""The request that was started as it was read from /dev/fuse, on its way to the coroutine that finishes it.

1. There is one at most. Nothing is awaited between the moment when a request is read and the one when its handler
   takes it: libfuse takes the request apart and calls the handler in between, in one thread.
2. libfuse may not call the handler: when it refuses the request or has no memory. So what is left over when the next
   request is read, or at the end, was given up, and is abandoned. A request that the kernel interrupts is handed on
   all the same, and so is one that comes after a forget.
3. The handler is not told the number of the request. It takes what has its kind, place and length, or nothing.
"""

from __future__ import annotations

from ..driver.pending import PendingRead, PendingWrite

Started = PendingRead | PendingWrite | Exception
"""An exception is what the start of a request has raised: its handler raises it again."""


class StartedRequest:
    """See the module docstring."""

    def __init__(self) -> None:
        self._kept: tuple[type[Started], int, int, Started] | None = None

    @property
    def is_kept(self) -> bool:
        """Whether there is one."""
        return self._kept is not None

    def keep(self, kind: type[PendingRead] | type[PendingWrite], off: int, size: int, started: Started) -> None:
        """Keep a read or write, which ``kind`` tells apart, for its handler."""
        self.drop()
        self._kept = kind, off, size, started

    def take_read(self, off: int, size: int) -> PendingRead | None:
        """The read of these bytes, if it was started. Raises what its start has raised."""
        started = self._take(PendingRead, off, size)
        return started if isinstance(started, PendingRead) else None

    def take_write(self, off: int, size: int) -> PendingWrite | None:
        """The write of these bytes, if it was started. Raises what its start has raised."""
        started = self._take(PendingWrite, off, size)
        return started if isinstance(started, PendingWrite) else None

    def _take(self, kind: type[Started], off: int, size: int) -> Started | None:
        if self._kept is None:
            return None
        if self._kept[:3] != (kind, off, size):
            self.drop()
            return None
        started, self._kept = self._kept[3], None
        if isinstance(started, Exception):
            raise started
        return started

    def drop(self) -> None:
        """Abandon it, if there is one."""
        kept, self._kept = self._kept, None
        if kept is not None and not isinstance(kept[3], Exception):
            kept[3].abandon()
