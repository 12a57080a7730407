"""Reads that a thread answers: the bytes, failures, how many at a time, and the end."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from qcowfuse.buffer import Buffer
from qcowfuse.driver.image import LARGE_READ, never
from qcowfuse.driver.pending import PendingRead, PendingSource
from qcowfuse.storage.base import Deliver, OnEnd
from qcowfuse.storage.file import FileStorage, open_file_storage
from tests.export.test_at_once import Kernel, read_request
from tests.support.memory_image import MemoryImage


class HeldSource:
    """Delivers when :meth:`release` is called, in a thread as a storage does; or fails with ``failure``."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.failure: Exception | None = None
        self.takes = True
        self.held: list[tuple[int, int, Deliver, OnEnd]] = []

    async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
        return self.data[host_offset : host_offset + n_bytes]

    def start_delivery(self, host_offset: int, n_bytes: int, deliver: Deliver, on_end: OnEnd) -> bool:
        if self.takes:
            self.held.append((host_offset, n_bytes, deliver, on_end))
        return self.takes

    def release(self) -> None:
        off, n_bytes, deliver, on_end = self.held.pop(0)
        if self.failure is None:
            thread = threading.Thread(target=deliver, args=(self.data[off : off + n_bytes],))
            thread.start()
            thread.join()
        on_end(self.failure)


class ApartImage(MemoryImage):
    """Its reads lie in a :class:`HeldSource`, unless ``is_alone`` says so."""

    def __init__(self, source: HeldSource) -> None:
        super().__init__(len(source.data))
        self.data[:] = source.data
        self.source = source

    def start_read(
        self, guest_offset: int, n_bytes: int, is_alone: Callable[[], bool] = never, /
    ) -> Buffer | PendingRead:
        if is_alone():
            return super().start_read(guest_offset, n_bytes)
        return PendingSource(self.guard, self.source, guest_offset, n_bytes)


@pytest.fixture
def image() -> ApartImage:
    return ApartImage(HeldSource(os.urandom(1 << 20)))


@pytest.fixture
def kernel(image: ApartImage) -> Iterator[Kernel]:
    kernel = Kernel(image)
    kernel.gate.n_slow = 1  # somebody waits
    yield kernel
    kernel.close()


def test_a_thread_answers(kernel: Kernel, image: ApartImage) -> None:
    """The request is not handed on; the reply is whole; the operation is in flight until the end."""
    source = image.source
    assert kernel.receive(read_request(4096, 70000, unique=8)) == -errno.EINTR
    assert not kernel.has_reply()
    assert len(kernel.gate.elsewhere) == image.guard.epochs.n_in_flight == 1
    source.release()
    assert kernel.reply() == (8, 0, source.data[4096:74096])
    assert not kernel.has_reply()
    assert len(kernel.gate.elsewhere) == image.guard.epochs.n_in_flight == 0


def test_a_failure_is_answered_by_its_number(
    kernel: Kernel, image: ApartImage, caplog: pytest.LogCaptureFixture
) -> None:
    """One error, in the log as well; nothing stays in flight."""
    source = image.source
    kernel.receive(read_request(0, 4096, unique=9))
    source.failure = OSError(errno.ENOSPC, "odd")
    source.release()
    assert kernel.reply() == (9, -errno.ENOSPC, b"")
    assert not kernel.has_reply()
    assert len(kernel.gate.elsewhere) == image.guard.epochs.n_in_flight == 0
    assert "read failed" in caplog.text


def test_what_no_thread_takes_is_handed_on(kernel: Kernel, image: ApartImage) -> None:
    """As any read that waits: its handler goes on with it."""
    source = image.source
    source.takes = False
    request = read_request(0, 4096)
    assert kernel.receive(request) == len(request)
    assert kernel.operations.started.is_kept
    assert not kernel.gate.elsewhere
    assert trio.run(kernel.operations.read, 0, 0, 4096) == source.data[:4096]


def test_no_more_at_a_time_than_processors(kernel: Kernel, image: ApartImage) -> None:
    """While all that may help are at work, the next read is for the spot."""
    source = image.source
    kernel.gate.max_elsewhere = 2
    kernel.receive(*(read_request(0, 4096, unique=number) for number in (1, 2, 3)))
    assert kernel.reply()[0] == 3
    assert not kernel.has_reply()
    source.release()
    source.release()
    assert [kernel.reply()[0] for _ in range(2)] == [1, 2]


