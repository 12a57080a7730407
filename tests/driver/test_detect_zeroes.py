"""detect-zeroes: writes of zeroes leave no data behind, whichever way they come; all else is as without it."""

from __future__ import annotations

import random

import pytest

from qcowfuse.driver.options import DetectZeroes
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.driver.writing.zero_detection import is_zero
from tests.support.checker import check_image_bytes
from tests.support.images import TOP, ImageSpec, build_image, open_memory_image, qemu_read
from tests.support.memory_storage import MemoryStorage

KIB = 1 << 10


async def write(image: QcowImage, offset: int, data: bytes) -> None:
    """As the mount does."""
    await image.write(offset, data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", False), (b"\0", True), (bytes(5000), True), (bytes(4999) + b"x", False), (b"x" + bytes(5), False)],
)
def test_what_is_zero(data: bytes, expected: bool) -> None:
    """Every byte counts, in bytes as in a view."""
    assert is_zero(data) is expected
    assert is_zero(memoryview(data)) is expected


@pytest.mark.parametrize("mode", list(DetectZeroes))
@pytest.mark.parametrize(
    "spec",
    [
        ImageSpec(cluster_size=4096),
        ImageSpec(version=2, cluster_size=4096, fill=0.5),
        ImageSpec(version=1, cluster_size=4096, fill=0.5),
        ImageSpec(cluster_size=4096, backing="raw", backing_size=200 * KIB),
        ImageSpec(cluster_size=16384, extended_l2=True, fill=0.5, zeroes=True),
    ],
    ids=["v3", "v2", "v1", "backing", "extended"],
)
async def test_random_writes_of_zeroes_and_data(spec: ImageSpec, mode: DetectZeroes) -> None:
    """What is read is what was written."""
    built = build_image(spec)
    memory = MemoryStorage(built.top)
    image = await open_memory_image({**built.files, TOP: memory}, detect_zeroes=mode)
    expected = bytearray(built.contents)
    chooser = random.Random(4)
    for number in range(150):
        length = chooser.choice([512, 4096, 5000, 40_000])
        unit = chooser.choice([1, 4096])
        offset = chooser.randrange(spec.size - length) // unit * unit
        data = bytes(length) if number % 2 else chooser.randbytes(length)
        await write(image, offset, data)
        expected[offset : offset + length] = data
        if number % 30 == 0:
            await image.flush()
    assert bytes(await image.read(0, image.size)) == expected
    await image.aclose()
    report = check_image_bytes(memory.data)
    assert not report.errors
    assert (
        qemu_read({**built.files, TOP: memory.data}, format_name="qcow" if spec.version == 1 else "qcow2") == expected
    )


async def test_zeroes_take_no_space() -> None:
    """Onto nothing, nothing is allocated; onto data, the cluster becomes a zero cluster."""
    built = build_image(ImageSpec(cluster_size=4096))
    sizes = {}
    for mode in DetectZeroes:
        image = await open_memory_image(built.files, detect_zeroes=mode)
        await image.count_allocated()
        for offset in range(0, 64 * KIB, 4096):
            await write(image, offset, bytes(4096))
        sizes[mode] = image.allocated_bytes()
        await write(image, 0, b"x" * 8192)
        await write(image, 0, bytes(4096))
        assert (await image.find_extent(0, 8192)) == (
            mode is DetectZeroes.OFF,
            8192 if mode is DetectZeroes.OFF else 4096,
        )
        await image.aclose()
    assert sizes == {DetectZeroes.OFF: 64 * KIB, DetectZeroes.ON: 0, DetectZeroes.UNMAP: 0}
