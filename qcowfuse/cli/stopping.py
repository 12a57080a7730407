"""Stop signals end a command in good order: what it had begun is cleaned up, and the exit code tells of it.

1. Most commands do one thing after the other and need no event loop: :func:`run_alone_until_stopped`. What writes an
   image that exists, or reads the data of one, needs it: :func:`run_until_stopped`.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import QcowFuseError
from ..system.alone import run_alone
from ..system.late_logging import expect_messages

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedError(QcowFuseError):
    """A signal ended the command; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


class _Stopped(BaseException):
    """Goes through all that handles errors, as a cancellation does."""


def run_until_stopped(function: Callable[[], Awaitable[int]]) -> int:
    """``trio.run(function)``; SIGINT, SIGTERM and SIGHUP cancel it, unless the process ignores or handles them.

    Raises StoppedError, and what ``function`` raises.
    """
    from .trimmed_trio import import_trio

    import_trio()
    import trio

    expect_messages()

    async def main() -> int:
        token = trio.lowlevel.current_trio_token()
        received: list[int] = []
        with trio.CancelScope() as scope, _heard(received, lambda: token.run_sync_soon(scope.cancel)):
            return await function()
        raise StoppedError(received[0])

    return trio.run(main)


def run_alone_until_stopped(function: Callable[[], Awaitable[int]]) -> int:
    """As :func:`run_until_stopped`, without an event loop (see :mod:`~qcowfuse.system.alone`)."""
    received: list[int] = []

    def check() -> None:
        if received:
            raise _Stopped

    try:
        with _heard(received, lambda: None):
            return run_alone(function, check)
    except _Stopped:
        raise StoppedError(received[0]) from None


@contextmanager
def _heard(received: list[int], then: Callable[[], None]) -> Iterator[None]:
    """Inside of the block, stop signals are added to ``received``, and ``then`` is called. Signals are the main
    thread's: in any other there are none."""
    numbers = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]

    def stop(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        then()

    try:
        for number in numbers:
            signal.signal(number, stop)
    except ValueError:  # another thread
        numbers.clear()
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
