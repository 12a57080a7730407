"""Run a function in each thread of the process, for what the kernel keeps by thread.

1. A module that keeps threads says how to reach them (:func:`add_group`). Trio's own, which keep waiting for a while
   after their work, are reached through trio.
2. A thread that is busy for longer than a second is left out: the caller sees which threads have answered.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import trio

_MEETING_SECONDS = 1.0

T = TypeVar("T")
Group = Callable[[Callable[[], Any]], Awaitable[list[Any]]]
"""Runs a function once in each thread of a group and gives the results."""

_groups: trio.lowlevel.RunVar[tuple[Group, ...]] = trio.lowlevel.RunVar("groups of threads", ())


def add_group(group: Group) -> None:
    """``group`` takes part in :func:`run_in_every_thread` for the rest of this trio run."""
    _groups.set((*_groups.get(), group))


async def run_in_every_thread(function: Callable[[], T], n_threads: int) -> list[T]:
    """``function()`` in each of ``n_threads`` threads that run now, the calling one not counted; the results.

    Raises what ``function`` raises.
    """
    results: list[T] = []
    for group in _groups.get():
        results += await group(function)
    n_others = max(n_threads - len(results), 0)
    meeting = Meeting(function, n_others)

    async def run_one() -> None:
        results.append(await trio.to_thread.run_sync(meeting))

    async with trio.open_nursery() as nursery:
        for _ in range(n_others):
            nursery.start_soon(run_one)
    return results


class Meeting(Generic[T]):
    """``function`` for ``n_threads`` threads, none of which gets to it twice: each waits for the others."""

    def __init__(self, function: Callable[[], T], n_threads: int) -> None:
        self._function = function
        self._all_there = threading.Barrier(n_threads) if n_threads else None

    def __call__(self) -> T:
        result = self._function()
        if self._all_there is not None:
            with suppress(threading.BrokenBarrierError):
                self._all_there.wait(_MEETING_SECONDS)
        return result
