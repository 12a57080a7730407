"""A Storage around a Storage that adds a known delay to each access, for measuring.

1. The ``try_`` calls always decline, so that each access pays; the delay comes first, then the access.
2. With a constant delay, accesses wait side by side. The disk model has one spindle: one after another.
3. A delay is exact to some 0.1 ms however short it is: it is timed by the kernel (timerfd), because trio's
   own clock wakes in whole milliseconds only.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from ...buffer import Buffer
from ..base import Deliver, OnEnd, OnWritten, Storage, StorageCounters, pread
from ..syscalls import timer_create, timer_start
from .delay_model import DelayModel


class TimerSleep:
    """``await timers(seconds)``: a sleep by timerfd, many at a time; the timers are kept for the next one."""

    def __init__(self) -> None:
        self._spare: list[int] = []

    async def __call__(self, seconds: float) -> None:
        """Sleep. Raises OSError where the process has no descriptors left."""
        if seconds <= 0:
            await trio.lowlevel.checkpoint()
            return
        fd = self._spare.pop() if self._spare else timer_create()
        try:
            timer_start(fd, seconds)
            await trio.lowlevel.wait_readable(fd)
        finally:
            self._spare.append(fd)

    def close(self) -> None:
        """Give up the timers that are not in use. Idempotent."""
        while self._spare:
            os.close(self._spare.pop())


class LatencyStorage:
    """``inner`` with the delays of ``model``; ``sleep`` is for tests that have a clock of their own."""

    def __init__(
        self, inner: Storage, model: DelayModel, *, sleep: Callable[[float], Awaitable[None]] | None = None
    ) -> None:
        self._inner = inner
        self._model = model
        self._timers = TimerSleep()
        self._sleep = self._timers if sleep is None else sleep
        self._spindle = trio.Lock()
        self._previous_end = 0

    @property
    def name(self) -> str:
        """The inner one's."""
        return self._inner.name

    @property
    def is_fixed(self) -> bool:
        """The inner one's."""
        return self._inner.is_fixed

    @property
    def writable(self) -> bool:
        """The inner one's."""
        return self._inner.writable

    @property
    def counters(self) -> StorageCounters:
        """The inner one's."""
        return self._inner.counters

    def size(self) -> int:
        """The length in bytes."""
        return self._inner.size()

    def refresh_size(self) -> None:
        """The inner one's."""
        self._inner.refresh_size()

    def allocated_bytes(self) -> int:
        """Bytes of disk space in use."""
        return self._inner.allocated_bytes()

    def free_bytes(self) -> int:
        """Free bytes in the file system below."""
        return self._inner.free_bytes()

    def try_pread(self, host_offset: int, n_bytes: int) -> Buffer | None:
        """Declines."""
        return None

    def try_pread_into(self, host_offset: int, buffer: memoryview) -> bool:
        """Declines."""
        return False

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """Declines."""
        return False

    async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
        """The inner read, later."""
        async with self._access(host_offset, n_bytes):
            return await pread(self._inner, host_offset, n_bytes)

    def start_delivery(self, host_offset: int, n_bytes: int, deliver: Deliver, on_end: OnEnd) -> bool:
        """False: the delay needs a task."""
        return False

    def start_pwrite(self, host_offset: int, data: Buffer, on_written: OnWritten, on_end: OnEnd) -> bool:
        """False: the delay needs a task."""
        return False

    async def pread_into(self, host_offset: int, buffer: memoryview) -> None:
        """The inner read, later."""
        async with self._access(host_offset, len(buffer)):
            if not self._inner.try_pread_into(host_offset, buffer):
                await self._inner.pread_into(host_offset, buffer)

    async def pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """The inner write, later."""
        async with self._access(host_offset, sum(map(len, buffers))):
            if not self._inner.try_pwritev(host_offset, buffers):
                await self._inner.pwritev(host_offset, buffers)

    async def write_zeroes(self, host_offset: int, n_bytes: int, *, unmap: bool = False) -> None:
        """The inner call, later: the disk moves all the zeroes, unless it gives their space back."""
        async with self._access(host_offset, 0 if unmap else n_bytes):
            await self._inner.write_zeroes(host_offset, n_bytes, unmap=unmap)

    async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
        """The inner call, later: the disk moves nothing."""
        async with self._access(host_offset, 0):
            await self._inner.punch_hole(host_offset, n_bytes, in_use=in_use)

    async def allocate(self, host_offset: int, n_bytes: int) -> bool:
        """The inner call, later: the disk moves nothing."""
        async with self._access(host_offset, 0):
            return await self._inner.allocate(host_offset, n_bytes)

    async def keep_free(self, n_bytes: int) -> bool:
        """As the inner one, without delay."""
        return await self._inner.keep_free(n_bytes)

    async def truncate(self, n_bytes: int) -> None:
        """The inner call, later: the disk neither moves nor seeks."""
        async with self._access(None, 0):
            await self._inner.truncate(n_bytes)

    def try_flush(self) -> bool:
        """False: every flush takes its time."""
        return False

    async def flush(self) -> None:
        """The inner flush, later: the constant once; the disk neither moves nor seeks."""
        async with self._access(None, 0):
            await self._inner.flush()

    async def aclose(self) -> None:
        """Close the inner one, without delay. Idempotent."""
        self._timers.close()
        await self._inner.aclose()

    @asynccontextmanager
    async def _access(self, host_offset: int | None, n_bytes: int) -> AsyncIterator[None]:
        if not self._model.is_disk:
            await self._sleep(self._model.delay(0, 0, 0))
            yield
            return
        async with self._spindle:
            start = self._previous_end if host_offset is None else host_offset
            await self._sleep(self._model.delay(self._previous_end, start, n_bytes))
            self._previous_end = start + n_bytes
            yield
