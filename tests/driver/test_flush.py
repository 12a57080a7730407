"""flush(): how many there are, who shares them, and that a failure is final."""

from __future__ import annotations

import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.driver.writing import refcount_blocks
from qcowfuse.errors import ReadOnlyImageError
from qcowfuse.storage.base import Storage
from tests.support.checker import check_image_bytes
from tests.support.faults import FaultyStorage, Hold, Operation
from tests.support.images import TOP, ImageSpec, build_image, open_memory_image
from tests.support.memory_storage import MemoryStorage

KIB = 1 << 10


async def open_faulty(spec: ImageSpec, *, inline: bool = False) -> tuple[QcowImage, FaultyStorage]:
    """An image on a storage whose operations can be held and failed."""
    made: list[FaultyStorage] = []

    def wrap(inner: MemoryStorage) -> Storage:
        made.append(FaultyStorage(inner, inline=inline))
        return made[0]

    image = await open_memory_image(build_image(spec).files, wrap=wrap)
    return image, made[0]


def kinds(faulty: FaultyStorage, first: int) -> list[str]:
    """The kinds of the operations from number ``first`` on."""
    return [operation.kind for operation in faulty.operations[first:]]


async def test_with_nothing_dirty_a_flush_is_one_flush() -> None:
    """No write at all, and exactly one fdatasync: also after writes in place."""
    image, faulty = await open_faulty(ImageSpec(fill=1.0))
    await image.write(0, b"begin" * 100)
    await image.flush()
    await image.flush()
    for _ in range(3):
        first = len(faulty.operations)
        await image.flush()
        assert kinds(faulty, first) == ["flush"]
        await image.write(100, b"in place")
        first = len(faulty.operations)
        await image.flush()
        assert kinds(faulty, first) == ["flush"]
    await image.aclose()


async def test_an_allocating_write_costs_two_flushes() -> None:
    """Counts and data, flush, links, flush; a new L2 table adds writes but no flush."""
    image, faulty = await open_faulty(ImageSpec(size=256 * KIB))
    await image.write(0, b"first" * 200)
    await image.flush()
    for offset in (8 * KIB, 100 * KIB):
        first = len(faulty.operations)
        await image.write(offset, b"new" * 1000)
        assert "flush" not in kinds(faulty, first)
        first = len(faulty.operations)
        await image.flush()
        assert kinds(faulty, first).count("flush") == 2
    await image.aclose()


async def test_concurrent_fsyncs_share_one_flush() -> None:
    """Ten fsyncs that come while one runs are served by one more."""
    image, faulty = await open_faulty(ImageSpec(fill=1.0))
    await image.write(0, b"x" * 100)
    await image.flush()
    hold = Hold(lambda operation: operation.kind == "flush")
    faulty.gate = hold
    first = len(faulty.operations)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.flush)
        await hold.reached.wait()
        for _ in range(10):
            nursery.start_soon(image.flush)
        await wait_all_tasks_blocked()
        hold.release()
    assert kinds(faulty, first) == ["flush", "flush"]


async def test_a_shared_flush_that_is_given_up_is_begun_again() -> None:
    """The one that leads the next flush is cancelled while it waits its turn: those that share it get one still."""
    image, faulty = await open_faulty(ImageSpec(fill=1.0))
    await image.write(0, b"x" * 100)
    await image.flush()
    hold = Hold(lambda operation: operation.kind == "flush")
    faulty.gate = hold
    first = len(faulty.operations)
    leader = trio.CancelScope()
    done: list[int] = []

    async def lead() -> None:
        with leader:
            await image.flush()

    async def share(number: int) -> None:
        await image.flush()
        done.append(number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.flush)
        await hold.reached.wait()
        nursery.start_soon(lead)
        await wait_all_tasks_blocked()
        for number in range(3):
            nursery.start_soon(share, number)
        await wait_all_tasks_blocked()
        leader.cancel()
        await wait_all_tasks_blocked()
        assert not done, "the flush that runs began before theirs was asked for"
        hold.release()
    assert sorted(done) == [0, 1, 2]
    assert kinds(faulty, first) == ["flush", "flush"]
    await image.aclose()


