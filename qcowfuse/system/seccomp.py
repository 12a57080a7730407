"""The seccomp filter of a serving daemon: the few system calls that serving takes, for all threads.

1. What the filter does not name fails with EPERM, and the daemon lives on: to kill it would take the disk away from
   its users. A call that is newer than the filter's table gets ENOSYS, so that the C library uses an older one.
2. Four calls depend on their arguments: openat only reads, clone only makes threads, mmap and mprotect never make
   memory executable, ioctl and prctl do only what is named here. clone3 keeps its arguments in memory, where a filter
   can't see them: it answers ENOSYS, and the C library falls back to clone.
3. Building the program is pure; :func:`install` alone makes system calls.

Sources: seccomp(2), linux/seccomp.h, linux/filter.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from typing import Final

from .syscall_numbers import MACHINES, Machine

_LD_ABS: Final = 0x20
_JEQ: Final = 0x15
_JGE: Final = 0x35
_JSET: Final = 0x45
_RET: Final = 0x06

_ALLOW: Final = 0x7FFF_0000
_ERRNO: Final = 0x0005_0000
_NUMBER_OFFSET: Final = 0
_ARCHITECTURE_OFFSET: Final = 4
_ARGUMENTS_OFFSET: Final = 16

_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_FILTER_FLAG_TSYNC: Final = 1
_SECCOMP_FILTER_FLAG_SPEC_ALLOW: Final = 4
_SYSCALL_NUMBER_OF_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}

_O_WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PROT_EXEC: Final = 4
_CLONE_THREAD: Final = 0x10000
_CLONE_NEW_NAMESPACES: Final = 0x7E02_0000 | 0x80
_PR_SET_NAME: Final = 15
_PR_GET_NAME: Final = 16
_PR_SET_VMA: Final = 0x53564D41
_TCGETS: Final = 0x5401
_FIONREAD: Final = 0x541B
_FIONBIO: Final = 0x5421
_FIOCLEX: Final = 0x5451
_BLKDISCARD: Final = 0x1277
_BLKZEROOUT: Final = 0x127F
_BLKSSZGET: Final = 0x1268
_BLKROGET: Final = 0x125E
_BLKGETSIZE64: Final = 0x8008_1272
_IOCTLS: Final = (
    _TCGETS,
    _FIONREAD,
    _FIONBIO,
    _FIOCLEX,
    _BLKDISCARD,
    _BLKZEROOUT,
    _BLKSSZGET,
    _BLKROGET,
    _BLKGETSIZE64,
)

_CONDITIONAL: Final = frozenset({"openat", "clone", "clone3", "mmap", "mprotect", "ioctl", "prctl", "prlimit64"})

_libc = ctypes.CDLL(None, use_errno=True)


class _Program:
    """Instructions of the filter, in order."""

    def __init__(self) -> None:
        self.code: list[tuple[int, int, int, int]] = []

    def load(self, offset: int) -> None:
        self.code.append((_LD_ABS, 0, 0, offset))

    def jump(self, operation: int, value: int, if_true: int, if_false: int) -> None:
        self.code.append((operation, if_true, if_false, value))

    def leave(self, action: int) -> None:
        self.code.append((_RET, 0, 0, action))

    def load_argument(self, number: int) -> None:
        """The low half of an argument: the kernel itself looks at no more of those that are tested here."""
        low_half = 0 if sys.byteorder == "little" else 4
        self.load(_ARGUMENTS_OFFSET + 8 * number + low_half)

    def leave_by_bits(self, bits: int, *, if_set: int, if_clear: int) -> None:
        self.jump(_JSET, bits, 0, 1)
        self.leave(if_set)
        self.leave(if_clear)

    def leave_by_value(self, values: tuple[int, ...], *, otherwise: int) -> None:
        for value in values:
            self.jump(_JEQ, value, 0, 1)
            self.leave(_ALLOW)
        self.leave(otherwise)


def _refusal(number: int) -> int:
    return _ERRNO | number


def build_program(machine: Machine) -> bytes:
    """The filter for a machine, as an array of ``struct sock_filter``."""
    program = _Program()
    program.load(_ARCHITECTURE_OFFSET)
    program.jump(_JEQ, machine.audit_arch, 1, 0)
    program.leave(_refusal(errno.EPERM))
    program.load(_NUMBER_OFFSET)
    # On x86-64 this also holds for numbers of the x32 ABI, which begin at 2^30.
    program.jump(_JGE, machine.newest + 1, 0, 1)
    program.leave(_refusal(errno.ENOSYS))
    for name, number in machine.numbers.items():
        body = _Program()
        _decide(body, name)
        program.jump(_JEQ, number, 0, len(body.code))
        program.code += body.code
    program.leave(_refusal(errno.EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program.code)


def _decide(body: _Program, name: str) -> None:
    """What happens to the system call ``name``; every way ends with an answer."""
    if name == "openat":
        body.load_argument(2)
        body.leave_by_bits(_O_WRITES, if_set=_refusal(errno.EPERM), if_clear=_ALLOW)
    elif name == "clone":
        body.load_argument(0)
        body.jump(_JSET, _CLONE_NEW_NAMESPACES, 0, 1)
        body.leave(_refusal(errno.EPERM))
        body.leave_by_bits(_CLONE_THREAD, if_set=_ALLOW, if_clear=_refusal(errno.EPERM))
    elif name == "clone3":
        body.leave(_refusal(errno.ENOSYS))
    elif name in ("mmap", "mprotect"):
        body.load_argument(2)
        body.leave_by_bits(_PROT_EXEC, if_set=_refusal(errno.EPERM), if_clear=_ALLOW)
    elif name == "ioctl":
        body.load_argument(1)
        body.leave_by_value(_IOCTLS, otherwise=_refusal(errno.ENOTTY))
    elif name == "prctl":
        body.load_argument(0)
        body.leave_by_value((_PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA), otherwise=_refusal(errno.EPERM))
    elif name == "prlimit64":
        body.load_argument(0)  # the process: 0 is the caller
        body.leave_by_value((0,), otherwise=_refusal(errno.EPERM))
    else:
        assert name not in _CONDITIONAL
        body.leave(_ALLOW)


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install() -> None:
    """Put every thread of this process under the filter. They must have no-new-privileges, or be privileged.

    Raises OSError; ENOSYS where the machine is unknown, or the kernel has no such filters.
    """
    name = os.uname().machine
    machine = MACHINES.get(name)
    if machine is None or sys.maxsize < 1 << 32:
        raise OSError(errno.ENOSYS, f"no system call filter for {name}")
    code = build_program(machine)
    program = _FilterProgram(len(code) // 8, code)
    result = _libc.syscall(
        _SYSCALL_NUMBER_OF_SECCOMP[name],
        _SECCOMP_SET_MODE_FILTER,
        # The second flag: no mitigation of speculation comes along, which some kernels would add and which is slow.
        _SECCOMP_FILTER_FLAG_TSYNC | _SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        ctypes.byref(program),
    )
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if result > 0:
        raise OSError(errno.EBUSY, f"thread {result} has a filter of its own")
