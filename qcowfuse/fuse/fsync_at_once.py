"""fsync, and the times that the kernel sends before it, answered as soon as they have been read from /dev/fuse.

1. fsync is answered where all that was written is durable without waiting; anything else is left to the handler of
   :class:`~.operations.Operations`, which begins anew.
2. With the write-back cache the kernel keeps the times of the file, and tells of them in a request of its own before
   each fsync that follows a write (``fuse_flush_times``). They are set here.
"""

from __future__ import annotations

from collections.abc import Callable

from pyfuse3 import EntryAttributes

from ..driver.image import Image
from .attributes import Attributes


class FsyncAtOnce:
    """``file`` is what the file shows, ``show`` all of it with the size. ``on_durable`` is told of each success."""

    def __init__(
        self, image: Image, file: Attributes, *, show: Callable[[], EntryAttributes], on_durable: Callable[[], None]
    ) -> None:
        self._image = image
        self._file = file
        self._show = show
        self._on_durable = on_durable

    def start_fsync(self) -> bool:
        """Whether everything written is durable now; False by rule 1."""
        if not self._image.try_flush():
            return False
        self._on_durable()
        return True

    def start_set_times(self, mtime_ns: int, ctime_ns: int) -> EntryAttributes:
        """Set the times, in nanoseconds since 1970; what the file shows then. Raises FUSEError."""
        self._file.mtime_ns, self._file.ctime_ns = mtime_ns, ctime_ns
        return self._show()
