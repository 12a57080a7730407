"""Landlock: a thread gives up the file system, TCP, and processes that are not its own.

1. A thread that has restricted itself can't undo it, and the threads that it starts are born restricted. Others are
   not touched: each of them has to do it.
2. Descriptors that are open already stay what they are.
3. An older kernel restricts less. What it has is asked for, and nothing more.

Source: landlock(7), linux/landlock.h, up to ABI 7 (Linux 6.15).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Final

_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_VERSION_FLAG: Final = 1
_RULE_PATH_BENEATH: Final = 1
_READ_FILE: Final = 1 << 2
_READ_DIR: Final = 1 << 3
_FILE_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""ABI to the number of rights on files, which are the lowest bits."""
_BIND_AND_CONNECT_TCP: Final = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS: Final = 0b11

_libc = ctypes.CDLL(None, use_errno=True)


def abi_version() -> int:
    """What the kernel has; 0 where Landlock is missing or switched off."""
    return max(int(_libc.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)), 0)


def ruleset_for_reading_below(path: str) -> int:
    """A descriptor of the rules "read below ``path``, nothing else"; see :func:`restrict_this_thread`.

    Raises OSError; ENOSYS where there is no Landlock.
    """
    abi = abi_version()
    if not abi:
        raise OSError(errno.ENOSYS, "no Landlock")
    rights = (1 << _FILE_RIGHTS.get(abi, _FILE_RIGHTS[5])) - 1
    attributes = struct.pack("=Q", rights)
    if abi >= 4:
        attributes += struct.pack("=Q", _BIND_AND_CONNECT_TCP)
    if abi >= 6:
        attributes += struct.pack("=Q", _ABSTRACT_SOCKETS_AND_SIGNALS)
    ruleset = _checked(_libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0))
    try:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            rule = struct.pack("=Qi", _READ_FILE | _READ_DIR, folder)
            _checked(_libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0))
        finally:
            os.close(folder)
    except BaseException:
        os.close(ruleset)
        raise
    return ruleset


def restrict_this_thread(ruleset: int) -> None:
    """Hold the calling thread to the rules. It must have no-new-privileges. Raises OSError."""
    _checked(_libc.syscall(_RESTRICT_SELF, ruleset, 0))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)
