"""Version 1: entries that point at the header or at a table are not written through, whatever they are."""

from __future__ import annotations

import struct
from array import array
from contextlib import suppress

import pytest

from qcowfuse.driver.writing import guarded_clusters
from qcowfuse.driver.writing.guarded_clusters_v1 import MetadataV1
from qcowfuse.errors import CorruptImageError, ReadOnlyImageError
from tests.support.images import TOP, ImageSpec, build_image, open_memory_image, qemu_read
from tests.support.memory_storage import MemoryStorage

KIB = 1 << 10
CLUSTER = 4096
L2_BITS = 6
TABLE = 8 << L2_BITS
SPAN = CLUSTER << L2_BITS
SIZE = 8 * SPAN
L1 = 48


async def image_with_tables() -> bytearray:
    """Two L2 tables with data, L2 tables smaller than a cluster."""
    built = build_image(ImageSpec(version=1, cluster_size=CLUSTER, size=SIZE, l2_bits=L2_BITS))
    memory = MemoryStorage(built.top)
    image = await open_memory_image({TOP: memory})
    await image.write(0, b"a" * 4 * CLUSTER)
    await image.write(2 * SPAN, b"b" * 4 * CLUSTER)
    await image.aclose()
    return bytearray(memory.data)


def word(data: bytearray, position: int) -> int:
    """A big-endian number of 64 bits."""
    return int(struct.unpack_from(">Q", data, position)[0])


def places(data: bytearray) -> dict[str, int]:
    """Host offsets that no guest data may have."""
    first, second = word(data, L1), word(data, L1 + 16)
    return {
        "first table": first,
        "second table": second,
        "a sector before a table": first - 512,
    }


