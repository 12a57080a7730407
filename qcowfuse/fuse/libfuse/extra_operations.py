"""What pyfuse3 has no handlers for (fallocate, lseek, copies): between libfuse's callbacks and :class:`Operations`.

1. A callback only starts a task; the task answers the request, whatever happens to it. A request that is never
   answered would hang its client for good.
2. Nothing is raised into libfuse: ctypes would swallow it.
3. A task counts as waiting from its start on (rules 4 and 6 of :mod:`..request_gate`): no worker may keep it from its
   turn.
4. The kernel tells of signals that a caller gets, and libfuse takes note of it; the kernel waits for the answer all
   the same, of a caller that is killed, too. A handler that may take long can ask while it is at work.
5. ENOSYS is never answered: the kernel would turn the operation off for the life of the mount.
"""

from __future__ import annotations

import ctypes
import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

import pyfuse3
import trio

from ..copying import Copies
from ..request_gate import RequestGate
from .callbacks import Callbacks

_log = logging.getLogger(__name__)

_FALLOCATE = (
    ctypes.c_void_p,  # request
    ctypes.c_uint64,  # inode
    ctypes.c_int,  # mode
    ctypes.c_int64,  # offset
    ctypes.c_int64,  # length
    ctypes.c_void_p,  # file info
)
_LSEEK = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p)
_FILE_RANGE = (ctypes.c_uint64, ctypes.c_int64, ctypes.c_void_p)  # inode, offset, file info
_COPY = (ctypes.c_void_p, *_FILE_RANGE, *_FILE_RANGE, ctypes.c_size_t, ctypes.c_int)

_Handler = Callable[[], Awaitable[int | None]]
_Reply = Callable[[int, int], int]


class ExtraHandlers(Protocol):
    """What :class:`~qcowfuse.fuse.operations.Operations` adds to pyfuse3's. Only FUSEError leaves a handler."""

    copies: Copies
    """Takes copies into the file."""

    def file_of(self, inode: int) -> ExtraHandlers:
        """The handlers of one file."""

    async def fallocate(self, mode: int, off: int, length: int) -> None:
        """fallocate(2) of the one file."""

    async def lseek(self, off: int, whence: int, is_interrupted: Callable[[], bool]) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE. ``is_interrupted``: whether the caller got a signal, and should have
        an answer soon."""


class ExtraOperations:
    """Callbacks for libfuse's table of operations. ``nursery`` is set before the first request is read and must be
    closed before ``pyfuse3.close``."""

    def __init__(self, handlers: ExtraHandlers, gate: RequestGate) -> None:
        self.nursery: trio.Nursery | None = None
        self._handlers = handlers
        self._gate = gate
        self._reply_error: Callable[[int, int], int] | None = None
        self._reply_lseek: Callable[[int, int], int] | None = None
        self._reply_write: Callable[[int, int], int] | None = None
        self._is_interrupted: Callable[[int], int] | None = None

    def fallocate_callback(self, library: ctypes.CDLL, callbacks: Callbacks) -> int:
        """The address of a callback for fallocate. Raises AttributeError where this libfuse cannot answer it, and
        SlotError."""
        self._reply_error = _error_reply(library)
        return callbacks.address(self._on_fallocate, None, *_FALLOCATE)

    def lseek_callback(self, library: ctypes.CDLL, callbacks: Callbacks) -> int:
        """The same for lseek."""
        reply_lseek = library.fuse_reply_lseek
        reply_lseek.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        self._reply_error, self._reply_lseek = _error_reply(library), reply_lseek
        self._is_interrupted = _interrupted(library)
        return callbacks.address(self._on_lseek, None, *_LSEEK)

    def copy_callback(self, library: ctypes.CDLL, callbacks: Callbacks) -> int:
        """The same for copy_file_range."""
        reply_write = library.fuse_reply_write
        reply_write.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self._reply_error, self._reply_write = _error_reply(library), reply_write
        self._is_interrupted = _interrupted(library)
        return callbacks.address(self._on_copy, None, *_COPY)

    def _on_fallocate(self, request: int, inode: int, mode: int, off: int, length: int, info: int) -> None:
        self._start(request, lambda: self._handlers.file_of(inode).fallocate(mode, off, length))

    def _on_lseek(self, request: int, inode: int, off: int, whence: int, info: int) -> None:
        is_interrupted = self._asks_for_signals(request)
        self._start(
            request, lambda: self._handlers.file_of(inode).lseek(off, whence, is_interrupted), self._reply_lseek
        )

    def _on_copy(
        self,
        request: int,
        source: int,
        source_off: int,
        source_info: int,
        target: int,
        off: int,
        info: int,
        n_bytes: int,
        flags: int,
    ) -> None:
        is_interrupted = self._asks_for_signals(request)

        def copy() -> Awaitable[int]:
            copies = self._handlers.file_of(target).copies
            return copies.copy_from(
                self._handlers.file_of(source).copies, source_off, off, n_bytes, flags, is_interrupted
            )

        self._start(request, copy, self._reply_write)

    def _asks_for_signals(self, request: int) -> Callable[[], bool]:
        def is_interrupted() -> bool:
            assert self._is_interrupted is not None
            return bool(self._is_interrupted(request))

        return is_interrupted

    def _start(self, request: int, handler: _Handler, reply: _Reply | None = None) -> None:
        try:
            if self.nursery is None:
                raise RuntimeError("no nursery yet")
            self.nursery.start_soon(self._answer, request, handler, reply)
            self._gate.n_slow += 1
        except Exception:
            _log.exception("a request could not be started")
            self._refuse(request, errno.EIO)

    async def _answer(self, request: int, handler: _Handler, reply: _Reply | None) -> None:
        value: int | None = None
        error = errno.EIO
        try:
            value = await handler()
            error = 0
        except pyfuse3.FUSEError as exc:
            error = exc.errno
        except Exception:
            _log.exception("bug in qcowfuse: a handler failed unexpectedly")
        finally:
            self._gate.n_slow -= 1
            if error or value is None:
                self._refuse(request, errno.EIO if error == errno.ENOSYS else error)
            else:
                assert reply is not None
                reply(request, value)

    def _refuse(self, request: int, error: int) -> None:
        """Answer with an error; 0 is success without a value."""
        assert self._reply_error is not None
        self._reply_error(request, error)


def _error_reply(library: ctypes.CDLL) -> Callable[[int, int], int]:
    reply_error = library.fuse_reply_err
    reply_error.argtypes = (ctypes.c_void_p, ctypes.c_int)
    return reply_error


def _interrupted(library: ctypes.CDLL) -> Callable[[int], int]:
    interrupted = library.fuse_req_interrupted
    interrupted.argtypes = (ctypes.c_void_p,)
    return interrupted
