"""The FUSE operations of exactly one file: the virtual disk.

1. Only FUSEError (and cancellation) leaves a handler: anything else would end the mount. What to answer is in
   :mod:`.errnos`; what is not in that table is a bug, logged with its traceback and answered with EIO
   (:mod:`.failures`).
2. The size, and what the kernel believes of it, is in :mod:`.sizes`.
3. A handler that waits for anything counts itself in ``gate.n_slow`` meanwhile (rule 4 of :mod:`.request_gate`).
4. Owner, mode and times can be changed, and live as long as the mount: :mod:`.attributes`.
5. With the write-back cache the kernel may hold data that the image does not know of yet: see :mod:`.unsent_data`.
   Before anything is said about holes it is made to send that. Where that is not possible, all of the file counts as
   data. When the disk is growable, not even its end is known then: the answer is that of a file system which does not
   know holes.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from ..buffer import Buffer
from ..driver.image import Image
from ..driver.pending import PendingRead
from .attributes import Attributes, Ownership
from .copying import Copies
from .failures import Failures
from .fsync_at_once import FsyncAtOnce
from .holes_at_once import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE, HolesAtOnce
from .open_files import WRITER, OpenFiles
from .request_gate import RequestGate
from .seeking import Seeker, never
from .sizes import Mend, Sizes
from .started import StartedRequest
from .unsent_data import WORTHWHILE_HOLE, UnsentData
from .writes_at_once import WritesAtOnce

XATTR_PREFIX = b"user.qcowfuse."
FILE_INODE_IN_DIRECTORY = 2

_MIN_BLOCK_SIZE, _MAX_BLOCK_SIZE = 4096, 1 << 20

_log = logging.getLogger(__name__)


class Operations(pyfuse3.Operations):
    """One file that holds ``image``. ``file_name`` is its name in a folder, None when the file is the root itself.

    ``mtime_ns`` is the time that the file shows until it is written. ``on_release`` and ``on_discard`` must not
    block. ``is_cached``: the kernel may keep pages of the file.
    """

    supports_dot_lookup = False

    def __init__(
        self,
        image: Image,
        *,
        file_name: bytes | None,
        file_inode: int = FILE_INODE_IN_DIRECTORY,
        is_cached: bool = True,
        ownership: Ownership,
        folder_mode: int = 0o700,
        mtime_ns: int,
        gate: RequestGate | None = None,
        growable: bool = False,
        on_release: Callable[[], None] = lambda: None,
        on_discard: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.enable_writeback_cache = False
        self.gate = RequestGate() if gate is None else gate
        self.daemon_statistics: Callable[[], dict[str, int]] = dict
        self.unsent = UnsentData(lambda: self.enable_writeback_cache)
        self._image = image
        self._seeker = Seeker(image)
        self.holes = HolesAtOnce(
            image, self._seeker, knows_all=lambda: not self.unsent.may_be, on_change=self._note_zeroes
        )
        self.started = StartedRequest()
        self.start_read = image.start_read
        self._name = file_name
        self._file_inode = pyfuse3.ROOT_INODE if file_name is None else file_inode
        self.opens = OpenFiles(image, self._file_inode, self.unsent, is_cached=is_cached, on_release=on_release)
        self._file = Attributes(self._file_inode, ownership, mtime_ns)
        self.writes = WritesAtOnce(image, self._file)
        self.sizes = Sizes(
            image,
            self._file_inode,
            growable=growable,
            slow=self._slow,
            note_write=self.writes.note_change,
            trusts_kernel=lambda: self.enable_writeback_cache,
        )
        self.copies = Copies(image, self.sizes, self._slow, self._fail, self.writes.note_change, self._note_zeroes)
        self._folder = Attributes(pyfuse3.ROOT_INODE, ownership.copy(mode=folder_mode), mtime_ns)
        self.fsyncs = FsyncAtOnce(
            image,
            self._file,
            self.sizes,
            self.writes,
            show=self.file_attributes,
        )
        self._on_discard = on_discard
        self.failures = Failures()

    # ---- the hot path ----

    @property
    def file_inode(self) -> int:
        """The inode of the one file."""
        return self._file_inode

    @property
    def n_open(self) -> int:
        """How many have a file open."""
        return self.opens.n_open

    def file_of(self, inode: int) -> Operations:
        """What answers for the file with ``inode``: there is one."""
        return self

    async def watch_sizes(self, mend: Mend) -> None:
        """See :meth:`Sizes.watch`; for every file that there is."""
        await self.sizes.watch(mend)

    def _note_zeroes(self) -> None:
        self.writes.note_change()
        self._on_discard()

    async def read(self, fh: int, off: int, size: int) -> Buffer:  # type: ignore[override]  # any buffer will do
        """The bytes at ``off``, less at the end of the disk."""
        try:
            started: Buffer | PendingRead | None = self.started.take_read(off, size)
            if started is None:
                size = min(size, self._image.size - off)
                if size <= 0:
                    return b""
                started = self.start_read(off, size, self.gate.is_idle)
            if not isinstance(started, PendingRead):
                return started
            self.gate.n_slow += 1
            try:
                return await started.finish()
            finally:
                self.gate.n_slow -= 1
        except Exception as exc:
            self._fail("read", exc)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write ``buf``."""
        try:
            if off + len(buf) > self._image.size:
                return await self.sizes.write_past_end(off, buf)
            try:
                pending = self.started.take_write(off, len(buf))
                if pending is None:
                    pending = self._image.start_write(off, buf)
                if pending is not None:
                    pending.use(buf)
                    with self._slow():
                        await pending.finish()
            finally:
                self.writes.note_change()
        except Exception as exc:
            self._fail("write", exc)
        return len(buf)

    # ---- holes (called through ExtraOperations) ----

    async def fallocate(self, mode: int, off: int, length: int) -> None:
        """Punch holes, zero ranges and set space aside, at any offset and length inside of the disk; past its end
        when it is growable."""
        try:
            if self._image.read_only:
                raise FUSEError(errno.EROFS)
            kind = mode & ~FALLOC_KEEP_SIZE
            if kind not in (0, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE):
                raise FUSEError(errno.EOPNOTSUPP)
            if off + length > self._image.size and not mode & FALLOC_KEEP_SIZE:
                if not self.sizes.is_growable:
                    raise FUSEError(errno.ENOSPC)
                await self.sizes.grow_to(off + length)
            length = min(length, self._image.size - off)
            if length <= 0:
                return
            try:
                self.holes.raise_failure(off, length)
                with self._slow():
                    if kind:
                        await self._image.write_zeroes(off, length, unmap=kind == FALLOC_PUNCH_HOLE)
                    else:
                        await self._image.allocate(off, length)
            except BaseException:
                # The kernel changes neither pages nor size after a failure, and a part may be done.
                self.sizes.is_wrong(forgets=True)
                raise
            finally:
                self.writes.note_change()
            self._on_discard()
        except Exception as exc:
            self._fail("fallocate", exc)

    async def lseek(self, off: int, whence: int, is_interrupted: Callable[[], bool] = never) -> int:
        """The next data, or the next hole; the end of the file is a hole. With ``is_interrupted``, see
        :mod:`.seeking`."""
        try:
            if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
                raise FUSEError(errno.EINVAL)
            least_hole = 1
            if self.unsent.may_be:
                with self._slow():
                    is_known = await self.unsent.fetch()
                if not is_known and self.sizes.is_growable:
                    raise FUSEError(errno.EINVAL)
                least_hole = WORTHWHILE_HOLE if is_known else self._image.size + 1
            if not 0 <= off < self._image.size:
                raise FUSEError(errno.ENXIO)
            if least_hole > self._image.size:
                return off if whence == os.SEEK_DATA else self._image.size
            with self._slow():
                found = await self._seeker.seek(off, self._image.size, whence, is_interrupted, least_hole=least_hole)
            if found is None:
                raise FUSEError(errno.ENXIO)
            return found
        except Exception as exc:
            self._fail("lseek", exc)

    # ---- durability ----

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Make everything written durable. There is nothing that ``datasync`` could leave out."""
        await self._flush_image("fsync")

    async def flush(self, fh: int) -> None:
        """Every close of a descriptor that could write: durable as well, where anything was written since the last
        time. One that only reads has no part in that, and does not hear of its failure."""
        if fh & WRITER:
            if not self.writes.is_durable:
                await self._flush_image("flush")
            await self.sizes.wait_until_mended()

    async def _flush_image(self, operation: str) -> None:
        n_changes = self.writes.n_changes
        try:
            with self._slow():
                await self._image.flush()
        except Exception as exc:
            self._fail(operation, exc)
        self.writes.note_durable(n_changes)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """There is nothing in the folder to make durable."""

    # ---- names ----

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """The one name in the folder."""
        if parent_inode == pyfuse3.ROOT_INODE and self._name is not None:
            if name == self._name:
                return self.file_attributes()
            if name in (b".", b".."):
                return self._folder_attributes()
        raise FUSEError(errno.ENOENT if self._name is not None else errno.ENOTDIR)

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open the folder."""
        if self._name is None or inode != pyfuse3.ROOT_INODE:
            raise FUSEError(errno.ENOTDIR)
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """The folder holds one name."""
        if start_id == 0 and self._name is not None:
            pyfuse3.readdir_reply(token, self._name, self.file_attributes(), 1)

    async def releasedir(self, fh: int) -> None:
        """Close the folder."""

    # ---- attributes ----

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """The attributes of file or folder."""
        if self.sizes.is_in_doubt:
            await self.sizes.settle(ctx.pid)
        return self._attributes_of(inode)

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """Owner, mode, times, size. Who may do what has been checked by the kernel."""
        is_file = inode == self._file_inode
        shown = self._image.size
        if fields.update_size:
            if not is_file:
                raise FUSEError(errno.EISDIR)
            try:
                shown = await self.sizes.truncate(attr.st_size, ctx.pid)
            except Exception as exc:
                self._fail("truncate", exc)
        (self._file if is_file else self._folder).change(attr, fields)
        entry = self._attributes_of(inode)
        if is_file and shown < self._image.size:
            entry.st_size = shown
            entry.attr_timeout = 0
            self._on_discard()
        return entry

    def _attributes_of(self, inode: int) -> EntryAttributes:
        if inode == self._file_inode:
            return self.file_attributes()
        if inode == pyfuse3.ROOT_INODE:
            return self._folder_attributes()
        raise FUSEError(errno.ESTALE)

    def file_attributes(self) -> EntryAttributes:
        """The attributes of the file."""
        entry = self._file.entry(stat.S_IFREG, 1)
        entry.st_size = self._image.size
        entry.st_blksize = min(max(self._image.cluster_size, _MIN_BLOCK_SIZE), _MAX_BLOCK_SIZE)
        try:
            entry.st_blocks = -(-self._image.allocated_bytes() // 512)
        except Exception as exc:
            self._fail("getattr", exc)
        return entry

    def _folder_attributes(self) -> EntryAttributes:
        entry = self._folder.entry(stat.S_IFDIR, 2)
        entry.st_size = 0
        return entry

    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """The kernel checks permissions (default_permissions), so this only knows about read-only."""
        return not (mode & os.W_OK and self._image.read_only)

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """The disk as a file system of clusters: a loop device takes its discard granularity from the block size."""
        try:
            n_free = self._image.free_host_bytes() // self._image.cluster_size
        except Exception as exc:
            self._fail("statfs", exc)
        stats = StatvfsData()
        stats.f_bsize = stats.f_frsize = self._image.cluster_size
        stats.f_blocks = -(-self._image.size // self._image.cluster_size)
        stats.f_bfree = stats.f_bavail = min(n_free, stats.f_blocks)
        stats.f_files = 1
        stats.f_namemax = 255
        return stats

    # ---- statistics as extended attributes ----

    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        """``user.qcowfuse.<counter>`` for each counter."""
        names = self._statistics() if inode == self._file_inode else {}
        return [XATTR_PREFIX + name.encode() for name in names]

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """A counter in decimal."""
        if inode == self._file_inode and name.startswith(XATTR_PREFIX):
            value = self._statistics().get(name.removeprefix(XATTR_PREFIX).decode("ascii", "replace"))
            if value is not None:
                return b"%d" % value
        raise FUSEError(pyfuse3.ENOATTR)

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Nothing can be set."""
        raise FUSEError(errno.EROFS if name.startswith(XATTR_PREFIX) else errno.EOPNOTSUPP)

    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """Nothing can be removed."""
        raise FUSEError(errno.EROFS if name.startswith(XATTR_PREFIX) else pyfuse3.ENOATTR)

    def _statistics(self) -> dict[str, int]:
        try:
            return self._image.statistics() | self.daemon_statistics()
        except Exception as exc:
            self._fail("statistics", exc)

    # ---- open and close ----

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open the file."""
        if inode != self._file_inode:
            raise FUSEError(errno.EISDIR)
        is_cached = self.opens.is_cached
        return FileInfo(fh=self.opens.open(flags), keep_cache=is_cached, direct_io=not is_cached)

    async def release(self, fh: int) -> None:
        """The last descriptor of an open is gone."""
        self.opens.release(fh)

    # ---- what a folder of one fixed file does not do ----

    async def _refuse(self, *args: object) -> NoReturn:
        raise FUSEError(errno.EROFS if self._image.read_only else errno.EPERM)

    create = mknod = mkdir = symlink = link = unlink = rmdir = rename = _refuse  # type: ignore[assignment]

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """There are no links."""
        raise FUSEError(errno.EINVAL)

    # ---- errors ----

    @contextmanager
    def _slow(self) -> Iterator[None]:
        self.gate.n_slow += 1
        try:
            yield
        finally:
            self.gate.n_slow -= 1

    def _fail(self, operation: str, exc: Exception) -> NoReturn:
        if isinstance(exc, FUSEError):
            raise exc
        raise FUSEError(self.failures.note(operation, exc)) from None
