"""The FUSE operations of a disk and of its partitions, each a file in the same folder.

1. One byte of the disk may be in two files, so the kernel keeps no pages of any: every file is opened with
   FOPEN_DIRECT_IO, and there is no write-back cache. A read under one name gives what was written under another as
   soon as that write has returned. The price: small reads and writes are requests of their own, and shared mappings
   (``mmap`` with MAP_SHARED) are refused by the kernel with ENODEV.
2. Two writes to the same bytes at the same time land in any order, as on a disk; see rule 4 of
   :mod:`~qcowfuse.driver.image`.
3. The partitions are those of the table that the disk had when it was mounted.
4. With no pages to mend, and a kernel that takes sizes from attributes, a truncated partition needs no look from
   outside of the mount.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, RequestContext, SetattrFields

from ..buffer import Buffer
from ..driver.image import Image
from .attributes import Ownership
from .operations import FILE_INODE_IN_DIRECTORY, Operations
from .sizes import Mend

_INODE_MASK = (1 << 32) - 1
"""What a file handle has of the inode."""


class SeveralFiles(Operations):
    """The file of ``image``, as :class:`Operations` with ``options`` serves it, and beside it ``partitions`` by name.
    All of these are of the same ``image``, which alone is closed."""

    def __init__(
        self, image: Image, partitions: Mapping[bytes, Image], *, ownership: Ownership, **options: Any
    ) -> None:
        super().__init__(image, ownership=ownership, is_cached=False, **options)
        options["growable"] = False
        self._others: dict[int, Operations] = {}
        for inode, (name, window) in enumerate(partitions.items(), FILE_INODE_IN_DIRECTORY + 1):
            self._others[inode] = Operations(
                window,
                ownership=ownership.copy(),
                is_cached=False,
                **{**options, "file_name": name, "file_inode": inode, "gate": self.gate},
            )
        self._by_name = dict(zip(partitions, self._others.values(), strict=True))

    def file_of(self, inode: int) -> Operations:
        """See Operations."""
        return self._others.get(inode, self)

    def _other(self, fh: int) -> Operations | None:
        return self._others.get(fh & _INODE_MASK)

    async def watch_sizes(self, mend: Mend) -> None:
        """See Operations; rule 4."""
        async with trio.open_nursery() as nursery:
            for other in self._others.values():
                nursery.start_soon(other.watch_sizes, _mend_nothing)
            await super().watch_sizes(mend)

    # ---- by file handle ----

    async def read(self, fh: int, off: int, size: int) -> Buffer:  # type: ignore[override]  # any buffer will do
        """See Operations."""
        other = self._other(fh)
        return await (super().read(fh, off, size) if other is None else other.read(fh, off, size))

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """See Operations."""
        other = self._other(fh)
        return await (super().write(fh, off, buf) if other is None else other.write(fh, off, buf))

    async def fsync(self, fh: int, datasync: bool) -> None:
        """See Operations."""
        other = self._other(fh)
        await (super().fsync(fh, datasync) if other is None else other.fsync(fh, datasync))

    async def flush(self, fh: int) -> None:
        """See Operations."""
        other = self._other(fh)
        await (super().flush(fh) if other is None else other.flush(fh))

    async def release(self, fh: int) -> None:
        """See Operations."""
        other = self._other(fh)
        if other is None:
            await super().release(fh)
        else:
            self.opens.n_open -= 1
            await other.release(fh)

    # ---- by inode ----

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """See Operations."""
        other = self._others.get(inode)
        if other is None:
            return await super().open(inode, flags, ctx)
        opened = await other.open(inode, flags, ctx)
        self.opens.n_open += 1
        return opened

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """See Operations."""
        other = self._others.get(inode)
        return await (super().getattr(inode, ctx) if other is None else other.getattr(inode, ctx))

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """See Operations."""
        other = self._others.get(inode)
        if other is None:
            return await super().setattr(inode, attr, fields, fh, ctx)
        return await other.setattr(inode, attr, fields, fh, ctx)

    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        """See Operations: only the disk has counters."""
        return await super().listxattr(inode, ctx)

    # ---- names ----

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """One of the names in the folder."""
        other = self._by_name.get(name)
        if other is not None and parent_inode == pyfuse3.ROOT_INODE:
            return await other.getattr(other.file_inode, ctx)
        return await super().lookup(parent_inode, name, ctx)

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """The disk, then its partitions."""
        if start_id == 0:
            await super().readdir(fh, start_id, token)
            start_id = 1
        for number, (name, other) in enumerate(self._by_name.items(), 1):
            if number < start_id:
                continue
            if not pyfuse3.readdir_reply(token, name, other.file_attributes(), number + 1):
                return


async def _mend_nothing(n_bytes: int, *, lowers: bool, syncs: bool, forgets: bool) -> None:
    """See rule 4."""
