"""A cheaper wait for the next request than trio's own, and which request is served when.

pyfuse3 takes a lock and asks trio's epoll set before each request: two passes of the scheduler and three system
calls for a request that mostly waits in the kernel already. Here a worker asks poll(2) first and goes on at once.

1. No ``await`` lies between a poll that saw a request and the read of it, and all workers run in one thread: so
   no other worker can take the request in between, and pyfuse3's lock is not needed.
2. One worker at most waits in trio's epoll set (the watcher), the others are parked. A worker that was woken,
   from there or from parking, wakes one more before it goes on. So while it works or waits for something slow,
   another one is watching, or on its way to.
3. After ``burst`` requests in a row there is a checkpoint (after ``burst_while_slow`` when a handler waits for
   something): timers, threads, signals and cancellation get their turn.
4. Before it waits, a worker spins for ``spin`` seconds: waking a process costs the client more than that. Where the
   last request came soon after that (a client that copies what it read), it spins for three times as long. Where a
   request comes soon after even that, spinning was a loss, and some waits do without the longer one. A worker
   yields the processor at every turn, and does not spin at all while a handler waits for something, because the
   next event will then come through trio. Where others want the processor, yielding costs a worker its turn, while
   one that sleeps gets it back at once: after a turn that took long, it does without for a while.
5. Parked workers are woken last in first out: the buffer used last is the one in the processor's cache.
6. A worker that has spun in vain sleeps in poll(2) for a millisecond at most before it goes to trio's epoll set: from
   there the way to the next request is three times as long, and many a client asks again soon. Other tasks have no
   turn meanwhile. So that is done only where :attr:`may_rest` says that nothing is going on but requests, not while a
   handler waits, and not when others had no turn for some milliseconds.
7. Threads that answer requests by themselves do not count as waiting: they need nothing of trio. As many of them are
   useful as there are processors beside that of the event loop, up to four, and one more: it has work at hand when
   another ends while the event loop copies for some hundred microseconds itself. On a single processor none is.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

import trio

_MOST_HELPERS = 4
_LONG_TURN = 200e-6
_WITHOUT_SPIN = 200
_LONGER = 3
_SOON = 4
"""Times ``spin``: a wait of this much, in which the process was woken, would have taken :data:`_LONGER` spinning."""
_WITHOUT_LONGER = 16
_REST_MS = 1
_MOST_SECONDS_WITHOUT_OTHERS = 4e-3


class RequestGate:
    """Stands in for ``trio.lowlevel``. A handler that waits for something adds one to :attr:`n_slow` meanwhile."""

    current_task = staticmethod(trio.lowlevel.current_task)
    current_trio_token = staticmethod(trio.lowlevel.current_trio_token)

    def __init__(self, *, burst: int = 32, burst_while_slow: int = 4, spin: float = 30e-6) -> None:
        self.n_slow = 0
        self.elsewhere: list[int] = []
        """As long as the number of requests that other threads answer. Such a thread takes one away when it has
        answered, which is a single step for all others."""
        n_helpers = min(len(os.sched_getaffinity(0)) - 1, _MOST_HELPERS)
        self.max_elsewhere = n_helpers + 1 if n_helpers else 0
        self.may_rest = False
        self._others_had_turn = 0.0
        self._burst = burst
        self._burst_while_slow = burst_while_slow
        self._least_spin = self._spin = spin
        self._n_since_checkpoint = 0
        self._n_without_spin = self._n_without_longer = 0
        self._has_spun = False
        self._parked: dict[trio.lowlevel.Task, None] = {}
        self._watched = False
        self._closing = False
        self._poll: Callable[[int], list[tuple[int, int]]] | None = None

    def notify_closing(self, fd: int) -> None:
        """Every wait for ``fd`` ends with ClosedResourceError, now and from now on."""
        self._closing = True
        while self._parked:
            self._wake_one()
        trio.lowlevel.notify_closing(fd)

    def is_idle(self) -> bool:
        """Whether to take time for a request: no handler waits for anything and no request waits to be read, or else
        no other thread should be given work now."""
        if len(self.elsewhere) >= self.max_elsewhere:
            return True
        return not (self.n_slow or (self._poll is not None and self._poll(0)))

    def n_left_in_burst(self) -> int:
        """How many requests may be answered before :meth:`wait_readable` has its checkpoint; 1 or more after it."""
        return (self._burst_while_slow if self.n_slow else self._burst) - self._n_since_checkpoint + 1

    def spin(self, fd: int) -> bool:
        """Wait for a request as rule 4 says; whether there is one. If not, the next wait won't spin again."""
        is_there = self._spins(fd)
        self._has_spun = not is_there
        return is_there

    def count(self, n_requests: int) -> None:
        """So many requests were answered without :meth:`wait_readable`."""
        self._n_since_checkpoint += n_requests

    async def wait_readable(self, fd: int) -> None:
        """Return when a request waits at ``fd``; the caller must read it before it awaits anything."""
        woken = False
        try:
            while not self._closing:
                self._n_since_checkpoint += 1
                if self._n_since_checkpoint > (self._burst_while_slow if self.n_slow else self._burst):
                    self._n_since_checkpoint = 1
                    await trio.lowlevel.checkpoint()
                    self._others_had_turn = time.perf_counter()
                has_spun, self._has_spun = self._has_spun, False
                if self._request_waits(fd, spin=not (woken or has_spun)):
                    return
                woken = True  # also when that is cancelled: rule 2
                if self._watched:
                    await self._park()
                else:
                    await self._watch(fd)
            raise trio.ClosedResourceError
        finally:
            if woken:
                self._wake_one()

    def _request_waits(self, fd: int, *, spin: bool) -> bool:
        if self._poller(fd)(0):
            return True
        return spin and self._spins(fd)

    def _poller(self, fd: int) -> Callable[[int], list[tuple[int, int]]]:
        poll = self._poll
        if poll is None:
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            poll = self._poll = poller.poll
        return poll

    def _spins(self, fd: int) -> bool:
        """Wait as rule 4 says; whether there is a request now."""
        if not self._spin or self.n_slow:
            return False
        if self._n_without_spin:
            self._n_without_spin -= 1
            return self._rests(fd)
        poll, now, give_way = self._poller(fd), time.perf_counter, os.sched_yield
        start = turn = now()
        end = turn + self._spin
        while turn < end:
            give_way()
            is_there = poll(0)
            before, turn = turn, now()
            if turn - before > _LONG_TURN:
                self._n_without_spin = _WITHOUT_SPIN
                return bool(is_there)
            if is_there:
                return True
        came = self._rests(fd)
        is_soon = came and now() < start + _SOON * self._least_spin
        if is_soon and self._spin > self._least_spin:
            self._n_without_longer = _WITHOUT_LONGER
        elif self._n_without_longer:
            self._n_without_longer -= 1
        self._spin = self._least_spin * _LONGER if is_soon and not self._n_without_longer else self._least_spin
        return came

    def _rests(self, fd: int) -> bool:
        """Sleep as rule 6 says; whether there is a request now."""
        if not self.may_rest or time.perf_counter() > self._others_had_turn + _MOST_SECONDS_WITHOUT_OTHERS:
            return False
        return bool(self._poller(fd)(_REST_MS))

    async def _watch(self, fd: int) -> None:
        self._watched = True
        self._n_since_checkpoint = 0
        try:
            await trio.lowlevel.wait_readable(fd)
        finally:
            self._watched = False
            self._others_had_turn = time.perf_counter()

    async def _park(self) -> None:
        task = trio.lowlevel.current_task()
        self._parked[task] = None

        def give_up(_: object) -> trio.lowlevel.Abort:
            del self._parked[task]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(give_up)

    def _wake_one(self) -> None:
        if self._parked:
            task, _ = self._parked.popitem()
            trio.lowlevel.reschedule(task)
