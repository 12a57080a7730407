"""The parameters of a FUSE connection: what libfuse negotiates with the kernel in INIT, and what a disk image wants.

Nothing here looks into libfuse's memory by itself: :mod:`.session_hook` hands the structure in while libfuse answers
INIT.
"""

from __future__ import annotations

import ctypes

CAP_ATOMIC_O_TRUNC = 1 << 3
CAP_SPLICE_READ = 1 << 9
CAP_AUTO_INVAL_DATA = 1 << 12
CAP_WRITEBACK_CACHE = 1 << 16
CAP_HANDLE_KILLPRIV_V2 = 1 << 21
"""libfuse 3.17 and later; before, nothing has that bit."""

FIRST_WITH_KILLPRIV_V2 = 317
"""libfuse's version, as ``fuse_version`` gives it, from which on it knows that capability."""

MAX_BACKGROUND = 64
"""Requests of read-ahead, write-back and asynchronous direct I/O that the kernel keeps in flight."""


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


def is_known(connection: ConnectionInfo) -> bool:
    """Whether the structure says what that of a FUSE 7 connection must."""
    return connection.proto_major == 7 and not connection.want & ~connection.capable


def tune(connection: ConnectionInfo) -> bool:
    """Set what a disk image wants, after pyfuse3's init; False where the connection is of an unknown kind."""
    if not is_known(connection):
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


def want_killpriv(connection: ConnectionInfo) -> bool:
    """Have libfuse tell the kernel that privileges are taken away here; whether both know the capability."""
    if not connection.capable & CAP_HANDLE_KILLPRIV_V2:
        return False
    connection.want |= CAP_HANDLE_KILLPRIV_V2
    return True
