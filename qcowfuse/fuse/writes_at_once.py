"""Writes answered as soon as they have been read from /dev/fuse, or by the thread that makes them; and which changes
of the file no flush has covered yet.

1. A change is counted when it has ended. A flush covers those that were counted when it began.
2. A write that a thread makes and answers has ended for its client before the trio thread hears of it. So it is
   counted when it begins, too, and while one goes on nothing counts as durable: a close that comes right behind the
   answer is flushed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..buffer import Buffer
from ..driver.image import Image
from ..driver.pending import PendingWrite
from .attributes import Attributes


class WritesAtOnce:
    """To the file of ``image``, whose times are in ``file``."""

    def __init__(self, image: Image, file: Attributes) -> None:
        self.n_changes = 0
        self._n_durable = 0
        self._n_elsewhere = 0
        self._file = file
        self._start = image.start_write

    def start(self, off: int, data: Buffer, is_alone: Callable[[], bool]) -> PendingWrite | None:
        """None when all of ``data``, which is only lent, was written; else what is left to do. Raises what the image
        raises."""
        pending = self._start(off, data, is_alone)
        if pending is None:  # what note_change does: a call costs as much
            self.n_changes += 1
            self._file.mtime_ns = self._file.ctime_ns = time.time_ns()
        return pending

    def note_change(self) -> None:
        """The file has changed, or a part of what was asked for was done."""
        self.n_changes += 1
        self._file.mtime_ns = self._file.ctime_ns = time.time_ns()

    def begin_elsewhere(self) -> None:
        """A thread makes a write from now on, and answers it (rule 2)."""
        self._n_elsewhere += 1
        self.note_change()

    def end_elsewhere(self) -> None:
        """That has ended, well or not."""
        self._n_elsewhere -= 1
        self.n_changes += 1

    @property
    def is_durable(self) -> bool:
        """Whether a flush has covered everything."""
        return not self._n_elsewhere and self._n_durable >= self.n_changes

    def note_durable(self, n_changes: int) -> None:
        """A flush has succeeded that began after so many changes."""
        self._n_durable = max(self._n_durable, n_changes)
