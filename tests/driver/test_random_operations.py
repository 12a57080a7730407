"""Random operations on every format and refcount width against a bytearray."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcowfuse.driver.options import L2CacheSize
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.errors import OutOfRangeError, ReadOnlyImageError
from tests.support.checker import check_image_bytes
from tests.support.images import TOP, ImageSpec, build_image, open_memory_image, qemu_check, qemu_read
from tests.support.memory_storage import MemoryStorage
from tests.support.powercut import read_image

KIB = 1 << 10
SIZE = 192 * KIB + 512

SPECS = {
    "v1": ImageSpec(version=1, size=SIZE),
    "v1-l2-8": ImageSpec(version=1, size=SIZE, cluster_size=1024, l2_bits=8),
    "v1-large": ImageSpec(version=1, size=SIZE, cluster_size=65536, l2_bits=6),
    "v1-tables-larger-than-clusters": ImageSpec(version=1, size=SIZE, cluster_size=512, l2_bits=8),
    "v1-backing": ImageSpec(version=1, size=SIZE, cluster_size=4096, backing="raw", backing_size=90 * KIB + 512),
    "v1-compressed": ImageSpec(version=1, size=192 * KIB, cluster_size=4096, compression="zlib", fill=0.6),
    "v2": ImageSpec(version=2, size=SIZE, fill=0.4),
    "v2-64k": ImageSpec(version=2, size=SIZE, cluster_size=65536),
    "v2-snapshot": ImageSpec(version=2, size=SIZE, fill=0.6, snapshot=True),
    "v2-compressed": ImageSpec(version=2, size=192 * KIB, fill=0.6, compression="zlib"),
    "v3-snapshot": ImageSpec(size=SIZE, fill=0.6, snapshot=True, zeroes=True),
    "v3-zeroes": ImageSpec(size=SIZE, fill=0.6, zeroes=True),
    "v3-zlib": ImageSpec(size=192 * KIB, cluster_size=2048, fill=0.7, compression="zlib", snapshot=True),
    "v3-zstd": ImageSpec(size=192 * KIB, cluster_size=4096, fill=0.7, compression="zstd"),
    "v3-64k": ImageSpec(size=1 << 20, cluster_size=65536, fill=0.3),
    "v3-backing-qcow": ImageSpec(size=SIZE, backing="qcow", backing_size=100 * KIB),
    "v3-backing-qcow2": ImageSpec(size=SIZE, cluster_size=4096, backing="qcow2", backing_size=100 * KIB, fill=0.2),
    "v3-backing-raw": ImageSpec(size=SIZE, backing="raw", backing_size=77 * KIB + 512),
    "extended": ImageSpec(size=1 << 20, cluster_size=16384, extended_l2=True, fill=0.3),
    "extended-zeroes": ImageSpec(size=512 * KIB + 512, cluster_size=16384, extended_l2=True, fill=0.6, zeroes=True),
    "extended-snapshot": ImageSpec(
        size=512 * KIB, cluster_size=16384, extended_l2=True, fill=0.6, zeroes=True, snapshot=True
    ),
    "extended-zstd": ImageSpec(size=512 * KIB, cluster_size=32768, extended_l2=True, fill=0.7, compression="zstd"),
    "extended-backing": ImageSpec(
        size=512 * KIB, cluster_size=16384, extended_l2=True, backing="qcow2", backing_size=300 * KIB
    ),
    **{f"v3-refcount-{1 << order}": ImageSpec(size=SIZE, fill=0.3, refcount_bits=1 << order) for order in range(7)},
}

Operation = tuple[str, int, int, int]


@st.composite
def operation_lists(draw: st.DrawFn) -> Sequence[Operation]:
    """Operations with positions in parts of a million of the disk, so that they suit every size."""
    kinds = st.sampled_from(["write", "write", "write", "read", "flush", "reopen", "zero", "discard"])
    lengths = st.one_of(st.integers(1, 600), st.integers(1, 9000), st.sampled_from([512, 4096, 40_000]))
    one = st.tuples(kinds, st.integers(0, 1_000_000), lengths, st.integers(0, 255))
    return draw(st.lists(one, min_size=1, max_size=25))


async def perform(
    operations: Sequence[Operation], spec: ImageSpec, *, suspend: bool, cache: L2CacheSize | None
) -> None:
    """Do ``operations`` on an image and on a bytearray; compare; check what is left."""
    built = build_image(spec)
    memory = MemoryStorage(built.top, suspend=suspend)
    files: dict[str, bytes | MemoryStorage] = {**built.files, TOP: memory}
    oracle = bytearray(built.contents)
    image: QcowImage = await open_memory_image(files, cache=cache)
    for kind, place, n_bytes, value in operations:
        offset = place * image.size // 1_000_001
        n_bytes = min(n_bytes, image.size - offset)
        if kind == "write":
            data = random.Random(value).randbytes(n_bytes)
            await image.write(offset, memoryview(data))
            oracle[offset : offset + n_bytes] = data
        elif kind in ("zero", "discard"):
            n_bytes = min(n_bytes * (1 + value % 16), image.size - offset)
            is_discard, is_at_once = kind == "discard", (offset + n_bytes) // 512 % 2 == 0
            if not (is_at_once and image.try_write_zeroes(offset, n_bytes, unmap=is_discard)):
                await image.write_zeroes(offset, n_bytes, unmap=is_discard)
            oracle[offset : offset + n_bytes] = bytes(n_bytes)
        elif kind == "read":
            assert await read_image(image, offset, n_bytes) == oracle[offset : offset + n_bytes]
        elif kind == "flush":
            await image.flush()
        else:
            await image.aclose()
            memory.closed = False
            image = await open_memory_image(files, cache=cache)
    assert await read_image(image, 0, image.size) == oracle
    await image.aclose()
    report = check_image_bytes(memory.data)
    assert report.exit_code == 0, report
    read_only = await open_memory_image({**built.files, TOP: bytes(memory.data)}, read_only=True)
    assert await read_image(read_only, 0, read_only.size) == oracle
    if built.snapshot_contents is not None:
        chain = {**built.files, TOP: bytes(memory.data)}
        assert qemu_read(chain, snapshot="s1") == built.snapshot_contents


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    operations=operation_lists(),
    suspend=st.booleans(),
    n_tables=st.sampled_from([None, 0, 1, 2]),
)
async def test_any_operations_read_back_as_from_a_bytearray(
    name: str, operations: Sequence[Operation], suspend: bool, n_tables: int | None
) -> None:
    """Whatever is written is read back, in any format, and the closed image has no leak and no damage."""
    cache = None if n_tables is None else L2CacheSize(n_tables=n_tables)
    await perform(operations, SPECS[name], suspend=suspend, cache=cache)


@pytest.mark.parametrize("name", SPECS)
async def test_qemu_agrees_after_many_writes(name: str) -> None:
    """After some hundred writes, fsyncs and reopens QEMU reads the same bytes and finds nothing to repair."""
    spec = SPECS[name]
    built = build_image(spec)
    memory = MemoryStorage(built.top)
    files: dict[str, bytes | MemoryStorage] = {**built.files, TOP: memory}
    oracle = bytearray(built.contents)
    chooser = random.Random(name)
    image = await open_memory_image(files)
    for number in range(300):
        n_bytes = chooser.choice([1, 511, 512, 700, 4096, 20_000])
        offset = chooser.randrange(image.size - n_bytes)
        data = chooser.randbytes(n_bytes)
        await image.write(offset, data)
        oracle[offset : offset + n_bytes] = data
        if number % 5 == 0:
            n_bytes = chooser.choice([512, 5000, 70_000])
            offset = chooser.randrange(image.size - n_bytes)
            await image.write_zeroes(offset, n_bytes, unmap=number % 2 == 0)
            oracle[offset : offset + n_bytes] = bytes(n_bytes)
        if number % 23 == 0:
            await image.flush()
        if number % 90 == 89:
            await image.aclose()
            memory.closed = False
            image = await open_memory_image(files)
    await image.aclose()
    chain = {**built.files, TOP: bytes(memory.data)}
    assert qemu_read(chain, format_name="qcow" if spec.version == 1 else "qcow2") == oracle
    if spec.version > 1:
        code, output = qemu_check(chain)
        assert code == 0, output
    if built.snapshot_contents is not None:
        assert qemu_read(chain, snapshot="s1") == built.snapshot_contents


async def test_requests_outside_the_disk_are_refused() -> None:
    """Past the end, before the start: OutOfRangeError, nothing written."""
    built = build_image(ImageSpec(fill=0.5))
    memory = MemoryStorage(built.top)
    image = await open_memory_image({TOP: memory})
    size = image.size
    await image.write(0, b"x")
    before = bytes(memory.data)
    for offset, n_bytes in [(size, 1), (size - 1, 2), (-1, 1), (-512, 512), (size + (1 << 40), 1), (0, size + 1)]:
        with pytest.raises(OutOfRangeError):
            await image.read(offset, n_bytes)
        with pytest.raises(OutOfRangeError):
            await image.write(offset, bytes(n_bytes))
    assert memory.data == before
    assert await image.read(size, 0) == b""
    await image.write(size, b"")
    assert not image.read_only


async def test_a_read_only_image_is_not_written() -> None:
    """Opened read-only, nothing reaches the file, not even at close."""
    built = build_image(ImageSpec(fill=0.5))
    memory = MemoryStorage(built.top)
    image = await open_memory_image({TOP: memory}, read_only=True)
    assert image.read_only
    with pytest.raises(ReadOnlyImageError):
        await image.write(0, b"x")
    await image.flush()
    await image.aclose()
    assert memory.data == built.top
    assert memory.counters.writes == memory.counters.flushes == 0


@pytest.mark.parametrize(
    "name", ["v3-backing-qcow2", "v3-snapshot", "v3-zstd", "v2", "v1-backing", "v3-zeroes", "extended-backing"]
)
@pytest.mark.parametrize("n_counted_first", [0, 3, 1000])
async def test_allocated_bytes_is_exact(name: str, n_counted_first: int) -> None:
    """The incremental count of data bytes is what counting from scratch finds, however they interleave."""
    spec = replace(SPECS[name], backing="qcow2") if SPECS[name].backing else SPECS[name]
    built = build_image(spec)
    memory = MemoryStorage(built.top, suspend=True)
    image = await open_memory_image({**built.files, TOP: memory}, backing_format="auto")
    if n_counted_first == 1000:
        await image.count_allocated()
    chooser = random.Random(3)
    for number in range(60):
        n_bytes = chooser.choice([1, 700, 5000])
        await image.write(chooser.randrange(image.size - n_bytes), chooser.randbytes(n_bytes))
        if number == n_counted_first:
            await image.count_allocated()
    await image.count_allocated()
    counted = image.allocated_bytes()
    await image.aclose()
    again = await open_memory_image({**built.files, TOP: bytes(memory.data)}, read_only=True, backing_format="auto")
    await again.count_allocated()
    assert again.allocated_bytes() == counted
    assert 0 < counted < again.size


async def test_an_empty_and_a_full_disk_have_their_allocated_bytes() -> None:
    """0 for an empty image, the whole size for a full one, also where the last cluster is cut short."""
    image = await open_memory_image(build_image(ImageSpec(size=SIZE, cluster_size=4096)).files)
    await image.count_allocated()
    assert image.allocated_bytes() == 0
    await image.write(SIZE - 1, b"x")
    assert image.allocated_bytes() == 512
    await image.write(0, b"y" * SIZE)
    assert image.allocated_bytes() == SIZE
