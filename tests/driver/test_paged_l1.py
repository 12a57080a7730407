"""Layers whose L1 table is read part by part: what is read, what is a hole and what is counted is the same."""

from __future__ import annotations

import random

import pytest

from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.tables import paged_table, snapshot_table
from tests.driver.test_holes import SPECS
from tests.support.images import ImageSpec, build_image, open_memory_image

OVER_QCOW2 = ImageSpec(fill=0.1, backing="qcow2", backing_size=200 << 10)
SNAPSHOT = ImageSpec(fill=0.3, snapshot=True)


async def holes(image: QcowImage) -> list[tuple[bool, int]]:
    """Where data ends and begins."""
    found: list[tuple[bool, int]] = []
    position = 0
    while position < image.size:
        is_data, n_bytes = await image.find_extent(position, image.size - position)
        position += n_bytes
        if found and found[-1][0] == is_data:
            found.pop()
        found.append((is_data, position))
    return found


async def must_read(image: QcowImage, contents: bytes, seed: str) -> None:
    """Requests all over the disk, answered at once or not."""
    chooser = random.Random(seed)
    for _ in range(200):
        start = chooser.randrange(len(contents))
        n_bytes = min(chooser.choice([512, 4096, 50000]), len(contents) - start)
        data = await image.read(start, n_bytes)
        assert bytes(data) == contents[start : start + n_bytes]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of two entries, of which two or three stay in memory."""
    monkeypatch.setattr(snapshot_table, "MAX_HELD", 0)
    monkeypatch.setattr(paged_table, "PART_ENTRIES", 2)
    monkeypatch.setattr(paged_table, "MAX_PARTS_BYTES", 3 * (16 + 256))


@pytest.mark.parametrize("suspend", [False, True])
@pytest.mark.parametrize("name", SPECS)
async def test_nothing_differs(name: str, suspend: bool, request: pytest.FixtureRequest) -> None:
    """Reads, holes and the count of what is allocated, in chains of every kind."""
    built = build_image(SPECS[name])
    image = await open_memory_image(built.files, read_only=True, suspend=suspend)
    expected = await holes(image)
    await image.count_allocated()
    allocated = image.allocated_bytes()
    await image.aclose()
    request.getfixturevalue("small_parts")
    image = await open_memory_image(built.files, read_only=True, suspend=suspend)
    await must_read(image, built.contents, name)
    assert await holes(image) == expected
    await image.count_allocated()
    assert image.allocated_bytes() == allocated
    await image.aclose()


@pytest.mark.usefixtures("small_parts")
async def test_a_layer_that_is_written_has_its_whole_table() -> None:
    """And the one below it has not."""
    built = build_image(OVER_QCOW2)
    image = await open_memory_image(built.files)
    contents = bytearray(built.contents)
    for start in range(0, image.size - 600, 30000):
        await image.write(start, b"new" * 200)
        contents[start : start + 600] = b"new" * 200
    await must_read(image, bytes(contents), "written")
    await image.aclose()


@pytest.mark.usefixtures("small_parts")
async def test_a_snapshot_is_read_part_by_part() -> None:
    """Its own L1 table, not the active one."""
    built = build_image(SNAPSHOT)
    assert built.snapshot_contents is not None
    image = await open_memory_image(built.files, snapshot="s1")
    await must_read(image, built.snapshot_contents, "snapshot")
    await image.aclose()
