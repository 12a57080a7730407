"""Space below a part of a file: having it set aside, so that a later write there does not find the disk full, and
giving it back.

Sources: fallocate(2); linux/fs.h on BLKDISCARD, with which QEMU, too, gives space of a device back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from .blocking import NOT_SUPPORTED
from .opened import is_block_device, length_of
from .syscalls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, fallocate

BLKDISCARD = 0x1277


def allocate_range(fd: int, host_offset: int, n_bytes: int) -> bool:
    """Allocate what the range lacks and keep what it holds; grows the file where the range reaches past its end;
    blocks. False where the file system has no such call; a block device has its space, as far as it says.

    Raises OSError (ENOSPC; part of the range may be allocated then).
    """
    if is_block_device(fd):
        if host_offset + n_bytes > length_of(fd):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return True
    try:
        fallocate(fd, 0, host_offset, n_bytes)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        return False
    return True


def give_back(fd: int, host_offset: int, n_bytes: int, zeroes: bool) -> bool:
    """Give back the space of a range that lies within the file; ``zeroes``: and have it read as zeroes, else as
    anything; blocks. False where that can't be: nothing has happened then. Raises OSError."""
    try:
        if is_block_device(fd) and not zeroes:
            fcntl.ioctl(fd, BLKDISCARD, struct.pack("@QQ", host_offset, n_bytes))
        else:
            fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, host_offset, n_bytes)
    except OSError as error:
        # EINVAL is about this range (a block device wants whole sectors), the others about what lies below.
        if error.errno == errno.EINVAL:
            return not zeroes
        if error.errno not in NOT_SUPPORTED:
            raise
        return False
    return True
