"""Flushes of a file on a disk: by io_uring, begun at once or not, what that declines, and what a failure costs."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qcowfuse.storage import file_systems
from qcowfuse.storage import ring as ring_module
from qcowfuse.storage.file import FileStorage, open_file_storage
from qcowfuse.storage.held import Held
from qcowfuse.storage.workers import WorkerPool
from qcowfuse.system.short_wait import allow_short_waits, wait_shortly
from tests.support.io_uring import FakeBinding, FakeContext, need_io_uring

REFUSED = [-errno.ECANCELED]
FINAL = [-errno.EIO, -errno.ENOSPC, -errno.EINVAL, -errno.EACCES, -errno.EINTR]


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The descriptors that were flushed in a thread."""
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    return flushed


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeBinding:
    """Stands in for io_uring."""
    binding = FakeBinding()
    monkeypatch.setattr(ring_module, "load_binding", lambda: binding)
    return binding


@pytest.fixture
async def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FileStorage]:
    """A file that was just written, on a disk as far as it knows. There may be a ``fake`` before it."""
    monkeypatch.setattr(file_systems, "type_of", lambda fd: "ext4")
    path = tmp_path / "image"
    path.touch()
    async with aclosing(await open_file_storage(str(path), writable=True, io_uring=True)) as opened:
        assert opened.try_pwritev(0, [b"data"])
        yield opened


@pytest.fixture
def context(fake: FakeBinding, storage: FileStorage, in_threads: list[int]) -> FakeContext:
    """The ring of ``storage``. Threads flush nothing, but it is known what they would."""
    fake.flushed.clear()
    return fake.contexts[0]


@pytest.fixture
def quiet() -> Iterator[int]:
    """A descriptor that ends no short wait, until something is written to the one after it; they are allowed."""
    reader, writer = os.pipe()
    os.dup2(writer, reader + 1000)
    os.close(writer)
    yield reader
    os.close(reader)
    os.close(reader + 1000)


async def test_a_real_ring_flushes(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no thread; afterwards there is nothing to flush."""
    need_io_uring()

    def refuse(fd: int) -> None:
        raise AssertionError("a thread was used")

    monkeypatch.setattr(os, "fdatasync", refuse)
    await storage.flush()
    assert storage.counters.flushes == 1
    assert storage.try_flush()
    assert storage.counters.flushes == 1
    await storage.pwritev(4, [b"more"])
    await storage.flush()
    assert storage.counters.flushes == 2


async def test_a_short_wait_ends_a_flush_at_once(
    fake: FakeBinding, context: FakeContext, storage: FileStorage, quiet: int, in_threads: list[int]
) -> None:
    """While no other request waits for anything; else it has begun, and a flush later on ends it."""
    n_waiting = 0
    allow_short_waits(quiet, lambda: n_waiting)
    assert storage.try_flush()
    assert fake.flushed == [storage.fileno()]
    assert storage.try_pwritev(0, [b"more"])
    n_waiting = 1
    assert not storage.try_flush()
    await storage.flush()
    assert len(fake.flushed) == storage.counters.flushes == 2
    assert not in_threads


async def test_a_flush_that_goes_on_covers_what_was_written_before_it_began(
    fake: FakeBinding, context: FakeContext, storage: FileStorage
) -> None:
    """What is written while it goes on, at once or in a thread that has not ended, needs another one."""
    for n_others in range(3):
        n_before = len(fake.flushed)
        assert storage.try_pwritev(0, [b"before"])
        context.is_held = True
        assert not storage.try_flush()
        assert not storage.try_flush()
        assert len(fake.flushed) == n_before + 1
        if n_others:
            assert storage.try_pwritev(0, [b"beside"])
        async with trio.open_nursery() as nursery:
            for _ in range(max(1, n_others)):
                nursery.start_soon(storage.flush)
            await wait_all_tasks_blocked()
            assert len(fake.flushed) == n_before + 1, "one at a time"
            context.let_go()
        assert len(fake.flushed) == n_before + 1 + n_others
        assert storage.try_flush()
        assert storage.counters.flushes == len(fake.flushed)


async def test_a_change_that_goes_on_beside_a_flush_is_not_covered(
    fake: FakeBinding, context: FakeContext, storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began while an earlier flush was waited for, and ends after the next one."""
    run, held = WorkerPool.run, trio.Event()

    async def hold(pool: WorkerPool, function: Any, *args: Any) -> Any:
        await held.wait()
        return await run(pool, function, *args)

    monkeypatch.setattr(WorkerPool, "run", hold)
    context.is_held = True
    assert not storage.try_flush()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.flush)
        await wait_all_tasks_blocked()
        nursery.start_soon(storage.pwritev, 0, [b"late"])
        await wait_all_tasks_blocked()
        context.let_go()
        await wait_all_tasks_blocked()
        assert len(fake.flushed) == 2
        assert not storage.try_flush()
        held.set()
    assert not storage.try_flush()
    await storage.flush()
    assert len(fake.flushed) == 3
    assert storage.try_flush()


