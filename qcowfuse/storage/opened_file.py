"""An open regular file or block device: its name, its length, its space. What reads and writes it builds on this.

1. The descriptor is looked up on each call and is -1 once it is closed: a late call gets EBADF and can never reach
   another file that was given the same number.
"""

from __future__ import annotations

import os

from .base import StorageCounters
from .opened import is_block_device, length_of


class OpenedFile:
    """The part of Storage that neither reads nor writes. Owns ``fd`` from now on."""

    def __init__(self, fd: int, path: str) -> None:
        """Raises OSError."""
        self._fd = fd
        self._name = path
        self._size = length_of(fd)
        self.is_fixed = is_block_device(fd)
        self.counters = StorageCounters()

    @property
    def name(self) -> str:
        """The path as it was given."""
        return self._name

    def fileno(self) -> int:
        """The descriptor, for locks; -1 once it is closed."""
        return self._fd

    def size(self) -> int:
        """The length in bytes."""
        return self._size

    def refresh_size(self) -> None:
        """See Storage. The process that held the lock before may have changed it, too. Raises OSError."""
        self._size = length_of(self._fd)

    def allocated_bytes(self) -> int:
        """Bytes of disk space in use; of a device, all that it has. Raises OSError."""
        if self.is_fixed:
            return self._size
        return os.fstat(self._fd).st_blocks * 512

    def free_bytes(self) -> int:
        """Bytes that may still be written to the file system, for an ordinary user; the length of a device, which
        has none. Raises OSError."""
        if self.is_fixed:
            return self._size
        status = os.fstatvfs(self._fd)
        return status.f_bavail * status.f_frsize
