"""MemoryImage: an Image in a bytearray, with switches for what those who serve it must cope with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from qcowfuse.driver.image import never
from qcowfuse.driver.layers.range_claims import InFlightEpochs
from qcowfuse.driver.pending import PendingRead, PendingWrite
from qcowfuse.errors import CorruptImageError, OutOfRangeError, ReadOnlyImageError

Buffer = bytes | bytearray | memoryview


class Guard:
    """Of pending requests: ``epochs`` tells how many there are."""

    def __init__(self) -> None:
        self.epochs = InFlightEpochs()

    async def freeze(self, error: CorruptImageError) -> None:
        raise AssertionError("memory is not corrupt")


class MemoryImage:
    """``inline`` False: nothing is answered at once. ``failure``: raised by every read, write and flush while set."""

    def __init__(
        self, size: int = 1 << 20, *, read_only: bool = False, cluster_size: int = 65536, inline: bool = True
    ) -> None:
        self.path = "/images/memory.qcow2"
        self.format_name = "memory"
        self.size = size
        self.cluster_size = cluster_size
        self.read_only = read_only
        self.inline = inline
        self.guard = Guard()
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

    def start_read(
        self, guest_offset: int, n_bytes: int, is_alone: Callable[[], bool] = never, /
    ) -> Buffer | PendingRead:
        self._check(guest_offset, n_bytes)
        if self.inline:
            return memoryview(self.data)[guest_offset : guest_offset + n_bytes]
        return PendingRead(self.guard, partial(self.read_later, guest_offset, n_bytes))

    def start_write(
        self, guest_offset: int, data: Buffer, is_alone: Callable[[], bool] = never, /
    ) -> PendingWrite | None:
        self._check(guest_offset, len(data))
        if self.read_only:
            raise ReadOnlyImageError("the image is read-only")
        if not self.inline:
            return PendingWrite(self.guard, partial(self.write_later, guest_offset), data)
        self.data[guest_offset : guest_offset + len(data)] = data
        return None

    async def read(self, guest_offset: int, n_bytes: int) -> Buffer:
        started = self.start_read(guest_offset, n_bytes)
        return await started.finish() if isinstance(started, PendingRead) else started

    async def write(self, guest_offset: int, data: Buffer) -> None:
        pending = self.start_write(guest_offset, data)
        if pending is not None:
            await pending.finish()

    async def read_later(self, guest_offset: int, n_bytes: int) -> Buffer:
        await trio.lowlevel.checkpoint()
        return bytes(self.data[guest_offset : guest_offset + n_bytes])

    async def write_later(self, guest_offset: int, data: Buffer) -> None:
        await trio.lowlevel.checkpoint()
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

    def try_find_extent(self, guest_offset: int, n_bytes: int) -> tuple[bool, int, bool] | None:
        return None

    def try_write_zeroes(self, guest_offset: int, n_bytes: int, *, unmap: bool) -> bool:
        return False

    def try_flush(self) -> bool:
        return False

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
