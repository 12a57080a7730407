"""A wait in poll(2) for what the kernel is about to answer, in place of a turn of the event loop.

A task that goes to sleep and is woken through trio costs 40 us and more: two turns of the loop, and the system calls
for its set of descriptors. A flush on a fast disk takes little longer than that.

1. Nothing else runs meanwhile. So the wait ends with whatever comes in for somebody else to serve (the descriptor
   given to :func:`allow_short_waits`), and after a millisecond.
2. There is none without that descriptor, none while other requests wait for something, which may be there, and after
   some that were in vain (a slow disk) none for a while.
"""

from __future__ import annotations

import select
from collections.abc import Callable

import trio

LONGEST_MS = 1
"""Milliseconds that a wait takes at most."""
_MAX_FUTILE = 4
_WITHOUT = 64


class _ShortWaits:
    """The waits of one trio run, which end with ``other_fd``; ``n_waiting`` is asked before each."""

    def __init__(self, other_fd: int, n_waiting: Callable[[], int]) -> None:
        self._other_fd = other_fd
        self._n_waiting = n_waiting
        self._polls: dict[int, Callable[[int], list[tuple[int, int]]]] = {}
        self._n_futile = 0
        self._n_without = 0

    def wait(self, fd: int, n_own: int) -> bool:
        """See :func:`wait_shortly`."""
        if self._n_without:
            self._n_without -= 1
            return False
        if self._n_waiting() > n_own:
            return False
        found = (self._polls.get(fd) or self._poll_of(fd))(LONGEST_MS)
        if found:
            self._n_futile = 0
            return any(ready == fd for ready, _ in found)
        self._n_futile += 1
        if self._n_futile == _MAX_FUTILE:
            self._n_futile, self._n_without = 0, _WITHOUT
        return False

    def _poll_of(self, fd: int) -> Callable[[int], list[tuple[int, int]]]:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.register(self._other_fd, select.POLLIN)
        poll = self._polls[fd] = poller.poll
        return poll


_current: trio.lowlevel.RunVar[_ShortWaits | None] = trio.lowlevel.RunVar("qcowfuse short waits", None)


def allow_short_waits(other_fd: int, n_waiting: Callable[[], int]) -> None:
    """For this trio run: allow them, to be ended by input at ``other_fd``. ``n_waiting()`` is how many requests wait
    for something."""
    _current.set(_ShortWaits(other_fd, n_waiting))


def wait_shortly(fd: int, *, n_own: int) -> bool:
    """Whether there is input at ``fd``, now or after a short wait; False may be wrong, where none is allowed.

    ``n_own``: whether the caller serves a request that counts as waiting already, 1 or 0.
    """
    waits = _current.get()
    return waits is not None and waits.wait(fd, n_own)
