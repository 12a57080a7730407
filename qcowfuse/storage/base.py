"""The Storage protocol: bytes at offsets, asynchronously, and nothing about QCOW.

1. The ``try_`` calls are plain functions: they answer at once or say that they can't, and never block.
   They are an offer: a storage may always decline, and the caller then awaits the other call.
2. Reads past the end of the storage give zeroes; writes past the end grow it.
3. A completed write is visible to every later read; it is durable after the next successful ``flush``.
4. ``OSError`` is the only exception. A failed ``flush`` is final: each later one fails too (the kernel has
   dropped the dirty pages and would report success).
5. Cancelling an awaited write leaves any part of it done; the task returns only when the storage no longer
   touches the caller's buffers.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Protocol

from ..buffer import Buffer

_PAGE_MASK = mmap.PAGESIZE - 1


async def pread(storage: Storage, host_offset: int, n_bytes: int) -> Buffer:
    """:meth:`Storage.pread` without a hop to a thread where the bytes can be had at once."""
    data = storage.try_pread(host_offset, n_bytes)
    return await storage.pread(host_offset, n_bytes) if data is None else data


def of_whole_pages(host_offset: int, n_bytes: int) -> bool:
    """Whether the range covers each page that it touches: nothing has to be read to write it."""
    return not (host_offset | n_bytes) & _PAGE_MASK


class StorageCounters:
    """What reached the backend: one count per call, inline or not; ``_bytes`` in bytes."""

    __slots__ = ("flushes", "read_bytes", "reads", "writes", "written_bytes")

    def __init__(self) -> None:
        self.reads = self.writes = self.flushes = 0
        self.read_bytes = self.written_bytes = 0

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return {
            "reads": self.reads,
            "writes": self.writes,
            "flushes": self.flushes,
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
        }


class TryPread(Protocol):
    """:meth:`Storage.try_pread`."""

    def __call__(self, host_offset: int, n_bytes: int) -> Buffer | None: ...


class TryPreadInto(Protocol):
    """:meth:`Storage.try_pread_into`."""

    def __call__(self, host_offset: int, buffer: memoryview) -> bool: ...


class TryPwritev(Protocol):
    """:meth:`Storage.try_pwritev`."""

    def __call__(self, host_offset: int, buffers: Sequence[Buffer]) -> bool: ...


Deliver = Callable[[Buffer], None]
"""Takes what was read, in the thread that has read it. The bytes are only lent. Raises nothing."""
OnEnd = Callable[[Exception | None], None]
"""Called in the trio thread when what a thread was to do has ended: with None, or with why it was not done. Raises
nothing."""
OnWritten = Callable[[], None]
"""Called in the thread that has written, where that went well. Raises nothing."""


class Storage(Protocol):
    """A file, or something that acts as one. Offsets and lengths are in bytes."""

    @property
    def name(self) -> str:
        """The path, for messages."""

    @property
    def writable(self) -> bool:
        """Whether writes are allowed; a write to a read-only storage raises ``OSError(EBADF)``."""

    @property
    def is_fixed(self) -> bool:
        """Whether writes never change the length: a block device. There is no room behind its end (ENOSPC), and what
        was not written yet may be anything. Others may enlarge it: see :meth:`refresh_size`."""

    @property
    def counters(self) -> StorageCounters:
        """Live counts of backend operations."""

    def size(self) -> int:
        """The present length, kept in memory (the image is held alone); grows with writes past the end."""

    def refresh_size(self) -> None:
        """Ask for the length again, which others may have changed (``lvextend``); at once. Raises OSError."""

    def allocated_bytes(self) -> int:
        """Bytes of host disk space in use (``st_blocks * 512``)."""

    def free_bytes(self) -> int:
        """Bytes that the file system still has for it."""

    def try_pread(self, host_offset: int, n_bytes: int) -> Buffer | None:
        """All ``n_bytes`` (zero-filled past the end), or None when that would block."""

    def try_pread_into(self, host_offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` and return True, or return False when that would block (``buffer`` is then undefined)."""

    async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
        """All ``n_bytes``, zero-filled past the end."""

    def start_delivery(self, host_offset: int, n_bytes: int, deliver: Deliver, on_end: OnEnd) -> bool:
        """Have a thread read all ``n_bytes`` (zero-filled past the end) and hand them to ``deliver``, so that the
        trio thread has no part in it; ``on_end`` is called in any case, after this has returned. False where there
        is no such thread: nothing has happened then, and the caller awaits :meth:`pread`. Raises nothing."""

    async def pread_into(self, host_offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``, with zeroes past the end."""

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """Write all buffers back to back and return True, or return False: then nothing is promised and the
        caller must await :meth:`pwritev` with the same arguments. What is not :func:`of_whole_pages` may be declined
        where other writes of that length are not."""

    async def pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers back to back (any number of them), however many system calls it takes."""

    def start_pwrite(self, host_offset: int, data: Buffer, on_written: OnWritten, on_end: OnEnd) -> bool:
        """Have a thread write ``data``, which stays as it is until then, and call ``on_written`` when it is written
        and visible to every read. ``on_end`` is called in any case, after this has returned; after a failure any part
        may be written. False where there is no such thread, and where ``data`` would make the storage longer: nothing
        has happened then, and the caller awaits :meth:`pwritev`. Raises nothing."""

    async def write_zeroes(self, host_offset: int, n_bytes: int, *, unmap: bool = False) -> None:
        """Make the range read as zeroes, keeping its space allocated where the file system can; may grow. ``unmap``:
        giving its space back where the file system can, and never growing."""

    async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
        """Give the range's space back where the file system or the device can. What is read there afterwards may be
        anything: this is for what nothing refers to any more. ``in_use``: something still does, and it may be what it
        was, or zeroes, nothing else; where that can't be promised, the range keeps its space."""

    async def allocate(self, host_offset: int, n_bytes: int) -> bool:
        """Set space aside for the range, so that later writes there need none, and keep what it holds; grows the
        storage where the range reaches past the end. False where that cannot be had: nothing has happened then."""

    async def keep_free(self, n_bytes: int) -> bool:
        """Where writing over what is there takes new space (copy on write): keep so many bytes from others, and from
        this storage until 0 lets it have them. False where there is no need, or no way. Raises OSError (ENOSPC):
        then none are kept."""

    async def truncate(self, n_bytes: int) -> None:
        """Set the length."""

    def try_flush(self) -> bool:
        """Whether every completed write is durable now, at once or after a short wait
        (:mod:`~qcowfuse.system.short_wait`); False: the caller must await :meth:`flush`, which also says what is
        wrong."""

    async def flush(self) -> None:
        """Make every completed write durable (fdatasync). Failure is final, see rule 4."""

    async def aclose(self) -> None:
        """Give up the file and its locks. Does not flush. Idempotent."""
