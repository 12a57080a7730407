"""Writes that a thread makes and answers: the bytes, the memory they lie in, failures, durability, and the end."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from qcowfuse.buffer import Buffer
from qcowfuse.driver.image import LARGE_WRITE, never
from qcowfuse.driver.pending import PendingPlace, PendingWrite
from qcowfuse.fuse.libfuse.request_memory import RequestMemory
from qcowfuse.storage.base import OnEnd, OnWritten
from qcowfuse.storage.file import FileStorage, open_file_storage
from tests.export.test_at_once import FILE, Kernel, read_request, write_request
from tests.support.memory_image import MemoryImage

SIZE = 2 << 20


class HeldPlace:
    """Writes into ``data`` when :meth:`release` is called, in a thread; or fails with ``failure``."""

    def __init__(self, data: bytearray) -> None:
        self.data = data
        self.failure: Exception | None = None
        self.takes = True
        self.held: list[tuple[int, Buffer, OnWritten, OnEnd]] = []

    def start_pwrite(self, host_offset: int, data: Buffer, on_written: OnWritten, on_end: OnEnd) -> bool:
        if self.takes:
            self.held.append((host_offset, data, on_written, on_end))
        return self.takes

    def answer(self) -> OnEnd:
        """The thread has done its part; what the trio thread will hear of by calling what is returned."""
        off, data, on_written, on_end = self.held.pop(0)

        def write() -> None:
            self.data[off : off + len(data)] = data
            on_written()

        if self.failure is None:
            thread = threading.Thread(target=write)
            thread.start()
            thread.join()
        return on_end

    def release(self) -> None:
        self.answer()(self.failure)


class ApartImage(MemoryImage):
    """Its writes go to a :class:`HeldPlace`, unless ``is_alone`` says so."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.place = HeldPlace(self.data)

    def start_write(
        self, guest_offset: int, data: Buffer, is_alone: Callable[[], bool] = never, /
    ) -> PendingWrite | None:
        if is_alone():
            return super().start_write(guest_offset, data)
        rest = partial(self.write_later, guest_offset)
        return PendingPlace(self.guard, rest, data, place=self.place, host_offset=guest_offset)


@pytest.fixture
def image() -> ApartImage:
    return ApartImage()


@pytest.fixture
def lends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small writes are lent, too: messages of this socket can't be as long as those of the kernel."""
    monkeypatch.setattr("qcowfuse.fuse.libfuse.direct_requests.COPIED_BYTES", 0)


@pytest.fixture(params=["copied", "lent"])
def kernel(image: ApartImage, request: pytest.FixtureRequest) -> Iterator[Kernel]:
    if request.param == "lent":
        request.getfixturevalue("lends")
    kernel = Kernel(image)
    kernel.gate.n_slow = 1  # somebody waits
    yield kernel
    kernel.close()


def busy_kernel(image: ApartImage) -> Kernel:
    """Somebody always waits, and any number of threads may help."""
    kernel = Kernel(image, burst=100)
    kernel.gate.is_idle = lambda: False  # type: ignore[method-assign]
    return kernel


def written(unique: int, n_bytes: int) -> tuple[int, int, bytes]:
    return unique, 0, struct.pack("<II", n_bytes, 0)


def test_a_thread_writes_and_answers(kernel: Kernel, image: ApartImage) -> None:
    """The request is not handed on, and the requests after it do not touch its bytes. It is in flight until the
    trio thread hears of its end."""
    place, first, second = image.place, os.urandom(5000), os.urandom(6000)
    kernel.gate.max_elsewhere = 2
    assert kernel.receive(write_request(0, first, unique=3)) == -errno.EINTR
    assert kernel.receive(write_request(8192, second, unique=4)) == -errno.EINTR
    assert kernel.receive(read_request(0, 512, unique=5)) == -errno.EINTR
    assert kernel.reply()[0] == 5
    assert not kernel.has_reply()
    assert len(kernel.gate.elsewhere) == image.guard.epochs.n_in_flight == 2
    end = place.answer()
    assert kernel.reply() == written(3, 5000)
    assert (len(kernel.gate.elsewhere), image.guard.epochs.n_in_flight) == (1, 2)
    end(None)
    assert image.guard.epochs.n_in_flight == 1
    place.release()
    assert kernel.reply() == written(4, 6000)
    assert not kernel.has_reply()
    assert image.data[:5000] == first
    assert image.data[8192:14192] == second
    assert not kernel.gate.elsewhere
    assert not image.guard.epochs.n_in_flight


