"""Damaged images through the whole driver: bytes or an error of ours, in bounded time and memory.

Images by QEMU get some of their metadata changed, are opened from memory, read, written and closed. Whatever
happens, only the exceptions of ``errors`` may come out, and OSError where the test's storage is full.
"""

from __future__ import annotations

import contextlib
import errno
import random
import struct
import tempfile
import tracemalloc
from functools import cache
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcowfuse.driver.chain import open_image
from qcowfuse.driver.image import Image
from qcowfuse.driver.options import OpenOptions
from qcowfuse.errors import QcowFuseError
from qcowfuse.storage.base import Storage
from tests.support import battery
from tests.support.bounded_storage import BoundedStorage
from tests.support.matrix import (
    ImageSpec,
    Layer,
    build,
    compress_from_raw,
    empty_v1,
    fill,
    io,
    snapshot,
)

SIZE = 96 * 1024
ALLOWED = (QcowFuseError, OSError)
SPECS = (
    ImageSpec("v3-512", (Layer("qcow2", SIZE, "cluster_size=512", steps=(fill(1, 6, 8192),)),)),
    ImageSpec(
        "v3-4k-refcount-1", (Layer("qcow2", SIZE, "cluster_size=4k,refcount_bits=1", steps=(fill(1, 4, 8192),)),)
    ),
    ImageSpec("v2-4k", (Layer("qcow2", SIZE, "compat=0.10,cluster_size=4k", steps=(fill(1, 4, 8192),)),)),
    ImageSpec(
        "v3-snapshot",
        (Layer("qcow2", SIZE, "cluster_size=512", steps=(fill(1, 4, 8192), snapshot("s"), fill(2, 3, 4096))),),
    ),
    ImageSpec(
        "v3-zeroes", (Layer("qcow2", SIZE, "cluster_size=512", steps=(fill(1, 4, 8192), io("write -z 0 32k"))),)
    ),
    ImageSpec("v3-deflate", (Layer("qcow2", SIZE, make=compress_from_raw(3, "cluster_size=4k")),)),
    ImageSpec("v3-zstd", (Layer("qcow2", SIZE, make=compress_from_raw(3, "cluster_size=4k,compression_type=zstd")),)),
    ImageSpec("v1", (Layer("qcow", SIZE, make=empty_v1(9, 6), steps=(fill(1, 4, 8192),)),)),
    ImageSpec("v1-long-tables", (Layer("qcow", SIZE, make=empty_v1(9, 13), steps=(fill(1, 4, 8192),)),)),
    ImageSpec("v1-deflate", (Layer("qcow", SIZE, make=compress_from_raw(4)),)),
)


@cache
def images() -> tuple[tuple[str, bytes, tuple[int, ...]], ...]:
    """Id, bytes and the offsets of all 8-byte words of metadata of each image."""
    found = []
    for spec in SPECS:
        with tempfile.TemporaryDirectory() as folder:
            data = build(spec, Path(folder)).path.read_bytes()
        found.append((spec.id, data, metadata_words(data)))
    return tuple(found)


