"""Host clusters: refcount blocks and tables that grow, what is given back and when it is used again."""

from __future__ import annotations

import errno
import random
import struct
import sys

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qcowfuse.driver.layers.host_run import HostRun
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.driver.writing import refcount_blocks, refcount_growth
from qcowfuse.driver.writing.append_allocation import AppendAllocator
from qcowfuse.driver.writing.guarded_clusters import MetadataClusters
from qcowfuse.driver.writing.refcount_allocation import RefcountAllocator
from qcowfuse.errors import CorruptImageError
from qcowfuse.format.entries import parse_table
from tests.support.checker import check_image_bytes
from tests.support.faults import FaultyStorage, Hold, Operation
from tests.support.images import TOP, ImageSpec, build_image, open_memory_image, qemu_check, qemu_read
from tests.support.memory_storage import MemoryStorage

KIB = 1 << 10


def allocator_of(
    data: bytes, storage: FaultyStorage | MemoryStorage, *, cluster_bits: int = 9, refcount_order: int = 6
) -> RefcountAllocator:
    """An allocator for an image with such clusters and refcounts: 512 bytes and 64 bits."""
    table_offset, n_clusters = struct.unpack_from(">QI", data, 48)
    return RefcountAllocator(
        storage,
        cluster_bits=cluster_bits,
        refcount_order=refcount_order,
        table=parse_table(data[table_offset : table_offset + (n_clusters << cluster_bits)]),
        table_offset=table_offset,
        metadata=MetadataClusters(cluster_bits),
    )


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
async def test_new_refcount_blocks_are_added(refcount_bits: int) -> None:
    """An image that outgrows its refcount blocks gets new ones, and QEMU agrees with all counts."""
    built = build_image(ImageSpec(size=3 << 20, refcount_bits=refcount_bits))
    memory = MemoryStorage(built.top)
    image = await open_memory_image({TOP: memory})
    data = bytes(range(256)) * (12 << 10)
    for start in range(0, len(data), 100_000):
        await image.write(start, data[start : start + 100_000])
    await image.aclose()
    files = {TOP: memory.data}
    code, output = qemu_check(files)
    assert code == 0, output
    assert qemu_read(files) == data


async def test_the_refcount_table_grows() -> None:
    """512-byte clusters with 64-bit counts outgrow their table every 2 MiB; it moves, and its old place is freed."""
    built = build_image(ImageSpec(size=9 << 20, refcount_bits=64))
    memory = MemoryStorage(built.top, suspend=True)
    image = await open_memory_image({TOP: memory})
    places = set()
    data = b"growing!" * (9 << 17)
    for start in range(0, len(data), 256 * KIB):
        await image.write(start, data[start : start + 256 * KIB])
        await image.flush()
        places.add(bytes(memory.data[48:60]))
    await image.aclose()
    assert len(places) >= 3
    report = check_image_bytes(memory.data)
    assert report.exit_code == 0, report
    code, output = qemu_check({TOP: memory.data})
    assert code == 0, output
    assert qemu_read({TOP: memory.data}) == data


async def overwrite(image: QcowImage, n_bytes: int, value: bytes) -> None:
    """Whole clusters from the start of the disk."""
    await image.write(0, value * n_bytes)


