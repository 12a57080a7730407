"""Sets one flag in libfuse's reply to INIT that libfuse itself knows nothing of (before 3.17).

Without FUSE_HANDLE_KILLPRIV_V2 the kernel asks for the attribute ``security.capability`` before every single
write, since a write must take such privileges away: two requests instead of one, and a page-cache write is
then as slow as a direct one. The flag says that the file system sees to that by itself. It is true without
further work: the served file never has set-id bits or capabilities.

1. The first ``writev`` of libfuse after its init callback is the reply. It is diverted for that one call, and
   changed only when it is what it should be: header, no error, protocol 7.
2. On any surprise nothing is changed, and the mount works without.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from contextlib import ExitStack

from ...system.import_slot import LoadedObject, diverted
from .callbacks import Callbacks

HANDLE_KILLPRIV_V2 = 1 << 28

_HEADER_BYTES = 16
_MIN_REPLY_BYTES = 24

_log = logging.getLogger(__name__)


class IoVector(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("n_bytes", ctypes.c_size_t))


class ReplyHeader(ctypes.Structure):
    """``struct fuse_out_header`` of linux/fuse.h."""

    _fields_ = (("n_bytes", ctypes.c_uint32), ("error", ctypes.c_int32), ("unique", ctypes.c_uint64))


class InitReply(ctypes.Structure):
    """The head of ``struct fuse_init_out`` of linux/fuse.h."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in ("major", "minor", "max_readahead", "flags"))


_VectorPointer = ctypes.POINTER(IoVector)
_WRITEV = (ctypes.c_int, _VectorPointer, ctypes.c_int)


class InitReplyFlag:
    """Call :meth:`arm` inside libfuse's init callback. Keep the object as long as the session lives."""

    def __init__(
        self, library: ctypes.CDLL, callbacks: Callbacks, note: Callable[[bool], None] = lambda was_set: None
    ) -> None:
        """``library`` is any object that leads to libfuse. ``note`` is told whether the flag was set, once the reply
        is about to go out. Raises SlotError, AttributeError, OSError."""
        function = ctypes.cast(library.fuse_reply_err, ctypes.c_void_p).value
        assert function is not None
        _, self._slot = LoadedObject.holding(function).slot_of(["writev"])
        self._real = ctypes.CFUNCTYPE(ctypes.c_ssize_t, *_WRITEV, use_errno=True)(("writev", ctypes.CDLL(None)))
        self._target = callbacks.address(self._writev, ctypes.c_ssize_t, *_WRITEV, errno=True)
        self._note = note
        self._diversion = ExitStack()

    def arm(self) -> None:
        """Divert the next ``writev``. Raises SlotError."""
        self._diversion.enter_context(diverted(self._slot, self._target))

    def disarm(self) -> None:
        """Take the diversion back. Nothing when there is none."""
        self._diversion.close()

    def _writev(self, fd: int, vectors: ctypes._Pointer[IoVector], n_vectors: int) -> int:
        try:
            self.disarm()
            self._note(set_flag(vectors, n_vectors))
        except Exception:
            _log.exception("the reply to INIT could not be changed")
        return int(self._real(fd, vectors, n_vectors))


def set_flag(vectors: ctypes._Pointer[IoVector], n_vectors: int) -> bool:
    """Set the flag in what is written; False, and nothing is changed, where that is no good reply to INIT."""
    if n_vectors != 2 or vectors[0].n_bytes != _HEADER_BYTES or vectors[1].n_bytes < _MIN_REPLY_BYTES:
        return False
    header = ReplyHeader.from_address(vectors[0].base)
    reply = InitReply.from_address(vectors[1].base)
    if header.error or header.n_bytes != _HEADER_BYTES + vectors[1].n_bytes:
        return False
    if reply.major != 7:
        return False
    reply.flags |= HANDLE_KILLPRIV_V2
    return True
