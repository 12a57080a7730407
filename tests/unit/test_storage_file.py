"""FileStorage on real files: short reads, growth, splitting, failures, closing."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qcowfuse.storage import blocking, file_systems, inline_reads, space, syscalls
from qcowfuse.storage import file as file_module
from qcowfuse.storage.blocking import IOV_MAX
from qcowfuse.storage.file import FileStorage, open_file_storage
from qcowfuse.storage.workers import WorkerPool
from tests.support.container import need_loop_devices

SHM = Path("/dev/shm")


@pytest.fixture(params=["disk", "tmpfs"])
def file_path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A path for a new file: on the disk of the temporary folder, and on a tmpfs."""
    if request.param == "disk":
        yield str(tmp_path / "image")
        return
    if not SHM.is_dir():
        pytest.skip("no /dev/shm here")
    path = SHM / f"qcowfuse-test-{os.getpid()}-{threading.get_ident()}"
    yield str(path)
    path.unlink(missing_ok=True)


@pytest.fixture
async def storage(file_path: str) -> AsyncIterator[FileStorage]:
    """An empty writable storage on both kinds of file system."""
    Path(file_path).touch()
    opened = await open_file_storage(file_path, writable=True)
    yield opened
    await opened.aclose()


@pytest.fixture
async def nowait_storage(file_path: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FileStorage]:
    """A storage that takes its file system for one where a read can decline to wait, whatever it is."""
    monkeypatch.setattr(file_systems, "MEMORY_FILE_SYSTEMS", frozenset())
    monkeypatch.setattr(file_systems, "takes_nowait", lambda fd: True)
    Path(file_path).touch()
    opened = await open_file_storage(file_path, writable=True)
    yield opened
    await opened.aclose()


async def read(storage: FileStorage, host_offset: int, n_bytes: int) -> bytes:
    """As a caller does: inline first."""
    data = storage.try_pread(host_offset, n_bytes)
    return bytes(await storage.pread(host_offset, n_bytes) if data is None else data)


async def write(storage: FileStorage, host_offset: int, *buffers: bytes) -> None:
    """As a caller does: inline first."""
    if not storage.try_pwritev(host_offset, buffers):
        await storage.pwritev(host_offset, buffers)


async def test_reads_past_the_end_give_zeroes(storage: FileStorage) -> None:
    """A read over the end, and one wholly behind it, are zero-filled, inline and in a thread."""
    await write(storage, 0, b"x" * 1000)
    assert await read(storage, 900, 300) == b"x" * 100 + bytes(200)
    assert await storage.pread(900, 300) == b"x" * 100 + bytes(200)
    assert await read(storage, 1 << 40, 4096) == bytes(4096)
    assert await storage.pread(1 << 40, 4096) == bytes(4096)
    assert storage.size() == 1000


async def test_pread_into_zero_fills_a_dirty_buffer(storage: FileStorage) -> None:
    """What the buffer held before is gone past the end of the file, inline and in a thread."""
    await write(storage, 0, b"y" * 10)
    buffer = bytearray(b"\xff" * 64)
    if not storage.try_pread_into(4, memoryview(buffer)):
        await storage.pread_into(4, memoryview(buffer))
    assert buffer == b"y" * 6 + bytes(58)
    buffer = bytearray(b"\xff" * 64)
    await storage.pread_into(4, memoryview(buffer))
    assert buffer == b"y" * 6 + bytes(58)


async def test_a_partly_cached_read_is_never_short(tmp_path: Path) -> None:
    """With every other part of a file dropped from the page cache, each read gives the right bytes."""
    path = tmp_path / "image"
    contents = os.urandom(4 << 20)
    path.write_bytes(contents)
    storage = await open_file_storage(str(path), writable=False)
    try:
        fd = storage.fileno()
        os.fsync(fd)
        for offset in range(0, len(contents), 128 << 10):
            os.posix_fadvise(fd, offset, 64 << 10, os.POSIX_FADV_DONTNEED)
        for offset in range(0, len(contents), 256 << 10):
            assert await read(storage, offset + 60_000, 200_000) == contents[offset + 60_000 :][:200_000].ljust(
                200_000, b"\0"
            )
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(len(contents))
        if not storage.try_pread_into(0, memoryview(buffer)):
            await storage.pread_into(0, memoryview(buffer))
        assert buffer == contents
    finally:
        await storage.aclose()