@pytest.mark.usefixtures("lends")
def test_memory_is_used_again(image: ApartImage) -> None:
    """Two blocks take turns, however many writes there are."""
    kernel = busy_kernel(image)
    seen = set()
    for number in range(20):
        data = os.urandom(4096)
        kernel.receive(write_request(number * 4096, data))
        seen.add(kernel.fuse_buf.mem)
        image.place.release()
        kernel.reply()
        assert image.data[number * 4096 : (number + 1) * 4096] == data
    assert len(seen) == 2
    kernel.close()


def test_a_failure_is_answered_by_its_number(
    kernel: Kernel, image: ApartImage, caplog: pytest.LogCaptureFixture
) -> None:
    """One error, in the log as well; nothing stays in flight, and the memory is used again."""
    place, before = image.place, kernel.fuse_buf.mem
    place.failure = OSError(errno.ENOSPC, "odd")
    kernel.receive(write_request(0, b"x" * 4096, unique=9))
    place.release()
    assert kernel.reply() == (9, -errno.ENOSPC, b"")
    assert not kernel.has_reply()
    assert len(kernel.gate.elsewhere) == image.guard.epochs.n_in_flight == 0
    assert "write failed" in caplog.text
    kernel.receive(write_request(0, b"x" * 4096, unique=9))
    assert kernel.fuse_buf.mem == before  # a second block came and went, if it was lent
    place.release()


async def test_what_no_thread_takes_is_handed_on(kernel: Kernel, image: ApartImage) -> None:
    """As any write that waits: with its bytes where libfuse looks for them, and its handler goes on with it."""
    image.place.takes = False
    request = write_request(4096, b"y" * 4096)
    assert kernel.receive(request) == len(request)
    assert kernel.handed_on(len(request)) == request
    assert kernel.operations.started.is_kept
    assert not kernel.gate.elsewhere
    assert await kernel.operations.write(FILE, 4096, b"y" * 4096) == 4096
    assert image.data[4096:8192] == b"y" * 4096
    assert not image.guard.epochs.n_in_flight


