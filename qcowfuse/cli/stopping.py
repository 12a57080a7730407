"""Stop signals end a command in good order: what it had begun is cleaned up, and the exit code tells of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Awaitable, Callable
from types import FrameType

import trio

from ..errors import QcowFuseError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedError(QcowFuseError):
    """A signal ended the command; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


def run_until_stopped(function: Callable[[], Awaitable[int]]) -> int:
    """``trio.run(function)``; SIGINT, SIGTERM and SIGHUP cancel it, unless the process ignores or handles them.

    Raises StoppedError, and what ``function`` raises.
    """
    if threading.current_thread() is not threading.main_thread():
        return trio.run(function)  # signals are the main thread's

    async def main() -> int:
        received: list[int] = []
        token = trio.lowlevel.current_trio_token()

        def stop(number: int, _frame: FrameType | None) -> None:
            received.append(number)
            token.run_sync_soon(scope.cancel)

        numbers = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
        with trio.CancelScope() as scope:
            for number in numbers:
                signal.signal(number, stop)
            try:
                return await function()
            finally:
                for number in numbers:
                    signal.signal(number, signal.SIG_DFL)
        raise StoppedError(received[0])

    return trio.run(main)