async def test_a_short_nowait_read_inside_the_file_declines(
    nowait_storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short answer before the end of the file means a thread; the same at the end is zero-filled."""
    await write(nowait_storage, 0, b"z" * 8192)
    monkeypatch.setattr(inline_reads, "sys_preadv", lambda fd, buffers, offset, flags: 100)
    assert nowait_storage.try_pread(0, 4096) is None
    assert nowait_storage.try_pread_into(0, memoryview(bytearray(4096))) is False
    assert nowait_storage.counters.reads == 0
    assert nowait_storage.try_pread(8092, 4096) is not None


async def test_a_file_system_that_refuses_nowait_later_is_not_asked_again(
    nowait_storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EOPNOTSUPP on a read switches inline reads off; EIO passes through."""

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(inline_reads, "sys_preadv", refuse)
    number = errno.EIO
    with pytest.raises(OSError, match="error") as caught:
        nowait_storage.try_pread(0, 4096)
    assert caught.value.errno == errno.EIO
    number = errno.EOPNOTSUPP
    assert nowait_storage.try_pread(0, 4096) is None
    monkeypatch.undo()
    assert nowait_storage.try_pread(0, 1) is None
    assert nowait_storage.try_pread_into(0, memoryview(bytearray(1))) is False


async def test_writes_past_the_end_grow(storage: FileStorage, file_path: str) -> None:
    """Inline and in a thread; the size in memory is the file's; an empty write grows nothing."""
    await write(storage, 5000, b"abc")
    assert storage.size() == os.stat(file_path).st_size == 5003
    await storage.pwritev(6000, [b"d", memoryview(b"ef"), bytearray(b"g")])
    assert storage.size() == os.stat(file_path).st_size == 6004
    await write(storage, 9000, b"")
    await storage.pwritev(9000, [])
    assert storage.size() == os.stat(file_path).st_size == 6004
    assert await read(storage, 5998, 6) == b"\0\0defg"


@pytest.mark.parametrize("n_buffers", [IOV_MAX, IOV_MAX + 1, 3 * IOV_MAX + 5])
async def test_any_number_of_buffers(storage: FileStorage, n_buffers: int) -> None:
    """More buffers than one system call takes land back to back."""
    buffers = [bytes([i % 251]) * (i % 5) for i in range(n_buffers)]
    expected = b"".join(buffers)
    await storage.pwritev(7, buffers)
    assert await read(storage, 7, len(expected)) == expected
    await write(storage, 100_000, *buffers)
    assert await read(storage, 100_000, len(expected)) == expected


async def test_short_writes_are_finished(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system call that writes only a part is followed by others until all is written."""
    real_pwritev, real_pwrite = os.pwritev, os.pwrite

    def short_pwritev(fd: int, buffers: list[bytes], offset: int) -> int:
        return real_pwritev(fd, [b"".join(buffers)[:5]], offset)

    def short_pwrite(fd: int, buffer: bytes, offset: int) -> int:
        return real_pwrite(fd, buffer[:3], offset)

    monkeypatch.setattr(os, "pwritev", short_pwritev)
    for module in (file_module, blocking):
        monkeypatch.setattr(module, "sys_pwrite", short_pwrite)
    await storage.pwritev(10, [b"abcd", b"", b"efghijkl", b"m"])
    await write(storage, 50, b"0123456789")
    assert await read(storage, 10, 13) == b"abcdefghijklm"
    assert await read(storage, 50, 10) == b"0123456789"


async def test_write_zeroes_and_punch_hole(storage: FileStorage, file_path: str) -> None:
    """Zeroes may grow the file, holes never; both leave their neighbours alone."""
    await write(storage, 0, b"q" * 20_000)
    await storage.write_zeroes(4000, 5000)
    await storage.write_zeroes(19_000, 5000)
    assert storage.size() == os.stat(file_path).st_size == 24_000
    expected = b"q" * 4000 + bytes(5000) + b"q" * 10_000 + bytes(5000)
    assert await read(storage, 0, 24_000) == expected
    await storage.punch_hole(100, 200)
    await storage.punch_hole(10_000, 1 << 30)
    await storage.punch_hole(1 << 30, 4096)
    assert storage.size() == os.stat(file_path).st_size == 24_000
    assert await read(storage, 0, 24_000) == b"q" * 100 + bytes(200) + expected[300:10_000] + bytes(14_000)


async def test_space_is_set_aside(storage: FileStorage, file_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holes get space and what is there stays; the file grows. Where the file system can't, False, and no change."""
    await write(storage, 1 << 20, b"q" * 1000)
    assert await storage.allocate(4096, 2 << 20)
    assert storage.size() == os.stat(file_path).st_size == 4096 + (2 << 20)
    assert storage.allocated_bytes() >= 2 << 20
    assert await read(storage, 0, 3 << 20) == (bytes(1 << 20) + b"q" * 1000).ljust(3 << 20, b"\0")

    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(space, "fallocate", refuse)
    assert not await storage.allocate(4096, 4 << 20)
    assert storage.size() == 4096 + (2 << 20)


async def test_zeroing_without_fallocate(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where fallocate is not supported, zeroes are written, over more than one chunk, and it isn't asked again. What
    nothing refers to is left as it is."""
    calls = []

    def refuse(*arguments: int) -> None:
        calls.append(arguments)
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(syscalls, "fallocate", refuse)
    monkeypatch.setattr(space, "fallocate", refuse)
    n_bytes = (2 << 20) + 777
    await write(storage, 0, b"w" * (n_bytes + 100))
    await storage.write_zeroes(50, n_bytes)
    await storage.write_zeroes(50, 10)
    await storage.punch_hole(10, 20)
    await storage.punch_hole(10, 20)
    assert len(calls) == 2
    assert await read(storage, 0, n_bytes + 100) == b"w" * 50 + bytes(n_bytes) + b"w" * 50
    await storage.write_zeroes(10, 20, unmap=True)
    await storage.write_zeroes(n_bytes + 90, 1 << 30, unmap=True)
    assert storage.size() == n_bytes + 100
    expected = b"w" * 10 + bytes(20) + b"w" * 20 + bytes(n_bytes) + b"w" * 40 + bytes(10)
    assert await read(storage, 0, n_bytes + 100) == expected


async def test_space_is_set_aside_and_contents_stay(tmp_path: Path, storage: FileStorage) -> None:
    """Holes get their space, bytes that are there stay, and the file grows with a range that reaches past its end."""
    await write(storage, 0, b"s" * 4096)
    await storage.truncate(3 << 20)
    before = storage.allocated_bytes()
    assert await storage.allocate(100, 1 << 20)
    assert storage.allocated_bytes() >= before + (1 << 20) - 4096
    assert await read(storage, 0, 1 << 20) == b"s" * 4096 + bytes((1 << 20) - 4096)
    assert await storage.allocate(3 << 20, 100)
    assert storage.size() == os.stat(storage.name).st_size == (3 << 20) + 100
    assert await storage.allocate(0, 0)


async def test_space_that_cannot_be_set_aside(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where fallocate is not supported the storage says so, nothing happens, and it isn't asked again."""
    calls = []

    def refuse(*arguments: int) -> None:
        calls.append(arguments)
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(space, "fallocate", refuse)
    await write(storage, 0, b"s" * 100)
    assert not await storage.allocate(0, 4096)
    assert not await storage.allocate(0, 4096)
    assert len(calls) == 1
    assert storage.size() == 100


async def test_punching_gives_space_back(tmp_path: Path, storage: FileStorage) -> None:
    """A hole of 1 MiB is no longer counted in allocated_bytes()."""
    await write(storage, 0, b"h" * (2 << 20))
    os.fsync(storage.fileno())
    before = storage.allocated_bytes()
    await storage.punch_hole(0, 1 << 20)
    assert before - storage.allocated_bytes() >= 1 << 20


async def test_truncate(storage: FileStorage, file_path: str) -> None:
    """Both ways; what was cut off reads as zeroes afterwards."""
    await write(storage, 0, b"t" * 5000)
    await storage.truncate(3000)
    await storage.truncate(9000)
    assert storage.size() == os.stat(file_path).st_size == 9000
    assert await read(storage, 0, 9000) == b"t" * 3000 + bytes(6000)


async def test_a_failed_flush_is_final(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one EIO each later flush raises EIO, though the kernel would report success."""

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    await storage.flush()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="error") as caught:
            await storage.flush()
        assert caught.value.errno == errno.EIO
    for _ in range(2):
        with pytest.raises(OSError, match="error") as caught:
            await storage.flush()
        assert caught.value.errno == errno.EIO
    assert storage.counters.flushes == 2


@pytest.fixture
async def disk_storage(file_path: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FileStorage]:
    """A storage whose flush has to be waited for, whatever its file system is."""
    Path(file_path).touch()
    monkeypatch.setattr(file_systems, "MEMORY_FILE_SYSTEMS", frozenset())
    async with aclosing(await open_file_storage(file_path, writable=True)) as opened:
        yield opened


async def change_inline(storage: FileStorage) -> None:
    storage.write_inline(0, [b"x"])


async def change_longer(storage: FileStorage) -> None:
    await storage.pwritev(0, [b"x"])


async def change_zeroes(storage: FileStorage) -> None:
    await storage.write_zeroes(0, 4096)


async def change_unmap(storage: FileStorage) -> None:
    await storage.write_zeroes(0, 4096, unmap=True)


async def change_punch(storage: FileStorage) -> None:
    await storage.punch_hole(0, 4096)


async def change_allocate(storage: FileStorage) -> None:
    await storage.allocate(1 << 20, 4096)


async def change_length(storage: FileStorage) -> None:
    await storage.truncate(3 << 20)


CHANGES = [
    change_inline,
    change_longer,
    change_zeroes,
    change_unmap,
    change_punch,
    change_allocate,
    change_length,
]


@pytest.mark.parametrize("change", CHANGES)
async def test_a_disk_has_nothing_to_flush_until_it_changes(
    disk_storage: FileStorage, change: Callable[[FileStorage], Awaitable[None]]
) -> None:
    """What was never flushed is in doubt, whatever was done to it; every kind of change needs another flush."""
    await disk_storage.pwritev(0, [b"t" * 8192])
    assert not disk_storage.try_flush()
    await disk_storage.flush()
    assert disk_storage.try_flush()
    assert disk_storage.counters.flushes == 1
    await change(disk_storage)
    assert not disk_storage.try_flush()
    await disk_storage.flush()
    assert disk_storage.try_flush()


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_that_failed_may_have_been_made_in_part(
    disk_storage: FileStorage, monkeypatch: pytest.MonkeyPatch, change: Callable[[FileStorage], Awaitable[None]]
) -> None:
    """What is in the file is read by the guest, and so has to be durable after a flush."""
    await disk_storage.pwritev(0, [b"t" * 8192])
    await disk_storage.flush()

    def fail(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        for name in ("sys_pwrite", "write_all", "zero_range", "give_back", "allocate_range"):
            patch.setattr(file_module, name, fail)
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(OSError, match="No space"):
            await change(disk_storage)
    assert not disk_storage.try_flush()


@pytest.mark.parametrize("change", [change_longer, change_zeroes, change_punch, change_allocate, change_length])
async def test_a_flush_beside_a_change_does_not_cover_it(
    disk_storage: FileStorage, monkeypatch: pytest.MonkeyPatch, change: Callable[[FileStorage], Awaitable[None]]
) -> None:
    """Whether the change or the flush began first, and whichever ends first."""
    await disk_storage.pwritev(0, [b"t" * 8192])
    await disk_storage.flush()
    run = WorkerPool.run
    held = trio.Event()

    async def hold_flush(pool: WorkerPool, function: Any, *args: Any) -> Any:
        if function is os.fdatasync:
            await held.wait()
        return await run(pool, function, *args)

    async def hold_change(pool: WorkerPool, function: Any, *args: Any) -> Any:
        if function is not os.fdatasync:
            await held.wait()
        return await run(pool, function, *args)

    monkeypatch.setattr(WorkerPool, "run", hold_flush)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk_storage.flush)
        await wait_all_tasks_blocked()
        await change(disk_storage)
        held.set()
    assert not disk_storage.try_flush()

    held = trio.Event()
    monkeypatch.setattr(WorkerPool, "run", hold_change)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(change, disk_storage)
        await wait_all_tasks_blocked()
        assert not disk_storage.try_flush()
        await disk_storage.flush()
        assert not disk_storage.try_flush()
        held.set()
    assert not disk_storage.try_flush()
    await disk_storage.flush()
    assert disk_storage.try_flush()


async def test_what_lies_in_memory_is_flushed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One fdatasync each time; a failure is final, and flush() tells of it."""
    monkeypatch.setattr(file_systems, "type_of", lambda fd: "tmpfs")
    (tmp_path / "image").touch()
    storage = await open_file_storage(str(tmp_path / "image"), writable=True)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    await storage.pwritev(0, [b"t" * 8192])
    assert storage.try_flush()
    assert storage.try_flush()
    assert storage.counters.flushes == 2
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        assert not storage.try_flush()
    assert not storage.try_flush()
    with pytest.raises(OSError, match="an earlier flush"):
        await storage.flush()
    await storage.aclose()


async def test_flushes_never_overlap(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux tells of a lost write once per descriptor: of two flushes at a time, none may take the other's error."""
    second_came = threading.Event()
    n_calls = 0

    def fdatasync(fd: int) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls > 1:
            second_came.set()  # and finds the error taken already
            return
        second_came.wait(0.2)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    failed = 0

    async def flush() -> None:
        nonlocal failed
        try:
            await storage.flush()
        except OSError:
            failed += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flush)
        nursery.start_soon(flush)
    assert failed == 2


async def test_read_only(file_path: str) -> None:
    """Inline writes decline and awaited ones raise EBADF; a flush is nothing."""
    Path(file_path).write_bytes(b"r" * 100)
    storage = await open_file_storage(file_path, writable=False)
    try:
        assert storage.try_pwritev(0, [b"x"]) is False
        for call in (
            storage.pwritev(0, [b"x"]),
            storage.write_zeroes(0, 1),
            storage.punch_hole(0, 1),
            storage.truncate(0),
        ):
            with pytest.raises(OSError, match="read-only") as caught:
                await call
            assert caught.value.errno == errno.EBADF
        await storage.flush()
        assert Path(file_path).read_bytes() == b"r" * 100
    finally:
        await storage.aclose()


async def test_counters(storage: FileStorage) -> None:
    """One count per call that reached the backend, inline or not; a declined call counts nothing."""
    await write(storage, 0, b"c" * 4096)
    await read(storage, 0, 1000)
    await storage.pread(0, 2000)
    await storage.flush()
    assert storage.counters.as_dict() == {
        "reads": 2,
        "writes": 1,
        "flushes": 1,
        "read_bytes": 3000,
        "written_bytes": 4096,
    }


async def test_use_after_close(storage: FileStorage) -> None:
    """A late call gets EBADF even through a method that was bound before; closing again is nothing."""
    await write(storage, 0, b"x")
    bound_read, bound_write = storage.try_pread, storage.try_pwritev
    await storage.aclose()
    await storage.aclose()
    assert storage.try_pread(0, 1) is None
    assert storage.try_pwritev(0, [b"x"]) is False
    with pytest.raises(OSError) as caught:
        bound_read(0, 1)
    assert caught.value.errno == errno.EBADF
    with pytest.raises(OSError) as caught:
        bound_write(0, [b"x"])
    assert caught.value.errno == errno.EBADF
    with pytest.raises(OSError) as caught:
        await storage.pread(0, 1)
    assert caught.value.errno == errno.EBADF


async def test_close_waits_for_calls_in_flight(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptor is not closed below a thread that uses it, cancelled or not."""
    real_write = blocking.write_all
    ended = []

    def slow(fd: int, host_offset: int, buffers: list[bytes]) -> int:
        time.sleep(0.2)
        n_bytes = real_write(fd, host_offset, buffers)
        ended.append(fd)
        return n_bytes

    monkeypatch.setattr(file_module, "write_all", slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.pwritev, 0, [b"slow"])
        await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
        await storage.aclose()
        assert ended
    assert storage.fileno() == -1


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A mounted tmpfs of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.root
async def test_disk_full(small_tmpfs: Path) -> None:
    """ENOSPC comes out, inline and in a thread; the size stays the file's; writing goes on when there is room."""
    path = small_tmpfs / "image"
    path.touch()
    storage = await open_file_storage(str(path), writable=True)
    try:
        with pytest.raises(OSError) as caught:
            storage.try_pwritev(0, [b"a" * (600 << 10), b"b" * (600 << 10)])
        assert caught.value.errno == errno.ENOSPC
        assert storage.size() == path.stat().st_size > 600 << 10
        for call in (
            storage.pwritev(600 << 10, [b"b" * (600 << 10)]),
            storage.write_zeroes(900 << 10, 600 << 10),
            storage.allocate(900 << 10, 600 << 10),
        ):
            with pytest.raises(OSError) as caught:
                await call
            assert caught.value.errno == errno.ENOSPC
            assert storage.size() == path.stat().st_size
        assert storage.free_bytes() == 0
        await storage.truncate(100)
        assert storage.free_bytes() > 900 << 10
        assert storage.try_pwritev(100, [b"c" * 1000])
        assert await read(storage, 99, 3) == b"acc"
    finally:
        await storage.aclose()


async def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A directory, a fifo (without waiting for its writer), a device, a socket, nothing at all: by errno and name."""
    fifo, listener = tmp_path / "fifo", tmp_path / "socket"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as unix_socket:
        unix_socket.bind(str(listener))
        expected = {
            str(tmp_path): errno.EISDIR,
            str(fifo): errno.EINVAL,
            "/dev/null": errno.EINVAL,
            str(listener): errno.ENXIO,
            str(tmp_path / "missing"): errno.ENOENT,
            str(fifo / "below"): errno.ENOTDIR,
        }
        for writable in (False, True):
            for path, number in expected.items():
                with pytest.raises(OSError) as caught:
                    await open_file_storage(path, writable=writable)
                assert (caught.value.errno, caught.value.filename) == (number, path)


async def test_the_descriptor_is_not_inherited(storage: FileStorage) -> None:
    """A program that we start does not keep the image and its locks."""
    assert os.get_inheritable(storage.fileno()) is False


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """A loop device over 1 MiB of the letter L."""
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    need_loop_devices()
    image = tmp_path / "image"
    image.write_bytes(b"L" * (1 << 20))
    command = ["losetup", "--find", "--show", str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.root
async def test_block_device(loop_device: str) -> None:
    """A device has its own length; reads, writes, zeroes and holes work, also off sector bounds."""
    storage = await open_file_storage(loop_device, writable=True)
    try:
        assert storage.size() == 1 << 20
        await write(storage, 4096, b"M" * 4096)
        await storage.write_zeroes(100, 50)
        await storage.write_zeroes(65536, 4096)
        await storage.punch_hole(131072, 65536)
        await storage.flush()
        expected = bytearray(b"L" * (1 << 20))
        expected[4096:8192] = b"M" * 4096
        expected[100:150] = bytes(50)
        expected[65536:69632] = bytes(4096)
        expected[131072:196608] = bytes(65536)
        assert await read(storage, 0, 1 << 20) == expected
        with pytest.raises(OSError) as caught:
            await write(storage, 1 << 20, b"x" * 512)
        assert caught.value.errno == errno.ENOSPC
    finally:
        await storage.aclose()


async def test_whole_pages_go_to_a_block_device_at_once(loop_device: str) -> None:
    """A part of a page may have to be read first, and more than 1 MiB takes long: both are left to a thread."""
    storage = await open_file_storage(loop_device, writable=True)
    page = mmap.PAGESIZE
    assert storage.try_pwritev(page, (b"a" * 512, b"b" * (page - 512)))
    assert not storage.try_pwritev(page, (b"x" * (page - 512),))
    assert not storage.try_pwritev(512, (b"x" * page,))
    assert not storage.try_pwritev(0, (bytes((1 << 20) + page),))
    assert (storage.counters.writes, storage.counters.written_bytes) == (1, page)
    with pytest.raises(OSError, match="No space left"):
        storage.try_pwritev(1 << 20, (b"x" * page,))
    assert storage.size() == 1 << 20
    await storage.flush()
    await storage.aclose()
    assert not storage.try_pwritev(0, (b"x" * page,))
    expected = b"L" * page + b"a" * 512 + b"b" * (page - 512) + b"L" * page
    assert Path(loop_device).read_bytes()[: 3 * page] == expected


async def test_space_of_a_block_device(loop_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its space and none behind its end. What is given back is discarded; what must be zeroes is."""
    storage = await open_file_storage(loop_device, writable=True)
    try:
        size = storage.size()
        assert storage.is_fixed
        assert storage.allocated_bytes() == size
        assert await storage.allocate(0, size)
        with pytest.raises(OSError, match="No space left"):
            await storage.allocate(size - 4096, 8192)
        await storage.pwritev(0, [b"d" * 131072])
        await storage.flush()
        await storage.punch_hole(0, 65536)
        await storage.write_zeroes(65536, 512, unmap=True)
        await storage.write_zeroes(66048 + 1, 100, unmap=True)
        found = bytes(await storage.pread(65536, 65536))
        assert found == bytes(512) + b"d" + bytes(100) + b"d" * (65536 - 512 - 101)
        monkeypatch.setattr(space, "BLKDISCARD", 0x1234)  # no such request: as if the device could not
        await storage.punch_hole(65536, 65536)
        assert bytes(await storage.pread(65536, 65536)) == found
        await storage.punch_hole(66048, 512, in_use=True)  # not by BLKDISCARD, after which anything may be there
        assert bytes(await storage.pread(65536, 65536)) == bytes(1024) + found[1024:]
        await storage.punch_hole(67001, 100, in_use=True)  # which a device refuses
        await storage.punch_hole(67072, 512, in_use=True)
        assert bytes(await storage.pread(65536, 2048)) == bytes(1024) + found[1024:1536] + bytes(512)
    finally:
        await storage.aclose()