async def test_a_failed_flush_of_header_bits_is_final() -> None:
    """The flush between the header bits and the first write is one like all others: its failure ends the writing."""
    built = build_image(ImageSpec(fill=0.5))
    top = bytearray(built.top)
    top[88:96] = (1 << 40).to_bytes(8, "big")
    made: list[FaultyStorage] = []

    def wrap(inner: MemoryStorage) -> Storage:
        made.append(FaultyStorage(inner))
        return made[0]

    image = await open_memory_image({TOP: top}, wrap=wrap)
    made[0].check = lambda operation: errno.EIO if operation.kind == "flush" else 0
    with pytest.raises(OSError) as caught:
        await image.write(0, b"x" * 512)
    assert caught.value.errno == errno.EIO
    assert image.read_only
    with pytest.raises(ReadOnlyImageError):
        await image.write(0, b"x" * 512)
    for _ in range(2):
        with pytest.raises(OSError):
            await image.flush()
    await image.aclose()


async def test_all_who_share_a_failed_flush_hear_of_it() -> None:
    """Everyone who waits gets the error, and everyone who comes later."""
    image, faulty = await open_faulty(ImageSpec(fill=1.0))
    await image.write(0, b"x" * 100)
    hold = Hold(lambda operation: operation.kind == "flush")
    faulty.gate = hold
    faulty.check = lambda operation: errno.EIO if operation.kind == "flush" else 0
    heard: list[int | None] = []

    async def fsync() -> None:
        try:
            await image.flush()
        except OSError as error:
            heard.append(error.errno)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fsync)
        await hold.reached.wait()
        for _ in range(4):
            nursery.start_soon(fsync)
        await wait_all_tasks_blocked()
        hold.release()
    await fsync()
    assert heard == [errno.EIO] * 6
    assert image.read_only
    with pytest.raises(OSError):
        await image.aclose()


async def test_an_in_place_write_during_a_flush_is_not_promised_by_it() -> None:
    """An fsync issued after a write waits for a flush of its own and does not join the one that runs."""
    image, faulty = await open_faulty(ImageSpec(fill=1.0))
    await image.write(0, b"x" * 100)
    await image.flush()
    hold = Hold(lambda operation: operation.kind == "flush")
    faulty.gate = hold
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.flush)
        await hold.reached.wait()
        await image.write(0, b"y" * 100)
        first = len(faulty.operations)
        nursery.start_soon(image.flush)
        await wait_all_tasks_blocked()
        assert kinds(faulty, first) == []
        hold.release()
    assert kinds(faulty, first) == ["flush"]


async def test_closing_gives_back_what_the_last_writes_freed() -> None:
    """close flushes until the counts on disk are exact, closes the storage, and may be called twice."""
    image, faulty = await open_faulty(ImageSpec(fill=1.0, snapshot=True, size=64 * KIB))
    await image.write(0, b"x" * 20 * KIB)
    await image.aclose()
    n_operations = len(faulty.operations)
    await image.aclose()
    assert len(faulty.operations) == n_operations
    memory = faulty.inner
    assert isinstance(memory, MemoryStorage)
    assert memory.closed


async def test_closing_ends_although_a_read_hangs() -> None:
    """A read that never ends keeps clusters from being given back; close does not wait for it."""
    image, faulty = await open_faulty(ImageSpec(fill=1.0, compression="zlib", cluster_size=4096))
    hold = Hold(lambda operation: operation.kind == "read")
    async with trio.open_nursery() as nursery:
        await image.write(100 * KIB, b"x" * 4096)
        await image.flush()
        faulty.gate = hold
        nursery.start_soon(image.read, 0, 4096)
        with trio.fail_after(5):
            await hold.reached.wait()
        faulty.gate = None
        await image.write(0, b"x" * 4096)
        with trio.fail_after(5):
            await image.aclose()
        nursery.cancel_scope.cancel()


