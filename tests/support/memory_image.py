"""MemoryImage: an Image in a bytearray, with switches for what export must cope with."""

from __future__ import annotations

import trio

from qcowfuse.errors import OutOfRangeError, ReadOnlyImageError

Buffer = bytes | bytearray | memoryview


class MemoryImage:
    """``inline`` False: the try_ calls decline. ``failure``: raised by every read, write and flush while set."""

    def __init__(
        self, size: int = 1 << 20, *, read_only: bool = False, cluster_size: int = 65536, inline: bool = True
    ) -> None:
        self.path = "/images/memory.qcow2"
        self.format_name = "memory"
        self.size = size
        self.cluster_size = cluster_size
        self.read_only = read_only
        self.inline = inline
        self.failure: BaseException | None = None
        self.data = bytearray(size)
        self.n_flushes = 0
        self.n_closes = 0
        self.allocated = 0
        self.free = 1 << 30

    def _check(self, guest_offset: int, n_bytes: int) -> None:
        if self.failure is not None:
            raise self.failure
        if guest_offset < 0 or guest_offset + n_bytes > self.size:
            raise OutOfRangeError(f"{guest_offset} + {n_bytes} is past {self.size}")

    def try_read(self, guest_offset: int, n_bytes: int) -> Buffer | None:
        self._check(guest_offset, n_bytes)
        return memoryview(self.data)[guest_offset : guest_offset + n_bytes] if self.inline else None

    def try_read_alone(self, guest_offset: int, n_bytes: int) -> Buffer | None:
        return None

    async def read(self, guest_offset: int, n_bytes: int, *, may_block_loop: bool = False) -> Buffer:
        await trio.lowlevel.checkpoint()
        self._check(guest_offset, n_bytes)
        return bytes(self.data[guest_offset : guest_offset + n_bytes])

    def try_write(self, guest_offset: int, data: Buffer) -> bool:
        self._check(guest_offset, len(data))
        if self.read_only:
            raise ReadOnlyImageError("the image is read-only")
        if self.inline:
            self.data[guest_offset : guest_offset + len(data)] = data
        return self.inline

    def try_allocate_write(self, guest_offset: int, data: Buffer) -> bool:
        self._check(guest_offset, len(data))
        return False

    async def write(self, guest_offset: int, data: Buffer) -> None:
        await trio.lowlevel.checkpoint()
        self._check(guest_offset, len(data))
        if self.read_only:
            raise ReadOnlyImageError("the image is read-only")
        self.data[guest_offset : guest_offset + len(data)] = data

    async def write_zeroes(self, guest_offset: int, n_bytes: int, *, unmap: bool) -> None:
        await self.write(guest_offset, bytes(n_bytes))

    async def allocate(self, guest_offset: int, n_bytes: int) -> None:
        await trio.lowlevel.checkpoint()
        self._check(guest_offset, n_bytes)
        self.allocated = max(self.allocated, n_bytes)

    async def grow(self, size: int) -> None:
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        self.data.extend(bytes(-(-size // 512) * 512 - self.size))
        self.size = len(self.data)

    async def find_extent(self, guest_offset: int, n_bytes: int, *, keep: bool = True) -> tuple[bool, int]:
        """Cluster by cluster: whether any byte of it is not zero."""
        await trio.lowlevel.checkpoint()
        self._check(guest_offset, n_bytes)
        end = min(guest_offset // self.cluster_size * self.cluster_size + self.cluster_size, guest_offset + n_bytes)
        return any(self.data[guest_offset // self.cluster_size * self.cluster_size : end]), end - guest_offset

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        self.n_flushes += 1

    def allocated_bytes(self) -> int:
        return self.allocated

    async def count_allocated(self) -> None:
        await trio.lowlevel.checkpoint()

    def free_host_bytes(self) -> int:
        return self.free

    def statistics(self) -> dict[str, int]:
        return {"backend.flushes": self.n_flushes, "l2_cache.hits": 7}

    async def aclose(self) -> None:
        self.n_closes += 1
        await trio.lowlevel.checkpoint()