@pytest.mark.parametrize("result", FINAL)
@pytest.mark.parametrize("begins_at_once", [False, True])
async def test_a_flush_that_fails_is_final(
    fake: FakeBinding,
    context: FakeContext,
    storage: FileStorage,
    in_threads: list[int],
    quiet: int,
    result: int,
    begins_at_once: bool,
) -> None:
    """Nothing tries again: the kernel has told of its loss, and a second flush would succeed."""
    message = re.escape(os.strerror(-result))
    fake.results.append(result)
    if begins_at_once:
        allow_short_waits(quiet, lambda: 0)
        assert not storage.try_flush()
    for _ in range(2):
        with pytest.raises(OSError, match=message):
            await storage.flush()
        assert not storage.try_flush()
    assert len(fake.flushed) == 1
    assert not in_threads


async def test_the_failure_of_a_flush_that_went_on_is_not_lost(
    fake: FakeBinding, context: FakeContext, storage: FileStorage, in_threads: list[int]
) -> None:
    """Whoever flushes next hears of it, also when more was written."""
    fake.results.append(-errno.EIO)
    context.is_held = True
    assert not storage.try_flush()
    assert storage.try_pwritev(0, [b"more"])
    context.let_go()
    with pytest.raises(OSError, match="Input/output error"):
        await storage.flush()
    assert len(fake.flushed) == 1
    assert not in_threads


async def test_what_the_kernel_did_not_begin_a_thread_does(
    fake: FakeBinding, context: FakeContext, storage: FileStorage, in_threads: list[int]
) -> None:
    """ECANCELED: there was no thread in the kernel for it."""
    fake.results += REFUSED
    await storage.flush()
    assert in_threads == [storage.fileno()]
    assert storage.try_flush()
    assert in_threads == [storage.fileno()]


@pytest.mark.parametrize("lacks", ["the operation", "the kernel"])
async def test_without_flushes_in_the_ring_threads_flush(
    fake: FakeBinding,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_threads: list[int],
    lacks: str,
) -> None:
    """A binding or a kernel that has none is found out with a file in memory; reads go by the ring all the same."""
    monkeypatch.setattr(file_systems, "type_of", lambda fd: "ext4")
    if lacks == "the kernel":
        fake.results.append(-errno.EINVAL)
    else:
        del fake.Operation.fdsync
    path = tmp_path / "image"
    path.touch()
    async with aclosing(await open_file_storage(str(path), writable=True, io_uring=True)) as storage:
        assert storage.ring is not None
        fake.flushed.clear()
        assert storage.try_pwritev(0, [b"data"])
        assert not storage.try_flush()
        await storage.flush()
        assert in_threads == [storage.fileno()]
        assert not fake.flushed


@pytest.mark.parametrize("file_system", ["nfs4", "fuse.sshfs", "overlay", ""])
async def test_what_may_lie_elsewhere_is_flushed_in_threads(
    fake: FakeBinding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_threads: list[int], file_system: str
) -> None:
    """Its errors may be any."""
    monkeypatch.setattr(file_systems, "type_of", lambda fd: file_system)
    path = tmp_path / "image"
    path.touch()
    async with aclosing(await open_file_storage(str(path), writable=True, io_uring=True)) as storage:
        fake.flushed.clear()
        await storage.flush()
        assert in_threads == [storage.fileno()]
        assert not fake.flushed


