"""Run a function in each thread of the process, for what the kernel keeps by thread.

1. A module that keeps threads says how to reach them (:func:`add_group`). Trio's own, which keep waiting for a while
   after their work, are reached through trio.
2. A thread that is busy is asked again until it has time, for :data:`PATIENCE_SECONDS` seconds. The caller sees which
   threads were not reached.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import trio

PATIENCE_SECONDS = 10.0
_MEETING_SECONDS = 1.0
_PAUSE_SECONDS = 0.01

T = TypeVar("T")
Group = Callable[[Callable[[], Any]], Awaitable[list[Any]]]
"""Runs a function in each thread of a group that has time, and gives the results. A cancellation does not wait."""

_groups: trio.lowlevel.RunVar[tuple[Group, ...]] = trio.lowlevel.RunVar("groups of threads", ())


def add_group(group: Group) -> None:
    """``group`` takes part in :func:`run_in_every_thread` for the rest of this trio run."""
    _groups.set((*_groups.get(), group))


async def run_in_every_thread(function: Callable[[], object], threads: Callable[[], set[int]]) -> set[int]:
    """``function()`` once in each of ``threads()``, the calling one first. Gives the threads that were not reached.

    ``threads`` gives the threads that run when it is called, by their numbers in the kernel. A thread that is there
    later, but not at first, was started by one that had run ``function``: what the kernel keeps by thread, it has
    inherited. A thread that ends meanwhile was not missed. Raises what ``function`` raises.
    """
    wanted = threads()
    reached: set[int] = set()
    is_over = False

    def run_once() -> int:
        number = threading.get_native_id()
        if number not in reached and not is_over:
            function()
            reached.add(number)
        return number

    own = run_once()
    with trio.move_on_after(PATIENCE_SECONDS):
        while (wanted & threads()) - reached:
            in_groups = {own}
            for group in _groups.get():
                in_groups.update(await group(run_once))
            await _run_in_threads_of_trio(run_once, len(threads() - in_groups))
            if wanted <= reached:
                return set()
            await trio.sleep(_PAUSE_SECONDS)
    is_over = True
    return (wanted & threads()) - reached


async def _run_in_threads_of_trio(function: Callable[[], object], n_threads: int) -> None:
    meeting = Meeting(function, n_threads)
    async with trio.open_nursery() as nursery:
        for _ in range(n_threads):
            nursery.start_soon(trio.to_thread.run_sync, meeting)


class Meeting(Generic[T]):
    """``function`` for ``n_threads`` threads, none of which gets to it twice: each waits for the others.

    They wait for one second. Later than that a thread may get to it twice, in place of another that is busy.
    """

    def __init__(self, function: Callable[[], T], n_threads: int) -> None:
        self._function = function
        self._all_there = threading.Barrier(n_threads) if n_threads else None

    def __call__(self) -> T:
        result = self._function()
        if self._all_there is not None:
            with suppress(threading.BrokenBarrierError):
                self._all_there.wait(_MEETING_SECONDS)
        return result
