"""FileStorage: a regular file or block device, inline where the kernel answers at once, else in a thread or a ring.

1. How to read (:mod:`.inline_reads`) and write inline is found out once, at open, from the file system and one trial
   read:

   ==================  ==========================================  ==========================
   file system         reads inline                                writes inline
   ==================  ==========================================  ==========================
   tmpfs, ramfs        plain: never blocks (refuses RWF_NOWAIT)    plain
   ext2/3/4, xfs       RWF_NOWAIT: what is in the page cache       plain, up to 1 MiB
   block devices       RWF_NOWAIT where the trial read took it     whole pages, up to 1 MiB
   others              RWF_NOWAIT where the trial read took it     never
   ==================  ==========================================  ==========================

   Plain buffered writes on ext4 and xfs end in about 1.5 us and 0.1 ms at worst; on btrfs they have been
   seen to take 30 ms. Those of whole pages to a block device are as quick as those of ext4, also where the kernel
   is busy writing back; a part of a page may have to be read first.
2. The descriptor is looked up on each call and is -1 after :meth:`FileStorage.aclose` (see :mod:`.opened_file`).
3. Buffers are bytes, bytearrays, or contiguous memoryviews of bytes.
4. Reads that wait go by io_uring (:mod:`.ring`) where that was asked for and can be had, up to 128 KiB, and so do
   flushes of local file systems and devices; all else goes to a thread.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import trio

from ..buffer import Buffer
from . import file_systems
from .base import Deliver, OnEnd, OnWritten, TryPread, TryPreadInto, TryPwritev, of_whole_pages
from .blocking import read_all, read_all_into, write_all, zero_range
from .calls_in_flight import CallsInFlight
from .durability import Durability
from .flushes import DiskFlushes
from .held import Held
from .inline_reads import InlineReads, decline_pread, decline_pread_into
from .opened import length_of
from .opened_file import OpenedFile
from .ring import MAX_READ_BYTES, Ring, retain_ring
from .space import allocate_range, give_back
from .syscalls import FALLOC_ZERO_RANGE
from .workers import retain_worker_pool

MAX_INLINE_WRITE = 1 << 20
"""Bytes; longer writes to a disk file system go to a thread, which copies them without the interpreter lock."""

sys_pwrite = os.pwrite

T = TypeVar("T")


class FileStorage(OpenedFile):
    """A Storage on an open file descriptor, which it owns from now on. Make it inside a trio run.

    ``try_pread``, ``try_pread_into`` and ``try_pwritev`` are bound once to what the file system can do.
    ``write_zeroes`` counts as one write of its length, ``punch_hole`` as one write of no bytes.
    """

    try_pread: TryPread
    try_pread_into: TryPreadInto
    try_pwritev: TryPwritev

    def __init__(self, fd: int, path: str, *, writable: bool, io_uring: bool = False) -> None:
        super().__init__(fd, path)
        self._writable = writable
        self._file_system = file_systems.type_of(fd)
        self._in_memory = self._file_system in file_systems.MEMORY_FILE_SYSTEMS
        self._zero_mode = FALLOC_ZERO_RANGE
        self._can_give_back = True
        self._can_allocate = True
        self._reserve_fd: int | None = None
        if writable and self._file_system in file_systems.COPY_ON_WRITE_FILE_SYSTEMS:
            from .reserve import open_reserve

            self._reserve_fd = open_reserve(fd, path)
        self._closed = trio.Event()
        self.durability = Durability(path, self.counters)
        self._calls = CallsInFlight(retain_worker_pool(), path)
        self.ring: Ring | None = None
        if io_uring and not self._in_memory:
            self.ring = retain_ring()
        is_local = self.is_fixed or self._file_system in file_systems.LOCAL_FILE_SYSTEMS
        self._flushes = DiskFlushes(
            self.durability,
            fd=self.fileno,
            is_changing=lambda: self.n_in_flight > 0,
            run=self._run,
            ring=self.ring if is_local else None,
        )
        self._reads = InlineReads(fd, self.counters, self.size, self._decline_reads)
        self._bind()

    def _bind(self) -> None:
        self.try_pwritev = self._decline_pwritev
        if self._in_memory:
            self.try_pread, self.try_pread_into = self._reads.plain_pread, self._reads.plain_pread_into
        elif file_systems.takes_nowait(self._fd):
            self.try_pread, self.try_pread_into = self._reads.nowait_pread, self._reads.nowait_pread_into
        else:
            self._decline_reads()
        if self._writable and (self._in_memory or self._file_system in file_systems.PLAIN_WRITE_FILE_SYSTEMS):
            self.try_pwritev = self._plain_pwritev
        elif self._writable and self.is_fixed:
            self.try_pwritev = self._pages_pwritev

    def _decline_reads(self) -> None:
        self.try_pread, self.try_pread_into = decline_pread, decline_pread_into

    @property
    def writable(self) -> bool:
        """Whether the file was opened for writing."""
        return self._writable

    @property
    def file_system(self) -> str:
        """The type of the file system ("ext4"), or "" for a block device and where it is unknown."""
        return self._file_system

    @property
    def n_in_flight(self) -> int:
        """Calls that go on in a thread or in the ring."""
        return self._calls.n

    # -- inline

    def _plain_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        n_bytes = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        if n_bytes > MAX_INLINE_WRITE and not self._in_memory:
            return False
        return self.write_inline(host_offset, buffers)

    def _pages_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        n_bytes = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        if n_bytes > MAX_INLINE_WRITE or not of_whole_pages(host_offset, n_bytes):
            return False
        return self.write_inline(host_offset, buffers)

    def write_inline(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """Write all buffers in this thread, even where that may block; always True. Raises OSError."""
        try:
            if len(buffers) == 1:
                buffer = buffers[0]
                n_bytes = len(buffer)
                if sys_pwrite(self._fd, buffer, host_offset) != n_bytes:
                    write_all(self._fd, host_offset, buffers)
            else:
                n_bytes = write_all(self._fd, host_offset, buffers)
        except OSError:
            self.durability.note_change()  # a first part may be in the file
            self._grow_to(length_of(self._fd))
            raise
        counters = self.counters
        counters.writes += 1
        counters.written_bytes += n_bytes
        if host_offset + n_bytes > self._size and n_bytes:
            self._size = host_offset + n_bytes
        return True

    def _decline_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        return False

    # -- in a worker thread, or by io_uring

    async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
        """All ``n_bytes``, zero-filled past the end. Raises OSError."""
        self.counters.reads += 1
        self.counters.read_bytes += n_bytes
        if self.ring is not None and n_bytes <= MAX_READ_BYTES:
            return await self._run_in_ring(self.ring, host_offset, n_bytes)
        return await self._run(read_all, host_offset, n_bytes)

    def start_delivery(self, host_offset: int, n_bytes: int, deliver: Deliver, on_end: OnEnd) -> bool:
        """See Storage. False for what goes by io_uring."""
        if self.ring is not None and n_bytes <= MAX_READ_BYTES:
            return False
        if not self._calls.start_delivery(self._fd, host_offset, n_bytes, deliver, on_end):
            return False
        self.counters.reads += 1
        self.counters.read_bytes += n_bytes
        return True

    async def pread_into(self, host_offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``, with zeroes past the end. Raises OSError."""
        self.counters.reads += 1
        self.counters.read_bytes += len(buffer)
        if self.ring is not None and len(buffer) <= MAX_READ_BYTES:
            buffer[:] = await self._run_in_ring(self.ring, host_offset, len(buffer))
        else:
            await self._run(read_all_into, host_offset, buffer)

    async def pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers back to back. Raises OSError; ENOSPC may leave a first part written."""
        self._must_be_writable()
        n_bytes = sum(map(len, buffers))
        self.counters.writes += 1
        self.counters.written_bytes += n_bytes
        await self._run_growing(write_all, host_offset, buffers)
        if n_bytes:
            self._grow_to(host_offset + n_bytes)

    def start_pwrite(self, host_offset: int, data: Buffer, on_written: OnWritten, on_end: OnEnd) -> bool:
        """See Storage."""
        n_bytes = len(data)
        if not self._writable or host_offset + n_bytes > self._size:
            return False
        if not self._calls.start_pwrite(self._fd, host_offset, data, on_written, on_end):
            return False
        self.counters.writes += 1
        self.counters.written_bytes += n_bytes
        return True

    async def write_zeroes(self, host_offset: int, n_bytes: int, *, unmap: bool = False) -> None:
        """Zero the range, growing the file where it reaches past the end. ``unmap``: only what lies within the file,
        and give its space back where that can be. Raises OSError."""
        self._must_be_writable()
        if unmap:
            n_bytes = min(n_bytes, self._size - host_offset)
        if n_bytes <= 0:
            return
        self.durability.note_change()  # whether it fails or not
        if unmap and await self._run(give_back, host_offset, n_bytes, True):
            self.counters.writes += 1
            return
        self.counters.writes += 1
        self.counters.written_bytes += n_bytes
        if not await self._run_growing(zero_range, self._zero_mode, host_offset, n_bytes):
            self._zero_mode = 0
        self._grow_to(host_offset + n_bytes)

    async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
        """Give the space of the range back, as far as it lies within the file: a device is told to discard it, and
        one that cannot promise zeroes then is not where the range is ``in_use``. Raises OSError."""
        self._must_be_writable()
        n_bytes = min(n_bytes, self._size - host_offset)
        if n_bytes <= 0 or not self._can_give_back:
            return
        self.counters.writes += 1
        if in_use and self.is_fixed:
            await self._run(give_back, host_offset, n_bytes, True)  # what it can't do here, it may elsewhere
            return
        self._can_give_back = await self._run(give_back, host_offset, n_bytes, False)

    async def allocate(self, host_offset: int, n_bytes: int) -> bool:
        """See Storage. Raises OSError."""
        self._must_be_writable()
        if n_bytes <= 0 or not self._can_allocate:
            return n_bytes <= 0
        self.durability.note_change()
        if self._in_memory and n_bytes <= MAX_INLINE_WRITE:
            allocated = allocate_range(self._fd, host_offset, n_bytes)
        else:
            allocated = await self._run_growing(allocate_range, host_offset, n_bytes)
        self._can_allocate = allocated
        self._size = max(self._size, length_of(self._fd))
        return allocated

    async def keep_free(self, n_bytes: int) -> bool:
        """See Storage. Raises OSError (ENOSPC)."""
        if self._reserve_fd is None:
            return False
        from .reserve import keep_free

        await self._run(lambda _, reserve_fd: keep_free(reserve_fd, n_bytes), self._reserve_fd)
        return True

    async def truncate(self, n_bytes: int) -> None:
        """Set the length; a device, whose length others set, can only be told to keep it. Raises OSError."""
        self._must_be_writable()
        if self.is_fixed:
            self.refresh_size()
            if n_bytes != self._size:
                raise OSError(errno.EFBIG, f"a block device of {self._size} bytes cannot have {n_bytes}", self._name)
            return
        self.durability.note_change()
        await self._run(os.ftruncate, n_bytes)
        self._size = n_bytes

    def try_flush(self) -> bool:
        """See Storage: where fdatasync ends within a short wait, or where nothing has changed since the last one."""
        if not self._writable:
            return True
        if not self.durability.can_begin or self._calls.is_closing:
            return False
        if self._in_memory:
            return self.durability.try_at_once(os.fdatasync, self._fd)
        return self._flushes.try_flush()

    async def flush(self) -> None:
        """fdatasync, one at a time; after one failure every later call fails with the same errno. Raises OSError
        (EBADF where :meth:`aclose` came first: nothing is promised then)."""
        durability = self.durability
        async with Held(durability.lock):
            durability.raise_failure()
            if not self._writable:
                return
            self._calls.refuse_if_closing()
            if self._in_memory:
                durability.at_once(os.fdatasync, self._fd)
            else:
                await self._flushes.flush()

    async def aclose(self) -> None:
        """Wait for the calls in flight, cancelled or not, then close: that gives up the locks. Idempotent."""
        if self._calls.is_closing:
            await self._closed.wait()
            return
        self._decline_reads()
        self.try_pwritev = self._decline_pwritev
        self._calls.is_closing = True
        with trio.CancelScope(shield=True):
            async with Held(self.durability.lock):  # one task at most may wait for a flush of the ring
                await self._flushes.abandon()
            await self._calls.close()
        fd, self._fd = self._fd, -1
        self._reads.fd = -1
        if self.ring is not None:
            self.ring.release()
        if self._reserve_fd is not None:
            os.close(self._reserve_fd)
        try:
            os.close(fd)
        finally:
            self._closed.set()

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        """``function(fd, *args)`` in a thread."""
        return await self._calls.run(function, self._fd, *args)

    async def _run_in_ring(self, ring: Ring, host_offset: int, n_bytes: int) -> Buffer:
        """A read by io_uring, and in a thread where that declines."""
        with self._calls.counted():
            data = await ring.read(self._fd, host_offset, n_bytes)
            return await self._calls.pool.run(read_all, self._fd, host_offset, n_bytes) if data is None else data

    async def _run_growing(self, function: Callable[..., T], *args: Any) -> T:
        """:meth:`_run`, and on failure take note of what the file has grown to."""
        try:
            return await self._run(function, *args)
        except OSError:
            if not self._calls.is_closing:
                self._grow_to(length_of(self._fd))
            raise

    def _grow_to(self, n_bytes: int) -> None:
        if n_bytes > self._size:
            self._size = n_bytes

    def _must_be_writable(self) -> None:
        if not self._writable:
            raise OSError(errno.EBADF, "storage was opened read-only", self._name)


async def open_file_storage(path: str, *, writable: bool, io_uring: bool = False) -> FileStorage:
    """:func:`.opening.open_file` in a program that has an event loop. Raises what that raises."""
    from .opening import open_file

    file = await open_file(path, writable=writable, io_uring=io_uring)
    assert isinstance(file, FileStorage)
    return file
