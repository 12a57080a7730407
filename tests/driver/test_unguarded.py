"""Clusters that are in use though free by their refcounts: no write takes them, and the log says so once."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.driver.writing import unguarded
from qcowfuse.driver.writing.guarded_clusters import MetadataClusters
from qcowfuse.driver.writing.refcount_allocation import RefcountAllocator
from qcowfuse.driver.writing.unguarded import _free_in
from qcowfuse.errors import CorruptImageError, ReadOnlyImageError
from qcowfuse.format.entries import parse_table
from qcowfuse.format.refcounts import parse_refcounts, serialise_refcounts
from qcowfuse.storage.base import Storage
from tests.support.bitmaps import bitmap_directory
from tests.support.checker import check_image_bytes
from tests.support.faults import FaultyStorage, Hold, fail_at
from tests.support.images import (
    TOP,
    ImageSpec,
    build_image,
    open_memory_image,
    qemu_check,
    qemu_read,
    run_tool,
    scratch_folder,
    write_chain,
)
from tests.support.memory_storage import MemoryStorage

KIB = 1 << 10
CLUSTER = 4096
SIZE = 256 * KIB
OFFSET = (1 << 56) - 512
MAPPED = 96 * KIB
"""Guest bytes that may be data; the rest is free, for writes that want new clusters."""
WAYS = ["first", "behind", "by and by"]
"""The look is a part of the first write, goes on behind it, or does so with a map of a part of the file at a time."""


class Image:
    """An image in memory, and where its structures are. Its L2 table is the first; its counts have 16 bits."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.bits: int = struct.unpack_from(">I", data, 20)[0]
        self.size: int = 1 << self.bits
        self.l1 = self.word(40)
        self.l2 = self.word(self.l1) & OFFSET

    def word(self, position: int) -> int:
        """A big-endian number of 64 bits."""
        return int(struct.unpack_from(">Q", self.data, position)[0])

    def count_place(self, host_offset: int) -> int:
        """Where the count of a cluster stands."""
        block, index = divmod(host_offset >> self.bits, self.size // 2)
        return self.word(self.word(48) + 8 * block) + 2 * index

    def count(self, host_offset: int) -> int:
        """Of a cluster."""
        return int(struct.unpack_from(">H", self.data, self.count_place(host_offset))[0])

    def lose(self, host_offset: int) -> bytes:
        """Set the count of a cluster to 0; its bytes."""
        struct.pack_into(">H", self.data, self.count_place(host_offset), 0)
        start = host_offset & -self.size
        return bytes(self.data[start : start + self.size])

    def leak_and_free(self, n_clusters: int) -> None:
        """Clusters at the end of the file that are really free."""
        self.data += bytes(-len(self.data) % self.size + n_clusters * self.size)


def build(**spec: object) -> Image:
    """Data in the first part of the disk, and a few clusters that are really free."""
    image = Image(build_image(ImageSpec(cluster_size=CLUSTER, size=SIZE, **spec)).top)  # type: ignore[arg-type]
    image.leak_and_free(6)
    return image


def used(**spec: object) -> Image:
    """As :func:`build`, with data."""
    options: dict[str, object] = {"fill": 0.35, "seed": 3, **spec}
    return build(**options)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All ways."""
    if request.param != "first":
        monkeypatch.setattr(unguarded, "INLINE_BYTES", 0)
    if request.param == "by and by":
        monkeypatch.setattr(unguarded, "MAP_CLUSTERS", 7)
    return str(request.param)


async def fill(image: QcowImage) -> None:
    """Write until everything that may be taken has been; with a pause for the look."""
    for round_ in range(3):
        for start in range(0, SIZE, CLUSTER):
            extent = await image.find_extent(start, CLUSTER)
            if not extent[0]:
                await image.write(start, bytes([round_ + 1]) * (CLUSTER // 2))
        await image.flush()
        assert image.changes is not None
        assert image.changes.unguarded is not None
        await image.changes.unguarded.wait()
        for start in range(SIZE - 4 * CLUSTER, SIZE, CLUSTER):
            await image.write_zeroes(start, CLUSTER, unmap=True)
        await image.flush()
        await image.flush()


async def check_kept(damaged: Image, host_offset: int, before: bytes, caplog: pytest.LogCaptureFixture) -> bytearray:
    """After many writes the cluster has its bytes; one line in the log."""
    memory = MemoryStorage(bytes(damaged.data))
    image = await open_memory_image({TOP: memory})
    with caplog.at_level(logging.WARNING, "qcowfuse"):
        await fill(image)
    await image.aclose()
    start = host_offset & -damaged.size
    assert bytes(memory.data[start : start + damaged.size]) == before, "the cluster was overwritten"
    assert Image(bytes(memory.data)).count(host_offset) == 0
    said = [record.getMessage() for record in caplog.records if "free by their refcounts" in record.getMessage()]
    assert len(said) == 1
    assert "check -r all" in said[0]
    assert f"{start:#x}" in said[0]
    return memory.data


@pytest.mark.parametrize("spec", [{}, {"version": 2}, {"extended_l2": True, "cluster_size": 16384}], ids=str)
async def test_data(spec: dict[str, object], way: str, caplog: pytest.LogCaptureFixture) -> None:
    """A data cluster of the disk. What is really free is used, once all is known, and nothing leaks."""
    options = {"fill": 0.35, "seed": 3, "cluster_size": CLUSTER, "size": SIZE, **spec}
    damaged = Image(build_image(ImageSpec(**options)).top)  # type: ignore[arg-type]
    damaged.leak_and_free(6)
    step = 16 if spec.get("extended_l2") else 8
    entries = [damaged.word(damaged.l2 + step * index) & OFFSET for index in range(20)]
    host_offset = next(place for place in entries if place)
    before = damaged.lose(host_offset)
    after = await check_kept(damaged, host_offset, before, caplog)
    report = check_image_bytes(after)
    assert report.leaks == 0
    assert len(report.errors) <= 2, report
    first_free = len(damaged.data) - 6 * damaged.size
    assert any(after[first_free : len(damaged.data)]), "free clusters inside the file were not used"
    raw = qemu_read({TOP: bytes(damaged.data)})
    guest = next(index for index, place in enumerate(entries) if place) * damaged.size
    assert qemu_read({TOP: bytes(after)})[guest : guest + damaged.size] == raw[guest : guest + damaged.size]


async def test_compressed_data(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """Host clusters that several compressed clusters share."""
    damaged = used(compression="zlib")
    entry = next(word for index in range(40) if (word := damaged.word(damaged.l2 + 8 * index)) & 1 << 62)
    host_offset = entry & (1 << 58) - 1
    before = damaged.lose(host_offset)
    await check_kept(damaged, host_offset & -CLUSTER, before, caplog)


async def test_data_of_a_snapshot(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """What only a snapshot refers to, and the L2 table that says so."""
    damaged = used(snapshot=True)
    memory = MemoryStorage(bytes(damaged.data))
    image = await open_memory_image({TOP: memory})
    await image.write(0, b"n" * MAPPED)
    await image.aclose()
    changed = Image(bytes(memory.data))
    changed.leak_and_free(2)
    snapshot_l1 = changed.word(changed.word(64))
    snapshot_l2 = changed.word(snapshot_l1) & OFFSET
    assert snapshot_l2 != changed.l2
    data = next(word for index in range(20) if (word := changed.word(snapshot_l2 + 8 * index) & OFFSET))
    assert changed.count(data) == 1
    for host_offset in (data, snapshot_l2):
        damaged = Image(bytes(changed.data))
        before = damaged.lose(host_offset)
        caplog.clear()
        await check_kept(damaged, host_offset, before, caplog)


async def test_bitmaps(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """The table of a bitmap, and a cluster with its bits."""
    with scratch_folder() as folder:
        path = write_chain(folder, {TOP: build_image(ImageSpec(cluster_size=CLUSTER, size=SIZE)).top})
        run_tool("qemu-img", "bitmap", "--add", "-g", "512", path, "b")
        run_tool("qemu-img", "bitmap", "--disable", path, "b")
        run_tool("qemu-img", "bitmap", "--enable", path, "b")
        run_tool("qemu-io", "-f", "qcow2", "-c", "write 0 40k", path)
        whole = Image(Path(path).read_bytes())
    whole.leak_and_free(2)
    place = bitmap_directory(whole.data)
    assert place is not None
    table = whole.word(place[0])
    bits = whole.word(table) & OFFSET
    assert bits
    for host_offset in (table, bits):
        damaged = Image(bytes(whole.data))
        before = damaged.lose(host_offset)
        memory = MemoryStorage(bytes(damaged.data))
        image = await open_memory_image({TOP: memory})
        caplog.clear()
        with caplog.at_level(logging.WARNING, "qcowfuse"):
            await fill(image)
            assert memory.data[host_offset : host_offset + CLUSTER] == before
        assert sum("free by their refcounts" in record.getMessage() for record in caplog.records) == 1
        await image.aclose()


async def test_a_refcount_block_that_is_missing(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """No count at all for a part of the file, tables among it: a write may be refused, but nothing is overwritten."""
    damaged = Image(build_image(ImageSpec(cluster_size=512, size=SIZE, fill=1.0, refcount_bits=64)).top)
    table = damaged.word(48)
    number = next(n for n in range(2, 60) if damaged.word(table + 8 * n) and damaged.word(table + 8 * n + 8))
    struct.pack_into(">Q", damaged.data, table + 8 * number, 0)
    memory = MemoryStorage(bytes(damaged.data))
    image = await open_memory_image({TOP: memory})
    expected = bytearray(await image.read(0, SIZE))
    written = range(0, SIZE, 64 * KIB)
    with caplog.at_level(logging.WARNING, "qcowfuse"), suppress(CorruptImageError, ReadOnlyImageError):
        for start in written:
            await image.write_zeroes(start, 4 * KIB, unmap=True)
        await image.flush()
        assert image.changes is not None
        assert image.changes.unguarded is not None
        await image.changes.unguarded.wait()
        for start in written:
            await image.write(start, b"n" * 4 * KIB)
    with suppress(CorruptImageError):
        await image.aclose()
    found = bytearray(qemu_read({TOP: bytes(memory.data)}))
    for start in written:
        assert found[start : start + 4 * KIB] in (b"n" * 4 * KIB, bytes(4 * KIB), expected[start : start + 4 * KIB])
        found[start : start + 4 * KIB] = expected[start : start + 4 * KIB]
    assert found == expected
    assert sum("free by their refcounts" in record.getMessage() for record in caplog.records) == 1


async def test_a_new_refcount_block_goes_beside_what_is_in_use() -> None:
    """A range without a block, whose first clusters are in use: the block and clusters lie behind them."""
    data = bytearray(build_image(ImageSpec(cluster_size=512, size=SIZE, refcount_bits=64)).top)
    table_offset, n_clusters = struct.unpack_from(">QI", data, 48)
    table = parse_table(data[table_offset : table_offset + 512 * n_clusters])
    allocator = RefcountAllocator(
        MemoryStorage(bytes(data)),
        cluster_bits=9,
        refcount_order=6,
        table=table,
        table_offset=table_offset,
        metadata=MetadataClusters(9),
    )
    in_use = frozenset({*range(64, 70), 75, 128, 129})
    allocator.hold_back(100)
    held = await allocator.allocate(1)
    assert held.host_offset >= 100 << 9
    allocator.let_in(in_use)
    taken: set[int] = {held.host_offset >> 9}
    for _ in range(40):
        run = await allocator.allocate(7)
        clusters = set(range(run.host_offset >> 9, (run.host_offset >> 9) + run.n_clusters))
        assert not clusters & (taken | in_use)
        taken |= clusters
    blocks = {entry >> 9 for entry in table if entry}
    assert len(blocks) >= 4
    assert not blocks & (taken | in_use)
    assert {70, 74, 76} & taken, "clusters beside them are not used"


async def test_a_sound_image_is_as_compact_as_ever(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """What is free inside the file is used once it is known, nothing leaks, and nobody is told anything."""
    image_file = used()
    memory = MemoryStorage(bytes(image_file.data))
    image = await open_memory_image({TOP: memory})
    await fill(image)
    length = len(memory.data)
    for number in range(20):
        await image.write_zeroes(0, MAPPED, unmap=True)
        await image.flush()
        await image.flush()
        await image.write(0, bytes([number + 1]) * MAPPED)
        await image.flush()
    assert len(memory.data) <= length + MAPPED, "space is not used again"
    await image.aclose()
    assert check_image_bytes(memory.data).exit_code == 0
    assert qemu_check({TOP: bytes(memory.data)})[0] == 0
    assert not caplog.records


async def test_of_the_counts_only_those_of_the_file_are_read() -> None:
    """A block counts 32,768 clusters; the image has few, and its first write waits for the look at them."""
    built = build_image(ImageSpec(size=256 * KIB, cluster_size=64 * KIB, fill=0.5))
    made: list[FaultyStorage] = []

    def wrap(inner: MemoryStorage) -> FaultyStorage:
        made.append(FaultyStorage(inner))
        return made[0]

    image = await open_memory_image({TOP: MemoryStorage(built.top)}, wrap=wrap)
    opened = Image(built.top)
    block = opened.word(opened.word(48))
    made[0].operations.clear()
    await image.write(0, b"x" * 64 * KIB)
    look = next(operation for operation in made[0].operations if operation.kind == "read")
    assert (look.host_offset, look.n_bytes) == (block, 2 * (len(built.top) // opened.size))
    await image.aclose()


@pytest.mark.parametrize("n_clusters", [1, 4])
async def test_what_is_freed_opens_no_way_into_the_file(n_clusters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look was given up. A discard frees clusters, one or a run of them; behind them lies one that is in use and
    not counted: no write takes it."""
    monkeypatch.setattr(unguarded, "MAX_FILE_CLUSTERS", 0)
    damaged = build(fill=1.0)
    places = [damaged.word(damaged.l2 + 8 * number) & OFFSET for number in range(SIZE // CLUSTER)]
    run = next(
        n for n in range(8, 50) if places[n : n + n_clusters] == [places[n] + i * CLUSTER for i in range(n_clusters)]
    )
    victim = max(places)
    before = damaged.lose(victim)
    memory = MemoryStorage(bytes(damaged.data))
    image = await open_memory_image({TOP: memory})
    await image.write_zeroes(run * CLUSTER, n_clusters * CLUSTER, unmap=True)
    await image.flush()
    await image.flush()
    for _ in range(4):
        await image.write(run * CLUSTER, b"n" * n_clusters * CLUSTER)
        await image.write_zeroes(run * CLUSTER, n_clusters * CLUSTER, unmap=True)
    await image.aclose()
    assert bytes(memory.data[victim : victim + CLUSTER]) == before


async def test_until_it_is_known_the_file_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the look goes on, nothing inside the file is taken; it is given up when the image is closed."""
    monkeypatch.setattr(unguarded, "INLINE_BYTES", 0)
    image_file = used()
    memory = MemoryStorage(bytes(image_file.data), suspend=True)
    faulty: list[FaultyStorage] = []
    hold = Hold(lambda operation: operation.kind == "read" and operation.host_offset == image_file.l2)

    def wrap(inner: MemoryStorage) -> Storage:
        faulty.append(FaultyStorage(inner, inline=False))
        return faulty[0]

    image = await open_memory_image({TOP: memory}, wrap=wrap)
    await image.read(0, SIZE)
    holes = [start for start in range(0, SIZE, CLUSTER) if not (await image.find_extent(start, CLUSTER))[0]]
    faulty[0].gate = hold
    for start in holes[:8]:
        await image.write(start, b"n" * CLUSTER)
    await hold.reached.wait()
    inside = bytes(memory.data[: len(image_file.data)])
    assert b"n" * CLUSTER not in inside
    assert memory.data.count(b"n" * CLUSTER) == 8
    await image.aclose()
    assert check_image_bytes(memory.data).exit_code == 0


@pytest.mark.parametrize("limit", ["MAX_FOUND", "MAX_FILE_CLUSTERS", "MAX_TABLES"])
async def test_beyond_a_limit_the_file_grows(
    limit: str, way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """More than can be kept in mind: no free cluster is used, the log says so, and the data stays."""
    damaged = used()
    host_offset = next(word for index in range(20) if (word := damaged.word(damaged.l2 + 8 * index) & OFFSET))
    before = damaged.lose(host_offset)
    monkeypatch.setattr(unguarded, limit, 0)
    memory = MemoryStorage(bytes(damaged.data))
    image = await open_memory_image({TOP: memory})
    with caplog.at_level(logging.WARNING, "qcowfuse"):
        await fill(image)
    await image.aclose()
    assert bytes(memory.data[host_offset : host_offset + CLUSTER]) == before
    assert bytes(memory.data[len(damaged.data) - 6 * CLUSTER : len(damaged.data)]) == bytes(6 * CLUSTER)
    assert sum("the image grows" in record.getMessage() for record in caplog.records) == 1
    assert check_image_bytes(memory.data).leaks == 0


async def test_a_read_error_keeps_free_clusters_free(caplog: pytest.LogCaptureFixture) -> None:
    """The write itself succeeds, and what could not be looked at is left alone."""
    damaged = used()
    faulty: list[FaultyStorage] = []

    def wrap(inner: MemoryStorage) -> Storage:
        faulty.append(FaultyStorage(inner, inline=False))
        return faulty[0]

    memory = MemoryStorage(bytes(damaged.data), suspend=True)
    image = await open_memory_image({TOP: memory}, wrap=wrap)
    await image.read(0, SIZE)
    faulty[0].operations.clear()
    faulty[0].check = fail_at(1)
    with caplog.at_level(logging.WARNING, "qcowfuse"):
        await image.write(SIZE - CLUSTER, b"n" * CLUSTER)
    assert memory.data.find(b"n" * CLUSTER) >= len(damaged.data)
    assert any("the image grows" in record.getMessage() for record in caplog.records)
    await image.aclose()
    assert check_image_bytes(memory.data).exit_code == 0


def counts_of(order: int) -> Iterator[list[int]]:
    """Counts with zeroes among them."""
    largest = (1 << (1 << order)) - 1
    yield [0, 1, largest, 0, 0, 1, 1, largest] * 64
    yield [1] * 512
    if order >= 4:
        yield [256, 0, 1, 256, largest - 255, 0, 0, 512] * 64


@pytest.mark.parametrize("order", range(7))
def test_counts_of_every_width(order: int) -> None:
    """Which are 0, as told from their columns of bytes."""
    for counts in counts_of(order):
        block = parse_refcounts(bytes(len(counts) << order >> 3), order)
        for index, count in enumerate(counts):
            block[index] = count
        packed = serialise_refcounts(block, order, 0, len(counts))
        assert _free_in(packed, order) == bytes(not count for count in counts)
