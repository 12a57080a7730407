"""Having a file system set space aside for a part of a file: a later write there does not find the disk full."""

from __future__ import annotations

import errno

from .opened import is_block_device
from .syscalls import fallocate

_NOT_SUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})


def allocate_range(fd: int, host_offset: int, n_bytes: int) -> bool:
    """Allocate what the range lacks and keep what it holds; grows the file where the range reaches past its end;
    blocks. False where the file system has no such call; a block device has its space, as far as it says.

    Raises OSError (ENOSPC; part of the range may be allocated then).
    """
    try:
        fallocate(fd, 0, host_offset, n_bytes)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        return is_block_device(fd)
    return True
