"""Gets between pyfuse3 and libfuse where pyfuse3 makes its session: the table of operations, and the answer to INIT.

pyfuse3 hands libfuse its table of operations in one call of ``fuse_session_new``. While :meth:`SessionHook.active`
lasts that call is diverted, and libfuse is given a copy of the table that the caller has been shown and may have
changed.

1. On any surprise the session is made as pyfuse3 wants it, and :attr:`SessionHook.refusal` says why.
2. A function of pyfuse3 is called with the interpreter's lock held (PYFUNCTYPE), one of libfuse without.
3. What libfuse calls must never raise: ctypes would swallow the exception.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...system.import_slot import LoadedObject, diverted
from .callbacks import Callbacks
from .connection import ConnectionInfo
from .features import reason_of
from .operations_table import TableCopy

# What a call of each takes. Since libfuse 3.17 the header turns the first into the second, which has the version too.
SESSION_NEW = {
    "fuse_session_new": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p),
    "fuse_session_new_versioned": (
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p),
    ),
}

_log = logging.getLogger(__name__)


class SessionHook:
    """``with hook.active(): pyfuse3.init(...)``; ``edit`` is called with the copy of the table. Afterwards
    :attr:`refusal` is None, or says why libfuse got the table of pyfuse3."""

    def __init__(self, library: ctypes.CDLL, callbacks: Callbacks, edit: Callable[[TableCopy], None]) -> None:
        """``library`` is pyfuse3's own shared object: it finds the very libfuse that pyfuse3 uses."""
        self._library = library
        self._callbacks = callbacks
        self._edit = edit
        self.refusal: str | None = "pyfuse3 has not been initialised"

    @contextmanager
    def active(self) -> Iterator[None]:
        """Divert the making of a session inside of the block. Raises nothing of its own."""
        try:
            name, slot = LoadedObject(self._library).slot_of(SESSION_NEW)
            arguments = SESSION_NEW[name]
            real = ctypes.CFUNCTYPE(ctypes.c_void_p, *arguments)((name, self._library))
            target = self._callbacks.address(self._stand_in_for(real), ctypes.c_void_p, *arguments)
            diversion = diverted(slot, target)
            diversion.__enter__()
        except Exception as exc:
            self.refusal = reason_of(exc)
            yield
            return
        self.refusal = "pyfuse3 made no session"
        try:
            yield
        finally:
            diversion.__exit__(None, None, None)

    def _stand_in_for(self, real: Callable[..., int | None]) -> Callable[..., int | None]:
        def session_new(args: int, table: int, n_bytes: int, *rest: int) -> int | None:
            try:
                copy = TableCopy(table, n_bytes)
                if self.show(copy):
                    table = copy.address
            except Exception as exc:
                self.refusal = reason_of(exc)
            return real(args, table, n_bytes, *rest)

        return session_new

    def show(self, copy: TableCopy) -> bool:
        """Have the caller change the copy; whether it did."""
        try:
            self._edit(copy)
        except Exception as exc:
            self.refusal = reason_of(exc)
            return False
        self._callbacks.keep(copy)
        self.refusal = None
        return True


def wrap_init(table: TableCopy, callbacks: Callbacks, react: Callable[[ConnectionInfo], None]) -> None:
    """Have ``react`` called with the connection, once pyfuse3's own handler of INIT is done. Raises SlotError."""

    def init(userdata: int, connection: Any) -> None:
        original(userdata, connection)
        try:
            react(connection.contents)
        except Exception:
            _log.exception("tuning the connection failed")

    arguments = (ctypes.c_void_p, ctypes.POINTER(ConnectionInfo))
    address = callbacks.address(init, None, *arguments)
    original: Callable[[int, Any], None] = ctypes.PYFUNCTYPE(None, *arguments)(table.exchange("init", address))