def metadata_words(data: bytes) -> tuple[int, ...]:
    """Offsets of the words of the header and of every table that can be reached from it."""
    version = struct.unpack_from(">I", data, 4)[0]
    ranges = [(0, 128)]
    if version == 1:
        cluster_bits, l2_bits, l1_offset, mask = data[32], data[33], 48, (1 << 63) - 1
        n_l1 = -(-SIZE // (1 << (cluster_bits + l2_bits)))
        table_size = 8 << l2_bits
    else:
        cluster_bits = struct.unpack_from(">I", data, 20)[0]
        n_l1, l1_offset, table_offset = struct.unpack_from(">IQQ", data, 36)
        mask, table_size = 0x00FF_FFFF_FFFF_FE00, 1 << cluster_bits
        ranges.append((table_offset, 64))
        blocks = struct.unpack_from(">8Q", data, table_offset)
        ranges += [(block, table_size) for block in blocks if block]
    ranges.append((l1_offset, n_l1 * 8))
    ranges += [(entry & mask, table_size) for entry in struct.unpack_from(f">{n_l1}Q", data, l1_offset) if entry]
    return tuple(
        word for start, length in ranges for word in range(start, start + length, 8) if 0 <= word <= len(data) - 8
    )


async def exercise(data: bytes, seed: int, *, read_only: bool, suspend: bool) -> None:
    """Open, read, write, flush, close; the allowed errors end a step and nothing else."""
    storages: list[BoundedStorage] = []

    async def opener(path: str, writable: bool, options: OpenOptions) -> Storage:
        if path != "top":
            raise FileNotFoundError(errno.ENOENT, "No such file", path)
        storages.append(BoundedStorage(data, writable=writable, suspend=suspend))
        return storages[-1]

    try:
        image = await open_image("top", OpenOptions(read_only=read_only), opener=opener)
    except ALLOWED:
        assert all(storage.closed for storage in storages)
        return
    rng = random.Random(seed)
    try:
        for step in range(24):
            try:
                await one_step(image, rng, step, read_only=read_only)
            except ALLOWED:
                continue
    finally:
        with contextlib.suppress(*ALLOWED):
            await image.aclose()
    assert all(storage.closed for storage in storages)
    if read_only:
        assert storages[0].data == data


async def one_step(image: Image, rng: random.Random, step: int, *, read_only: bool) -> None:
    """One request, its kind by ``step``."""
    n_bytes = min(rng.choice((1, 512, 5000, 100_000)), image.size)
    guest_offset = rng.randrange(min(image.size - n_bytes, 2 * SIZE) + 1)
    if step % 8 == 7:
        guest_offset = image.size - n_bytes
    if step % 3 == 1 and not read_only:
        wanted = rng.randbytes(n_bytes)
        await battery.write(image, guest_offset, wanted)
    elif step % 8 == 6:
        await image.flush()
    else:
        assert len(await battery.read(image, guest_offset, n_bytes)) == n_bytes


async def bounded(data: bytes, seed: int, *, read_only: bool, suspend: bool) -> None:
    with trio.fail_after(30):
        await exercise(data, seed, read_only=read_only, suspend=suspend)


WORDS = st.one_of(
    st.sampled_from((0, 1, (1 << 64) - 1, 1 << 63, 1 << 62, 1 << 55, (1 << 56) - 512, 511, 512)),
    st.builds(lambda cluster, flags: cluster << 9 | flags << 62, st.integers(0, 400), st.integers(0, 3)),
    st.builds(lambda cluster, flags: cluster << 12 | flags << 62 | 1, st.integers(0, 60), st.integers(0, 3)),
    st.integers(0, (1 << 64) - 1),
)


@settings(max_examples=800, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    which=st.integers(0, len(SPECS) - 1),
    words=st.lists(st.tuples(st.integers(0, 1 << 16), WORDS), max_size=6),
    flips=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), max_size=4),
    cut=st.none() | st.integers(0, 100),
    seed=st.integers(0, 1 << 16),
    read_only=st.booleans(),
    suspend=st.booleans(),
)
def test_damaged_metadata(
    which: int,
    words: list[tuple[int, int]],
    flips: list[tuple[int, int]],
    cut: int | None,
    seed: int,
    read_only: bool,
    suspend: bool,
) -> None:
    """With entries, counts and header words changed, bytes flipped and the file cut, only our errors come out."""
    _, whole, places = images()[which]
    data = bytearray(whole)
    for place, value in words:
        word = places[place % len(places)]
        data[word : word + 8] = value.to_bytes(8, "big")
    for place, value in flips:
        data[places[place % len(places)] + place % 8] ^= value
    if cut is not None:
        del data[len(data) * cut // 100 :]
    trio.run(lambda: bounded(bytes(data), seed, read_only=read_only, suspend=suspend))


@pytest.mark.parametrize("which", range(len(SPECS)), ids=[spec.id for spec in SPECS])
@pytest.mark.parametrize("suspend", [False, True])
async def test_intact_images_pass(which: int, suspend: bool) -> None:
    """The same exercise on the images as they are: nothing in it is too much for a good image."""
    for seed in range(5):
        await bounded(images()[which][1], seed, read_only=False, suspend=suspend)


@pytest.mark.parametrize("field", ["l1", "refcount table", "both", "snapshots"])
async def test_claims_of_a_tiny_file(field: str) -> None:
    """A file of some KiB that claims the greatest tables costs what the tables would, and no more."""
    data = bytearray(images()[0][1])
    if field in ("l1", "both"):
        struct.pack_into(">Q", data, 24, 1 << 37)
        struct.pack_into(">IQ", data, 36, 4 << 20, 1 << 40)
    if field in ("refcount table", "both"):
        struct.pack_into(">QI", data, 48, 1 << 41, (8 << 20) // 512)
    if field == "snapshots":
        struct.pack_into(">IQ", data, 60, 65536, 1 << 41)
    tracemalloc.start()
    try:
        await bounded(bytes(data), 1, read_only=False, suspend=False)
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()
