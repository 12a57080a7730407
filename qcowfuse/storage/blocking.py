"""Whole transfers on a descriptor, and zeroing. Each call blocks until all of it is done: it is made in a thread."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from ..buffer import Buffer

IOV_MAX = 1024
"""Buffers that one pwritev takes (Linux: UIO_MAXIOV)."""
NOT_SUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.ENOTTY})
"""What a call fails with that a file system or a device does not have."""

_ZERO_CHUNK = 1 << 20
sys_pread = os.pread
sys_preadv = os.preadv
sys_pwrite = os.pwrite


def read_all(fd: int, host_offset: int, n_bytes: int) -> bytes:
    """All ``n_bytes``, zero-filled past the end of the file; blocks. Raises OSError."""
    data = sys_pread(fd, n_bytes, host_offset)
    if len(data) == n_bytes:
        return data
    parts = [data]
    n_done = len(data)
    while data and n_done < n_bytes:
        data = sys_pread(fd, n_bytes - n_done, host_offset + n_done)
        parts.append(data)
        n_done += len(data)
    parts.append(bytes(n_bytes - n_done))
    return b"".join(parts)


def read_all_into(fd: int, host_offset: int, buffer: memoryview) -> None:
    """Fill ``buffer``, with zeroes past the end of the file; blocks. Raises OSError."""
    n_done = 0
    n_bytes = len(buffer)
    while n_done < n_bytes:
        n_read = sys_preadv(fd, (buffer[n_done:],), host_offset + n_done)
        if n_read == 0:
            buffer[n_done:] = bytes(n_bytes - n_done)
            return
        n_done += n_read


def write_all(fd: int, host_offset: int, buffers: Sequence[Buffer]) -> int:
    """Write all buffers back to back, in as many system calls as it takes; blocks.

    Gives the number of bytes written. Raises OSError; then any first part of them is written.
    """
    n_done = 0
    for first in range(0, len(buffers), IOV_MAX):
        group = buffers[first : first + IOV_MAX]
        n_group = sum(map(len, group))
        n_written = os.pwritev(fd, group, host_offset + n_done) if n_group else 0
        if n_written != n_group:
            n_written = _write_rest(fd, host_offset + n_done, group, n_written)
        n_done += n_written
    return n_done


def _write_rest(fd: int, host_offset: int, group: Sequence[Buffer], n_written: int) -> int:
    """Finish a short vectored write of ``group``, one buffer at a time (it is rare). Gives the whole length."""
    n_before = 0
    for buffer in group:
        n_end = n_before + len(buffer)
        view = memoryview(buffer)
        while n_written < n_end:
            n_more = sys_pwrite(fd, view[n_written - n_before :], host_offset + n_written)
            if n_more == 0:
                raise OSError(errno.EIO, "a write wrote nothing")
            n_written += n_more
        n_before = n_end
    return n_written


def _write_zero_chunks(fd: int, host_offset: int, n_bytes: int) -> None:
    zeroes = memoryview(bytes(min(n_bytes, _ZERO_CHUNK)))
    for n_done in range(0, n_bytes, _ZERO_CHUNK):
        write_all(fd, host_offset + n_done, (zeroes[: n_bytes - n_done],))


def zero_range(fd: int, mode: int, host_offset: int, n_bytes: int) -> bool:
    """Zero by fallocate ``mode`` (0: not), or by writing; blocks. False when the file system has no such fallocate.
    Raises OSError."""
    if mode:
        from .syscalls import fallocate

        try:
            fallocate(fd, mode, host_offset, n_bytes)
            return True
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            # EINVAL is about this range (a block device wants whole sectors), the others about the file system.
            supported = error.errno == errno.EINVAL
    else:
        supported = False
    _write_zero_chunks(fd, host_offset, n_bytes)
    return supported
