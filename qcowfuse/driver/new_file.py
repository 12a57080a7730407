"""A file that is being made: locked before it is emptied, filled with progress, removed again when it fails.

1. A file that exists is only overwritten when asked for, and never while somebody has it open in a way that matters.
2. Whatever takes long is done in steps, each in a thread: between two of them the whole can be given up.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum

import trio

from ..errors import ImageUsageError
from ..storage.locks import acquire_image_lock

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, now and then."""

_STEP_BYTES = 16 << 20
_ALLOCATE_STEP_BYTES = 1 << 30
_ZEROES = bytes(1 << 20)


class CreateError(ImageUsageError):
    """An option that cannot be, or that does not go with another one."""


class Preallocation(Enum):
    """What of a new disk is there from the start; the names are qemu-img's."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


class NewFile:
    """A new file, open and locked. Use :func:`open_new_file`."""

    def __init__(self, path: str, fd: int, *, is_new: bool) -> None:
        self.path = path
        self.fd = fd
        self._is_new = is_new

    async def reserve(self, n_bytes: int, preallocation: Preallocation, progress: Progress) -> None:
        """Empty the file and give it ``n_bytes`` that read as zeroes; their space too, by FALLOC, or written, by
        FULL. Raises OSError."""
        await trio.to_thread.run_sync(os.ftruncate, self.fd, 0)
        await trio.to_thread.run_sync(os.ftruncate, self.fd, n_bytes)
        if preallocation in (Preallocation.FALLOC, Preallocation.FULL):
            is_full = preallocation is Preallocation.FULL
            step_bytes = _STEP_BYTES if is_full else _ALLOCATE_STEP_BYTES
            step = _write_zeroes if is_full else os.posix_fallocate
            for start in range(0, n_bytes, step_bytes):
                length = min(step_bytes, n_bytes - start)
                await trio.to_thread.run_sync(step, self.fd, start, length)
                progress(start + length, n_bytes)

    async def write(self, parts: Iterable[tuple[int, bytes]], n_all: int, progress: Progress) -> None:
        """Write all ``(offset, bytes)``, ``n_all`` bytes of which there are about. Raises OSError."""
        batch: list[tuple[int, bytes]] = []
        n_batch = n_done = 0
        for offset, data in parts:
            batch.append((offset, data))
            n_batch += len(data)
            if n_batch >= _STEP_BYTES:
                await trio.to_thread.run_sync(_write_parts, self.fd, batch)
                batch, n_batch, n_done = [], 0, n_done + n_batch
                progress(min(n_done, n_all), n_all)
        await trio.to_thread.run_sync(_write_parts, self.fd, batch)

    async def sync(self) -> None:
        """Make it durable. Raises OSError."""
        await trio.to_thread.run_sync(os.fsync, self.fd)

    def discard(self) -> None:
        """Remove it, unless it was there before."""
        if self._is_new:
            with suppress(OSError):
                os.unlink(self.path)

    def close(self) -> None:
        """Close it: that gives up the lock."""
        os.close(self.fd)


def open_new_file(path: str, *, overwrite: bool) -> NewFile:
    """Make or open a file, and lock it; blocks. Raises FileExistsError, ImageLockedError, CreateError, OSError."""
    is_new = not os.path.exists(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if overwrite else os.O_EXCL)
    file = NewFile(path, os.open(path, flags, 0o644), is_new=is_new)
    try:
        acquire_image_lock(file.fd, path, writable=True)
        if not stat.S_ISREG(os.fstat(file.fd).st_mode):
            raise CreateError(f"{path}: not a regular file")
    except BaseException:
        file.discard()
        file.close()
        raise
    return file


def _write_zeroes(fd: int, start: int, n_bytes: int) -> None:
    zeroes = memoryview(_ZEROES)
    while n_bytes:
        n_written = os.pwrite(fd, zeroes[:n_bytes], start)
        start, n_bytes = start + n_written, n_bytes - n_written


def _write_parts(fd: int, parts: Iterable[tuple[int, bytes]]) -> None:
    for offset, data in parts:
        view = memoryview(data)
        while view:
            n_written = os.pwrite(fd, view, offset)
            view, offset = view[n_written:], offset + n_written