async def test_a_descriptor_is_not_closed_below_a_flush(
    fake: FakeBinding, context: FakeContext, storage: FileStorage
) -> None:
    """Closing waits for one that goes on, whatever becomes of it."""
    fake.results.append(-errno.EIO)
    context.is_held = True
    assert not storage.try_flush()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.aclose)
        await wait_all_tasks_blocked()
        assert storage.fileno() >= 0
        context.let_go()
    assert storage.fileno() == -1


async def test_closing_beside_a_flush_that_somebody_waits_for(
    fake: FakeBinding, context: FakeContext, storage: FileStorage
) -> None:
    """Both come to their end, and one that waits for its turn is refused: its descriptor may be another file's."""
    context.is_held = True
    refused: list[int | None] = []

    async def flush_too_late() -> None:
        try:
            await storage.flush()
        except OSError as error:
            refused.append(error.errno)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(storage.flush)
            await wait_all_tasks_blocked()
            assert storage.try_pwritev(0, [b"more"])
            nursery.start_soon(flush_too_late)
            await wait_all_tasks_blocked()
            nursery.start_soon(storage.aclose)
            await wait_all_tasks_blocked()
            assert storage.fileno() >= 0
            context.let_go()
    assert refused == [errno.EBADF]
    assert len(fake.flushed) == 1


async def test_nothing_is_flushed_once_it_is_closed(
    fake: FakeBinding, context: FakeContext, storage: FileStorage
) -> None:
    """It says so as every other call does, and the ring that has gone is not asked."""
    await storage.aclose()
    await wait_all_tasks_blocked()
    assert not storage.try_flush()
    with pytest.raises(OSError, match="closed") as caught:
        await storage.flush()
    assert caught.value.errno == errno.EBADF
    assert not fake.flushed


async def test_a_cancelled_flush_is_waited_for(fake: FakeBinding, context: FakeContext, storage: FileStorage) -> None:
    """It ends, and what it says is kept."""
    context.is_held = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.flush)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        context.let_go()
    assert storage.try_flush()
    assert len(fake.flushed) == 1
    assert storage.try_pwritev(0, [b"more"])
    with trio.CancelScope() as scope:
        scope.cancel()
        await storage.flush()
    assert scope.cancelled_caught
    assert len(fake.flushed) == 1


async def test_short_waits(quiet: int) -> None:
    """They end with input at either descriptor; after some in vain there is none for a while."""
    answered = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        os.eventfd_write(answered, 1)
        assert not wait_shortly(answered, n_own=0), "none is allowed yet"
        n_waiting = 1
        allow_short_waits(quiet, lambda: n_waiting)
        assert wait_shortly(answered, n_own=1)
        assert not wait_shortly(answered, n_own=0)
        n_waiting = 0
        os.eventfd_read(answered)
        for _ in range(3):
            assert not wait_shortly(answered, n_own=0)
        os.eventfd_write(answered, 1)
        assert wait_shortly(answered, n_own=0), "three in vain are not too many"
        os.eventfd_read(answered)
        for _ in range(4):
            assert not wait_shortly(answered, n_own=0)
        os.eventfd_write(answered, 1)
        n_without = next(number for number in range(1000) if wait_shortly(answered, n_own=0))
        assert n_without > 10
        os.eventfd_read(answered)
        os.write(quiet + 1000, b"a request")
        for _ in range(10):
            assert not wait_shortly(answered, n_own=0)
        os.eventfd_write(answered, 1)
        assert wait_shortly(answered, n_own=0), "what others have to serve is no wait in vain"
    finally:
        os.close(answered)


async def test_a_free_lock_is_held_without_a_checkpoint() -> None:
    """One that is taken is waited for; a cancellation comes first."""
    lock = trio.Lock()
    order: list[str] = []

    async def other() -> None:
        order.append("other")
        async with Held(lock):
            order.append("second")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        async with Held(lock):
            order.append("first")
            await wait_all_tasks_blocked()
    assert order == ["first", "other", "second"]
    with trio.CancelScope() as scope:
        scope.cancel()
        async with Held(lock):
            order.append("never")
    assert scope.cancelled_caught
    assert not lock.locked()
    assert "never" not in order
