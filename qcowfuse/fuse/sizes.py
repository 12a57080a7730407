"""The size of the served file: truncating and growing it, writes past its end, and what the kernel believes of it.

1. A disk keeps its size. Truncating it to less makes everything from there on read as zeroes, and gives that space
   back, as it is on a plain file that is truncated and then made as long as before. That is how O_TRUNC arrives,
   too. Truncating to more makes the disk larger when it is growable; else it is refused.
2. With the write-back cache the kernel believes its own idea of the size of a regular file. It learns it from the
   first attributes (or, for a root inode, from a setattr: see ``daemon.session``), and moves it by itself when a
   client writes past the end. A write that does not fit fails, what fits of it is stored, and the kernel is told.
3. The kernel drops cached pages, and dirty ones unwritten, only where a truncation has changed the size that it knows
   (fs/fuse/dir.c, fuse_do_setattr). So a truncation to less is answered with the smaller size: when the call returns,
   no old page is left that could be read, or be written back over the zeroes. The disk has its zeroes before that
   answer: what the kernel reads from then on is new.
4. Then the kernel must have the true size back before anybody sees the smaller one. The answer says that attributes
   are out of date at once. So a process that asks for the size, or writes through the cache, has the kernel ask
   here first. Before that is answered, one zero is stored in the kernel's cache as the last byte, which is zero: this
   raises the kernel's size, and takes no lock that the asker may hold (lseek holds that of the inode). Nobody can
   have written to that page in the meantime, since writing through the cache asks as well.
5. On a busy machine the kernel may take in the answer to a truncation long after it was given, and lower its size
   only then: a size that was put right before is wrong again. The kernel has the answer for certain when the thread
   that truncated asks for something, or when another truncation comes, since each holds the lock of the inode up to
   its end. Other askers wait for that, but not long: they may hold this lock themselves.
6. So a process outside of the mount truncates as well, to the present size, after each such case, and does not look
   before. This puts right what is wrong all the same (:meth:`Sizes.watch`), and changes nothing of the disk. Without
   the write-back cache it only looks: the kernel takes in no size from attributes while a truncation is on its way.
7. A growable disk has failed to grow: the kernel may hold more of what lies past the end, of which some may still
   fit. So the kernel is first made to write all of it, and only then told the size.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import pyfuse3
import trio
from pyfuse3 import FUSEError

from ..driver.image import Image

_UNTIL_PROCESSED = 0.05
"""Seconds after which the kernel has most likely taken in an answer; only a wrong size for a moment depends on it."""
_UNTIL_MENDED = 1.0
_UNKNOWN = 0
"""What the kernel says instead of the number of a process that is in no PID namespace of ours."""

_log = logging.getLogger(__name__)


class Mend(Protocol):
    """Puts the kernel's idea of the file right, from outside of the mount. Raises OSError."""

    async def __call__(self, n_bytes: int, *, lowers: bool, syncs: bool, forgets: bool) -> None:
        """The file has ``n_bytes``. ``lowers``: even where the kernel believes in more, once it has written what it
        holds, with ``syncs``. ``forgets``: pages that it has cached may be untrue."""


def store_in_kernel(inode: int, off: int, data: bytes) -> None:
    """Put ``data`` into the kernel's cache. Raises OSError. Blocks while another one has the page."""
    pyfuse3.notify_store(inode, off, data)


