"""Growing a disk: what was there stays, the rest is zeroes, the image is clean, QEMU agrees."""

from __future__ import annotations

import errno
import random

import pytest
import trio

from qcowfuse.errors import ImageUsageError, ReadOnlyImageError
from tests.support.checker import check_image_bytes
from tests.support.images import (
    TOP,
    ImageSpec,
    build_image,
    open_memory_image,
    qemu_check,
    qemu_read,
)
from tests.support.memory_storage import MemoryStorage

KIB = 1 << 10
MIB = 1 << 20
SPECS = {
    "v3": ImageSpec(fill=0.5),
    "v3 64k": ImageSpec(cluster_size=65536, size=300 * KIB, fill=0.5),
    "v2": ImageSpec(version=2, fill=0.5),
    "v1": ImageSpec(version=1, fill=0.5),
    "refcount-64": ImageSpec(refcount_bits=64, fill=0.5),
    "odd end": ImageSpec(size=255 * KIB + 512, cluster_size=4096, fill=1.0),
    "empty": ImageSpec(size=0),
    "v1 long backing": ImageSpec(version=1, size=100 * KIB, backing="raw", backing_size=300 * KIB),
    "v2 long backing": ImageSpec(version=2, size=99 * KIB + 512, backing="qcow2", backing_size=300 * KIB),
    "v3 long backing": ImageSpec(size=99 * KIB + 512, cluster_size=4096, backing="raw", backing_size=300 * KIB),
    "v3 huge backing": ImageSpec(size=20 * KIB, backing="qcow2", backing_size=900 * KIB, fill=0.3),
    "snapshot": ImageSpec(fill=0.6, snapshot=True),
    "extended": ImageSpec(size=300 * KIB, cluster_size=16384, extended_l2=True, fill=0.4, zeroes=True),
    "extended long backing": ImageSpec(
        size=70 * KIB, cluster_size=16384, extended_l2=True, backing="raw", backing_size=300 * KIB
    ),
    "zlib": ImageSpec(cluster_size=4096, size=255 * KIB, fill=0.8, compression="zlib"),
}


