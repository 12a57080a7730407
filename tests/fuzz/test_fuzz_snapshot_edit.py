"""Damaged images whose snapshots are changed: an error of ours and an image that is what it was, or a disk that reads
as before."""

from __future__ import annotations

import contextlib
import random
import struct

import pytest
import trio

from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import OpenOptions
from qcowfuse.errors import QcowFuseError
from qcowfuse.storage.base import Storage
from qcowfuse.tools.snapshot_edit import apply_snapshot, create_snapshot, delete_snapshot
from tests.support.bounded_storage import BoundedStorage
from tests.support.images import ImageSpec, build_image, run_tool, scratch_folder, write_chain
from tests.support.memory_storage import MemoryStorage

from .test_fuzz_images import metadata_words

KIB = 1 << 10
SPECS = {
    "v3": ImageSpec(size=96 * KIB, fill=0.7, snapshot=True, zeroes=True),
    "v2": ImageSpec(version=2, cluster_size=1024, size=96 * KIB, fill=0.7, snapshot=True),
    "zlib": ImageSpec(cluster_size=4096, size=96 * KIB, fill=0.8, compression="zlib", snapshot=True),
    "refcount-2": ImageSpec(size=96 * KIB, refcount_bits=2, fill=0.7, snapshot=True),
}
CHANGES = {"create": create_snapshot, "apply": apply_snapshot, "delete": delete_snapshot}


def image_of(spec: ImageSpec) -> bytes:
    """A snapshot, and a disk that shares some clusters with it and has some alone."""
    built = build_image(spec)
    with scratch_folder() as folder:
        path = write_chain(folder, built.files)
        run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 7 8k 16k", "-c", "write -P 8 70k 9k", path)
        with open(path, "rb") as file:
            return file.read()


def damaged(data: bytes, words: tuple[int, ...], chooser: random.Random) -> bytes:
    """One to three words of metadata replaced or changed in one bit."""
    result = bytearray(data)
    for _ in range(chooser.randint(1, 3)):
        position = chooser.choice(words)
        if position + 8 > len(result):
            continue
        (value,) = struct.unpack_from(">Q", result, position)
        kind = chooser.randrange(4)
        if kind == 0:
            value ^= 1 << chooser.randrange(64)
        elif kind == 1:
            (value,) = struct.unpack_from(">Q", result, chooser.choice(words))
        elif kind == 2:
            value = chooser.choice((0, 1, 512, 0x8000000000000000 + chooser.randrange(len(data)) // 512 * 512))
        else:
            value = chooser.randrange(1 << 64)
        struct.pack_into(">Q", result, position, value)
    return bytes(result)


async def disk_of(data: bytes | bytearray) -> bytes | None:
    """What the disk reads as; None where reading it is an error."""

    async def opener(path: str, writable: bool, options: OpenOptions) -> Storage:
        return MemoryStorage(data, writable=False)

    with contextlib.suppress(QcowFuseError, OSError):
        image = await open_image("image", OpenOptions(read_only=True), opener=opener)
        if image.size <= 1 << 20:
            return bytes(await image.read(0, image.size))
    return None


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("spec", SPECS)
async def test_a_damaged_image_gets_no_worse(spec: str, change: str) -> None:
    """Refused and byte for byte what it was; or done, and a disk that could be read still reads as it did."""
    data = image_of(SPECS[spec])
    words = metadata_words(data)
    chooser = random.Random(f"{spec} {change}")
    n_refused = n_done = 0
    for number in range(150):
        before = damaged(data, words, chooser)
        storage = BoundedStorage(before)

        async def opener(
            path: str, writable: bool, options: OpenOptions, storage: BoundedStorage = storage
        ) -> Storage:
            return storage

        try:
            with trio.fail_after(20):
                await CHANGES[change]("image", "s1", opener=opener)
        except (QcowFuseError, OSError):
            n_refused += 1
            assert bytes(storage.data) == before or storage.data[24:96] != before[24:96], number
            continue
        n_done += 1
        disk = await disk_of(before)
        if change != "apply" and disk is not None:
            assert await disk_of(storage.data) == disk, f"damage {number}"
    assert n_refused > 20
    assert n_done > 10
