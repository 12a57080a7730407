"""How often the served file is open, and for what.

Plain functions, so that OPEN and RELEASE can be answered as soon as they have been read from /dev/fuse. The kernel
sends no RELEASE for an OPEN whose answer it did not take.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from pyfuse3 import FUSEError

from ..driver.image import Image
from .unsent_data import UnsentData

WRITER = 1 << 32
"""Set in the handle of a file that is open for writing."""


class OpenFiles:
    """Of the file with ``inode``. ``is_cached``: the kernel may keep its pages. ``on_release`` must not block."""

    def __init__(
        self, image: Image, inode: int, unsent: UnsentData, *, is_cached: bool, on_release: Callable[[], None]
    ) -> None:
        self.n_open = 0
        self.is_cached = is_cached
        self._image = image
        self._inode = inode
        self._unsent = unsent
        self._on_release = on_release

    def open(self, flags: int) -> int:
        """The handle for open(2) with ``flags``. Raises FUSEError."""
        is_writer = flags & os.O_ACCMODE != os.O_RDONLY
        if is_writer and self._image.read_only:
            raise FUSEError(errno.EROFS)
        self.n_open += 1
        self._unsent.n_writers += is_writer
        return self._inode | WRITER if is_writer else self._inode

    def release(self, handle: int) -> None:
        """The last descriptor of an open is gone. Its data was flushed when the descriptor was closed."""
        self.n_open -= 1
        self._unsent.n_writers -= bool(handle & WRITER)
        self._on_release()
