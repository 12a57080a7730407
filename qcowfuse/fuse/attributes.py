"""Owner, mode and times of what is served, as they live in this process for as long as the mount.

There are no set-id bits. (With the write-back cache the kernel keeps the times. For a root inode it then never moves
them by itself: a file that is mounted over a file shows the time that utimens gave it last.)
"""

from __future__ import annotations

import stat
import time

from pyfuse3 import EntryAttributes, SetattrFields

# The name of the file never changes; its attributes do: blocks get allocated.
_ENTRY_TIMEOUT = 3600.0
_ATTRIBUTES_TIMEOUT = 1.0


class Ownership:
    """Who owns the served file (and folder), and the permission bits of the file."""

    __slots__ = ("gid", "mode", "uid")

    def __init__(self, uid: int, gid: int, mode: int) -> None:
        self.uid = uid
        self.gid = gid
        self.mode = mode

    def copy(self, mode: int | None = None) -> Ownership:
        """One that is changed by itself, with another mode unless that is None."""
        return Ownership(self.uid, self.gid, self.mode if mode is None else mode)


class Attributes:
    """Of the file, or of the folder. ``time_ns`` is what it shows until it is changed; a write sets ``mtime_ns`` and
    ``ctime_ns``."""

    def __init__(self, inode: int, ownership: Ownership, time_ns: int) -> None:
        self._inode = inode
        self._ownership = ownership
        self._atime_ns = self.mtime_ns = self.ctime_ns = time_ns

    def change(self, attr: EntryAttributes, fields: SetattrFields) -> None:
        """Set what ``fields`` names, but the size."""
        ownership = self._ownership
        if fields.update_mode:
            ownership.mode = stat.S_IMODE(attr.st_mode) & 0o777
        if fields.update_uid:
            ownership.uid = attr.st_uid
        if fields.update_gid:
            ownership.gid = attr.st_gid
        if fields.update_atime:
            self._atime_ns = attr.st_atime_ns
        if fields.update_mtime:
            self.mtime_ns = attr.st_mtime_ns
        self.ctime_ns = attr.st_ctime_ns if fields.update_ctime else time.time_ns()

    def entry(self, kind: int, n_links: int) -> EntryAttributes:
        """What the kernel is told, but the size and what follows from it; ``kind``: stat.S_IFREG or S_IFDIR."""
        entry = EntryAttributes()
        entry.st_ino = self._inode
        entry.generation = 0
        entry.entry_timeout = _ENTRY_TIMEOUT
        entry.attr_timeout = _ATTRIBUTES_TIMEOUT
        entry.st_mode = kind | self._ownership.mode
        entry.st_nlink = n_links
        entry.st_uid = self._ownership.uid
        entry.st_gid = self._ownership.gid
        entry.st_atime_ns = self._atime_ns
        entry.st_mtime_ns = self.mtime_ns
        entry.st_ctime_ns = self.ctime_ns
        return entry
