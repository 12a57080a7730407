"""Capabilities, new privileges and core dumps of this process.

Capabilities and no-new-privileges belong to a thread; threads that it starts later inherit them.

Sources: capabilities(7), prctl(2), linux/capability.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
from contextlib import suppress
from typing import Final

CAP_DAC_OVERRIDE: Final = 1
CAP_DAC_READ_SEARCH: Final = 2
CAP_SYS_PTRACE: Final = 19
CAP_SYS_ADMIN: Final = 21

_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_VERSION_3: Final = 0x2008_0522

_libc = ctypes.CDLL(None, use_errno=True)


def forbid_new_privileges() -> None:
    """From now on no program that this thread executes gains anything by a set-id bit. Raises OSError."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def keep_capabilities(*numbers: int) -> None:
    """Give up, in the calling thread, every capability but ``numbers``, for good. Raises OSError."""
    kept = sum(1 << number for number in numbers) & permitted_capabilities()
    low, high = kept & 0xFFFF_FFFF, kept >> 32
    header = struct.pack("=Ii", _VERSION_3, 0)
    # Effective, permitted and inheritable, the low halves first.
    _check(_libc.capset(header, struct.pack("=6I", low, low, 0, high, high, 0)))


def permitted_capabilities() -> int:
    """The capabilities of the calling thread, as a mask. Raises OSError."""
    data = ctypes.create_string_buffer(24)
    _check(_libc.capget(struct.pack("=Ii", _VERSION_3, 0), data))
    words = struct.unpack("=6I", data.raw)
    return int(words[1] | words[4] << 32)


def forbid_core_dumps() -> None:
    """From now on this process leaves no core dump, and other processes of its user can't read its memory."""
    import resource

    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