@pytest.mark.parametrize("compressed", [True, False])
async def test_overwritten_clusters_are_freed_after_a_flush_and_not_before(compressed: bool) -> None:
    """What a write replaces stays in the file untouched until the link to it is durably gone; then it is reused."""
    spec = (
        ImageSpec(size=64 * KIB, cluster_size=4096, fill=1.0, compression="zlib")
        if compressed
        else ImageSpec(size=64 * KIB, cluster_size=4096, backing="raw", backing_size=64 * KIB)
    )
    built = build_image(spec)
    memory = MemoryStorage(built.top)
    image = await open_memory_image({**built.files, TOP: memory})
    if compressed:
        await overwrite(image, 64 * KIB, b"1")
        assert memory.data[4096 : len(built.top)] == built.top[4096:] or not compressed
        grown = len(memory.data)
        await image.flush()
        await image.flush()
        assert check_image_bytes(memory.data).exit_code == 0
        again = await open_memory_image({TOP: bytes(memory.data)}, read_only=True)
        assert await again.read(0, 64 * KIB) == b"1" * 64 * KIB
        assert image.changes is not None
        allocator = image.changes.allocator
        assert allocator is not None
        run = await allocator.allocate(1)
        assert run.host_offset < len(built.top), "the clusters of the compressed data were not reused"
        assert not run.is_fresh
        await allocator.release([run])
        assert len(memory.data) == grown
    else:
        await overwrite(image, 64 * KIB, b"1")
        n_bytes = len(memory.data)
        for _ in range(3):
            await overwrite(image, 64 * KIB, b"2")
            await image.flush()
        assert len(memory.data) == n_bytes, "an overwrite in place takes no space"
    await image.aclose()
    assert check_image_bytes(memory.data).exit_code == 0


@pytest.mark.parametrize("inline", [False, True], ids=["awaited", "at-once"])
async def test_clusters_of_a_failed_write_are_given_back(inline: bool) -> None:
    """ENOSPC again and again does not eat up cluster numbers, and what is taken later is zeroed around the data."""
    built = build_image(ImageSpec(size=64 * KIB, cluster_size=4096))
    memory = MemoryStorage(built.top)
    made: list[FaultyStorage] = []

    def wrap(inner: MemoryStorage) -> FaultyStorage:
        made.append(FaultyStorage(inner, inline=inline))
        return made[0]

    image = await open_memory_image({TOP: memory}, wrap=wrap)
    await image.write(0, b"begin")
    made[0].check = lambda operation: errno.ENOSPC if operation.kind == "write" else 0
    for _ in range(20):
        with pytest.raises(OSError):
            await image.write(8 * KIB, b"garbage!" * 1024)
    made[0].check = None
    await image.write(8 * KIB + 1000, b"data")
    assert await image.read(8 * KIB, 8 * KIB) == bytes(1000) + b"data" + bytes(8 * KIB - 1004)
    await image.aclose()
    assert check_image_bytes(memory.data).exit_code == 0
    assert len(memory.data) <= len(built.top) + 6 * 4096


async def test_a_write_in_one_step_keeps_off_a_claim() -> None:
    """A write that could be done at once waits for one that is in the middle of filling the same cluster."""
    built = build_image(ImageSpec(size=64 * KIB, cluster_size=4096))
    memory = MemoryStorage(built.top)
    made: list[FaultyStorage] = []

    def wrap(inner: MemoryStorage) -> FaultyStorage:
        made.append(FaultyStorage(inner))
        return made[0]

    image = await open_memory_image({TOP: memory}, wrap=wrap)
    await image.write(0, b"begin")
    hold = Hold(lambda operation: operation.kind == "write")
    made[0].gate = hold
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.write, 8 * KIB, b"first")
        await wait_all_tasks_blocked()
        made[0].inline = True
        assert image.changes is not None
        image.changes.writer_at_once.too_long = sys.maxsize  # it was put off when the storage declined
        nursery.start_soon(image.write, 8 * KIB + 10, b"second")
        await wait_all_tasks_blocked()
        hold.release()
    assert bytes(await image.read(8 * KIB, 16)) == b"first".ljust(10, b"\0") + b"second"
    await image.aclose()
    assert check_image_bytes(memory.data).exit_code == 0


