"""The L2 cache: what it saves, what it keeps, what it never drops."""

from __future__ import annotations

import errno
import random
from array import array

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qcowfuse.driver.layers import table_cache
from qcowfuse.driver.layers.table_cache import L2Slice, TableCache
from qcowfuse.driver.options import L2CacheSize
from qcowfuse.driver.pending import PendingRead
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.storage.base import Storage
from tests.support.faults import FaultyStorage, Hold
from tests.support.images import TOP, ImageSpec, build_image, open_memory_image
from tests.support.memory_storage import MemoryStorage

KIB = 1 << 10
FULL = ImageSpec(size=1 << 20, fill=1.0)
"""32 L2 tables of one slice of 512 bytes."""


async def open_counted(cache: L2CacheSize | None, spec: ImageSpec = FULL) -> tuple[QcowImage, FaultyStorage]:
    """An image whose backend operations can be counted and held."""
    made: list[FaultyStorage] = []

    def wrap(inner: MemoryStorage) -> Storage:
        made.append(FaultyStorage(inner))
        return made[0]

    image = await open_memory_image(build_image(spec).files, wrap=wrap, cache=cache)
    return image, made[0]


def n_reads(faulty: FaultyStorage, first: int) -> int:
    """Backend reads since operation ``first``."""
    return sum(operation.kind == "read" for operation in faulty.operations[first:])


async def test_a_random_read_costs_one_backend_read_with_the_cache_and_two_without() -> None:
    """The cache halves the work of random reads."""
    chooser = random.Random(1)
    offsets = [chooser.randrange(2048) * 512 for _ in range(200)]
    for cache, expected in ((None, 1), (L2CacheSize(n_tables=0), 2)):
        image, faulty = await open_counted(cache)
        for offset in range(0, 1 << 20, 32 * KIB):
            await image.read(offset, 512)
        first = len(faulty.operations)
        for offset in offsets:
            await image.read(offset, 512)
        assert n_reads(faulty, first) == expected * len(offsets)


async def test_hits_and_misses_are_counted_once_per_request() -> None:
    """32 tables: 32 misses, then only hits; statistics say so."""
    image, _ = await open_counted(None)
    for _ in range(3):
        for offset in range(0, 1 << 20, 32 * KIB):
            await image.read(offset, 512)
    statistics = image.statistics()
    assert statistics["l2_cache.misses"] == 32
    assert statistics["l2_cache.hits"] == 64
    assert statistics["l2_cache.slices"] == 32
    assert statistics["l2_cache.used_bytes"] == 32 * 512


async def test_a_request_that_was_declined_first_counts_once() -> None:
    """Where nothing can be had at once, the start and the end of a request are one hit."""
    image, _ = await open_counted(None)
    await image.write(0, b"w" * 512)
    for offset in (0, 700):
        hits = image.statistics()["l2_cache.hits"]
        pending = image.start_read(offset, 512)
        assert isinstance(pending, PendingRead)
        await pending.finish()
        assert image.statistics()["l2_cache.hits"] - hits == 1
        hits = image.statistics()["l2_cache.hits"]
        pending_write = image.start_write(offset, b"w" * 200)
        assert pending_write is not None
        await pending_write.finish()
        assert image.statistics()["l2_cache.hits"] - hits == 1


@pytest.mark.parametrize(("cache", "slices"), [(L2CacheSize(n_tables=0), 0), (L2CacheSize(n_tables=3), 3)])
async def test_the_budget_holds(cache: L2CacheSize, slices: int) -> None:
    """No more tables stay in memory than asked for, whatever is read or written and flushed."""
    image, _ = await open_counted(cache)
    chooser = random.Random(2)
    for _ in range(50):
        await image.read(chooser.randrange((1 << 20) - 70_000), 70_000)
    assert image.statistics()["l2_cache.slices"] == slices
    for _ in range(20):
        await image.write(chooser.randrange((1 << 20) - 9000), b"w" * 9000)
    await image.flush()
    await image.read(0, 100)
    statistics = image.statistics()
    assert statistics["l2_cache.slices"] == slices
    assert statistics["l2_cache.used_bytes"] == slices * 512
    assert statistics["l2_cache.budget_bytes"] == slices * 512


