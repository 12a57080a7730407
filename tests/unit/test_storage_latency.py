"""Delay models and the storage that applies them."""

from __future__ import annotations

import time

import pytest
import trio
from trio.testing import MockClock

from qcowfuse.storage.measuring.delay_model import DelayModel
from qcowfuse.storage.measuring.latency import LatencyStorage, TimerSleep
from tests.support.memory_storage import MemoryStorage

KIB = 1024


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1ms", 0.001), ("250us", 0.00025), ("0.5s", 0.5), (" 2 MS ", 0.002), (".5ms", 0.0005), ("0us", 0.0)],
)
def test_parse_constant(text: str, seconds: float) -> None:
    """A time with its unit."""
    model = DelayModel.parse(text)
    assert not model.is_disk
    assert model.delay(0, 1 << 40, 1 << 20) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "1", "ms", "-1ms", "1 hour", "1e3us", "disc", "nan s", "61s", "١ms"])
def test_parse_refuses(text: str) -> None:
    """Anything else is a ValueError that repeats the text."""
    with pytest.raises(ValueError, match="bad delay") as caught:
        DelayModel.parse(text)
    assert repr(text) in str(caught.value)


def test_disk_geometry() -> None:
    """1 us per KiB moved and per KiB of distance, in either direction."""
    model = DelayModel.parse("disk")
    assert model.is_disk
    assert model.delay(0, 0, 4 * KIB) == pytest.approx(4e-6)
    assert model.delay(100 * KIB, 150 * KIB, 4 * KIB) == pytest.approx(54e-6)
    assert model.delay(150 * KIB, 100 * KIB, 4 * KIB) == pytest.approx(54e-6)
    assert model.delay(7, 7, 0) == 0


async def test_constant_delays_run_side_by_side(autojump_clock: MockClock) -> None:
    """Ten reads of 100 ms at once take 100 ms; in a row, a second; a flush costs one."""
    storage = LatencyStorage(MemoryStorage(b"abc"), DelayModel.parse("100ms"), sleep=trio.sleep)
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(storage.pread, 0, 3)
    assert trio.current_time() - start == pytest.approx(0.1)
    for _ in range(10):
        assert await storage.pread(0, 3) == b"abc"
    await storage.flush()
    assert trio.current_time() - start == pytest.approx(1.2)
    assert (storage.counters.reads, storage.counters.flushes) == (20, 1)


async def test_the_disk_has_one_spindle(autojump_clock: MockClock) -> None:
    """Accesses at once take the sum of their times, in the order of asking, each from the end of the one before."""
    storage = LatencyStorage(MemoryStorage(bytes(2 << 20)), DelayModel.parse("disk"), sleep=trio.sleep)
    start = trio.current_time()
    ends: list[tuple[int, float]] = []

    async def one(host_offset: int) -> None:
        await storage.pread(host_offset, 64 * KIB)
        ends.append((host_offset, trio.current_time() - start))

    async with trio.open_nursery() as nursery:
        for host_offset in (0, 64 * KIB, 0):
            nursery.start_soon(one, host_offset)
            await trio.testing.wait_all_tasks_blocked()
    assert [host_offset for host_offset, _ in ends] == [0, 64 * KIB, 0]
    assert [end for _, end in ends] == pytest.approx([64e-6, 128e-6, (128 + 64 + 128) * 1e-6])
    await storage.flush()
    assert trio.current_time() - start == pytest.approx(320e-6)
    await storage.pwritev(64 * KIB, [bytes(KIB), bytes(KIB)])
    assert trio.current_time() - start == pytest.approx(322e-6)


@pytest.mark.parametrize("suspend", [False, True])
async def test_all_calls_reach_the_inner_storage(autojump_clock: MockClock, suspend: bool) -> None:
    """Reads, writes, zeroes, holes, lengths; the try calls decline."""
    inner = MemoryStorage(bytes(100), suspend=suspend)
    storage = LatencyStorage(inner, DelayModel.parse("1ms"), sleep=trio.sleep)
    assert storage.try_pwritev(0, [b"x"]) is False
    assert storage.try_pread(0, 1) is None
    assert storage.try_pread_into(0, memoryview(bytearray(1))) is False
    await storage.pwritev(10, [b"abc", b"def"])
    await storage.write_zeroes(11, 1)
    await storage.punch_hole(13, 1)
    await storage.truncate(15)
    buffer = bytearray(b"\xff" * 6)
    await storage.pread_into(10, memoryview(buffer))
    assert bytes(buffer) == b"a\0c\0e\0"
    assert storage.size() == 15
    assert inner.data == bytes(10) + b"a\0c\0e"
    await storage.aclose()
    assert inner.closed


async def test_an_access_waits_before_it_acts(autojump_clock: MockClock) -> None:
    """A write that is cancelled during its delay has not been made."""
    inner = MemoryStorage(b"old")
    storage = LatencyStorage(inner, DelayModel.parse("1s"), sleep=trio.sleep)
    with trio.move_on_after(0.5):
        await storage.pwritev(0, [b"new"])
    assert inner.data == b"old"
    await storage.pwritev(0, [b"new"])
    assert inner.data == b"new"


async def test_real_short_delays() -> None:
    """300 us last at least that, and far from a whole millisecond (the best of many, for a busy machine)."""
    sleep = TimerSleep()
    durations = []
    for _ in range(50):
        start = time.perf_counter()
        await sleep(300e-6)
        durations.append(time.perf_counter() - start)
    sleep.close()
    assert min(durations) >= 300e-6
    assert min(durations) < 900e-6


async def test_sleeps_at_once_and_cancelled() -> None:
    """Many sleepers wake each at their time; a cancelled one leaves a timer that serves the next."""
    sleep = TimerSleep()
    woken = []

    async def one(seconds: float) -> None:
        await sleep(seconds)
        woken.append(seconds)

    async with trio.open_nursery() as nursery:
        for seconds in (0.09, 0.03, 0.06):
            nursery.start_soon(one, seconds)
    assert woken == [0.03, 0.06, 0.09]
    with trio.move_on_after(0.005) as scope:
        await sleep(30)
    assert scope.cancelled_caught
    start = time.perf_counter()
    await sleep(0.02)
    assert 0.02 <= time.perf_counter() - start < 10
    sleep.close()
