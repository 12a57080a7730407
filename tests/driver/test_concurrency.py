"""Operations that overlap in time: placed by holding chosen storage operations, and at random."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qcowfuse.driver.layers import table_cache
from qcowfuse.driver.layers.range_claims import Claims
from qcowfuse.driver.options import L2CacheSize
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.driver.writing.refcount_allocation import RefcountAllocator
from qcowfuse.format import geometry
from qcowfuse.storage.base import Storage
from tests.support.checker import check_image_bytes
from tests.support.faults import FaultyStorage, Hold, Operation
from tests.support.images import TOP, BuiltImage, ImageSpec, build_image, open_memory_image, qemu_read
from tests.support.memory_storage import MemoryStorage
from tests.support.powercut import read_image
from tests.support.starting import read_at_once

KIB = 1 << 10


async def held_image(
    built: BuiltImage, hold: Hold | None = None, *, cache: L2CacheSize | None = None
) -> tuple[QcowImage, FaultyStorage, MemoryStorage]:
    """An image all of whose storage operations are awaited and pass ``hold``."""
    memory = MemoryStorage(built.top)
    made: list[FaultyStorage] = []

    def wrap(inner: MemoryStorage) -> Storage:
        made.append(FaultyStorage(inner))
        return made[0]

    image = await open_memory_image({**built.files, TOP: memory}, wrap=wrap, cache=cache)
    made[0].gate = hold
    return image, made[0], memory


def is_data_write(operation: Operation) -> bool:
    """A write of guest data of more than a sector; tables of 512-byte clusters are one sector."""
    return operation.kind == "write" and operation.n_bytes > 512


async def finish(image: QcowImage, memory: MemoryStorage, oracle: bytes | bytearray) -> None:
    """Contents as expected, before and after closing, and nothing leaked."""
    assert await read_image(image, 0, image.size) == oracle
    await image.aclose()
    report = check_image_bytes(memory.data)
    assert report.exit_code == 0, report


@pytest.mark.parametrize("suspend", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        ImageSpec(size=64 * KIB, cluster_size=4096),
        ImageSpec(size=64 * KIB),
        ImageSpec(size=64 * KIB, cluster_size=4096, backing="raw", backing_size=40 * KIB),
        ImageSpec(size=64 * KIB, cluster_size=4096, fill=0.8, snapshot=True),
        ImageSpec(size=64 * KIB, cluster_size=4096, fill=0.8, compression="zlib"),
        ImageSpec(size=64 * KIB, cluster_size=4096, fill=0.8, zeroes=True),
        ImageSpec(size=64 * KIB, version=1, cluster_size=4096),
        ImageSpec(size=64 * KIB, cluster_size=16384, extended_l2=True, backing="raw", backing_size=40 * KIB),
        ImageSpec(size=64 * KIB, cluster_size=16384, extended_l2=True, fill=0.8, zeroes=True, snapshot=True),
    ],
    ids=["4k", "512", "backing", "snapshot", "compressed", "zeroes", "v1", "extended", "extended-snapshot"],
)
async def test_many_writers_in_the_same_clusters(spec: ImageSpec, suspend: bool) -> None:
    """Eight writers on interleaved sectors, readers, and fsyncs all at once lose nothing."""
    built = build_image(spec)
    for seed in range(6):
        memory = MemoryStorage(built.top, suspend=suspend)
        image = await open_memory_image({**built.files, TOP: memory}, cache=L2CacheSize(n_tables=seed % 3))
        oracle = bytearray(built.contents)
        chooser = random.Random(seed)

        async def writer(number: int, image: QcowImage = image, oracle: bytearray = oracle) -> None:
            own = random.Random(number)
            for _ in range(12):
                offset = (own.randrange(image.size // 512 // 8) * 8 + number) * 512
                data = own.randbytes(512)
                oracle[offset : offset + 512] = data
                await image.write(offset, data)
                assert await read_image(image, offset, 512) == data
                await trio.lowlevel.checkpoint()

        async def flusher(image: QcowImage = image, chooser: random.Random = chooser) -> None:
            for _ in range(5):
                for _ in range(chooser.randrange(4)):
                    await trio.lowlevel.checkpoint()
                await image.flush()

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(writer, number)
                nursery.start_soon(flusher)
                nursery.start_soon(flusher)
        await finish(image, memory, oracle)


async def test_writers_of_one_cluster_wait_for_the_claim() -> None:
    """While a cluster is being allocated a second writer to it waits, and then writes in place."""
    built = build_image(ImageSpec(cluster_size=4096, size=64 * KIB, backing="raw", backing_size=64 * KIB))
    hold = Hold(is_data_write)
    image, faulty, memory = await held_image(built, hold)
    oracle = bytearray(built.contents)
    await image.flush()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.write, 100, b"a" * 200)
        # The first write of data is that of the new L2 table; release only what writes the cluster.
        await hold.reached.wait()
        nursery.start_soon(image.write, 1000, b"b" * 200)
        await wait_all_tasks_blocked()
        assert len(hold.held) == 1
        hold.release()
    oracle[100:300] = b"a" * 200
    oracle[1000:1200] = b"b" * 200
    writes = [operation for operation in faulty.operations if operation.kind == "write"]
    assert [write.n_bytes for write in writes].count(200) == 1, "the second write did not go in place"
    await finish(image, memory, oracle)


def test_of_several_claims_the_lowest_is_in_the_way() -> None:
    """Whatever the order they were taken in: a write may go on up to it."""
    claims = Claims()
    later, earlier = claims.take(10, 12), claims.take(5, 7)
    assert claims.first_conflict(4, 20) is earlier
    assert claims.first_conflict(7, 20) is later
    assert claims.first_conflict(7, 10) is None
    claims.release(earlier)
    assert claims.first_conflict(4, 20) is later


async def test_a_claim_covers_the_last_cluster_of_a_long_write() -> None:
    """A write to the rest of the cluster in which a long write ends waits, and both are there in the end."""
    built = build_image(ImageSpec(cluster_size=4096, size=64 * KIB, backing="raw", backing_size=64 * KIB))
    image, faulty, memory = await held_image(built)
    await image.write(60 * KIB, b"x")  # makes the table
    hold = Hold(lambda operation: operation.kind == "write")
    faulty.gate = hold
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.write, 0, b"l" * (12 * KIB + 512))
        await hold.reached.wait()
        nursery.start_soon(image.write, 14 * KIB, b"s" * 512)
        await wait_all_tasks_blocked()
        assert len(hold.held) == 1
        hold.release()
    oracle = bytearray(built.contents)
    oracle[60 * KIB] = ord("x")
    oracle[: 12 * KIB + 512] = b"l" * (12 * KIB + 512)
    oracle[14 * KIB : 14 * KIB + 512] = b"s" * 512
    await finish(image, memory, oracle)


async def test_a_long_write_takes_the_clusters_before_a_claim_and_waits_for_the_rest() -> None:
    """A write over many clusters, one of which is being allocated by another, is complete in the end."""
    built = build_image(ImageSpec(size=16 * KIB, refcount_bits=16))
    await_third = Hold(lambda operation: operation.kind == "write" and operation.n_bytes == 1)
    image, faulty, memory = await held_image(built, await_third)
    await image.write(15 * KIB, b"x" * 512)  # makes the table
    faulty.gate = Hold(lambda operation: operation.kind == "write")
    hold = faulty.gate
    oracle = bytearray(16 * KIB)
    oracle[15 * KIB : 15 * KIB + 512] = b"x" * 512
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.write, 4 * KIB, b"m" * 512)
        await hold.reached.wait()
        nursery.start_soon(image.write, 0, b"l" * 8 * KIB)
        await wait_all_tasks_blocked()
        assert [operation.n_bytes for operation in hold.held] == [512, 4 * KIB]
        hold.release()
    oracle[: 8 * KIB] = b"l" * 8 * KIB
    await finish(image, memory, oracle)


async def test_a_reader_during_cow_sees_old_or_new() -> None:
    """A read that overlaps the allocation of its cluster sees the bytes from before."""
    built = build_image(ImageSpec(cluster_size=4096, size=64 * KIB, fill=1.0, snapshot=True))
    hold = Hold(lambda operation: operation.kind == "write" and operation.n_bytes == 4096)
    image, faulty, memory = await held_image(built)
    await image.write(60 * KIB, b"t" * 512)  # the shared table is copied here
    faulty.gate = hold
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.write, 4096, b"n" * 1000)
        await hold.reached.wait()
        assert await read_image(image, 4096, 4096) == built.contents[4096:8192]
        hold.release()
    oracle = bytearray(built.contents)
    oracle[60 * KIB : 60 * KIB + 512] = b"t" * 512
    oracle[4096:5096] = b"n" * 1000
    await finish(image, memory, oracle)
    assert qemu_read({TOP: memory.data}, snapshot="s1") == built.snapshot_contents


async def test_two_writers_copy_a_shared_table_once() -> None:
    """Concurrent first writes below one shared L2 table make one copy of it."""
    built = build_image(ImageSpec(cluster_size=4096, size=64 * KIB, fill=1.0, snapshot=True))
    image, faulty, memory = await held_image(built)
    before = len([operation for operation in faulty.operations if operation.kind == "write"])
    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(image.write, number * 4096, b"%d" % number * 4096)
    writes = [operation for operation in faulty.operations if operation.kind == "write"][before:]
    assert len(writes) == 5
    oracle = b"".join(b"%d" % number * 4096 for number in range(4)) + built.contents[4 * 4096 :]
    await finish(image, memory, oracle)
    assert qemu_read({TOP: memory.data}, snapshot="s1") == built.snapshot_contents


async def test_a_freed_cluster_is_not_reused_under_a_reader() -> None:
    """A read in flight keeps the cluster that it looks at out of circulation, over any number of flushes."""
    built = build_image(ImageSpec(size=32 * KIB, cluster_size=4096, fill=1.0, compression="zlib"))
    image, faulty, memory = await held_image(built)
    assert image.changes is not None
    allocator = image.changes.allocator
    assert allocator is not None
    await image.write(28 * KIB, b"t" * 4096)
    await image.flush()
    hold = Hold(lambda operation: operation.kind == "read")
    faulty.gate = hold
    found: list[bytes] = []

    async def reader() -> None:
        found.append(bytes(await image.read(0, 4096)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        await hold.reached.wait()
        (held,) = hold.held
        hold.wanted = lambda operation: False
        await image.write(0, b"n" * 28 * KIB)
        for _ in range(3):
            await image.flush()
            run = await allocator.allocate(1)
            assert run.host_offset != held.host_offset // 4096 * 4096
            await allocator.release([run])
        hold.release()
    assert found == [built.contents[:4096]]
    await image.flush()
    run = await allocator.allocate(1)
    assert run.host_offset == held.host_offset // 4096 * 4096, "it was not even free"
    await allocator.release([run])
    await finish(image, memory, b"n" * 28 * KIB + b"t" * 4096)


async def test_a_freed_table_is_not_reused_under_who_asks_for_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is loaded to tell data from holes keeps its place, though a write frees it meanwhile."""
    monkeypatch.setattr(geometry, "MAX_SLICE_SIZE", 512)  # two slices a table, 64 KiB of the disk each
    built = build_image(ImageSpec(size=128 * KIB, cluster_size=KIB))
    prepared = await open_memory_image({TOP: (memory := MemoryStorage(built.top))})
    await prepared.write(0, b"a" * 512)
    await prepared.aclose()
    l1_offset = int.from_bytes(memory.data[40:48], "big")
    old_table = int.from_bytes(memory.data[l1_offset : l1_offset + 8], "big") & ~(1 << 63)
    memory.data[l1_offset : l1_offset + 8] = old_table.to_bytes(8, "big")  # as if it were shared
    image, faulty, memory = await held_image(BuiltImage(built.spec, {TOP: bytes(memory.data)}, b""))
    assert image.changes is not None
    allocator = image.changes.allocator
    assert isinstance(allocator, RefcountAllocator)
    hold = Hold(lambda operation: operation.kind == "read" and operation.host_offset == old_table + 512)
    faulty.gate = hold
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.find_extent, 64 * KIB, 512)  # in the second slice of the table
        await hold.reached.wait()
        await image.write(0, b"b" * 512)
        for _ in range(3):
            await image.flush()
        assert await allocator.refcount(old_table // KIB) == 1
        hold.release()
    await image.flush()
    assert await allocator.refcount(old_table // KIB) == 0
    await image.aclose()
    assert check_image_bytes(memory.data).exit_code == 0


async def test_what_is_linked_during_a_flush_belongs_to_the_next() -> None:
    """A write that completes while fsync waits for the disk is not lost and not half written."""
    built = build_image(ImageSpec(size=64 * KIB))
    image, faulty, memory = await held_image(built)
    await image.write(0, b"a" * 2048)
    for stage in range(3):
        hold = Hold(lambda operation: operation.kind == "flush" or operation.host_offset < 4096)
        faulty.gate = hold
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.flush)
            await hold.reached.wait()
            for number in range(8):
                hold.wanted = lambda operation: False
                await image.write((number * 8 + stage) * 1024, b"%d" % stage * 1024)
            assert read_at_once(image, stage * 1024, 1024) is None  # everything is awaited here
            assert await image.read(stage * 1024, 1024) == b"%d" % stage * 1024
            hold.release()
    assert image.changes is not None
    assert image.changes.write_back.is_dirty
    await image.flush()
    oracle = await read_image(image, 0, image.size)
    again = await open_memory_image({TOP: bytes(memory.data)}, read_only=True)
    assert await read_image(again, 0, again.size) == oracle
    await finish(image, memory, oracle)


@pytest.mark.parametrize("n_tables", [0, 1])
async def test_eviction_against_writers(n_tables: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one slice or none, writers all over the disk and write-backs in between lose nothing."""
    monkeypatch.setattr(table_cache, "MIN_DIRTY_BYTES", 512)
    built = build_image(ImageSpec(size=512 * KIB, fill=0.3))
    memory = MemoryStorage(built.top, suspend=True)
    image = await open_memory_image({TOP: memory}, cache=L2CacheSize(n_tables=n_tables))
    oracle = bytearray(built.contents)

    async def writer(number: int) -> None:
        own = random.Random(number)
        for _ in range(40):
            offset = (own.randrange(image.size // 512 // 4) * 4 + number) * 512
            data = own.randbytes(512)
            oracle[offset : offset + 512] = data
            await image.write(offset, data)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(writer, number)
    statistics = image.statistics()
    assert statistics["l2_cache.write_backs"] > 20
    assert statistics["l2_cache.evictions"] > 20
    await finish(image, memory, oracle)


async def cancel_at_each_operation(
    built: BuiltImage, prepare: Callable[[QcowImage], object] | None, offset: int, data: bytes
) -> int:
    """Cancel a write at its kth storage operation, before and after that is done, for all k; how many there were."""
    for number in range(1000):
        for after in (False, True):
            if await _cancel_at(built, offset, data, number, after=after):
                return number
    raise AssertionError("the write never ends")


async def _cancel_at(built: BuiltImage, offset: int, data: bytes, number: int, *, after: bool) -> bool:
    image, faulty, memory = await held_image(built)
    first = len(faulty.operations)
    scope = trio.CancelScope()

    async def gate(operation: Operation) -> None:
        if operation.number - first == number:
            scope.cancel()
        if not after:
            await trio.lowlevel.checkpoint()

    faulty.gate = gate
    if after:
        memory.suspend = True
    with scope:
        await image.write(offset, data)
    complete = not scope.cancelled_caught
    faulty.gate = None
    with trio.fail_after(10):
        found = await read_image(image, 0, image.size)
        new = built.contents[:offset] + data + built.contents[offset + len(data) :]
        for sector in range(0, image.size, 512):
            assert found[sector : sector + 512] in (new[sector : sector + 512], built.contents[sector : sector + 512])
        assert not complete or found == new
        await image.write(offset, data)
        await image.write(0, b"after")
        new = b"after" + new[5:]
        await finish(image, memory, new)
    return complete


@pytest.mark.parametrize(
    "spec",
    [
        ImageSpec(size=64 * KIB),
        ImageSpec(size=64 * KIB, cluster_size=4096, fill=1.0, snapshot=True),
        ImageSpec(size=64 * KIB, cluster_size=4096, fill=1.0, compression="zlib"),
        ImageSpec(size=64 * KIB, backing="raw", backing_size=64 * KIB, cluster_size=4096),
        ImageSpec(size=64 * KIB, version=1),
        ImageSpec(size=64 * KIB, fill=1.0, zeroes=True),
        ImageSpec(size=64 * KIB, cluster_size=16384, extended_l2=True, backing="raw", backing_size=40 * KIB),
    ],
    ids=["empty", "snapshot", "compressed", "backing", "v1", "zeroes", "extended"],
)
async def test_a_write_may_be_cancelled_anywhere(spec: ImageSpec) -> None:
    """Cancelled at any storage operation a write has happened or not, sector by sector, and nothing leaks."""
    built = build_image(spec)
    n_operations = await cancel_at_each_operation(built, None, 30 * KIB + 700, random.Random(1).randbytes(9000))
    assert n_operations >= 3


@pytest.mark.parametrize("snapshot", [True, False])
async def test_a_flush_may_be_cancelled_anywhere(snapshot: bool) -> None:
    """A cancelled fsync promises nothing and loses nothing; one that shared it goes on alone."""
    built = build_image(ImageSpec(size=64 * KIB, fill=0.6, snapshot=snapshot))
    for number in range(100):
        image, faulty, memory = await held_image(built)
        data = random.Random(2).randbytes(9000)
        await image.write(30 * KIB, data)
        await image.write_zeroes(2 * KIB, 9 * KIB, unmap=True)
        data_and_zeroes = bytearray(built.contents)
        data_and_zeroes[30 * KIB : 30 * KIB + 9000] = data
        data_and_zeroes[2 * KIB : 11 * KIB] = bytes(9 * KIB)
        first = len(faulty.operations)
        scope = trio.CancelScope()

        async def gate(
            operation: Operation, first: int = first, number: int = number, scope: trio.CancelScope = scope
        ) -> None:
            if operation.number - first == number:
                scope.cancel()
            await trio.lowlevel.checkpoint()

        faulty.gate = gate
        ended: list[bool] = []

        async def other(image: QcowImage = image, ended: list[bool] = ended) -> None:
            await trio.lowlevel.checkpoint()
            await image.flush()
            ended.append(True)

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other)
                with scope:
                    await image.flush()
        assert ended
        again = await open_memory_image({TOP: bytes(memory.data)}, read_only=True)
        assert await read_image(again, 30 * KIB, 9000) == data
        faulty.gate = None
        await finish(image, memory, data_and_zeroes)
        if not scope.cancelled_caught:
            assert number >= 3
            return
    raise AssertionError("the flush never ends")
