"""A small pool of threads for system calls that may block, shared by all storages of one trio run.

1. A job that has begun is waited for, cancelled or not: the thread may be using the caller's buffers.
   A cancellation is seen at the caller's next checkpoint. (Not so for a function that each thread is to run.)
2. All book-keeping is done in the trio thread; the two sides share only a queue and a deque.
3. The threads end with the last user's :meth:`WorkerPool.release`.

Measured against ``trio.to_thread.run_sync``, which wakes the loop once for each job: cached reads of 4 KiB at
depth 16 are two to four times as many, at a quarter to half of the CPU time, because completions share a wake-up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar, cast

import trio

from ..system.every_thread import Meeting, add_group

MAX_THREADS = 32
"""Threads in the pool at most; they are started only when all others are busy."""

T = TypeVar("T")


class _Waiter:
    """A task that sleeps until ``n_left`` jobs have ended."""

    __slots__ = ("n_left", "task")

    def __init__(self, n_left: int) -> None:
        self.n_left = n_left
        self.task = trio.lowlevel.current_task()

    def note_end(self, job: _Job) -> None:
        """One of its jobs has ended."""
        self.n_left -= 1
        if not self.n_left:
            trio.lowlevel.reschedule(self.task)


class _Listener:
    """What is to be called when a job has ended that no task waits for."""

    __slots__ = ("_on_end",)

    def __init__(self, on_end: Callable[[BaseException | None], None]) -> None:
        self._on_end = on_end

    def note_end(self, job: _Job) -> None:
        """The job has ended."""
        self._on_end(job.error)


class _Job:
    """One call on its way through the pool; ``error`` and ``value`` are set by the thread."""

    __slots__ = ("args", "error", "function", "value", "waiter")

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], waiter: _Waiter | _Listener) -> None:
        self.function = function
        self.args = args
        self.waiter = waiter
        self.value: Any = None
        self.error: BaseException | None = None


class WorkerPool:
    """Threads that run blocking calls for the tasks of one trio run."""

    def __init__(self, *, max_threads: int = MAX_THREADS) -> None:
        self._max_threads = max_threads
        self._token = trio.lowlevel.current_trio_token()
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._done: deque[_Job] = deque()
        self._n_jobs = 0
        self._n_threads = 0
        self._n_users = 0

    @property
    def n_threads(self) -> int:
        """Threads that run now."""
        return self._n_threads

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)`` in a thread; its exception is raised here. Cancellation waits (rule 1)."""
        return (await self.run_all(function, (args,)))[0]

    async def run_all(self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        """``function(*args)`` for each of ``arguments``, in as many threads; the first exception is raised when all
        have ended."""
        await trio.lowlevel.checkpoint_if_cancelled()
        waiter = _Waiter(len(arguments))
        jobs = []
        for args in arguments:
            job = _Job(function, args, waiter)
            self._enqueue(job)
            jobs.append(job)
        await trio.lowlevel.wait_task_rescheduled(_refuse_abort)
        error = next((job.error for job in jobs if job.error is not None), None)
        if error is not None:
            try:
                raise error
            finally:
                # The traceback refers to this frame: break the cycle, or the caller's buffers live on in it.
                del error, job, jobs
        return [cast(T, job.value) for job in jobs]

    def start(
        self, function: Callable[..., object], *args: Any, on_end: Callable[[BaseException | None], None]
    ) -> None:
        """``function(*args)`` in a thread; then ``on_end`` in the trio thread with what it has raised, or None.
        ``on_end`` must not raise. Raises RuntimeError where there is no thread to be had: then nothing is called."""
        self._enqueue(_Job(function, args, _Listener(on_end)))

    def _enqueue(self, job: _Job) -> None:
        self._n_jobs += 1
        if self._n_jobs - len(self._done) > self._n_threads < self._max_threads:
            self._start_thread()  # raises only where no thread runs: for the first job, or never
        self._queue.put(job)

    async def run_in_each(self, function: Callable[[], T]) -> list[T]:
        """``function()`` in each thread that runs now, when it has time; the results.

        Where a thread stays busy for longer than a second, another may have run it in its place. A cancellation does
        not wait: then ``function`` may be called later still. Raises what ``function`` raises.
        """
        if not self._n_threads:
            return []
        waiter = _Waiter(self._n_threads)
        meeting = Meeting(function, self._n_threads)
        jobs = [_Job(meeting, (), waiter) for _ in range(self._n_threads)]
        most, self._max_threads = self._max_threads, self._n_threads  # a new thread would take a busy one's place
        self._n_jobs += len(jobs)
        for job in jobs:
            self._queue.put(job)

        def abandon(_raise_cancel: object) -> trio.lowlevel.Abort:
            waiter.n_left = -1  # so that it is never 0
            return trio.lowlevel.Abort.SUCCEEDED

        try:
            await trio.lowlevel.wait_task_rescheduled(abandon)
        finally:
            self._max_threads = most
        for job in jobs:
            if job.error is not None:
                raise job.error
        return [cast(T, job.value) for job in jobs]

    def retain(self) -> WorkerPool:
        """One more user."""
        self._n_users += 1
        return self

    def release(self) -> None:
        """One user less; the last one ends the threads (they finish what is queued first)."""
        self._n_users -= 1
        if self._n_users == 0:
            for _ in range(self._n_threads):
                self._queue.put(None)
            self._n_threads = 0

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name=f"qcowfuse-io-{self._n_threads}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # No more threads to be had: the ones that run will get to the job. With none at all, it can't be done.
            if self._n_threads == 0:
                self._n_jobs -= 1
                raise
        else:
            self._n_threads += 1

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                job.value = job.function(*job.args)
            except BaseException as error:
                job.error = error
            self._done.append(job)
            # Not kept while waiting for the next job: it holds the caller's buffers.
            del job
            try:
                self._token.run_sync_soon(self._wake, idempotent=True)
            except trio.RunFinishedError:
                return

    def _wake(self) -> None:
        done = self._done
        while done:
            self._n_jobs -= 1
            job = done.popleft()
            job.waiter.note_end(job)


def _refuse_abort(_raise_cancel: object) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED


_current_pool: trio.lowlevel.RunVar[WorkerPool] = trio.lowlevel.RunVar("qcowfuse worker pool")


def retain_worker_pool() -> WorkerPool:
    """The pool of this trio run with one more user; give it back with :meth:`WorkerPool.release`."""
    try:
        pool = _current_pool.get()
    except LookupError:
        pool = WorkerPool()
        _current_pool.set(pool)
        add_group(pool.run_in_each)
    return pool.retain()