class Sizes:
    """Of one file. ``slow`` surrounds whatever waits, ``note_write`` is told of every change.
    ``trusts_kernel``: whether the write-back cache is on."""

    def __init__(
        self,
        image: Image,
        inode: int,
        *,
        growable: bool,
        slow: Callable[[], AbstractContextManager[None]],
        note_write: Callable[[], None],
        trusts_kernel: Callable[[], bool],
    ) -> None:
        self.is_growable = growable
        self._image = image
        self._inode = inode
        self._slow = slow
        self._note_write = note_write
        self._trusts_kernel = trusts_kernel
        self._lock = trio.Lock()
        self._truncated_by: int | None = None
        self._processed = trio.Event()
        self._store_lock = trio.Lock()
        self._wrong = trio.Event()
        self._lowers = self._forgets = False
        self._told: int | None = None
        self._mended = trio.Event()
        self._mended.set()

    @property
    def n_bytes(self) -> int:
        """The size, which the image owns."""
        return self._image.size

    # ---- changing it ----

    async def grow_to(self, n_bytes: int) -> None:
        """Make the disk larger, if it is not large enough by now. Raises what :meth:`Image.grow` does."""
        with self._slow():
            async with self._lock:
                if n_bytes > self.n_bytes:
                    await self._image.grow(n_bytes)

    async def truncate(self, n_bytes: int, pid: int) -> int:
        """What rule 1 says, for the process ``pid``; gives the size to answer with. Raises FUSEError, and what the
        image raises."""
        if n_bytes == self._told:
            with self._slow():
                await self._give_back()
            self._processed.set()
            return self.n_bytes
        if self._image.read_only:
            raise FUSEError(errno.EROFS)
        if n_bytes > self.n_bytes:
            if not self.is_growable:
                raise FUSEError(errno.EFBIG)
            await self.grow_to(n_bytes)
        with self._slow():
            async with self._lock:
                if n_bytes >= self.n_bytes:
                    return self.n_bytes
                try:
                    await self._image.write_zeroes(n_bytes, self.n_bytes - n_bytes, unmap=True)
                except BaseException:
                    self.is_wrong(forgets=True)
                    raise
                finally:
                    self._note_write()
        self._truncated_by = pid
        self._processed = trio.Event()
        if self._mended.is_set():
            self._mended = trio.Event()
        self.is_wrong()
        return n_bytes

    async def write_past_end(self, off: int, buf: bytes) -> int:
        """Write what fits of a write that reaches past the end; gives how much that was. Raises FUSEError, and what
        the image raises."""
        failure: Exception = FUSEError(errno.ENOSPC)
        if self.is_growable:
            try:
                await self.grow_to(off + len(buf))
            except OSError as exc:
                failure = exc
                if exc.errno == errno.EOPNOTSUPP:  # what a disk says that cannot grow at all
                    failure = OSError(errno.ENOSPC, exc.strerror, exc.filename)
        n_fitting = min(max(0, self.n_bytes - off), len(buf))
        try:
            if n_fitting:
                with self._slow():
                    await self._image.write(off, memoryview(buf)[:n_fitting])
        except BaseException:
            self.is_wrong(lowers=True)
            raise
        finally:
            self._note_write()
        if n_fitting == len(buf):
            return n_fitting
        self.is_wrong(lowers=True)
        # With the write-back cache the kernel takes any success for the whole of a written-back page.
        if n_fitting and not self._trusts_kernel():
            return n_fitting
        raise failure

    # ---- what the kernel believes ----

    def is_wrong(self, *, lowers: bool = False, forgets: bool = False) -> None:
        """The kernel's idea of the size (``forgets``: of the contents) may be wrong; :meth:`watch` will see to it."""
        self._lowers |= lowers
        self._forgets |= forgets
        self._wrong.set()

    @property
    def is_in_doubt(self) -> bool:
        """Whether :meth:`settle` must be awaited before attributes are given."""
        return self._truncated_by is not None

    async def settle(self, pid: int) -> None:
        """Give the kernel its size back, before ``pid`` gets attributes (rule 4)."""
        with self._slow():
            if self._trusts_kernel() and (pid != self._truncated_by or pid == _UNKNOWN):
                with trio.move_on_after(_UNTIL_PROCESSED):
                    await self._processed.wait()
            await self._give_back()

    async def _give_back(self) -> None:
        """Once: the process that was answered may have written to the page by the next time."""
        async with self._store_lock:
            if self._truncated_by is None:
                return
            if not self._trusts_kernel():  # then it believes the attributes that it gets
                self._truncated_by = None
                return
            try:
                await trio.to_thread.run_sync(
                    store_in_kernel, self._inode, self.n_bytes - 1, b"\0", abandon_on_cancel=True
                )
            except OSError as exc:
                _log.debug("the size is put right a moment later: %s", exc)
            self._truncated_by = None

    async def watch(self, mend: Mend) -> None:
        """Have ``mend`` see to it whenever the kernel may be wrong, for ever."""
        while True:
            await self._wrong.wait()
            self._wrong = trio.Event()
            lowers, self._lowers = self._lowers, False
            forgets, self._forgets = self._forgets, False
            self._told = self.n_bytes
            try:
                await mend(self.n_bytes, lowers=lowers, syncs=self.is_growable, forgets=forgets)
            except OSError as exc:
                _log.warning("the size that the kernel shows may be wrong: %s", exc)
            finally:
                self._told = None
            if not self._wrong.is_set():
                self._mended.set()

    @property
    def is_mended(self) -> bool:
        """Whether :meth:`wait_until_mended` would not wait."""
        return self._mended.is_set()

    async def wait_until_mended(self) -> None:
        """Wait a moment for :meth:`watch` after a truncation, so that an unmount after a close does not meet that
        process."""
        if not self._mended.is_set():
            with self._slow(), trio.move_on_after(_UNTIL_MENDED):
                await self._mended.wait()
