"""Data that the kernel holds and the image does not know of yet, and how the kernel is made to send it.

1. With the write-back cache there may be such data, but only while the file is open for writing somewhere: before the
   kernel tells of the release it has written everything.
2. A process outside of the mount has dirty pages written with sync_file_range(2). That takes no lock of the inode,
   which the kernel holds while it waits for the answer to lseek(2). For as long nobody writes with write(2): what the
   image then knows is what had been written when lseek was called.
3. This holds from Linux 6.16 on. Older kernels take a page for written as soon as they have copied it, long before
   they have sent it (fs/fuse/file.c, "temp pages").
4. It takes a process and some requests, 0.3 to 3 ms. So it is asked for once a search, and a search beside a writer
   passes over holes that are too short to be worth it (:data:`WORTHWHILE_HOLE`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable

import trio

from ..errors import MountError

WORTHWHILE_HOLE = 1 << 20
"""Bytes that are read in about the time in which the kernel is made to send what it holds, twice."""
_FIRST_RELEASE = (6, 16)
FETCH_SECONDS = 2.0

WriteBackPages = Callable[[], Awaitable[bool]]
"""Has the kernel send what it holds of the file; whether it did. Raises OSError, MountError."""


class UnsentData:
    """Of one file. ``has_cache``: whether the kernel has a write-back cache. ``n_writers`` have the file open."""

    def __init__(self, has_cache: Callable[[], bool]) -> None:
        self.n_writers = 0
        self._has_cache = has_cache
        self._write_back: WriteBackPages | None = None

    @property
    def may_be(self) -> bool:
        """Whether there may be such data."""
        return self.n_writers > 0 and self._has_cache()

    def serve(self, write_back: WriteBackPages) -> None:
        """There is a mount, and so there is somebody to ask."""
        if is_waited_for(os.uname().release):
            self._write_back = write_back

    async def fetch(self) -> bool:
        """Have the kernel send all, so that the image knows all for as long as the lock of the inode is held; whether
        that was possible, and did not take too long."""
        if self._write_back is None:
            return False
        try:
            with trio.move_on_after(FETCH_SECONDS):
                return await self._write_back()
        except (OSError, MountError):
            pass  # a writer hears of what could not be written
        return False


def is_waited_for(release: str) -> bool:
    """Whether a kernel of this release waits for the answers to what sync_file_range(2) has it send (rule 3)."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return found is not None and (int(found[1]), int(found[2])) >= _FIRST_RELEASE
