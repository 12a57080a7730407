"""Reads of a file in the thread that asks: of what never blocks, or of what the page cache holds.

1. A refused RWF_NOWAIT read has set the disk to work already; the caller goes on to ``Storage.pread``.
2. Where a file system turns out not to take RWF_NOWAIT, no read is made inline any more.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from ..buffer import Buffer
from .base import StorageCounters
from .blocking import read_all, read_all_into

_RWF_NOWAIT = os.RWF_NOWAIT
sys_pread = os.pread
sys_preadv = os.preadv


class InlineReads:
    """From ``fd``, which is -1 when the file is closed. ``size`` is the length of the file; ``on_refusal`` is called
    by rule 2."""

    def __init__(
        self, fd: int, counters: StorageCounters, size: Callable[[], int], on_refusal: Callable[[], None]
    ) -> None:
        self.fd = fd
        self._counters = counters
        self._size = size
        self._on_refusal = on_refusal

    def plain_pread(self, host_offset: int, n_bytes: int) -> Buffer | None:
        """``Storage.try_pread`` where a read never blocks. Raises OSError."""
        data = sys_pread(self.fd, n_bytes, host_offset)
        counters = self._counters
        counters.reads += 1
        counters.read_bytes += n_bytes
        if len(data) == n_bytes:
            return data
        return data + read_all(self.fd, host_offset + len(data), n_bytes - len(data))

    def nowait_pread(self, host_offset: int, n_bytes: int) -> Buffer | None:
        """``Storage.try_pread`` with RWF_NOWAIT. Raises OSError."""
        buffer = bytearray(n_bytes)
        try:
            n_read = sys_preadv(self.fd, (buffer,), host_offset, _RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            self._on_nowait_error(error)
            return None
        # Short: either only a part is cached, or that was the end of the file and the rest is zero already.
        if n_read != n_bytes and host_offset + n_read < self._size():
            return None
        counters = self._counters
        counters.reads += 1
        counters.read_bytes += n_bytes
        return buffer

    def plain_pread_into(self, host_offset: int, buffer: memoryview) -> bool:
        """``Storage.try_pread_into`` where a read never blocks. Raises OSError."""
        read_all_into(self.fd, host_offset, buffer)
        counters = self._counters
        counters.reads += 1
        counters.read_bytes += len(buffer)
        return True

    def nowait_pread_into(self, host_offset: int, buffer: memoryview) -> bool:
        """``Storage.try_pread_into`` with RWF_NOWAIT. Raises OSError."""
        try:
            n_read = sys_preadv(self.fd, (buffer,), host_offset, _RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            self._on_nowait_error(error)
            return False
        n_bytes = len(buffer)
        if n_read != n_bytes:
            if host_offset + n_read < self._size():
                return False
            buffer[n_read:] = bytes(n_bytes - n_read)
        counters = self._counters
        counters.reads += 1
        counters.read_bytes += n_bytes
        return True

    def _on_nowait_error(self, error: OSError) -> None:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise error
        self._on_refusal()


def decline_pread(host_offset: int, n_bytes: int) -> Buffer | None:
    """``Storage.try_pread`` where no read is made inline."""
    return None


def decline_pread_into(host_offset: int, buffer: memoryview) -> bool:
    """``Storage.try_pread_into`` where no read is made inline."""
    return False
