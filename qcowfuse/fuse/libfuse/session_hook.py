"""Tunes what pyfuse3 leaves at libfuse's defaults, by wrapping the INIT callback of the session that it makes.

pyfuse3 hands libfuse its table of operations in one call of ``fuse_session_new``. During ``pyfuse3.init`` that
call is diverted; the diversion gives libfuse a copy of the table in which ``init`` is ours, and ours calls
pyfuse3's and then changes the connection's parameters. More operations would be added to that same copy.

1. The table must look exactly as pyfuse3 fills it, and libfuse must be of the protocol we know. On any surprise
   nothing is changed, and :attr:`SessionHook.refusal` says why: the session works, untuned.
2. A function of pyfuse3 is called with the interpreter's lock held (PYFUNCTYPE), one of libfuse without.
3. What libfuse calls must never raise: ctypes would swallow the exception.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyfuse3

from ...system.import_slot import LoadedObject, SlotError, diverted
from .extra_operations import ExtraOperations
from .init_reply import MIN_PROTOCOL_MINOR, InitReplyFlag

CAP_ATOMIC_O_TRUNC = 1 << 3
CAP_SPLICE_READ = 1 << 9
CAP_AUTO_INVAL_DATA = 1 << 12
CAP_WRITEBACK_CACHE = 1 << 16

MAX_BACKGROUND = 64
"""Requests of read-ahead, write-back and asynchronous direct I/O that the kernel keeps in flight."""

_log = logging.getLogger(__name__)

# struct fuse_lowlevel_ops: libfuse only ever appends to it.
_TABLE = str.split(
    "init destroy lookup forget getattr setattr readlink mknod mkdir unlink rmdir symlink rename link open read "
    "write flush release fsync opendir readdir releasedir fsyncdir statfs setxattr getxattr listxattr removexattr "
    "access create getlk setlk bmap ioctl poll write_buf retrieve_reply forget_multi flock fallocate readdirplus "
    "copy_file_range lseek"
)
_EMPTY_IN_PYFUSE3 = set(
    str.split("destroy readdir getlk setlk bmap ioctl retrieve_reply flock fallocate copy_file_range lseek")
)
_DEPENDS_ON_VERSION = {"poll"}


class OperationsTable(ctypes.Structure):
    """libfuse's ``struct fuse_lowlevel_ops``."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in _TABLE)


class ConnectionInfo(ctypes.Structure):
    """The head of libfuse's ``struct fuse_conn_info``, which has been the same since 3.0."""

    proto_major: int
    proto_minor: int
    capable: int
    want: int
    max_background: int
    congestion_threshold: int

    _fields_ = tuple(
        (name, ctypes.c_uint32)
        for name in str.split(
            "proto_major proto_minor max_write max_read max_readahead capable want max_background "
            "congestion_threshold time_gran"
        )
    )


_INIT_OF_PYFUSE3 = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ConnectionInfo))
_INIT_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ConnectionInfo))
_SESSION_NEW = {
    "fuse_session_new": ctypes.CFUNCTYPE(
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    ),
    # Since libfuse 3.17 the header turns the first into this one, which has the version as another argument.
    "fuse_session_new_versioned": ctypes.CFUNCTYPE(
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p
    ),
}


class SessionHook:
    """``with hook.active(): pyfuse3.init(...)``; afterwards :attr:`refusal` is None, or says why nothing is tuned."""

    def __init__(self, extra: ExtraOperations | None = None) -> None:
        self._extra = extra
        self._library: ctypes.CDLL | None = None
        self.refusal: str | None = "pyfuse3 has not been initialised"
        self._must_live: list[object] = []  # what libfuse points at
        self._original_init: Callable[[Any, Any], None] | None = None
        self._reply_flag: InitReplyFlag | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Divert the making of a session inside of the block. Raises nothing of its own."""
        try:
            library = ctypes.CDLL(pyfuse3.__file__)  # finds the very libfuse that pyfuse3 uses
            self._library = library
            name, slot = LoadedObject(library).slot_of(_SESSION_NEW)
            real = _SESSION_NEW[name]((name, library))
            callback = _SESSION_NEW[name](self._make_session_new(real))
            target = ctypes.cast(callback, ctypes.c_void_p).value
            assert target is not None
            self._must_live.append(callback)
            diversion = diverted(slot, target)
            diversion.__enter__()
        except (SlotError, OSError, AttributeError, ValueError, LookupError) as exc:
            self.refusal = str(exc)
            yield
            return
        self.refusal = "pyfuse3 made no session"
        try:
            yield
        finally:
            diversion.__exit__(None, None, None)

    def _make_session_new(self, real: Callable[..., int | None]) -> Callable[..., int | None]:
        def session_new(args: int, table: int, n_bytes: int, *rest: int) -> int | None:
            try:
                table = self._complete_table(table, n_bytes)
                self.refusal = None
            except Exception as exc:
                self.refusal = str(exc) or repr(exc)
            return real(args, table, n_bytes, *rest)

        return session_new

    def _complete_table(self, table: int, n_bytes: int) -> int:
        if n_bytes < ctypes.sizeof(OperationsTable):
            raise SlotError("libfuse is too old")
        copy = (ctypes.c_char * n_bytes).from_buffer_copy(ctypes.string_at(table, n_bytes))
        operations = OperationsTable.from_buffer(copy)
        for name in _TABLE:
            is_empty = not getattr(operations, name)
            if name not in _DEPENDS_ON_VERSION and is_empty != (name in _EMPTY_IN_PYFUSE3):
                raise SlotError(f"unexpected table of operations at {name}")
        self._original_init = _INIT_OF_PYFUSE3(operations.init)
        callback = _INIT_CALLBACK(self._init)
        operations.init = ctypes.cast(callback, ctypes.c_void_p).value
        if self._extra is not None and self._library is not None:
            for name, address in self._extra.callbacks(self._library).items():
                setattr(operations, name, address)
        self._must_live += [copy, callback]
        return ctypes.addressof(copy)

    def _init(self, userdata: int, connection: Any) -> None:
        assert self._original_init is not None
        self._original_init(userdata, connection)
        try:
            if tune(connection.contents) and connection.contents.proto_minor >= MIN_PROTOCOL_MINOR:
                self._set_reply_flag()
        except Exception:
            _log.exception("tuning the connection failed")

    def _set_reply_flag(self) -> None:
        try:
            self._reply_flag = InitReplyFlag(ctypes.CDLL(pyfuse3.__file__))
            self._reply_flag.arm()
        except (SlotError, OSError, AttributeError, ValueError, LookupError) as exc:
            _log.info("each write will be two requests: %s", exc)


def tune(connection: ConnectionInfo) -> bool:
    """Set what a disk image wants, after pyfuse3's init; False where the connection is of an unknown kind."""
    if connection.proto_major != 7 or connection.want & ~connection.capable:
        _log.warning("the FUSE connection is not of a kind that qcowfuse knows: not tuned")
        # Not safe without the change below; see the rules of qcowfuse.fuse.operations.
        connection.want &= ~CAP_WRITEBACK_CACHE
        return False
    # With this, open(O_TRUNC) sets the kernel's idea of the size to zero and does not ask us; a disk keeps its size.
    connection.want &= ~CAP_ATOMIC_O_TRUNC
    # Through a pipe, small requests cost more.
    connection.want &= ~CAP_SPLICE_READ
    # Only this kernel changes the file, so its cached pages stay true whatever the times of the file say.
    connection.want &= ~CAP_AUTO_INVAL_DATA
    connection.max_background = MAX_BACKGROUND
    connection.congestion_threshold = MAX_BACKGROUND * 3 // 4
    return True