@pytest.mark.parametrize("version", [1, 3])
async def test_fresh_clusters_read_as_zeroes_around_the_data(version: int) -> None:
    """Zeroes that are not written are there all the same, also after failures, cancellation and reopening."""
    built = build_image(ImageSpec(version=version, size=256 * KIB, cluster_size=4096))
    memory = MemoryStorage(built.top)
    oracle = bytearray(256 * KIB)
    made: list[FaultyStorage] = []

    def wrap(inner: MemoryStorage) -> FaultyStorage:
        made.append(FaultyStorage(inner))
        return made[-1]

    for round_ in range(3):
        memory.closed = False
        image = await open_memory_image({TOP: memory}, wrap=wrap)
        for number in range(10):
            offset = (round_ * 20 + number * 2) * 4096
            made[-1].check = lambda operation: errno.EIO if operation.n_bytes > 4096 else 0
            with pytest.raises(OSError):
                await image.write(offset, b"\xff" * 8192)
            made[-1].check = None
            await image.write(offset + 700, b"%d" % number * 90)
            oracle[offset + 700 : offset + 790] = b"%d" % number * 90
        assert await image.read(0, image.size) == oracle
        await image.aclose()
    assert qemu_read({TOP: memory.data}, format_name="qcow" if version == 1 else "qcow2") == oracle


async def test_two_loads_of_a_refcount_block_never_bring_back_old_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that is late does not replace what was changed, written and dropped meanwhile."""
    monkeypatch.setattr(refcount_blocks, "BLOCK_CACHE_BYTES", 0)
    built = build_image(ImageSpec(size=400 * KIB, refcount_bits=64, fill=1.0))
    memory = MemoryStorage(built.top)
    faulty = FaultyStorage(memory)
    allocator = allocator_of(built.top, faulty)
    first, second = Hold(lambda operation: operation.number == 0), Hold(lambda operation: operation.number == 1)

    async def gate(operation: Operation) -> None:
        await first(operation)
        await second(operation)

    faulty.gate = gate
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(allocator.refcount, 5)
            nursery.start_soon(allocator.refcount, 5)
            await wait_all_tasks_blocked()
            old = bytes(memory.data)
            first.release()
            await wait_all_tasks_blocked()
            await allocator.release([HostRun(5 * 512, 1)])
            for host_offset, data in allocator.take_dirty().blocks:
                memory.data[host_offset : host_offset + len(data)] = data
            allocator.written()
            new = memory.data
            if second.reached.is_set():
                for block in range(1, 9):
                    await allocator.refcount(block * 64)
                memory.data = bytearray(old)  # what a read that began before the write may see
            second.release()
            await wait_all_tasks_blocked()
            memory.data = new
    assert await allocator.refcount(5) == 0


@pytest.mark.parametrize("refcount_order", [0, 3, 4, 6])
async def test_each_count_that_changes_is_written(refcount_order: int) -> None:
    """Runs are taken and given back, many of them up to where a sector of counts begins, or one count further. Now
    and then a round fails. After each round that does not, the file has the counts that memory has."""
    built = build_image(ImageSpec(size=64 * KIB, cluster_size=4096, refcount_bits=1 << refcount_order))
    memory = MemoryStorage(built.top)
    allocator = allocator_of(built.top, memory, cluster_bits=12, refcount_order=refcount_order)
    chooser = random.Random(refcount_order)
    per_sector = 4096 >> refcount_order
    taken: set[int] = set()
    for number in range(40):
        run = await allocator.allocate(chooser.choice([1, 60, 300, 900]))
        first = run.host_offset >> 12
        taken.update(range(first, first + run.n_clusters))
        start = chooser.choice(sorted(taken))
        end = -(-start // per_sector) * per_sector + chooser.choice([0, 1, 1, 5])
        end = next((cluster for cluster in range(start, end) if cluster not in taken), end)
        if end > start:
            await allocator.release([HostRun(start << 12, end - start)])
            taken.difference_update(range(start, end))
        dirty = allocator.take_dirty()
        if number % 5 == 2:
            allocator.put_back()
            continue
        for host_offset, data in (*dirty.blocks, *dirty.moved_table, *dirty.table):
            await memory.pwritev(host_offset, [data])
        allocator.written()
        now = bytes(memory.data)
        in_file = allocator_of(now, MemoryStorage(now), cluster_bits=12, refcount_order=refcount_order)
        for cluster in range(max(taken, default=0) + 2):
            assert await in_file.refcount(cluster) == await allocator.refcount(cluster)
        assert {cluster for cluster in taken if await in_file.refcount(cluster) != 1} == set()


async def test_a_block_that_is_being_written_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a changed block is in the file it is not dropped: reading it back would bring the old counts."""
    monkeypatch.setattr(refcount_blocks, "BLOCK_CACHE_BYTES", 0)
    built = build_image(ImageSpec(size=400 * KIB, refcount_bits=64, fill=1.0))
    allocator = allocator_of(built.top, MemoryStorage(built.top))
    assert await allocator.refcount(5) == 1
    await allocator.release([HostRun(5 * 512, 1)])
    assert len(allocator.take_dirty().blocks) == 1
    for block in range(1, 9):
        await allocator.refcount(block * 64)
    assert await allocator.refcount(5) == 0
    allocator.put_back()
    for block in range(1, 9):
        await allocator.refcount(block * 64)
    assert await allocator.refcount(5) == 0
    assert len(allocator.take_dirty().blocks) == 1


