"""A file that is being made: locked before it is emptied, filled with progress, and only a whole image at the end.

1. A file that exists is only overwritten when asked for, and never while somebody has it open in a way that matters.
2. Whatever takes long is done in steps, each in a thread: between two of them the whole can be given up.
3. A new file has no name until it is whole and durable: whatever ends the making, SIGKILL and a power cut included,
   nothing is left of it. Where the file system has no files without a name it has another name until then, which is
   removed again by the command that gives up.
4. What had a name before (a file that is overwritten, a block device) begins with zeroes until all else is durable.
   The header goes last: half an image can't be taken for one. A file that is given up is left empty.
5. A block device keeps its length. What of the image must read as zeroes is zeroed there.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum
from functools import partial

from ..errors import ImageUsageError
from ..storage.blocking import write_all, zero_range
from ..storage.locks import acquire_image_lock
from ..storage.opened import is_block_device, length_of, open_descriptor
from ..system.alone import run_blocking

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, now and then."""

_STEP_BYTES = 16 << 20
_DEVICE_STEP_BYTES = 256 << 20
_ALLOCATE_STEP_BYTES = 1 << 30
NO_NAMELESS_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS})
"""What an open with O_TMPFILE fails with where the file system has no files without a name."""
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


class CreateError(ImageUsageError):
    """An option has an impossible value, or contradicts another option."""


class Preallocation(Enum):
    """What of a new disk is there from the start; the names are qemu-img's."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


class NewFile:
    """A new file, open and locked. Use :func:`open_new_file`."""

    def __init__(self, path: str, fd: int, *, is_new: bool, other_name: str | None = None) -> None:
        """``other_name``: the path that a new file has until it is whole."""
        self.path = path
        self.fd = fd
        self.is_device = is_block_device(fd)
        self._is_new = is_new
        self._own_name = other_name
        """Where a new file is now."""
        self._is_changed = False

    async def reserve(
        self, n_bytes: int, preallocation: Preallocation, progress: Progress, *, may_hold_anything: bool = False
    ) -> None:
        """Empty the file and give it ``n_bytes`` that read as zeroes; their space too, by FALLOC, or written, by
        FULL. ``may_hold_anything``: the contents of a device don't matter. Raises OSError, CreateError."""
        if self.is_device:
            await self._reserve_on_device(n_bytes, preallocation, progress, may_hold_anything=may_hold_anything)
            return
        self._is_changed = True
        await self._run(os.ftruncate, 0)
        await self._run(os.ftruncate, n_bytes)
        if preallocation is Preallocation.FULL:
            await self._in_steps(_write_zeroes, n_bytes, _STEP_BYTES, progress)
        elif preallocation is Preallocation.FALLOC:
            await self._in_steps(os.posix_fallocate, n_bytes, _ALLOCATE_STEP_BYTES, progress)

    async def _reserve_on_device(
        self, n_bytes: int, preallocation: Preallocation, progress: Progress, *, may_hold_anything: bool
    ) -> None:
        length = length_of(self.fd)
        if n_bytes > length:
            raise CreateError(f"{self.path}: a block device of {length} bytes is too small: {n_bytes} are needed")
        if may_hold_anything:
            return
        self._is_changed = True
        if preallocation is Preallocation.FULL:
            await self._in_steps(_write_zeroes, n_bytes, _STEP_BYTES, progress)
        else:
            await self._in_steps(_zero_device, n_bytes, _DEVICE_STEP_BYTES, progress)

    async def _in_steps(
        self, step: Callable[[int, int, int], object], n_bytes: int, step_bytes: int, progress: Progress
    ) -> None:
        for start in range(0, n_bytes, step_bytes):
            length = min(step_bytes, n_bytes - start)
            await self._run(step, start, length)
            progress(start + length, n_bytes)

    async def write(self, parts: Iterable[tuple[int, bytes]], n_all: int, progress: Progress) -> None:
        """Write all ``(offset, bytes)``, ``n_all`` bytes of which there are about; what belongs at offset 0 goes
        last. Raises OSError."""
        batch: list[tuple[int, bytes]] = []
        header: list[tuple[int, bytes]] = []
        n_batch = n_done = 0
        for offset, data in parts:
            (batch if offset else header).append((offset, data))
            n_batch += len(data)
            if n_batch >= _STEP_BYTES:
                await self._run(_write_parts, batch)
                batch, n_batch, n_done = [], 0, n_done + n_batch
                progress(min(n_done, n_all), n_all)
        await self._run(_write_parts, batch)
        if not self._is_new:
            await self._run(os.fsync)
        await self._run(_write_parts, header)

    async def publish(self) -> None:
        """Make it durable, and give it its name. Raises OSError, FileExistsError where there is one meanwhile."""
        await self._run(os.fsync)
        if not self._is_new:
            return
        folder = await run_blocking(_open_folder, self.path)
        try:
            await self._run(self._give_name, folder)
            with suppress(OSError):  # some file systems don't sync folders
                await run_blocking(os.fsync, folder)
        finally:
            os.close(folder)

    def _give_name(self, fd: int, folder: int) -> None:
        other, name = self._own_name, os.path.basename(self.path)
        try:
            # With a folder's descriptor os.link() is linkat(), which can follow the link in /proc.
            os.link(other or f"/proc/self/fd/{fd}", name, dst_dir_fd=folder, follow_symlinks=True)
        except OSError as error:
            if other is None or error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(self.path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.path) from None
            os.rename(other, self.path)
        else:
            if other is not None:
                os.unlink(other)
        self._own_name = self.path

    def discard(self) -> None:
        """Give it up: remove what is new, and leave what was there before empty, if anything was changed in it."""
        with suppress(OSError):
            if self._own_name is not None:
                os.unlink(self._own_name)
            elif self._is_changed and not self._is_new and not self.is_device:
                os.ftruncate(self.fd, 0)

    def close(self) -> None:
        """Close it: that gives up the lock."""
        os.close(self.fd)

    async def _run(self, function: Callable[..., object], *args: object) -> None:
        """``function(fd, *args)`` in a thread. Raises OSError with the file's name."""
        try:
            await run_blocking(partial(function, self.fd, *args))
        except OSError as error:
            from ..storage.lock_reach import refusal

            raise OSError(error.errno, refusal(self.fd, error), self.path) from error


