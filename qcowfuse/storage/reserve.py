"""Space that is kept free on a copy-on-write file system, where writing over a file takes new space.

1. It is held by a file without a name beside the image, so that a crash leaves nothing of it. Where none can be made
   (a folder that may not be written, a file system without such files), nothing is kept.
2. A file with the attribute "no copy on write" (chattr +C) needs none.
3. What is given up can be had by the next write: btrfs commits where it must.

Sources: open(2) on O_TMPFILE, btrfs(5) on nodatacow.
"""

from __future__ import annotations

import array
import fcntl
import os

from .syscalls import fallocate

_FS_IOC_GETFLAGS = 0x80086601 if array.array("L").itemsize == 8 else 0x80046601
_FS_NOCOW_FL = 0x00800000


def open_reserve(fd: int, path: str) -> int | None:
    """A file without a name to hold space for ``fd``, the open file at ``path``; None where there is no need, or no
    way."""
    if _is_written_in_place(fd):
        return None
    try:
        reserve_fd = os.open(os.path.dirname(os.path.realpath(path)), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    if os.fstat(reserve_fd).st_dev != os.fstat(fd).st_dev:
        os.close(reserve_fd)
        return None
    return reserve_fd


def keep_free(reserve_fd: int, n_bytes: int) -> None:
    """Hold so much; 0: give it up. Blocks. Raises OSError (ENOSPC), and holds nothing then."""
    os.ftruncate(reserve_fd, 0)
    if not n_bytes:
        return
    try:
        fallocate(reserve_fd, 0, 0, n_bytes)
    except OSError:
        os.ftruncate(reserve_fd, 0)
        raise


def _is_written_in_place(fd: int) -> bool:
    flags = array.array("L", [0])
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
    except OSError:
        return False
    return bool(flags[0] & _FS_NOCOW_FL)