async def test_an_image_that_was_not_written_is_not_flushed_at_close() -> None:
    """Opening for writing and closing touches nothing."""
    image, faulty = await open_faulty(ImageSpec(fill=1.0))
    await image.read(0, 5000)
    first = len(faulty.operations)
    await image.aclose()
    assert kinds(faulty, first) == []


async def test_a_count_that_can_not_be_lowered_does_not_fail_an_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """When everything is durable, a refcount block that can't be read costs leaks, not the fsync."""
    monkeypatch.setattr(refcount_blocks, "BLOCK_CACHE_BYTES", 0)
    image, faulty = await open_faulty(ImageSpec(fill=1.0, snapshot=True, refcount_bits=64, size=256 * KIB))
    await image.write(0, b"x" * 512)
    faulty.check = lambda operation: errno.EIO if operation.kind == "read" else 0
    first = len(faulty.operations)
    await image.flush()
    faulty.check = None
    assert "read" in kinds(faulty, first), "the block was in memory"
    await image.write(200 * KIB, b"z" * 512)
    await image.aclose()
    memory = faulty.inner
    assert isinstance(memory, MemoryStorage)
    report = check_image_bytes(memory.data)
    assert not report.errors
    assert report.leaks


async def test_what_is_durable_at_once() -> None:
    """Nothing dirty and storages that need not wait: one flush each, the data file's first. Otherwise no flush of any
    kind, and flush() does all of it."""
    made: list[FaultyStorage] = []

    def wrap(inner: MemoryStorage) -> Storage:
        made.append(FaultyStorage(inner, inline=True))
        return made[-1]

    spec = ImageSpec(size=256 * KIB, fill=0.5, data_file="plain")
    image = await open_memory_image(build_image(spec).files, wrap=wrap, wrap_data=wrap)
    first = [len(faulty.operations) for faulty in made]

    def flushes() -> list[int]:
        return [kinds(faulty, start).count("flush") for faulty, start in zip(made, first, strict=True)]

    assert image.try_flush()
    assert flushes() == [1, 1]
    extents = [await image.find_extent(offset, 4096) for offset in range(0, image.size, 4096)]
    allocated = 4096 * next(number for number, extent in enumerate(extents) if extent[0])
    free = 4096 * next(number for number, extent in enumerate(extents) if not extent[0])
    await image.write(allocated, b"in place")
    assert image.try_flush()
    assert flushes() == [2, 2]
    await image.write(free, b"new")
    assert not image.try_flush()
    assert flushes() == [2, 2]
    await image.flush()
    assert image.try_flush()
    await image.aclose()


async def test_nothing_is_durable_at_once_beside_a_round() -> None:
    """A round that is under way may still fail; a flush that failed stays failed."""
    image, faulty = await open_faulty(ImageSpec(fill=1.0), inline=True)
    await image.write(0, b"begin")
    await image.flush()
    assert image.try_flush()
    go_on = trio.Event()

    async def hold(operation: Operation) -> None:
        if operation.kind == "flush":
            await go_on.wait()

    faulty.gate = hold
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.flush)
        await wait_all_tasks_blocked()
        faulty.gate = None
        assert not image.try_flush()
        go_on.set()
    assert image.try_flush()
    faulty.check = lambda operation: errno.EIO if operation.kind == "flush" else 0
    assert not image.try_flush()
    faulty.check = None
    assert not image.try_flush()
    with pytest.raises(OSError, match="error"):
        await image.flush()
    assert image.read_only
    assert not image.try_flush()
    with pytest.raises(OSError, match="error"):
        await image.aclose()


async def test_an_image_that_is_only_read_is_durable() -> None:
    """There is nothing to flush."""
    image = await open_memory_image(build_image(ImageSpec(fill=1.0)).files, read_only=True)
    assert image.try_flush()
    await image.aclose()
