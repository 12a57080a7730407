"""ForwardingStorage: a base for storages that stand in front of another one and add something."""

from __future__ import annotations

from collections.abc import Sequence

from qcowfuse.buffer import Buffer
from qcowfuse.storage.base import Deliver, OnEnd, OnWritten, Storage, StorageCounters


class ForwardingStorage:
    """Hands everything through to ``inner``."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        """The inner one's."""
        return self.inner.name

    @property
    def is_fixed(self) -> bool:
        """The inner one's."""
        return self.inner.is_fixed

    @property
    def writable(self) -> bool:
        """The inner one's."""
        return self.inner.writable

    @property
    def counters(self) -> StorageCounters:
        """The inner one's."""
        return self.inner.counters

    def size(self) -> int:
        """The inner one's."""
        return self.inner.size()

    def refresh_size(self) -> None:
        """The inner one's."""
        self.inner.refresh_size()

    def allocated_bytes(self) -> int:
        """The inner one's."""
        return self.inner.allocated_bytes()

    def free_bytes(self) -> int:
        """The inner one's."""
        return self.inner.free_bytes()

    def try_pread(self, host_offset: int, n_bytes: int) -> Buffer | None:
        """As the inner one."""
        return self.inner.try_pread(host_offset, n_bytes)

    def try_pread_into(self, host_offset: int, buffer: memoryview) -> bool:
        """As the inner one."""
        return self.inner.try_pread_into(host_offset, buffer)

    async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
        """As the inner one."""
        return await self.inner.pread(host_offset, n_bytes)

    def start_delivery(self, host_offset: int, n_bytes: int, deliver: Deliver, on_end: OnEnd) -> bool:
        """As the inner one."""
        return self.inner.start_delivery(host_offset, n_bytes, deliver, on_end)

    async def pread_into(self, host_offset: int, buffer: memoryview) -> None:
        """As the inner one."""
        await self.inner.pread_into(host_offset, buffer)

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """As the inner one."""
        return self.inner.try_pwritev(host_offset, buffers)

    async def pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """As the inner one."""
        await self.inner.pwritev(host_offset, buffers)

    def start_pwrite(self, host_offset: int, data: Buffer, on_written: OnWritten, on_end: OnEnd) -> bool:
        """As the inner one."""
        return self.inner.start_pwrite(host_offset, data, on_written, on_end)

    async def write_zeroes(self, host_offset: int, n_bytes: int, *, unmap: bool = False) -> None:
        """As the inner one."""
        await self.inner.write_zeroes(host_offset, n_bytes, unmap=unmap)

    async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
        """As the inner one."""
        await self.inner.punch_hole(host_offset, n_bytes, in_use=in_use)

    async def allocate(self, host_offset: int, n_bytes: int) -> bool:
        """As the inner one."""
        return await self.inner.allocate(host_offset, n_bytes)

    async def keep_free(self, n_bytes: int) -> bool:
        """As the inner one."""
        return await self.inner.keep_free(n_bytes)

    async def truncate(self, n_bytes: int) -> None:
        """As the inner one."""
        await self.inner.truncate(n_bytes)

    def try_flush(self) -> bool:
        """As the inner one."""
        return self.inner.try_flush()

    async def flush(self) -> None:
        """As the inner one."""
        await self.inner.flush()

    async def aclose(self) -> None:
        """As the inner one."""
        await self.inner.aclose()
