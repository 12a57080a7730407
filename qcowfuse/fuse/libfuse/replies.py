"""Replies written to /dev/fuse by us, and reads and writes that a thread answers on its own.

1. A request is answered once, whatever becomes of the answer: where the kernel refuses one, it gets an error.
2. The thread that has read the bytes of a read hands them to the kernel, and the one that has made a write tells it.
   A thread writes that reply and nothing else; what failed is answered in the trio thread, which knows what to say.
3. The connection stays open until the last of them has ended (:meth:`AnsweringThreads.wait_until_ended`): a thread
   must not find another file under the number of its descriptor.
4. The gate knows how many threads are at work for us (rule 7 of :mod:`..request_gate`).
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Callable

import trio

from ...buffer import Buffer
from ...driver.pending import PendingRead, PendingWrite
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


class AnsweringThreads:
    """Of one connection. ``errno_of`` says what to answer to an operation that failed, and logs it."""

    def __init__(self, gate: RequestGate, errno_of: Callable[[str, Exception], int]) -> None:
        self._gate = gate
        self._errno_of = errno_of
        self._n_in_flight = 0
        self._ended = trio.Event()

    def start_read(self, fd: int, unique: int, pending: PendingRead) -> bool:
        """Have a thread answer; False where the read has a longer way: then it is as before. Raises nothing."""
        elsewhere = self._gate.elsewhere

        def deliver(data: Buffer) -> None:
            send_data(fd, unique, data)
            elsewhere.pop()

        def end(error: Exception | None) -> None:
            self._end("read", fd, unique, error)

        elsewhere.append(unique)  # before the thread can have answered
        return self._note_start(pending.start_delivery(deliver, end))

    def start_write(
        self,
        fd: int,
        unique: int,
        n_bytes: int,
        pending: PendingWrite,
        give_back: Callable[[], None],
        on_end: Callable[[], None],
    ) -> bool:
        """Have a thread write and answer; False where the write has a longer way: then it is as before. Raises
        nothing. ``give_back`` is called, by any thread, when the bytes to be written are not needed any more;
        ``on_end`` in this one, before the error that is the answer to a write that failed."""
        elsewhere = self._gate.elsewhere

        def written() -> None:
            give_back()
            send_written(fd, unique, n_bytes)
            elsewhere.pop()

        def end(error: Exception | None) -> None:
            on_end()
            if error is not None:
                give_back()
            self._end("write", fd, unique, error)

        elsewhere.append(unique)
        return self._note_start(pending.start_in_thread(written, end))

    def _note_start(self, is_started: bool) -> bool:
        if is_started:
            self._n_in_flight += 1
        else:
            self._gate.elsewhere.pop()
        return is_started

    def _end(self, operation: str, fd: int, unique: int, error: Exception | None) -> None:
        self._n_in_flight -= 1
        if error is not None:
            self._gate.elsewhere.pop()
            send_error(fd, unique, self._errno_of(operation, error))
        if not self._n_in_flight:
            self._ended.set()

    async def wait_until_ended(self) -> None:
        """Return when none is at work; none may be set to work any more. A cancellation waits."""
        if self._n_in_flight:
            self._ended = trio.Event()
            with trio.CancelScope(shield=True):
                await self._ended.wait()