@pytest.mark.parametrize("spec", SPECS)
async def test_a_grown_disk_is_what_it_was_and_zeroes(spec: str) -> None:
    """Grown thrice with writes between, within a cluster, over an L1 entry and over the L1 table's cluster."""
    built = build_image(SPECS[spec])
    memory = MemoryStorage(built.top)
    image = await open_memory_image({**built.files, TOP: memory})
    expected = bytearray(built.contents)
    chooser = random.Random(3)
    for size in (built.spec.size + 512, built.spec.size + 100 * KIB + 1000, 5 * MIB):
        await image.grow(size)
        expected.extend(bytes(-(-size // 512) * 512 - len(expected)))
        assert image.size == len(expected)
        assert bytes(await image.read(0, image.size)) == expected
        for _ in range(12):
            data = chooser.randbytes(chooser.randint(1, 9000))
            offset = chooser.randrange(max(1, image.size - len(data)))
            data = data[: image.size - offset]
            await image.write(offset, data)
            expected[offset : offset + len(data)] = data
        assert bytes(await image.read(0, image.size)) == expected
    await image.aclose()
    files = {**built.files, TOP: bytes(memory.data)}
    report = check_image_bytes(memory.data)
    assert not report.errors, report.errors[:3]
    if built.spec.version > 1:
        assert not report.leaks
        assert qemu_check(files)[0] == 0, qemu_check(files)[1]
    assert qemu_read(files, format_name="qcow" if built.spec.version == 1 else "qcow2") == expected
    if built.snapshot_contents is not None:
        # qemu-img shows a snapshot in the size of the active disk.
        assert qemu_read(files, snapshot="s1") == built.snapshot_contents.ljust(len(expected), b"\0")
    again = await open_memory_image(files)
    assert again.size == len(expected)
    assert bytes(await again.read(0, again.size)) == expected
    await again.aclose()


async def test_a_large_l1_table_finds_a_place_among_small_clusters() -> None:
    """An L1 table that spans several ranges of refcount blocks is contiguous, and the image stays clean."""
    built = build_image(SPECS["refcount-64"])
    memory = MemoryStorage(built.top)
    image = await open_memory_image({**built.files, TOP: memory})
    await image.grow(1 << 30)
    await image.write((1 << 30) - 100, b"e" * 100)
    await image.grow(3 << 30)
    await image.write((3 << 30) - 100, b"f" * 100)
    await image.aclose()
    files = {**built.files, TOP: bytes(memory.data)}
    report = check_image_bytes(memory.data)
    assert (report.errors, report.leaks) == ([], 0)
    code, said = qemu_check(files)
    assert code == 0, said
    again = await open_memory_image(files, read_only=True)
    assert bytes(await again.read((1 << 30) - 100, 100)) == b"e" * 100
    assert bytes(await again.read((3 << 30) - 100, 100)) == b"f" * 100
    assert bytes(await again.read(0, len(built.contents))) == built.contents
    await again.aclose()


async def test_what_lies_behind_the_end_never_shows() -> None:
    """Data in an L2 table behind the end of the disk, and in a longer L1 table (the state of a machine), is gone
    when the disk grows over it; so is the rest of the last cluster."""
    built = build_image(ImageSpec(size=100 * KIB, fill=1.0))
    top = bytearray(built.top)
    small = 40 * KIB + 512  # one and a quarter L2 tables; the L1 table keeps its four entries
    top[24:32] = small.to_bytes(8, "big")
    memory = MemoryStorage(top)
    image = await open_memory_image({**built.files, TOP: memory})
    assert image.size == small
    await image.grow(80 * KIB)
    expected = built.contents[:small].ljust(80 * KIB, b"\0")
    assert bytes(await image.read(0, image.size)) == expected
    await image.grow(120 * KIB)
    expected = expected.ljust(120 * KIB, b"\0")
    assert bytes(await image.read(0, image.size)) == expected
    await image.aclose()
    data = bytes(memory.data)
    report = check_image_bytes(data)
    assert (report.errors, report.leaks) == ([], 0)
    assert qemu_read({**built.files, TOP: data}) == expected


@pytest.mark.parametrize(
    ("spec", "size", "code"),
    [
        ("v3", 1 << 40, errno.EFBIG),
        ("v1", 1 << 50, errno.EFBIG),
        ("v3 64k", 1 << 62, errno.EFBIG),
        ("v3 64k", (1 << 63) + 5, errno.EFBIG),
    ],
)
async def test_a_disk_that_no_l1_table_can_map_is_refused(spec: str, size: int, code: int) -> None:
    """More than 32 MiB of L1 table, or 2^63 bytes: EFBIG, and nothing is written."""
    built = build_image(SPECS[spec])
    memory = MemoryStorage(built.top)
    image = await open_memory_image({**built.files, TOP: memory})
    with pytest.raises(OSError, match=r"32 MiB|2\^63") as caught:
        await image.grow(size)
    assert caught.value.errno == code
    assert image.size == built.spec.size
    await image.aclose()
    assert memory.data == built.top


async def test_the_largest_disk_of_64k_clusters() -> None:
    """2 PiB is what an L1 table of 32 MiB maps; nothing about it takes long."""
    built = build_image(SPECS["v3 64k"])
    memory = MemoryStorage(built.top)
    image = await open_memory_image({**built.files, TOP: memory})
    await image.count_allocated()
    before = image.allocated_bytes()
    await image.grow(1 << 51)
    await image.write((1 << 51) - 3, b"end")
    assert bytes(await image.read((1 << 51) - 5, 5)) == b"\0\0end"
    rest_of_last_cluster = 20 * KIB
    assert image.allocated_bytes() == before + rest_of_last_cluster + (1 << 16)
    await image.aclose()
    assert check_image_bytes(memory.data).exit_code == 0


async def test_version_2_with_snapshots_cannot_grow() -> None:
    """A snapshot of version 2 has no size of its own; QEMU refuses as well."""
    built = build_image(ImageSpec(version=2, fill=0.5, snapshot=True))
    image = await open_memory_image(built.files)
    with pytest.raises(OSError, match="snapshots") as caught:
        await image.grow(built.spec.size + 512)
    assert caught.value.errno == errno.EOPNOTSUPP
    await image.aclose()


async def test_what_growing_refuses() -> None:
    """A smaller disk, and a read-only image; the same size is nothing."""
    built = build_image(SPECS["v3"])
    memory = MemoryStorage(built.top)
    image = await open_memory_image({**built.files, TOP: memory})
    with pytest.raises(ImageUsageError, match="smaller"):
        await image.grow(built.spec.size - 512)
    await image.grow(built.spec.size - 100)
    await image.aclose()
    assert memory.data == built.top
    image = await open_memory_image(built.files, read_only=True)
    with pytest.raises(ReadOnlyImageError):
        await image.grow(built.spec.size + 512)
    await image.aclose()


@pytest.mark.parametrize("spec", ["v3", "v1", "snapshot"])
async def test_writes_go_on_while_the_disk_grows(spec: str) -> None:
    """Writers and readers in flight never see anything but their own data, and none of it is lost."""
    built = build_image(SPECS[spec])
    memory = MemoryStorage(built.top, suspend=True)
    image = await open_memory_image({**built.files, TOP: memory})
    expected = bytearray(built.contents)
    done = False

    async def write(start: int, seed: int) -> None:
        chooser = random.Random(seed)
        while not done:
            offset = start + chooser.randrange(40 * KIB)
            data = chooser.randbytes(chooser.randint(1, 3000))
            await image.write(offset, data)
            expected[offset : offset + len(data)] = data
            assert bytes(await image.read(offset, len(data))) == data

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(write, number * 60 * KIB, number)
        for size in (300 * KIB, 301 * KIB, 900 * KIB, 3 * MIB):
            await image.grow(size)
            expected.extend(bytes(size - len(expected)))
            await image.write(size - 5, b"tails")
            expected[size - 5 : size] = b"tails"
        done = True
    assert bytes(await image.read(0, image.size)) == expected
    await image.aclose()
    report = check_image_bytes(memory.data)
    assert not report.errors
    assert qemu_read({TOP: bytes(memory.data)}, format_name="qcow" if spec == "v1" else "qcow2") == expected