@pytest.mark.parametrize("place", ["first table", "second table", "a sector before a table"])
@pytest.mark.parametrize("kind", ["set", "array"])
async def test_data_on_a_table(place: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest write is refused, the image is read-only, and not a byte of the file has changed."""
    if kind == "array":
        monkeypatch.setattr(guarded_clusters, "MAX_IN_SET", 0)
    data = await image_with_tables()
    host_offset = places(data)[place]
    struct.pack_into(">Q", data, word(data, L1) + 8, host_offset)
    memory = MemoryStorage(bytes(data))
    image = await open_memory_image({TOP: memory})
    await image.write(8 * CLUSTER, b"first")  # from now on writes may be answered at once
    before = bytes(memory.data)
    block = b"x" * CLUSTER
    with pytest.raises(CorruptImageError, match="metadata"):
        await image.write(CLUSTER, block)
    with pytest.raises(ReadOnlyImageError):
        await image.write(8 * CLUSTER, b"second")
    assert bytes(memory.data) == before
    with suppress(CorruptImageError):
        await image.aclose()


async def test_data_on_the_l1_table() -> None:
    """Of a disk that is large enough for its table to be seen from any sector."""
    size = 600 * SPAN
    built = build_image(ImageSpec(version=1, cluster_size=CLUSTER, size=size, l2_bits=L2_BITS))
    memory = MemoryStorage(built.top)
    image = await open_memory_image({TOP: memory})
    await image.write(0, b"a" * 4 * CLUSTER)
    await image.aclose()
    for host_offset in (512, 4096):
        data = bytearray(memory.data)
        struct.pack_into(">Q", data, word(data, L1) + 8, host_offset)
        damaged = MemoryStorage(bytes(data))
        image = await open_memory_image({TOP: damaged})
        await image.write(8 * CLUSTER, b"first")
        before = bytes(damaged.data)
        with pytest.raises(CorruptImageError, match="metadata"):
            await image.write(CLUSTER, b"x" * CLUSTER)
        assert bytes(damaged.data) == before
        await image.aclose()


async def test_tables_on_tables() -> None:
    """An L2 table of two L1 entries, and one on the L1 table: neither is written."""
    for value in ("shared", "on L1"):
        data = await image_with_tables()
        struct.pack_into(">Q", data, L1 + 8, word(data, L1) if value == "shared" else L1)
        memory = MemoryStorage(bytes(data))
        image = await open_memory_image({TOP: memory})
        with pytest.raises(CorruptImageError, match="on top of other metadata"):
            await image.write(SPAN + 5 * CLUSTER, b"x")
        assert bytes(memory.data) == data
        await image.aclose()


async def test_neighbours_of_tables_are_written() -> None:
    """Data right before, right behind and in the same cluster as a table is none of its business."""
    data = await image_with_tables()
    data += bytes(-len(data) % CLUSTER + 2 * CLUSTER)
    first = word(data, L1)
    assert first % CLUSTER == 0
    # The first table moves into the middle of a cluster at the end, between two clusters of data.
    end = len(data)
    data += bytes(4 * CLUSTER)
    moved = end + CLUSTER + 512
    data[moved : moved + TABLE] = data[first : first + TABLE]
    struct.pack_into(">Q", data, L1, moved)
    struct.pack_into(">Q", data, moved + 8, moved - CLUSTER)
    struct.pack_into(">Q", data, moved + 16, moved + 512)
    memory = MemoryStorage(bytes(data))
    image = await open_memory_image({TOP: memory})
    await image.write(CLUSTER, b"1" * CLUSTER + b"2" * CLUSTER)
    assert bytes(await image.read(CLUSTER, 2 * CLUSTER)) == b"1" * CLUSTER + b"2" * CLUSTER
    await image.aclose()
    assert memory.data[moved - CLUSTER : moved] == b"1" * CLUSTER
    assert memory.data[moved : moved + TABLE] == data[moved : moved + TABLE]
    assert qemu_read({TOP: bytes(memory.data)}, format_name="qcow")[: 3 * CLUSTER].count(b"2") == CLUSTER


async def test_new_clusters_come_behind_all_tables() -> None:
    """A table that reaches past the end of the file keeps its place."""
    data = await image_with_tables()
    table = len(data) + -len(data) % CLUSTER + CLUSTER - 64
    data += bytes(table - len(data)) + bytes(8)
    struct.pack_into(">Q", data, L1 + 8, table)
    memory = MemoryStorage(bytes(data))
    image = await open_memory_image({TOP: memory})
    await image.write(5 * CLUSTER, b"x" * CLUSTER)
    await image.write(SPAN, b"y" * CLUSTER)
    await image.aclose()
    assert word(memory.data, word(memory.data, L1) + 40) >= table + TABLE
    assert qemu_read({TOP: bytes(memory.data)}, format_name="qcow")[SPAN : SPAN + CLUSTER] == b"y" * CLUSTER


@pytest.mark.parametrize("kind", ["set", "array"])
def test_bytes_are_told_exactly(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sector of a small file against a model; what the hot path is told is never too little."""
    if kind == "array":
        monkeypatch.setattr(guarded_clusters, "MAX_IN_SET", 0)
    tables = [1 << 10, 5 << 10, 13 << 9]
    known = MetadataV1(10, head=[(0, 48), (48, 64)], tables=array("Q", sorted(tables)), table_size=512)
    known.add(20 << 10, 512)
    known.add(30 << 10, 512)
    known.discard(30 << 10, 512)
    assert not known.shared
    taken = set(range(64)) | {byte for table in [*tables, 20 << 10] for byte in range(table, table + 512)}
    for start in range(0, 32 << 10, 512):
        is_free = taken.isdisjoint(range(start, start + 1024))
        if is_free:
            known.check(start, 1024, "data")
        else:
            with pytest.raises(CorruptImageError):
                known.check(start, 1024, "data")
            assert not known.clusters.isdisjoint(range(start >> 10, (start >> 10) + 1))


@pytest.mark.parametrize("kind", ["set", "array"])
@pytest.mark.parametrize("l2_bits", [9, 6], ids=["tables of 8 clusters", "of one"])
async def test_an_l1_table_that_has_moved(l2_bits: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the disk has grown, its new place is guarded, all of it and no more, however long L2 tables are: the
    clusters behind it are taken for data, which is written again in place."""
    if kind == "array":
        monkeypatch.setattr(guarded_clusters, "MAX_IN_SET", 0)
    memory = MemoryStorage(build_image(ImageSpec(version=1, cluster_size=512, size=256 * KIB, l2_bits=l2_bits)).top)
    image = await open_memory_image({TOP: memory})
    await image.write(16 * KIB, b"a" * 2 * KIB)
    before = word(memory.data, 40)
    await image.grow(3 << 20)
    l1_table, n_bytes = word(memory.data, 40), 8 * -(-(3 << 20) // (512 << l2_bits))
    assert l1_table != before
    assert image.changes is not None
    for place in range(l1_table, l1_table + n_bytes, 256):
        with pytest.raises(CorruptImageError):
            image.changes.metadata.check(place, 1, "data")
    for number in range(3):
        await image.write(65 * KIB, bytes([number + 1]) * 8 * KIB)
        await image.write_zeroes(68 * KIB, KIB, unmap=False)
    await image.aclose()
    read = qemu_read({TOP: bytes(memory.data)}, format_name="qcow")
    assert read[65 * KIB : 73 * KIB] == b"\3" * 3 * KIB + bytes(KIB) + b"\3" * 4 * KIB
    assert read[16 * KIB : 18 * KIB] == b"a" * 2 * KIB
    assert len(read) == 3 << 20
