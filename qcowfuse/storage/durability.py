"""What a file knows of its own flushes: one at a time, final when they fail, and whether there is anything to flush.

1. A failed flush is final (rule 4 of :mod:`.base`): the kernel has dropped what it could not write, and would report
   success the next time. It tells of a lost write once for each descriptor: of two flushes at a time only one would
   hear of it.
2. A flush covers the changes that had ended when it began. One that had begun, and not ended, may be in the file or
   not: a flush beside it leaves the file in need of another.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import trio

from .base import StorageCounters

_UNKNOWN = -1


class Durability:
    """Of the file ``name``, whose changes are ``counters.writes`` and what :meth:`note_change` was told of."""

    def __init__(self, name: str, counters: StorageCounters) -> None:
        self.lock = trio.Lock()
        self._name = name
        self._counters = counters
        self._failure = 0
        self._n_other_changes = 0
        self._n_durable = _UNKNOWN

    @property
    def can_begin(self) -> bool:
        """Whether no flush is under way, and none has failed."""
        return not self._failure and not self.lock.locked()

    def count(self) -> None:
        """A flush begins."""
        self._counters.flushes += 1

    def raise_failure(self) -> None:
        """Raises OSError if a flush has failed."""
        if self._failure:
            raise OSError(self._failure, os.strerror(self._failure) + " (an earlier flush)", self._name)

    def keep_failure(self, error: OSError) -> None:
        """A flush has failed, and each later one will."""
        self._failure = error.errno or errno.EIO

    def at_once(self, flush: Callable[[int], object], fd: int) -> None:
        """A flush that does not wait. Raises OSError."""
        self.raise_failure()
        self.count()
        try:
            flush(fd)
        except OSError as error:
            self.keep_failure(error)
            raise

    def try_at_once(self, flush: Callable[[int], object], fd: int) -> bool:
        """:meth:`at_once`; False when it fails, or has failed before: the next flush says why."""
        try:
            self.at_once(flush, fd)
        except OSError:
            return False
        return True

    def note_change(self) -> None:
        """The file has changed, or is about to, in a way that does not count as a write."""
        self._n_other_changes += 1

    def n_changes(self, *, in_flight: bool) -> int:
        """What :meth:`note_flush` wants to hear when the flush that begins now has succeeded. ``in_flight``: whether
        something may be changing the file."""
        return _UNKNOWN if in_flight else self._counters.writes + self._n_other_changes

    def note_flush(self, n_changes: int) -> None:
        """So many changes are durable."""
        self._n_durable = n_changes

    def is_complete(self, *, in_flight: bool) -> bool:
        """Whether every change that has ended is durable."""
        return not in_flight and self._n_durable == self._counters.writes + self._n_other_changes
