"""Tables of operations as pyfuse3 fills them, and a libfuse that never mounts, for tests of what is done to them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pyfuse3

from qcowfuse.fuse.libfuse.connection import ConnectionInfo
from qcowfuse.fuse.libfuse.operations_table import ENTRIES, FREE, OperationsTable, TableCopy
from qcowfuse.fuse.libfuse.session_hook import SessionHook

EMPTY = {*FREE, "destroy", "readdir", "fallocate", "copy_file_range", "lseek"}
"""What pyfuse3 3.5 leaves empty."""
ADDRESS = 0x1000
"""Of each of pyfuse3's functions but init."""
Init = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ConnectionInfo))


def table(**changes: int) -> OperationsTable:
    """A table as pyfuse3 fills it, with some changes."""
    operations = OperationsTable()
    for name in ENTRIES:
        if name not in EMPTY:
            setattr(operations, name, ADDRESS)
    for name, value in changes.items():
        setattr(operations, name, value)
    return operations


class Libfuse:
    """Stands in for the session that pyfuse3 makes: it takes a table, and later answers INIT with it."""

    def __init__(self, changes: Mapping[str, int], n_bytes_less: int = 0) -> None:
        self._own_init = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ConnectionInfo))(self._init)
        address = ctypes.cast(self._own_init, ctypes.c_void_p).value
        assert address is not None
        self.original = table(**{"init": address, **changes})
        self.n_bytes = ctypes.sizeof(OperationsTable) - n_bytes_less
        self.given = TableCopy(ctypes.addressof(self.original), self.n_bytes)
        self.n_inits = 0

    def _init(self, userdata: int, connection: object) -> None:
        self.n_inits += 1

    @property
    def changed(self) -> set[str]:
        """The entries that differ from pyfuse3's."""
        given = self.given.entries()
        return {name for name in ENTRIES if given[name] != (getattr(self.original, name) or 0)}

    def answer_init(self, connection: ConnectionInfo) -> None:
        """Call what the table has for INIT, as libfuse does."""
        Init(self.given.entries()["init"])(None, ctypes.pointer(connection))

    def hook(self, *arguments: object) -> SessionHook:
        """To be used in place of SessionHook."""
        return _Hook(self, *arguments)


class _Hook(SessionHook):
    def __init__(self, libfuse: Libfuse, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._libfuse = libfuse

    @contextmanager
    def active(self) -> Iterator[None]:
        """Show the table when the block has made its session."""
        yield
        self.show(self._libfuse.given)


def connection(**values: int) -> ConnectionInfo:
    """A connection as today's kernels have it."""
    everything = (1 << 20) - 1
    return ConnectionInfo(
        **{"proto_major": 7, "proto_minor": 40, "capable": everything, "want": everything, **values}
    )


def library() -> ctypes.CDLL:
    """pyfuse3's own shared object."""
    return ctypes.CDLL(pyfuse3.__file__)
