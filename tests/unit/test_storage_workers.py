"""The worker pool: results, exceptions, cancellation, the end of its threads."""

from __future__ import annotations

import threading
import time

import pytest
import trio

from qcowfuse.storage.workers import WorkerPool


def pool_threads() -> set[threading.Thread]:
    """Threads of any worker pool that are alive."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("qcowfuse-io-")}


async def test_results_and_exceptions_come_back() -> None:
    """Each caller gets its own, with many in flight at once."""
    pool = WorkerPool(max_threads=4).retain()
    results: dict[int, object] = {}

    def work(number: int) -> int:
        time.sleep(0.001)
        if number % 3 == 0:
            raise ValueError(number)
        return number * 2

    async def one(number: int) -> None:
        try:
            results[number] = await pool.run(work, number)
        except ValueError as error:
            results[number] = error.args

    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(one, number)
    pool.release()
    assert results == {n: (n,) if n % 3 == 0 else n * 2 for n in range(200)}


async def test_threads_are_started_only_when_all_are_busy() -> None:
    """One after another needs one thread; at once, as many as allowed."""
    pool = WorkerPool(max_threads=3).retain()
    for _ in range(5):
        await pool.run(time.sleep, 0)
    assert pool.n_threads == 1
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(pool.run, time.sleep, 0.01)
    assert pool.n_threads == 3
    pool.release()


async def test_cancellation_waits_for_the_thread() -> None:
    """A cancelled caller comes back when its call has ended, and sees the cancellation at its next checkpoint."""
    pool = WorkerPool(max_threads=2).retain()
    ended = threading.Event()

    def work() -> str:
        time.sleep(0.1)
        ended.set()
        return "done"

    with trio.move_on_after(0.02) as scope:
        assert await pool.run(work) == "done"
        assert ended.is_set()
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    with trio.CancelScope() as scope:
        scope.cancel()
        await pool.run(pytest.fail, "a call of a task that was cancelled before must not begin")
    assert scope.cancelled_caught
    pool.release()


async def test_the_last_user_ends_the_threads() -> None:
    """Threads outlive the first release and are gone after the last."""
    before = pool_threads()
    pool = WorkerPool(max_threads=3).retain().retain()
    await pool.run(time.sleep, 0)
    assert len(pool_threads() - before) == 1
    pool.release()
    assert await pool.run(int, "7") == 7
    ours = pool_threads() - before
    pool.release()
    for thread in ours:
        thread.join(5)
        assert not thread.is_alive()


async def test_a_function_for_each_thread_waits_for_a_busy_one() -> None:
    """No thread that is started meanwhile takes the place of a busy one."""
    pool = WorkerPool(max_threads=4).retain()
    is_busy, may_end = threading.Event(), threading.Event()

    def work() -> int:
        is_busy.set()
        assert may_end.wait(30)
        return threading.get_native_id()

    numbers: list[int] = []

    async def keep_busy() -> None:
        numbers.append(await pool.run(work))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_busy)
        await trio.to_thread.run_sync(is_busy.wait)
        threading.Timer(0.05, may_end.set).start()
        reached = await pool.run_in_each(threading.get_native_id)
        await pool.run_all(time.sleep, [(0.01,)] * 2)
    assert reached == numbers
    assert pool.n_threads == 2, "as many as are allowed are started again"
    pool.release()