@pytest.mark.parametrize(
    ("entry", "reason"), [(1 << 20, "past the end of the image file"), (512, "impossible"), (1 << 56, "impossible")]
)
async def test_a_refcount_table_that_points_nowhere(entry: int, reason: str) -> None:
    """A block behind the end of the file, between two clusters or beyond all files is damage that names its place."""
    allocator = RefcountAllocator(
        MemoryStorage(bytes(8 * KIB)),
        cluster_bits=10,
        refcount_order=4,
        table=parse_table(struct.pack(">2Q", 2 * KIB, entry) + bytes(KIB - 16)),
        table_offset=KIB,
        metadata=MetadataClusters(10),
    )
    assert await allocator.refcount(0) == 0
    with pytest.raises(CorruptImageError, match=reason):
        await allocator.refcount(512)


async def test_changed_blocks_stay_in_memory_whatever_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound for blocks in memory gives way to blocks that the file does not have yet."""
    monkeypatch.setattr(refcount_blocks, "BLOCK_CACHE_BYTES", 0)
    built = build_image(ImageSpec(size=400 * KIB, refcount_bits=64, fill=1.0))
    memory = MemoryStorage(built.top)
    allocator = allocator_of(built.top, memory)
    clusters = [block * 64 + 5 for block in range(8)]
    for cluster in clusters:
        assert await allocator.refcount(cluster) == 1
        await allocator.release([HostRun(cluster * 512, 1)])
    n_reads = memory.counters.reads
    assert [await allocator.refcount(cluster) for cluster in clusters] == [0] * 8
    assert memory.counters.reads == n_reads
    assert len(allocator.take_dirty().blocks) == 8


async def test_a_grown_table_that_could_not_be_written_is_written_next_time() -> None:
    """A round that fails between growing and writing hands out the moved table and its header field again."""
    built = build_image(ImageSpec(size=64 * KIB, refcount_bits=64))
    allocator = allocator_of(built.top, MemoryStorage(built.top))
    for _ in range(64 * 64 + 1):
        await allocator.allocate(1)
    first = allocator.take_dirty()
    assert first.moved_table
    assert first.table[0].host_offset == 48
    allocator.put_back()
    assert allocator.is_dirty
    assert allocator.take_dirty() == first
    allocator.written()
    assert not allocator.is_dirty
    assert allocator.take_unlinked() == [HostRun(512, 1)]


async def test_the_header_is_never_handed_out() -> None:
    """An image whose counts say that its header is free is refused a cluster instead of being destroyed."""
    built = build_image(ImageSpec(size=64 * KIB, refcount_bits=64))
    for damage in ("count", "block"):
        top = bytearray(built.top)
        (table_offset,) = struct.unpack_from(">Q", top, 48)
        (block_offset,) = struct.unpack_from(">Q", top, table_offset)
        place = block_offset if damage == "count" else table_offset
        top[place : place + 8] = bytes(8)
        memory = MemoryStorage(top)
        image = await open_memory_image({TOP: memory})
        with pytest.raises(CorruptImageError):
            await image.write(0, b"x" * 512)
        assert memory.data[:72] == top[:72]
        assert image.read_only


async def test_an_image_that_can_not_grow_is_full_and_not_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the largest refcount table that QEMU reads, a write is answered with ENOSPC and the image stays writable."""
    monkeypatch.setattr(refcount_growth, "MAX_REFCOUNT_TABLE_SIZE", 512)
    built = build_image(ImageSpec(size=4 << 20, refcount_bits=64))
    memory = MemoryStorage(built.top)
    image = await open_memory_image({TOP: memory})

    async def fill() -> None:
        for start in range(0, 4 << 20, 64 * KIB):
            await image.write(start, b"f" * 64 * KIB)

    with pytest.raises(OSError) as caught:
        await fill()
    assert caught.value.errno == errno.ENOSPC
    assert not image.read_only
    await image.write(0, b"still works")
    await image.aclose()
    report = check_image_bytes(memory.data)
    assert report.exit_code == 0, report