@pytest.mark.usefixtures("lends")
def test_without_memory_it_is_handed_on(image: ApartImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where malloc has none for the next request."""
    kernel = busy_kernel(image)
    monkeypatch.setattr(RequestMemory, "lend", lambda *_: None)
    request = write_request(4096, b"y" * 4096)
    assert kernel.receive(request) == len(request)
    assert kernel.handed_on(len(request)) == request
    assert kernel.operations.started.is_kept
    assert not kernel.gate.elsewhere


def test_no_more_at_a_time_than_processors(kernel: Kernel, image: ApartImage) -> None:
    """While all that may help are at work, the next write is made on the spot."""
    kernel.gate.max_elsewhere = 2
    kernel.receive(*(write_request(number * 512, b"x" * 512, unique=number) for number in (1, 2, 3)))
    assert kernel.reply() == written(3, 512)
    assert not kernel.has_reply()
    image.place.release()
    image.place.release()
    assert [kernel.reply()[0] for _ in range(2)] == [1, 2]


def large_write(n_bytes: int, *, flags: int) -> bytes:
    """The head of a large write, with the flags of fuse_write_in."""
    request = bytearray(write_request(0, bytes(n_bytes)))
    struct.pack_into("<I", request, 60, flags)
    return bytes(request)


@pytest.mark.parametrize(("flags", "is_alone"), [(0, False), (1, True), (2, False), (3, True)])
def test_what_the_page_cache_sends_is_waited_for_by_nobody(
    image: ApartImage, flags: int, is_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is made on the spot: a thread would only take a processor from the client that fills the cache."""
    monkeypatch.setattr("qcowfuse.fuse.libfuse.direct_requests.LARGE_WRITE", 4096)
    kernel = Kernel(image)
    kernel.gate.n_slow = 1
    kernel.receive(large_write(4096, flags=flags))
    assert len(image.place.held) == (not is_alone)
    kernel.receive(large_write(4095, flags=flags))
    assert len(image.place.held) == 1 + (not is_alone), "a small one is up to the image"
    while image.place.held:
        image.place.release()
    kernel.close()


async def test_a_close_behind_the_answer_is_flushed(kernel: Kernel, image: ApartImage) -> None:
    """The client hears of the end of its write before the trio thread does, and closes: that is durable. The fsync
    of somebody else while the write went on is not enough."""
    operations, place = kernel.operations, image.place
    opened = await operations.open(FILE, os.O_RDWR, None)  # type: ignore[arg-type]
    kernel.receive(write_request(0, b"x" * 4096))
    await operations.fsync(opened.fh, False)
    end = place.answer()
    assert image.n_flushes == 1
    assert not operations.fsyncs.start_flush(opened.fh)
    await operations.flush(opened.fh)
    assert image.n_flushes == 2
    end(None)
    await operations.flush(opened.fh)
    assert image.n_flushes == 3
    await operations.flush(opened.fh)
    assert image.n_flushes == 3, "nothing was written since"


async def test_a_write_shows_in_the_times(kernel: Kernel, image: ApartImage) -> None:
    """Before its client can look."""
    before = kernel.operations.file_attributes().st_mtime_ns
    kernel.receive(write_request(0, b"x" * 4096))
    image.place.answer()
    assert kernel.operations.file_attributes().st_mtime_ns > before


async def test_the_end_waits(kernel: Kernel, image: ApartImage) -> None:
    """Until the last thread has answered; then the memory is given up."""
    kernel.receive(write_request(0, b"x" * 4096, unique=1))
    has_ended = False

    async def wait() -> None:
        nonlocal has_ended
        await kernel.at_once.wait_until_ended()
        has_ended = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not has_ended
        image.place.release()
    assert has_ended


@pytest.mark.usefixtures("lends")
def test_lent_memory_is_bounded(image: ApartImage) -> None:
    """What is kept for later is four blocks; the others are freed, and no block is in two places."""
    kernel = busy_kernel(image)
    for number in range(12):
        kernel.receive(write_request(number * 512, bytes([number]) * 512))
    assert len({id(data) for _, data, _, _ in image.place.held}) == 12
    while image.place.held:
        image.place.release()
    for number in range(12):
        assert image.data[number * 512 : (number + 1) * 512] == bytes([number]) * 512
    memory = kernel.at_once.memory
    assert memory is not None
    assert memory.n_spare == 4
    memory.release()
    assert memory.n_spare == 0
    kernel.close()


@pytest.fixture
async def storage(tmp_path: Path) -> FileStorage:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    return await open_file_storage(str(path), writable=True)


class Collector:
    """Hears of one write."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.ended = trio.Event()

    def written(self) -> None:
        self.thread = threading.current_thread()

    def end(self, error: Exception | None) -> None:
        self.error = error
        self.ended.set()


@pytest.mark.parametrize(("off", "n_bytes"), [(0, 1), (5, 4096), (3, LARGE_WRITE), (SIZE - 512, 512), (7, 0)])
async def test_a_file_is_written(storage: FileStorage, off: int, n_bytes: int) -> None:
    """In another thread; counted once; a flush that comes meanwhile does not count it as durable."""
    data = os.urandom(n_bytes)
    heard = Collector()
    assert storage.start_pwrite(off, memoryview(data), heard.written, heard.end)
    assert storage.n_in_flight == 1
    assert storage.durability.n_changes(in_flight=storage.n_in_flight > 0) < 0
    await heard.ended.wait()
    assert heard.error is None
    assert heard.thread is not threading.current_thread()
    assert bytes(await storage.pread(off, n_bytes)) == data
    assert (storage.counters.writes, storage.counters.written_bytes) == (1, n_bytes)
    assert storage.n_in_flight == 0
    await storage.aclose()


async def test_a_file_never_grows_by_it(storage: FileStorage, tmp_path: Path) -> None:
    """Its length is known without asking for it: what changes that is awaited. So is what can't be written at all."""
    heard = Collector()
    assert not storage.start_pwrite(SIZE - 511, b"x" * 512, heard.written, heard.end)
    assert storage.counters.writes == 0
    reader = await open_file_storage(str(tmp_path / "file"), writable=False)
    assert not reader.start_pwrite(0, b"x", heard.written, heard.end)
    await reader.aclose()
    await storage.aclose()
    assert not storage.start_pwrite(0, b"x", heard.written, heard.end)


async def test_a_failed_write_says_why(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trio thread hears of it, and nothing stays in flight."""
    heard = Collector()

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "bad")

    monkeypatch.setattr(os, "pwritev", fail)
    assert storage.start_pwrite(0, b"x" * 512, heard.written, heard.end)
    await heard.ended.wait()
    assert isinstance(heard.error, OSError)
    assert heard.error.errno == errno.EIO
    assert heard.thread is None
    assert storage.n_in_flight == 0
    await storage.aclose()


async def test_closing_waits_for_it(storage: FileStorage, tmp_path: Path) -> None:
    """The descriptor is open until it has ended."""
    may_go = threading.Event()
    heard = Collector()

    def write() -> None:
        may_go.wait(10)
        heard.written()

    assert storage.start_pwrite(0, b"x" * 4096, write, heard.end)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.aclose)
        await trio.testing.wait_all_tasks_blocked()
        assert storage.fileno() >= 0
        may_go.set()
    assert heard.thread is not None
    assert storage.fileno() == -1
    assert (tmp_path / "file").read_bytes()[:4097] == b"x" * 4096 + b"\0"
