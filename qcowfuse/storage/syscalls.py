"""The few system calls that the os module lacks: fallocate with a mode, write errors, mlocked mappings, timers.

1. Each raises OSError with the errno that the kernel gave.
2. All may block and give up the interpreter lock meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_ZERO_RANGE = 0x10

_SYNC_FILE_RANGE_WAIT_BEFORE = 1
_NOWHERE = 1 << 62
_PROT_READ = 1
_MAP_SHARED = 1
_CLOCK_MONOTONIC = 1

_libc = ctypes.CDLL(None, use_errno=True)
# glibc's plain fallocate has a 32-bit offset on 32-bit machines; musl has only the plain name, with 64 bits.
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int
_sync_file_range = _libc.sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_sync_file_range.restype = ctypes.c_int
_mmap = _libc.mmap
_mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_mmap.restype = ctypes.c_void_p
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_mlock = _libc.mlock
_mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value


def _raise_errno(call: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{call}: {os.strerror(number)}")


def fallocate(fd: int, mode: int, host_offset: int, n_bytes: int) -> None:
    """fallocate(2) with a ``FALLOC_`` mode. Raises OSError (EOPNOTSUPP where the file system can't)."""
    while _fallocate(fd, mode, host_offset, n_bytes) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))  # said as any other write would say it


def written_back_without_error(fd: int) -> None:
    """Ask whether some page of the file could not be written to the disk, without waiting for any that still is to
    be. Raises OSError for what happened since the last call, once for each open file."""
    # The range that it waits for is one in which there is nothing; the error is that of the whole file.
    if _sync_file_range(fd, _NOWHERE, 1, _SYNC_FILE_RANGE_WAIT_BEFORE) != 0:
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.ESPIPE):
            raise OSError(number, os.strerror(number))


class LockedMapping:
    """The first ``n_bytes`` of a file, mapped shared and read-only, and locked in RAM.

    Nothing may read past the end of the file through it (SIGBUS): unmap before the file shrinks.
    """

    def __init__(self, fd: int, n_bytes: int) -> None:
        """Map and lock, which reads the whole file. Raises OSError (ENOMEM, EAGAIN, EPERM where not allowed)."""
        self._address: int | None = _mmap(None, n_bytes, _PROT_READ, _MAP_SHARED, fd, 0)
        if self._address == _MAP_FAILED:
            _raise_errno("mmap")
        assert self._address is not None
        self._n_bytes = n_bytes
        if _mlock(self._address, n_bytes) != 0:
            number = ctypes.get_errno()
            _munmap(self._address, n_bytes)
            raise OSError(number, f"mlock: {os.strerror(number)}")
        self.view = memoryview((ctypes.c_ubyte * n_bytes).from_address(self._address)).cast("B").toreadonly()

    def unmap(self) -> None:
        """Give it up; ``view`` is not to be used from here on. Idempotent."""
        self.view.release()
        if self._address is not None:
            _munmap(self._address, self._n_bytes)
            self._address = None


def timer_create() -> int:
    """A timerfd on the monotonic clock, for epoll. Raises OSError."""
    fd = int(_libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))
    if fd < 0:
        _raise_errno("timerfd_create")
    return fd


def timer_start(fd: int, seconds: float) -> None:
    """Make the timer readable once, ``seconds`` (more than 0) from now; forgets an earlier start."""
    n_ns = max(1, round(seconds * 1e9))
    value = struct.pack("@llll", 0, 0, n_ns // 1_000_000_000, n_ns % 1_000_000_000)
    if _libc.timerfd_settime(fd, 0, value, None) != 0:
        _raise_errno("timerfd_settime")