async def test_the_appending_allocator_takes_back_the_end() -> None:
    """Version 1: the last clusters of the file may be taken again, others are lost."""
    memory = MemoryStorage(bytes(1000))
    allocator = AppendAllocator(memory, 4096)
    first = await allocator.allocate(2)
    second = await allocator.allocate(1)
    assert (first, second) == (HostRun(4096, 2, True), HostRun(3 * 4096, 1, True))
    await allocator.release([first])
    await allocator.release([second])
    assert (await allocator.allocate(1)).host_offset == 3 * 4096
    await memory.pwritev(3 * 4096, [b"x"])
    await allocator.release([HostRun(3 * 4096, 1)])
    again = await allocator.allocate(1)
    assert again == HostRun(3 * 4096, 1, False), "what a failed write has left is no reason to leave the place empty"
    assert await allocator.allocate(1) == HostRun(4 * 4096, 1, True)


async def test_a_version_1_image_that_can_not_grow_is_full() -> None:
    """Behind the last offset that an entry can name there is no cluster: ENOSPC, and nothing is taken."""

    class Huge(MemoryStorage):
        def size(self) -> int:
            return (1 << 56) - 8 * KIB

    allocator = AppendAllocator(Huge(b""), 4096)
    with pytest.raises(OSError, match="cannot take another cluster") as caught:
        await allocator.allocate(3)
    assert caught.value.errno == errno.ENOSPC
    assert await allocator.allocate(2) == HostRun((1 << 56) - 8 * KIB, 2, True)
    with pytest.raises(OSError, match="cannot take another cluster"):
        await allocator.allocate(1)


async def test_a_shared_cluster_is_copied_and_the_snapshot_stays() -> None:
    """Every cluster that a snapshot shares is copied on its first write; QEMU reads the snapshot as before."""
    for cluster_size in (512, 4096):
        spec = ImageSpec(size=256 * KIB, cluster_size=cluster_size, fill=0.7, snapshot=True, zeroes=True)
        built = build_image(spec)
        memory = MemoryStorage(built.top, suspend=True)
        image = await open_memory_image({TOP: memory})
        oracle = bytearray(built.contents)
        for start in range(300, spec.size - 5000, 9001):
            await image.write(start, b"s" * 5000)
            oracle[start : start + 5000] = b"s" * 5000
        await image.aclose()
        files = {TOP: memory.data}
        code, output = qemu_check(files)
        assert code == 0, output
        assert qemu_read(files) == oracle
        assert qemu_read(files, snapshot="s1") == built.snapshot_contents
