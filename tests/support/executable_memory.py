"""A process in which no memory can be made executable, as SELinux' execmem does it: by a filter of system calls."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_NUMBERS = {"x86_64": (9, 10), "aarch64": (222, 226)}
"""mmap and mprotect."""
_LOAD, _IS, _HAS, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _PROTECTION, _FLAGS = 0, 32, 40  # offsets in struct seccomp_data; the low halves of arguments 2 and 3
_ALLOW, _DENY = 0x7FFF0000, 0x00050000 | errno.EACCES


class _Program(ctypes.Structure):
    _fields_ = (("n_instructions", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def forbid() -> None:
    """From now on, in this process: libraries are loaded (private maps of files), nothing else gets executable."""
    number_of_mmap, number_of_mprotect = _NUMBERS[os.uname().machine]
    shared_or_anonymous = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
    instructions = (
        (_LOAD, 0, 0, _NUMBER),
        (_IS, 0, 4, number_of_mmap),
        (_LOAD, 0, 0, _PROTECTION),
        (_HAS, 0, 6, mmap.PROT_EXEC),
        (_LOAD, 0, 0, _FLAGS),
        (_HAS, 3, 4, shared_or_anonymous),
        (_IS, 0, 3, number_of_mprotect),
        (_LOAD, 0, 0, _PROTECTION),
        (_HAS, 0, 1, mmap.PROT_EXEC),
        (_RETURN, 0, 0, _DENY),
        (_RETURN, 0, 0, _ALLOW),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in instructions))
    program = _Program(len(instructions), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")