async def test_the_end_waits(kernel: Kernel, image: ApartImage) -> None:
    """Until the last thread has answered, cancelled or not."""
    source = image.source
    threads = kernel.at_once.threads
    await threads.wait_until_ended()
    kernel.gate.max_elsewhere = 2
    kernel.receive(read_request(0, 4096, unique=1), read_request(0, 4096, unique=2))
    assert len(source.held) == 2
    has_ended = False
    scope = trio.CancelScope()

    async def wait() -> None:
        nonlocal has_ended
        with scope:
            await threads.wait_until_ended()
            has_ended = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        source.release()
        await trio.testing.wait_all_tasks_blocked()
        assert not has_ended
        source.release()
    assert has_ended


async def test_a_client_that_has_gone_is_no_failure(
    kernel: Kernel, image: ApartImage, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection may have ended before the thread answers."""
    source = image.source
    kernel.receive(read_request(0, 4096))
    kernel.close()
    source.release()
    assert not kernel.gate.elsewhere


@pytest.fixture
async def storage(tmp_path: Path) -> FileStorage:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 8192)
    return await open_file_storage(str(path), writable=False)


class Collector:
    """Takes one delivery."""

    def __init__(self) -> None:
        self.data = b""
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.ended = trio.Event()

    def deliver(self, data: Buffer) -> None:
        self.data, self.thread = bytes(data), threading.current_thread()

    def end(self, error: Exception | None) -> None:
        self.error = error
        self.ended.set()


@pytest.mark.parametrize(
    ("off", "n_bytes"), [(0, 1), (5, 4096), (256, 128 << 10), (3, LARGE_READ), (7, 1 << 20), ((2 << 20) - 9, 200_000)]
)
async def test_a_file_delivers(storage: FileStorage, off: int, n_bytes: int) -> None:
    """In another thread, zeroes past the end, counted once, and again with the memory that was used before."""
    expected = (bytes(range(256)) * 8192)[off : off + n_bytes].ljust(n_bytes, b"\0")
    for number in (1, 2):
        got = Collector()
        assert storage.start_delivery(off, n_bytes, got.deliver, got.end)
        assert storage.n_in_flight == 1
        await got.ended.wait()
        assert (got.data, got.error) == (expected, None)
        assert got.thread is not threading.current_thread()
        assert storage.counters.reads == number
        assert storage.counters.read_bytes == number * n_bytes
    await storage.aclose()


async def test_deliveries_side_by_side_do_not_mix(storage: FileStorage) -> None:
    """Each has memory of its own."""
    collectors = [Collector() for _ in range(20)]
    for number, got in enumerate(collectors):
        assert storage.start_delivery(number * 50_000, 300_001 + number, got.deliver, got.end)
    contents = bytes(range(256)) * 8192
    for number, got in enumerate(collectors):
        await got.ended.wait()
        assert got.data == contents[number * 50_000 :][: 300_001 + number]
    await storage.aclose()


async def test_a_failed_delivery_says_why(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trio thread hears of it, nothing is delivered, and nothing stays in flight."""
    got = Collector()

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "bad")

    monkeypatch.setattr("qcowfuse.storage.blocking.sys_preadv", fail)
    assert storage.start_delivery(0, LARGE_READ, got.deliver, got.end)
    await got.ended.wait()
    assert isinstance(got.error, OSError)
    assert got.error.errno == errno.EIO
    assert got.thread is None
    assert storage.n_in_flight == 0
    await storage.aclose()


async def test_closing_waits_for_deliveries(storage: FileStorage) -> None:
    """None begins after that, and the descriptor is open until the last one has ended."""
    may_go = threading.Event()
    got = Collector()

    def deliver(data: Buffer) -> None:
        may_go.wait(10)
        got.deliver(data)

    assert storage.start_delivery(0, 4096, deliver, got.end)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.aclose)
        await trio.testing.wait_all_tasks_blocked()
        assert not storage.start_delivery(0, 4096, got.deliver, got.end)
        assert storage.fileno() >= 0
        may_go.set()
    assert got.data == bytes(range(256)) * 16
    assert storage.fileno() == -1
