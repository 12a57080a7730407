"""fallocate and lseek that need not wait, answered as soon as they have been read from /dev/fuse.

1. What is refused, what has to wait, and what is no plain case is left to the handlers of
   :class:`~.operations.Operations`, which begin anew: nothing was changed then, or some bytes are zeroed twice. What
   failed is kept for the handler, which answers: it is not tried again.
2. While the kernel may hold data that the image does not know of, nothing is said about holes (rule 5 of
   :mod:`.operations`).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from ..driver.image import Image
from .seeking import Seeker

# linux/falloc.h
FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_ZERO_RANGE = 0x10


class HolesAtOnce:
    """``knows_all``: whether the image knows all data that was written. ``on_change`` is told of each change."""

    def __init__(
        self, image: Image, seeker: Seeker, *, knows_all: Callable[[], bool], on_change: Callable[[], None]
    ) -> None:
        self._image = image
        self._seeker = seeker
        self._knows_all = knows_all
        self._on_change = on_change
        self._failure: tuple[int, int, OSError] | None = None

    def start_lseek(self, off: int, whence: int) -> int | None:
        """The answer of lseek(2), :data:`~.seeking.NO_DATA` for ENXIO, None by rule 1. Raises CorruptImageError."""
        size = self._image.size
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE) or not 0 <= off < size or not self._knows_all():
            return None
        return self._seeker.try_seek(off, size, whence)

    def start_fallocate(self, mode: int, off: int, length: int) -> bool:
        """Whether a hole was punched, or a range zeroed; False by rule 1."""
        self._failure = None
        image, kind = self._image, mode & ~FALLOC_KEEP_SIZE
        if kind not in (FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE) or off < 0 or off + length > image.size:
            return False
        try:
            if not image.try_write_zeroes(off, length, unmap=kind == FALLOC_PUNCH_HOLE):
                return False
        except OSError as exc:
            self._failure = off, length, exc
            return False
        self._on_change()
        return True

    def raise_failure(self, off: int, length: int) -> None:
        """Raise what :meth:`start_fallocate` met at the start of this request, if it did."""
        failure, self._failure = self._failure, None
        if failure is not None and failure[:2] == (off, length):
            raise failure[2]
