"""libfuse's table of operations as pyfuse3 fills it, and a copy of it with some entries exchanged.

1. libfuse only ever appends to the table: an entry's place is part of its binary interface. Where the entries
   that pyfuse3 can't do without are not there, the table is not what this module takes it for.
2. Each entry is judged by itself: one that can't be exchanged is left as it is, and costs what it is for.
3. An entry that pyfuse3 has come to fill is exchanged all the same: pyfuse3's own handler would call
   :class:`~qcowfuse.fuse.operations.Operations` with arguments that are not known here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from ...system.import_slot import SlotError

ENTRIES = str.split(
    "init destroy lookup forget getattr setattr readlink mknod mkdir unlink rmdir symlink rename link open read "
    "write flush release fsync opendir readdir releasedir fsyncdir statfs setxattr getxattr listxattr removexattr "
    "access create getlk setlk bmap ioctl poll write_buf retrieve_reply forget_multi flock fallocate readdirplus "
    "copy_file_range lseek"
)
"""``struct fuse_lowlevel_ops`` of libfuse 3.8; later ones have more."""
LANDMARKS = str.split("lookup getattr open read release fsync releasedir statfs write_buf forget_multi readdirplus")
"""Entries that pyfuse3 always fills, between and around those that are exchanged."""
FREE = str.split("getlk setlk bmap ioctl retrieve_reply flock")
"""Entries that pyfuse3 leaves empty. One of them may come to be filled; several at once mean another table."""
_MAX_NEWLY_FILLED = 2
_MAX_BYTES = 4096


class OperationsTable(ctypes.Structure):
    """libfuse's ``struct fuse_lowlevel_ops``."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ENTRIES)


class TableCopy:
    """A table of ``n_bytes`` at ``address``, copied; nothing of the original is changed. Raises SlotError."""

    def __init__(self, address: int, n_bytes: int) -> None:
        if n_bytes > _MAX_BYTES:
            raise SlotError(f"a table of operations of {n_bytes} bytes")
        self._memory = ctypes.create_string_buffer(
            ctypes.string_at(address, n_bytes), max(n_bytes, ctypes.sizeof(OperationsTable))
        )
        self._n_bytes = n_bytes
        self._table = OperationsTable.from_buffer(self._memory)

    @property
    def address(self) -> int:
        """Of the copy, which lives as long as this object."""
        return ctypes.addressof(self._memory)

    def entries(self) -> Mapping[str, int]:
        """The addresses by name, 0 where there is none."""
        return {name: getattr(self._table, name) or 0 for name in ENTRIES}

    def exchange(self, name: str, address: int) -> int:
        """Put ``address`` in; the previous one, or 0. Raises SlotError, then nothing is changed."""
        self._check(name)
        previous: int = getattr(self._table, name) or 0
        if name == "init" and not previous:
            raise SlotError("unexpected table of operations at init")
        setattr(self._table, name, address)
        return previous

    def _check(self, name: str) -> None:
        if getattr(OperationsTable, name).offset + ctypes.sizeof(ctypes.c_void_p) > self._n_bytes:
            raise SlotError(f"libfuse is too old for {name}")
        if name == "init":
            return  # the first entry, whatever follows
        entries = self.entries()
        for landmark in LANDMARKS:
            if not entries[landmark]:
                raise SlotError(f"unexpected table of operations at {landmark}")
        filled = [free for free in FREE if entries[free]]
        if len(filled) > _MAX_NEWLY_FILLED:
            raise SlotError(f"unexpected table of operations at {', '.join(filled)}")
