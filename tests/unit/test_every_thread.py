"""A function in every thread of the process: idle ones, busy ones, and those that are busy for too long."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from qcowfuse.storage.workers import retain_worker_pool
from qcowfuse.system import every_thread


def idle_threads_of_trio() -> set[int]:
    """Trio keeps them for a while: those of other tests may be there."""
    return {thread.native_id or 0 for thread in threading.enumerate() if thread.name.startswith("Trio thread")}


@asynccontextmanager
async def busy_threads(may_end: threading.Event) -> AsyncIterator[set[int]]:
    """The numbers of a thread of the pool's and one of trio's, which work until ``may_end`` is set."""
    numbers: set[int] = set()
    all_work = threading.Barrier(3)
    pool = retain_worker_pool()

    def work() -> None:
        numbers.add(threading.get_native_id())
        all_work.wait()
        assert may_end.wait(30)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.run, work)
        nursery.start_soon(trio.to_thread.run_sync, work)
        await trio.to_thread.run_sync(all_work.wait)
        yield numbers
    pool.release()


async def test_busy_threads_are_reached_when_they_have_time() -> None:
    """Each thread runs it once, though they are busy for longer than idle ones wait for each other."""
    may_end = threading.Event()
    runs: list[int] = []
    own = threading.get_native_id()
    async with busy_threads(may_end) as busy:
        threading.Timer(1.2, may_end.set).start()
        missed = await every_thread.run_in_every_thread(
            lambda: runs.append(threading.get_native_id()), lambda: {own, *busy, *idle_threads_of_trio()}
        )
    assert missed == set()
    assert {own, *busy} <= set(runs)
    assert len(runs) == len(set(runs))


async def test_nothing_is_waited_for_once_all_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows is the rest of a start."""
    n_pauses = 0

    async def pause(_seconds: float) -> None:
        nonlocal n_pauses
        n_pauses += 1

    monkeypatch.setattr(trio, "sleep", pause)
    other = await trio.to_thread.run_sync(threading.get_native_id)
    wanted = {threading.get_native_id(), other}
    runs: list[int] = []
    missed = await every_thread.run_in_every_thread(
        lambda: runs.append(threading.get_native_id()), lambda: wanted | idle_threads_of_trio()
    )
    assert missed == set()
    assert wanted <= set(runs)
    assert not n_pauses


async def test_threads_that_stay_busy_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that has ended meanwhile is not among them, and none runs it when the caller has gone on."""
    monkeypatch.setattr(every_thread, "PATIENCE_SECONDS", 0.05)
    may_end = threading.Event()
    own = threading.get_native_id()
    runs: list[int] = []
    async with busy_threads(may_end) as busy:
        answers = [{own, *busy, -1}]
        missed = await every_thread.run_in_every_thread(
            lambda: runs.append(threading.get_native_id()), lambda: answers.pop() if answers else {own, *busy}
        )
        may_end.set()
        pool = retain_worker_pool()
        await pool.run_all(time.sleep, [(0.01,)] * 2)
        pool.release()
    assert missed == busy
    assert not busy & set(runs)