def open_new_file(path: str, *, overwrite: bool, mode: int | None = None) -> NewFile:
    """Make or open a file, and lock it; blocks. ``mode``: the most that a new one may have of the usual permissions,
    which are 0644 less the umask. Raises FileExistsError, ImageLockedError, OSError."""
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    path = os.path.realpath(path) if os.path.islink(path) else path
    is_new = not os.path.exists(path)
    fd, other_name = open_nameless(path) if is_new else None, None
    if fd is None and is_new:
        other_name = os.path.join(os.path.dirname(path), f".qcowfuse-{os.urandom(8).hex()}.new")
    if fd is None:
        fd = open_descriptor(other_name or path, writable=True, flags=os.O_CREAT | os.O_EXCL if is_new else 0)
    file = NewFile(path, fd, is_new=is_new, other_name=other_name)
    try:
        if is_new and mode is not None:
            os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) & mode)
        acquire_image_lock(file.fd, path, writable=True)
    except BaseException:
        file.discard()
        file.close()
        raise
    return file


def open_nameless(path: str) -> int | None:
    """A file without a name in the folder of ``path``; None where that can't be, or could not get one later."""
    folder = os.path.dirname(path) or "."
    try:
        fd = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o644)
    except OSError as error:
        # ENOENT: an old kernel, or a folder that is missing. The open by a name tells which.
        if error.errno in NO_NAMELESS_FILES or error.errno == errno.ENOENT:
            return None
        raise OSError(error.errno, error.strerror, path) from error
    if os.path.exists(f"/proc/self/fd/{fd}"):
        return fd
    os.close(fd)
    return None


def _open_folder(path: str) -> int:
    return os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _zero_device(fd: int, start: int, n_bytes: int) -> None:
    from ..storage.syscalls import FALLOC_ZERO_RANGE

    zero_range(fd, FALLOC_ZERO_RANGE, start, n_bytes)


def _write_zeroes(fd: int, start: int, n_bytes: int) -> None:
    zero_range(fd, 0, start, n_bytes)


def _write_parts(fd: int, parts: Iterable[tuple[int, bytes]]) -> None:
    for offset, data in parts:
        write_all(fd, offset, (data,))
