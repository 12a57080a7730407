"""Reads by io_uring: the right bytes, what the ring declines, cancellation, closing, and doing without.

Flushes by it: tests/unit/test_storage_flushes.py.
"""

from __future__ import annotations

import errno
import logging
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from qcowfuse.storage import inline_reads
from qcowfuse.storage import ring as ring_module
from qcowfuse.storage.file import FileStorage, open_file_storage
from qcowfuse.storage.restricted_ring import restricted_context
from qcowfuse.storage.ring import MAX_READ_BYTES, MAX_READS, Ring, load_binding
from tests.support.io_uring import FakeBinding, need_io_uring

CONTENTS = random.Random(1).randbytes(3 << 20)


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[FileStorage]:
    """A file on a disk, of which nothing is in the page cache."""
    need_io_uring()
    path = tmp_path / "image"
    path.write_bytes(CONTENTS)
    opened = await open_file_storage(str(path), writable=True, io_uring=True)
    assert opened.ring is not None
    drop(opened)
    yield opened
    await opened.aclose()


def drop(storage: FileStorage) -> None:
    os.fsync(storage.fileno())
    os.posix_fadvise(storage.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def read(storage: FileStorage, host_offset: int, n_bytes: int) -> bytes:
    """As the driver does, the second attempt included."""
    for _ in range(2):
        data = storage.try_pread(host_offset, n_bytes)
        if data is not None:
            return bytes(data)
    if host_offset & 1:
        buffer = bytearray(b"\xff" * n_bytes)
        await storage.pread_into(host_offset, memoryview(buffer))
        return bytes(buffer)
    return bytes(await storage.pread(host_offset, n_bytes))


async def test_many_reads_at_once_give_the_right_bytes(storage: FileStorage) -> None:
    """More than the ring holds, of all sizes, cold and warm, up to and past the end of the file."""
    generator = random.Random(2)

    async def one(host_offset: int, n_bytes: int) -> None:
        expected = CONTENTS[host_offset : host_offset + n_bytes].ljust(n_bytes, b"\0")
        assert await read(storage, host_offset, n_bytes) == expected

    for _ in range(3):
        drop(storage)
        async with trio.open_nursery() as nursery:
            for _ in range(3 * MAX_READS):
                n_bytes = generator.choice((1, 512, 4096, 65536, MAX_READ_BYTES, MAX_READ_BYTES + 1))
                nursery.start_soon(one, generator.randrange(len(CONTENTS) + 5000), n_bytes)


async def test_a_read_sees_what_was_written_before(storage: FileStorage) -> None:
    """Inline writes and writes in a thread, between reads by io_uring of the same bytes."""
    for number in range(50):
        data = bytes([number]) * 5000
        assert await storage.pread(123, 5000) is not None
        if not (number & 1 and storage.try_pwritev(123, [data])):
            await storage.pwritev(123, [data])
        assert await storage.pread(123, 5000) == data


async def test_a_cancelled_read_is_waited_for(storage: FileStorage) -> None:
    """It ends, the cancellation is seen at the next checkpoint, and closing finds nothing in flight."""
    ended = []

    async def one(number: int) -> None:
        data = await storage.pread(number * 4096, 4096)
        ended.append(data == CONTENTS[number * 4096 :][:4096])

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(one, number * 7)
        while storage.n_in_flight < 20 - len(ended):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert all(ended)
    with trio.CancelScope() as scope:
        scope.cancel()
        await storage.pread(0, 4096)
    assert scope.cancelled_caught
    assert len(ended) == 20
    await storage.aclose()


async def test_storages_share_a_ring_and_the_last_one_gives_it_up(tmp_path: Path) -> None:
    """As with the pool of threads; a storage that comes later has a new one, and no descriptor is left behind."""
    need_io_uring()
    path = tmp_path / "image"
    path.write_bytes(CONTENTS)
    n_descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        first = await open_file_storage(str(path), writable=False, io_uring=True)
        second = await open_file_storage(str(path), writable=False, io_uring=True)
        assert first.ring is second.ring
        await first.aclose()
        drop(second)
        assert await second.pread(4096, 4096) == CONTENTS[4096:8192]
        await second.aclose()
        del first, second
        await trio.testing.wait_all_tasks_blocked()
    assert len(os.listdir("/proc/self/fd")) <= n_descriptors


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeBinding:
    """Reads end with its ``results``, one after the other, and then as they should."""
    binding = FakeBinding()
    monkeypatch.setattr(ring_module, "load_binding", lambda: binding)
    return binding


@pytest.mark.parametrize("result", [-5, -11, -22, 0, 4095], ids=["EIO", "EAGAIN", "EINVAL", "nothing", "short"])
async def test_what_the_ring_can_not_read_a_thread_reads(
    fake: FakeBinding, storage: FileStorage, result: int
) -> None:
    """Errors and short reads of the ring's cost a second read, which has the last word."""
    fake.results.append(result)
    assert await storage.pread(8192, 4096) == CONTENTS[8192:12288]
    assert not fake.results
    assert storage.counters.reads == 1


async def test_a_ring_that_takes_nothing_is_tried_again(fake: FakeBinding, storage: FileStorage) -> None:
    """What was submitted ends when the kernel takes it at last; meanwhile threads read."""
    (context,) = fake.contexts
    context.n_failures = 3
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.pread, 0, 4096)
        await trio.testing.wait_all_tasks_blocked()
        assert await storage.pread(8192, 4096) == CONTENTS[8192:12288]
        assert len(context.submitted) == 1
    assert not context.submitted
    assert not context.n_failures
    assert await storage.pread(4096, 4096) == CONTENTS[4096:8192]


