"""BlockingFile: a file that is only read, by calls that block, for a program that does nothing else meanwhile."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from ..buffer import Buffer
from .base import Deliver, OnEnd, OnWritten
from .blocking import read_all, read_all_into
from .opened_file import OpenedFile


class BlockingFile(OpenedFile):
    """A Storage; see the module docstring. What changes the file raises OSError (EBADF)."""

    writable = False
    file_system = ""

    def try_pread(self, host_offset: int, n_bytes: int) -> Buffer | None:
        """All ``n_bytes``, zero-filled past the end; blocks. Raises OSError."""
        self.counters.reads += 1
        self.counters.read_bytes += n_bytes
        return read_all(self._fd, host_offset, n_bytes)

    def try_pread_into(self, host_offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer``, with zeroes past the end; blocks. Raises OSError."""
        self.counters.reads += 1
        self.counters.read_bytes += len(buffer)
        read_all_into(self._fd, host_offset, buffer)
        return True

    async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
        """See Storage. Raises OSError."""
        return self.try_pread(host_offset, n_bytes) or b""

    async def pread_into(self, host_offset: int, buffer: memoryview) -> None:
        """See Storage. Raises OSError."""
        self.try_pread_into(host_offset, buffer)

    def start_delivery(self, host_offset: int, n_bytes: int, deliver: Deliver, on_end: OnEnd) -> bool:
        """There is no thread for it."""
        return False

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """Left to :meth:`pwritev`."""
        return False

    async def pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """Raises OSError."""
        raise self._refusal()

    def start_pwrite(self, host_offset: int, data: Buffer, on_written: OnWritten, on_end: OnEnd) -> bool:
        """There is no thread for it."""
        return False

    async def write_zeroes(self, host_offset: int, n_bytes: int, *, unmap: bool = False) -> None:
        """Raises OSError."""
        raise self._refusal()

    async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
        """Raises OSError."""
        raise self._refusal()

    async def allocate(self, host_offset: int, n_bytes: int) -> bool:
        """Raises OSError."""
        raise self._refusal()

    async def keep_free(self, n_bytes: int) -> bool:
        """There is no need."""
        return False

    async def truncate(self, n_bytes: int) -> None:
        """Raises OSError."""
        raise self._refusal()

    def try_flush(self) -> bool:
        """Nothing was written."""
        return True

    async def flush(self) -> None:
        """Nothing was written."""

    async def aclose(self) -> None:
        """Close it: that gives up the locks. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _refusal(self) -> OSError:
        return OSError(errno.EBADF, "storage was opened read-only", self._name)
