"""fsync, close and stat, and the times that the kernel sends before, answered as soon as they have been read from
/dev/fuse.

1. fsync is answered where all that was written is durable without waiting; anything else is left to the handler of
   :class:`~.operations.Operations`, which begins anew.
2. With the write-back cache the kernel keeps the times of the file, and tells of them in a request of its own before
   each fsync that follows a write (``fuse_flush_times``). They are set here.
3. A close of a descriptor that could write makes durable what was written, as fsync does, where anything was; other
   closes have nothing to do. It is left to the handler while a size is being put right.
"""

from __future__ import annotations

from collections.abc import Callable

from pyfuse3 import EntryAttributes

from ..driver.image import Image
from .attributes import Attributes
from .open_files import WRITER
from .sizes import Sizes
from .writes_at_once import WritesAtOnce


class FsyncAtOnce:
    """``file`` is what the file shows, ``show`` all of it with the size. ``writes`` are told of each success."""

    def __init__(
        self,
        image: Image,
        file: Attributes,
        sizes: Sizes,
        writes: WritesAtOnce,
        *,
        show: Callable[[], EntryAttributes],
    ) -> None:
        self._image = image
        self._file = file
        self._sizes = sizes
        self._show = show
        self._writes = writes

    def start_fsync(self) -> bool:
        """Whether everything written is durable now; False by rule 1."""
        if not self._image.try_flush():
            return False
        self._writes.note_durable(self._writes.n_changes)
        return True

    def start_flush(self, handle: int) -> bool:
        """Whether a descriptor of the open file ``handle`` may be closed now; False by rules 1 and 3."""
        if not handle & WRITER:
            return True
        return self._sizes.is_mended and (self._writes.is_durable or self.start_fsync())

    def start_getattr(self) -> EntryAttributes | None:
        """What the file shows; None where its size has to be put right first. Raises FUSEError."""
        return None if self._sizes.is_in_doubt else self._show()

    def start_set_times(self, mtime_ns: int, ctime_ns: int) -> EntryAttributes:
        """Set the times, in nanoseconds since 1970; what the file shows then. Raises FUSEError."""
        self._file.mtime_ns, self._file.ctime_ns = mtime_ns, ctime_ns
        return self._show()
