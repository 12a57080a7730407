"""BoundedStorage: a MemoryStorage for damaged images, which may ask for anything."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from qcowfuse.buffer import Buffer

from .memory_storage import MemoryStorage

STORAGE_LIMIT = 16 << 20
"""Bytes that the storage holds; a write beyond is EFBIG."""
READ_LIMIT = 9 << 20
"""Bytes that nothing may ask for at once: the largest that is read as a whole is a refcount table of 8 MiB."""


class BoundedStorage(MemoryStorage):
    """A MemoryStorage that is full at 16 MiB and fails the test when it is asked for too much at once."""

    def try_pread(self, host_offset: int, n_bytes: int) -> Buffer | None:
        """See Storage."""
        assert n_bytes <= READ_LIMIT
        return super().try_pread(host_offset, n_bytes)

    async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
        """See Storage."""
        assert n_bytes <= READ_LIMIT
        return await super().pread(host_offset, n_bytes)

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """See Storage."""
        self._must_fit(host_offset + sum(len(buffer) for buffer in buffers))
        return super().try_pwritev(host_offset, buffers)

    async def pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """See Storage."""
        self._must_fit(host_offset + sum(len(buffer) for buffer in buffers))
        await super().pwritev(host_offset, buffers)

    async def write_zeroes(self, host_offset: int, n_bytes: int, *, unmap: bool = False) -> None:
        """See Storage."""
        self._must_fit(host_offset + n_bytes)
        await super().write_zeroes(host_offset, n_bytes, unmap=unmap)

    async def truncate(self, n_bytes: int) -> None:
        """See Storage."""
        self._must_fit(n_bytes)
        await super().truncate(n_bytes)

    @staticmethod
    def _must_fit(end: int) -> None:
        if end > STORAGE_LIMIT:
            raise OSError(errno.EFBIG, "the storage is full")
