"""The request gate: who waits, who is woken, and that others get their turn."""

from __future__ import annotations

import itertools
import os
import select
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import trio
import trio.lowlevel
import trio.testing

from qcowfuse.fuse import request_gate
from qcowfuse.fuse.request_gate import RequestGate


class Pipe:
    """A descriptor with requests of one byte each."""

    def __init__(self) -> None:
        self.fd, self._write_end = os.pipe()
        os.set_blocking(self.fd, False)

    def send(self, n: int = 1) -> None:
        os.write(self._write_end, b"r" * n)

    def take(self) -> None:
        assert os.read(self.fd, 1) == b"r"  # fails with BlockingIOError when someone else took it

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._write_end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


class Workers:
    """Workers as pyfuse3 runs them; each request waits for ``handling`` when that is given."""

    def __init__(self, gate: RequestGate, pipe: Pipe, handling: trio.Event | None = None) -> None:
        self.gate, self.pipe, self.handling = gate, pipe, handling
        self.n_taken = 0
        self.n_ended = 0

    async def run(self) -> None:
        while True:
            try:
                await self.gate.wait_readable(self.pipe.fd)
            except trio.ClosedResourceError:
                self.n_ended += 1
                return
            self.pipe.take()
            self.n_taken += 1
            if self.handling is not None:
                await self.handling.wait()


async def wait_for(condition: object, limit: float = 5) -> None:
    with trio.fail_after(limit):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110  # the gate has no event for a test
            await trio.sleep(0.001)


class Polls:
    """Stands in for select.poll; it never waits, but notes how long it was to, in milliseconds."""

    def __init__(self) -> None:
        self.waits: list[int] = []
        self.fd = -1

    def __call__(self) -> Polls:
        return self

    def register(self, fd: int, events: int) -> None:
        """The one descriptor."""
        self.fd = fd

    def poll(self, milliseconds: int) -> list[tuple[int, int]]:
        """What is there."""
        self.waits.append(milliseconds)
        return [(fd, select.POLLIN) for fd in select.select([self.fd], [], [], 0)[0]]


