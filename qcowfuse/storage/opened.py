"""Opening a regular file or block device, and what the two are asked in different ways.

1. Every length of what may be a device comes from :func:`length_of` or :func:`length_of_path`: the status of a device
   has a size of 0.
2. The kernel opens a read-only device for writing and refuses the writes later, one by one: it is asked at open.
3. A file server on this machine (NFS 4, Samba) may have lent a file to a client (a lease, F_SETLEASE). An open that
   must not wait fails then, and has the kernel ask for the file back. A client gives it back in milliseconds, so the
   open is tried again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Callable

_BLKROGET = 0x125E
"""linux/fs.h: whether a block device is read-only, as an int."""
LEASE_SECONDS = 5.0
"""How long an open waits for a file that is lent; the kernel takes it back after 45 s (``fs.lease-break-time``)."""
_LEASE_POLL = 0.02


def go_on() -> None:
    """For ``before_wait``: nothing ends the wait."""


def is_block_device(fd: int) -> bool:
    """Whether ``fd`` is a block device. Raises OSError."""
    return stat.S_ISBLK(os.fstat(fd).st_mode)


def length_of(fd: int) -> int:
    """The length in bytes of an open regular file or block device. Raises OSError."""
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return status.st_size
    # By lseek and back: another holder of the descriptor may read from where it stands.
    position = os.lseek(fd, 0, os.SEEK_CUR)
    length = os.lseek(fd, 0, os.SEEK_END)
    os.lseek(fd, position, os.SEEK_SET)
    return length


def length_of_path(path: str) -> int:
    """The length in bytes of the regular file or block device at ``path``. Raises OSError, with the file name, also
    for anything else."""
    fd = open_descriptor(path, writable=False)
    try:
        return length_of(fd)
    finally:
        os.close(fd)


def open_descriptor(path: str, *, writable: bool, flags: int = 0, before_wait: Callable[[], None] = go_on) -> int:
    """Open a regular file or block device, with more ``flags`` of os.open. ``before_wait`` may raise, to end the wait
    of rule 3.

    Raises OSError, with the file name: EISDIR, EINVAL for what is neither, EROFS for a read-only device that shall be
    written.
    """
    flags |= os.O_RDWR if writable else os.O_RDONLY
    # O_NONBLOCK: opening a fifo must not wait for its other end; to files it only means rule 3, to devices nothing.
    fd = _open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, before_wait)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise OSError(errno.EINVAL, "Not a regular file or block device", path)
        if writable and stat.S_ISBLK(mode) and _is_read_only_device(fd):
            raise OSError(errno.EROFS, "The block device is read-only", path)
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open(path: str, flags: int, before_wait: Callable[[], None]) -> int:
    """Rule 3."""
    end = time.monotonic() + LEASE_SECONDS
    while True:
        try:
            return os.open(path, flags, 0o644)
        except BlockingIOError as error:
            if time.monotonic() >= end:
                text = "lent to a client of a file server on this machine, which does not give it back; try again"
                raise OSError(error.errno, text, path) from error
            before_wait()
            time.sleep(_LEASE_POLL)


def _is_read_only_device(fd: int) -> bool:
    answer = fcntl.ioctl(fd, _BLKROGET, bytes(4))
    return bool(struct.unpack("@i", answer)[0])