async def test_without_io_uring_threads_read_and_the_log_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However many files are opened."""

    def refuse() -> None:
        raise ImportError("io_uring_setup failed:\n  not permitted. Docker:\n use it")

    monkeypatch.setattr(ring_module, "load_binding", refuse)
    caplog.set_level(logging.INFO)
    path = tmp_path / "image"
    path.write_bytes(CONTENTS)
    for _ in range(2):
        opened = await open_file_storage(str(path), writable=False, io_uring=True)
        drop(opened)
        assert await opened.pread(4096, 4096) == CONTENTS[4096:8192]
        await opened.aclose()
    (record,) = caplog.records
    assert record.message.endswith("no io_uring: io_uring_setup failed: not permitted")


async def test_an_unknown_binding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caio that is not what it was counts as none."""
    monkeypatch.setattr(ring_module, "load_binding", lambda: SimpleNamespace(Context=lambda: None))
    with pytest.raises(ImportError, match="caio"):
        Ring()


async def test_a_storage_in_memory_needs_no_ring(tmp_path: Path) -> None:
    """There, no read ever waits."""
    path = Path("/dev/shm") / f"qcowfuse-ring-{os.getpid()}"
    path.write_bytes(b"x")
    try:
        opened = await open_file_storage(str(path), writable=False, io_uring=True)
        assert opened.ring is None
        await opened.aclose()
    finally:
        path.unlink()


async def test_a_refused_read_is_read_by_the_ring(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is asked each time."""
    asked = []

    def refuse(fd: int, buffers: object, offset: int, flags: int) -> int:
        asked.append(offset)
        raise BlockingIOError

    monkeypatch.setattr(inline_reads, "sys_preadv", refuse)
    assert storage.try_pread(4096, 4096) is None
    assert storage.try_pread(4096, 4096) is None
    assert storage.try_pread(8192, 4096) is None
    assert asked == [4096, 4096, 8192]
    monkeypatch.undo()
    assert await read(storage, 8192, 4096) == CONTENTS[8192:12288]


async def test_the_ring_only_reads_and_flushes(tmp_path: Path) -> None:
    """A write that somebody puts into the ring is refused by the kernel."""
    need_io_uring()
    binding = load_binding()
    context = restricted_context(binding, 4)
    file = tmp_path / "file"
    file.write_bytes(b"data")
    results: list[int] = []
    with file.open("r+b") as opened:
        write = binding.Operation.write(b"evil", opened.fileno(), 0)
        flush = binding.Operation.fdsync(opened.fileno())
        for operation in (write, binding.Operation.read(4, opened.fileno(), 0), flush):
            n_before = len(results)
            operation.set_callback(results.append)
            context.submit(operation)
            context.flush()
            with trio.fail_after(5):
                while len(results) == n_before:
                    context.process_events()
                    await trio.sleep(0.001)
    assert results == [-errno.EACCES, 4, 0]
    assert file.read_bytes() == b"data"
