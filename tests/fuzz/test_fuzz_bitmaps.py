"""Damaged bitmaps: the disk is served and written all the same, nothing else is damaged, and none becomes valid."""

from __future__ import annotations

import logging
import random
import struct
from contextlib import suppress

import pytest

from qcowfuse.errors import QcowFuseError
from tests.support.bitmaps import bitmap_directory, granules_of, stored_bitmaps, with_bitmaps
from tests.support.checker import check_image_bytes
from tests.support.images import TOP, BuiltImage, ImageSpec, build_image, open_memory_image
from tests.support.memory_storage import MemoryStorage

SPECS = [ImageSpec(cluster_size=512, fill=0.5), ImageSpec(cluster_size=4096, fill=0.5)]


async def image_with_bitmaps(spec: ImageSpec) -> BuiltImage:
    """An image with bitmaps that have seen a write."""
    built = with_bitmaps(build_image(spec), {"a": 512, "bb": 4096}, disabled={"d": 65536})
    memory = MemoryStorage(built.top)
    image = await open_memory_image({**built.files, TOP: memory})
    await image.write(0, b"x" * 3000)
    contents = bytes(await image.read(0, image.size))
    await image.aclose()
    return BuiltImage(spec, {**built.files, TOP: bytes(memory.data)}, contents)


def damaged(built: BuiltImage, chooser: random.Random) -> bytearray:
    """A few bits of the extension, the directory or a table turned over."""
    data = bytearray(built.top)
    directory = bitmap_directory(data)
    assert directory is not None
    extension = data.index(struct.pack(">I", 0x23852875)) + 8
    places = [range(extension, extension + 24), range(directory[0], sum(directory))]
    places += [range(bitmap.table_offset, bitmap.table_offset + 8) for bitmap in stored_bitmaps(data).values()]
    for _ in range(chooser.randint(1, 2)):
        data[chooser.choice(chooser.choice(places))] ^= 1 << chooser.randrange(8)
    return data


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.cluster_size))
async def test_damaged_bitmaps_damage_nothing_else(spec: ImageSpec, caplog: pytest.LogCaptureFixture) -> None:
    """Open, write, close: the disk is right, and no valid bitmap misses a write."""
    caplog.set_level(logging.CRITICAL)
    built = await image_with_bitmaps(spec)
    n_served = n_checked = 0
    for seed in range(400):
        chooser = random.Random(seed)
        data = damaged(built, chooser)
        errors = _errors(data)
        memory = MemoryStorage(data)
        try:
            image = await open_memory_image({**built.files, TOP: memory})
        except QcowFuseError:
            continue
        n_served += 1
        expected = bytearray(built.contents)
        ranges = []
        for _ in range(4):
            part = chooser.randbytes(chooser.randint(1, 6000))
            start = chooser.randrange(image.size - len(part))
            await image.write(start, part)
            expected[start : start + len(part)] = part
            ranges.append((start, len(part)))
        await image.aclose()
        if not errors:
            assert not _errors(memory.data), f"seed {seed}"
        if not any("of metadata is used" in error for error in errors):  # a cluster of the guest's: damage before
            image = await open_memory_image({**built.files, TOP: bytes(memory.data)}, read_only=True)
            assert bytes(await image.read(0, image.size)) == expected, f"seed {seed}"
            await image.aclose()
            n_checked += 1
        with suppress(ValueError, struct.error):
            for bitmap in stored_bitmaps(memory.data).values():
                if bitmap.is_valid and bitmap.flags & 2:
                    assert bitmap.dirty >= granules_of(ranges, bitmap.granularity), f"seed {seed}: {bitmap.name}"
    assert n_served > 200
    assert n_checked > 100


def _errors(data: bytes | bytearray) -> list[str]:
    try:
        return check_image_bytes(data).errors
    except (ValueError, struct.error) as error:
        return [str(error)]
