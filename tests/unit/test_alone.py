"""Coroutines without an event loop: they run to their end at once, and stop where a cancellation would be seen."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio

from qcowfuse.driver.files import open_storage
from qcowfuse.driver.options import OpenOptions
from qcowfuse.errors import ImageLockedError
from qcowfuse.storage.blocking_file import BlockingFile
from qcowfuse.storage.file import FileStorage
from qcowfuse.storage.opening import open_file
from qcowfuse.system.alone import check_stopped, checkpoint, is_alone, run_alone, run_blocking

DATA = bytes(range(256)) * 16


class StopError(BaseException):
    """What a check raises here."""


def stop_after(n_checks: int) -> Callable[[], None]:
    """A check that stops at the one after ``n_checks``."""
    left = [n_checks]

    def check() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise StopError

    return check


def never() -> None:
    """A check that nothing stops."""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A file."""
    (tmp_path / "file").write_bytes(DATA)
    return str(tmp_path / "file")


def test_each_way_to_wait_is_a_place_to_stop() -> None:
    """A checkpoint, a function that blocks before it is called, and one that asks while it waits."""
    called: list[int] = []

    async def work() -> str:
        await checkpoint()
        called.append(await run_blocking(int, "7"))
        await run_blocking(check_stopped)
        return "done"

    assert run_alone(work, never) == "done"
    assert called == [7]
    for n_checks, n_called in enumerate((0, 0, 1, 1)):
        called.clear()
        with pytest.raises(StopError):
            run_alone(work, stop_after(n_checks))
        assert len(called) == n_called


def test_what_needs_an_event_loop_is_a_mistake() -> None:
    """It is not taken for an end; afterwards all is as before."""

    class Waits:
        def __await__(self) -> object:
            yield "something"

    async def work() -> None:
        await Waits()  # type: ignore[misc]

    with pytest.raises(RuntimeError, match="waits for an event loop"):
        run_alone(work, never)
    assert not is_alone()


async def test_a_thread_alone_leaves_the_event_loop_of_others(path: str) -> None:
    """Each thread has its own way to wait."""
    inside, outside = threading.Event(), threading.Event()

    async def work() -> type:
        inside.set()
        outside.wait(10)
        assert is_alone()
        return type(await open_file(path, writable=False))

    found: list[type] = []
    async with trio.open_nursery() as nursery:

        async def start() -> None:
            found.append(await trio.to_thread.run_sync(lambda: run_alone(work, never)))

        nursery.start_soon(start)
        await trio.to_thread.run_sync(inside.wait, 10)
        assert not is_alone()
        await checkpoint()
        file = await open_file(path, writable=False)
        assert isinstance(file, FileStorage)
        await file.aclose()
        outside.set()
    assert found == [BlockingFile]


def test_a_blocking_file_reads_as_any_other(path: str) -> None:
    """Whatever the range, and past the end; what would change it is refused as by a file that is open to be read."""

    async def look(file: BlockingFile | FileStorage) -> list[object]:
        buffer = memoryview(bytearray(b"x" * 30))
        await file.pread_into(len(DATA) - 10, buffer)
        found: list[object] = [bytes(buffer), file.size(), file.name, file.is_fixed, file.allocated_bytes()]
        for place, length in ((0, 10), (4000, 96), (4090, 100), (5000, 5), (7, 0)):
            found.append(bytes(await file.pread(place, length)))
        codes = []
        for change in (
            lambda: file.pwritev(0, [b"x"]),
            lambda: file.write_zeroes(0, 1),
            lambda: file.punch_hole(0, 1),
            lambda: file.allocate(0, 1),
            lambda: file.truncate(1),
        ):
            with pytest.raises(OSError) as refused:
                await change()
            codes.append(refused.value.errno)
        assert set(codes) == {errno.EBADF}
        await file.flush()
        assert file.try_flush()
        assert not file.try_pwritev(0, [b"x"])
        counters = file.counters.as_dict()
        await file.aclose()
        await file.aclose()
        with pytest.raises(OSError):
            await file.pread(0, 1)
        return [*found, counters]

    async def opened() -> list[object]:
        return await look(await open_file(path, writable=False))

    assert run_alone(opened, never) == trio.run(opened)
    assert Path(path).read_bytes() == DATA


def test_locks_hold_without_an_event_loop(path: str) -> None:
    """A writer keeps a reader out, and the other way round; nothing stays behind."""

    async def read() -> None:
        await (await open_storage(path, False, OpenOptions(read_only=True))).aclose()

    async def write() -> None:
        writer = await open_storage(path, True, OpenOptions())
        try:
            with pytest.raises(ImageLockedError):
                await trio.to_thread.run_sync(lambda: run_alone(read, never))
        finally:
            await writer.aclose()

    trio.run(write)
    run_alone(read, never)

    async def read_and_write() -> None:
        reader = await open_storage(path, False, OpenOptions(read_only=True))
        with ThreadPoolExecutor(1) as thread, pytest.raises(ImageLockedError):
            thread.submit(trio.run, write).result()
        await reader.aclose()

    run_alone(read_and_write, never)
    trio.run(write)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    """As with an event loop; no descriptor is left behind."""
    os.mkfifo(tmp_path / "fifo")
    n_open = len(os.listdir("/proc/self/fd"))
    for name, number in (("missing", errno.ENOENT), (".", errno.EISDIR), ("fifo", errno.EINVAL)):
        with pytest.raises(OSError) as found:
            run_alone(lambda name=name: open_file(str(tmp_path / name), writable=False), never)  # type: ignore[misc]
        assert (found.value.errno, found.value.filename) == (number, str(tmp_path / name))
    assert len(os.listdir("/proc/self/fd")) == n_open
