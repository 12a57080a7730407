"""Exception to errno: the one table.

1. ``OSError`` keeps its errno, except for those that would mean something else to the kernel (ENOSYS turns an
   operation off for good) and those that are no errno at all: EIO.
2. Of our own exceptions, the nearest class in the table decides.
3. Anything else is a bug in qcowfuse: :func:`errno_of` says None, and the caller logs a traceback and answers EIO.
"""

from __future__ import annotations

import errno

from ..errors import (
    BackingChainError,
    FormatError,
    ImageLockedError,
    ImageUsageError,
    MountError,
    OutOfRangeError,
    QcowFuseError,
    ReadOnlyImageError,
)

ERRNOS: dict[type[BaseException], int] = {
    ReadOnlyImageError: errno.EROFS,
    OutOfRangeError: errno.EINVAL,
    ImageUsageError: errno.EINVAL,
    FormatError: errno.EIO,
    ImageLockedError: errno.EBUSY,
    BackingChainError: errno.EIO,
    MountError: errno.EIO,
    QcowFuseError: errno.EIO,
    MemoryError: errno.ENOMEM,
}


def errno_of(exc: BaseException) -> int | None:
    """The errno that a client of the served file gets for ``exc``; None: not in the table, so a bug."""
    if isinstance(exc, OSError):
        number = exc.errno
        if number is None or number == errno.ENOSYS or number not in errno.errorcode:
            return errno.EIO
        return number
    for ancestor in type(exc).__mro__:
        if ancestor in ERRNOS:
            return ERRNOS[ancestor]
    return None