async def test_the_least_recently_used_table_goes_first() -> None:
    """With room for two, the one used last stays."""
    image, _ = await open_counted(L2CacheSize(n_tables=2))
    for table in (0, 1, 0, 2, 0):
        await image.read(table * 32 * KIB, 512)
    assert image.statistics()["l2_cache.misses"] == 3
    await image.read(1 * 32 * KIB, 512)
    assert image.statistics()["l2_cache.misses"] == 4


async def test_a_miss_is_one_load_for_all_who_wait() -> None:
    """Ten readers of one table that is not in memory: one read of it."""
    image, faulty = await open_counted(None)
    hold = Hold(lambda operation: operation.kind == "read")
    faulty.gate = hold
    first = len(faulty.operations)
    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(image.read, number * 1024, 512)
        await wait_all_tasks_blocked()
        assert len(hold.held) == 1
        hold.release()
    assert n_reads(faulty, first) == 11
    assert image.statistics()["l2_cache.misses"] == 1


async def test_a_load_that_fails_or_is_cancelled_leaves_nothing() -> None:
    """The error goes to who loaded; one of those who wait tries again, and succeeds."""
    image, faulty = await open_counted(None)
    hold = Hold(lambda operation: operation.kind == "read")
    faulty.gate = hold
    scope = trio.CancelScope()
    found: list[bytes] = []

    async def doomed() -> None:
        with scope:
            await image.read(0, 512)

    async def other() -> None:
        found.append(bytes(await image.read(0, 512)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(doomed)
        await hold.reached.wait()
        nursery.start_soon(other)
        await wait_all_tasks_blocked()
        scope.cancel()
        await wait_all_tasks_blocked()
        hold.release()
    assert found == [build_image(FULL).contents[:512]]
    faulty.check = lambda operation: errno.EIO
    with pytest.raises(OSError):
        await image.read(32 * KIB, 512)
    faulty.check = None
    assert await image.read(32 * KIB, 512) == build_image(FULL).contents[32 * KIB : 32 * KIB + 512]


async def test_a_read_does_not_fail_for_a_write_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where room for a read has to be made by a write-back and that fails, the read is answered all the same."""
    monkeypatch.setattr(table_cache, "MIN_DIRTY_BYTES", 512)
    spec = ImageSpec(size=1 << 20, fill=1.0, snapshot=True)
    contents = build_image(spec).contents
    image, faulty = await open_counted(L2CacheSize(n_tables=1), spec)
    for table in range(4):
        await image.write(table * 32 * KIB + 512, b"%d" % table * 700)
    faulty.check = lambda operation: errno.ENOSPC if operation.kind == "write" else 0
    first = len(faulty.operations)
    for table in range(4, 12):
        offset = table * 32 * KIB
        assert await image.read(offset, 512) == contents[offset : offset + 512]
    assert any(operation.kind == "write" for operation in faulty.operations[first:]), "no write-back was tried"
    faulty.check = None
    await image.flush()
    assert await image.read(512, 700) == b"0" * 700


async def _slice(key: int) -> L2Slice:
    return L2Slice(key, key, 0, array("Q", [key] * 64))


async def test_pinned_and_dirty_slices_are_never_evicted() -> None:
    """Whatever the budget: a pinned slice stays, a dirty one stays, others go."""
    cache = TableCache(0)
    pinned = await cache.load(1, lambda: _slice(1))
    dirty = await cache.load(2, lambda: _slice(2))
    cache.mark_dirty(dirty, 3, 5)
    cache.unpin(dirty)
    for key in range(3, 20):
        cache.unpin(await cache.load(key, lambda key=key: _slice(key)))  # type: ignore[misc]
    assert set(cache.slices) == {1, 2}
    assert cache.used == 2 * 512
    dirty.mark_clean()
    cache.unpin(pinned)
    assert not cache.slices
    assert cache.used == 0
    assert cache.evictions == 19


async def test_slices_of_large_tables_are_read_by_themselves() -> None:
    """With clusters of 2 MiB a miss reads 64 KiB, not the 2 MiB of the table."""
    image, faulty = await open_counted(None, ImageSpec(size=64 << 20, cluster_size=2 << 20))
    await image.write(0, b"x")
    await image.flush()
    await image.aclose()
    memory = faulty.inner
    assert isinstance(memory, MemoryStorage)
    again = await open_memory_image({TOP: bytes(memory.data)})
    before = again.statistics()["backend.read_bytes"]
    assert await again.read(0, 1) == b"x"
    assert again.statistics()["backend.read_bytes"] - before == 65536 + 1
