"""Replies written to /dev/fuse by us, and reads that a thread answers on its own.

1. A request is answered once, whatever becomes of the answer: where the kernel refuses one, it gets an error.
2. A delivery is a read whose bytes the thread that has read them hands to the kernel. The thread writes that reply
   and nothing else; what failed is answered in the trio thread, which knows what to say.
3. The connection stays open until the last delivery has ended (:meth:`Deliveries.wait_until_ended`): a thread must
   not find another file under the number of its descriptor.
4. The gate knows how many threads are at work for us (rule 6 of :mod:`..request_gate`).
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Callable

import trio

from ...buffer import Buffer
from ...driver.pending import PendingRead
from ..request_gate import RequestGate

# linux/fuse.h: fuse_out_header (the length of all, minus an error number, the request), and fuse_write_out behind it.
_HEADER = struct.Struct("<IiQ")
_WRITTEN = struct.Struct("<IiQII")
_GONE = (errno.ENOENT, errno.ENODEV)
"""The process that asked was interrupted, or the connection is at its end."""

_log = logging.getLogger(__name__)


def send_data(fd: int, unique: int, data: Buffer) -> bool:
    """Answer with ``data`` (rule 1); whether the kernel took it. Raises nothing."""
    try:
        os.writev(fd, (_HEADER.pack(_HEADER.size + len(data), 0, unique), data))
    except OSError as exc:
        _on_refusal(fd, unique, exc)
        return False
    return True


def send_written(fd: int, unique: int, n_bytes: int) -> None:
    """Answer to a write: so many bytes are written (rule 1). Raises nothing."""
    try:
        os.write(fd, _WRITTEN.pack(_WRITTEN.size, 0, unique, n_bytes, 0))
    except OSError as exc:
        _on_refusal(fd, unique, exc)


def send_error(fd: int, unique: int, number: int) -> None:
    """Answer with an error number. Raises nothing."""
    try:
        os.write(fd, _HEADER.pack(_HEADER.size, -number, unique))
    except OSError as exc:
        if exc.errno not in _GONE:
            _log.error("an error was refused as a reply: %s", exc)


def _on_refusal(fd: int, unique: int, exc: OSError) -> None:
    if exc.errno not in _GONE:
        _log.error("a reply was refused: %s", exc)
        send_error(fd, unique, errno.EIO)


class Deliveries:
    """The deliveries of one connection. ``errno_of_read`` says what to answer to a read that failed, and logs it."""

    def __init__(self, gate: RequestGate, errno_of_read: Callable[[Exception], int]) -> None:
        self._gate = gate
        self._errno_of_read = errno_of_read
        self._n_in_flight = 0
        self._ended = trio.Event()

    def start(self, fd: int, unique: int, pending: PendingRead) -> bool:
        """Have a thread answer; False where the read has a longer way: then it is as before. Raises nothing."""
        elsewhere = self._gate.elsewhere

        def deliver(data: Buffer) -> None:
            send_data(fd, unique, data)
            elsewhere.pop()

        def end(error: Exception | None) -> None:
            self._n_in_flight -= 1
            if error is not None:
                elsewhere.pop()
                send_error(fd, unique, self._errno_of_read(error))
            if not self._n_in_flight:
                self._ended.set()

        elsewhere.append(unique)  # before the thread can have answered
        if not pending.start_delivery(deliver, end):
            elsewhere.pop()
            return False
        self._n_in_flight += 1
        return True

    async def wait_until_ended(self) -> None:
        """Return when none is in flight; none may be started any more. A cancellation waits."""
        if self._n_in_flight:
            self._ended = trio.Event()
            with trio.CancelScope(shield=True):
                await self._ended.wait()