async def test_a_worker_rests_where_others_want_no_turn(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A millisecond behind the spinning, once the service says so; not while a handler waits, and no longer than some
    milliseconds after trio had its turn."""
    polls, now = Polls(), itertools.count(100.0, 0.00001)
    monkeypatch.setattr(select, "poll", polls)
    monkeypatch.setattr(request_gate, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    gate = RequestGate(spin=1e-6)

    async def waits(*, may_rest: bool, n_slow: int = 0, late: float = 0) -> list[int]:
        nonlocal now
        gate.may_rest = may_rest
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gate.wait_readable, pipe.fd)
            await trio.testing.wait_all_tasks_blocked()
            pipe.send()
        pipe.take()
        now = itertools.count(next(now) + late, 0.00001)
        gate.n_slow = n_slow
        polls.waits.clear()
        assert not gate.spin(pipe.fd)
        gate.n_slow = 0
        return polls.waits

    assert 1 not in await waits(may_rest=False)
    assert await waits(may_rest=True) == [0, 1]
    assert await waits(may_rest=True, n_slow=1) == []
    assert 1 not in await waits(may_rest=True, late=0.1)
    assert await waits(may_rest=True) == [0, 1]


@pytest.fixture
def yields_until(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], int]:
    """How often a gate yields the processor, 10 us each, until a request that comes after so many microseconds."""
    now = arrival = 0.0
    n_yields = 0

    def give_way() -> None:
        nonlocal now, n_yields
        n_yields += 1
        now += 10e-6

    class Arrivals:
        def register(self, fd: int, events: int) -> None:
            pass

        def poll(self, milliseconds: int) -> list[tuple[int, int]]:
            nonlocal now
            now = max(now, min(arrival, now + milliseconds / 1000))
            return [(7, select.POLLIN)] if now >= arrival else []

    monkeypatch.setattr(select, "poll", Arrivals)
    monkeypatch.setattr(request_gate, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(os, "sched_yield", give_way)
    gate = RequestGate(spin=30e-6)
    gate.may_rest = True

    def yields(microseconds: int) -> int:
        nonlocal now, n_yields, arrival
        now, n_yields, arrival = 0, 0, microseconds * 1e-6 - 1e-9  # others had their turn just now
        assert gate.spin(7)
        return n_yields

    return yields


def test_a_worker_spins_for_longer_where_requests_come_a_little_later(yields_until: Callable[[int], int]) -> None:
    """Three times as long while they come soon after the spinning, and as before when one did not."""
    for microseconds, expected in (
        (80, 3),
        (80, 8),
        (85, 9),
        (500, 9),
        (80, 3),
        (500, 9),
        (20, 2),
        (500, 3),
        (80, 3),
    ):
        assert yields_until(microseconds) == expected, microseconds


def test_a_worker_does_not_spin_for_longer_in_vain(yields_until: Callable[[int], int]) -> None:
    """A client whose requests come just after the longer spinning has it tried once in a while."""
    spun = [yields_until(100) for _ in range(40)]
    assert spun[:3] == [3, 9, 3]
    assert spun.count(9) == 3
    assert [yields_until(80) for _ in range(20)][-2:] == [8, 8]


@pytest.mark.parametrize(("n_processors", "expected"), [(1, 0), (2, 2), (4, 4), (64, 5)])
def test_one_more_request_than_other_processors_is_answered_elsewhere(
    n_processors: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a thread finds the next one while the event loop copies; none on a single processor."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(n_processors)))
    assert RequestGate().max_elsewhere == expected


async def test_every_request_is_taken_once(pipe: Pipe) -> None:
    """Many requests and many workers: each request is read by exactly one worker."""
    workers = Workers(RequestGate(), pipe)
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(workers.run)
        for _ in range(50):
            pipe.send(37)
            await trio.lowlevel.checkpoint()
        await wait_for(lambda: workers.n_taken == 50 * 37)
        nursery.cancel_scope.cancel()


async def test_another_worker_takes_over_while_one_waits(pipe: Pipe) -> None:
    """As long as there is an idle worker, a request is taken whatever the others wait for."""
    go_on = trio.Event()
    workers = Workers(RequestGate(), pipe, go_on)
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(workers.run)
        for n_sent in range(1, 11):
            pipe.send()
            await wait_for(lambda n=n_sent: workers.n_taken == n)
        pipe.send()
        await trio.sleep(0.02)
        assert workers.n_taken == 10
        go_on.set()
        await wait_for(lambda: workers.n_taken == 11)
        nursery.cancel_scope.cancel()


async def test_a_cancelled_watcher_is_replaced(pipe: Pipe) -> None:
    """When the worker that watches is cancelled, a parked one watches instead."""
    workers = Workers(RequestGate(), pipe)
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def first() -> None:
            with scope:
                await workers.run()

        nursery.start_soon(first)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(workers.run)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        pipe.send()
        await wait_for(lambda: workers.n_taken == 1)
        nursery.cancel_scope.cancel()


async def test_a_cancelled_parked_worker_is_forgotten(pipe: Pipe) -> None:
    """When a parked worker is cancelled, the others go on."""
    workers = Workers(RequestGate(), pipe)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as inner:
            inner.start_soon(workers.run)
            await trio.testing.wait_all_tasks_blocked()
            inner.cancel_scope.cancel()
        pipe.send(3)
        await wait_for(lambda: workers.n_taken == 3)
        nursery.cancel_scope.cancel()


async def test_closing_ends_all_workers(pipe: Pipe) -> None:
    """notify_closing ends the watcher, the parked ones and whoever comes later."""
    gate = RequestGate()
    workers = Workers(gate, pipe)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(workers.run)
        await trio.testing.wait_all_tasks_blocked()
        gate.notify_closing(pipe.fd)
        await wait_for(lambda: workers.n_ended == 5)
        with pytest.raises(trio.ClosedResourceError):
            await gate.wait_readable(pipe.fd)


@pytest.mark.parametrize(("n_slow", "burst"), [(0, 32), (1, 4)])
async def test_others_get_their_turn(pipe: Pipe, n_slow: int, burst: int) -> None:
    """Under load a worker lets other tasks run after a burst, and sooner while a handler waits."""
    gate = RequestGate(spin=0)
    gate.n_slow = n_slow
    workers = Workers(gate, pipe)
    seen: list[int] = []

    async def observe() -> None:
        for _ in range(20):
            seen.append(workers.n_taken)
            await trio.lowlevel.checkpoint()

    pipe.send(4000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run)
        nursery.start_soon(observe)
        await wait_for(lambda: workers.n_taken == 4000)
        nursery.cancel_scope.cancel()
    steps = [after - before for before, after in itertools.pairwise(seen)]
    assert 0 < max(steps) <= 2 * burst  # trio shuffles the tasks of a batch: two bursts may follow each other


async def test_no_spinning_while_a_handler_waits(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor is left alone when the next event will come through trio."""
    yields: list[None] = []
    monkeypatch.setattr(os, "sched_yield", lambda: yields.append(None))
    gate = RequestGate(spin=0.001)
    for n_slow in (1, 0):
        gate.n_slow = n_slow
        yields.clear()
        with trio.move_on_after(0.05):
            await gate.wait_readable(pipe.fd)
        assert bool(yields) == (n_slow == 0)


async def test_no_spinning_where_others_want_the_processor(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a turn that took long, a worker sleeps at once, the next times too."""
    yields: list[None] = []

    def give_way() -> None:
        yields.append(None)
        time.sleep(0.001)

    monkeypatch.setattr(os, "sched_yield", give_way)
    gate = RequestGate(spin=0.1)
    for _ in range(3):
        with trio.move_on_after(0.02):
            await gate.wait_readable(pipe.fd)
    assert len(yields) == 1
