"""Space set aside for a guest range: what is read stays, later writes take nothing, a full disk leaves no trace."""

from __future__ import annotations

import errno
import random

import pytest
import trio

from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.errors import ReadOnlyImageError
from qcowfuse.storage.base import Storage
from tests.crash.test_power_cuts import SPECS
from tests.support.checker import check_image_bytes
from tests.support.faults import FaultyStorage, Operation
from tests.support.images import DATA, TOP, BuiltImage, build_image, open_memory_image, qemu_check, qemu_read
from tests.support.memory_storage import MemoryStorage
from tests.support.powercut import read_whole

KIB = 1 << 10


async def opened(built: BuiltImage) -> tuple[QcowImage, FaultyStorage, dict[str, bytes | bytearray | MemoryStorage]]:
    """An image with a storage that can fail, and its files as they will be."""
    memory = MemoryStorage(built.top, name=TOP)
    faulty = FaultyStorage(memory)
    files: dict[str, bytes | bytearray | MemoryStorage] = {**built.files, TOP: memory}
    if DATA in files:
        files[DATA] = MemoryStorage(built.files[DATA], name=DATA)

    def wrap(_: MemoryStorage) -> Storage:
        return faulty

    image = await open_memory_image(files, wrap=wrap)
    faulty.operations.clear()
    return image, faulty, files


def contents_of(files: dict[str, bytes | bytearray | MemoryStorage]) -> dict[str, bytes | bytearray]:
    """The files as bytes."""
    return {path: file.data if isinstance(file, MemoryStorage) else file for path, file in files.items()}


@pytest.mark.parametrize("spec", SPECS)
async def test_reserved_clusters_are_written_in_place(spec: str) -> None:
    """After the whole disk was set aside it reads as before, no write takes another cluster, and QEMU agrees."""
    built = build_image(SPECS[spec])
    image, _, files = await opened(built)
    await image.allocate(0, image.size)
    assert await read_whole(image) == built.contents
    await image.flush()
    reserved = contents_of(files)
    top = bytes(reserved[TOP])
    report = check_image_bytes(reserved[TOP])
    assert not report.errors, report.errors[:3]
    if built.spec.version > 1:
        code, output = qemu_check(reserved)
        assert code in (0, 3), output
    format_name = "qcow" if built.spec.version == 1 else "qcow2"
    if built.spec.encryption is None:
        assert qemu_read(reserved, format_name=format_name) == built.contents
    expected = bytearray(built.contents)
    chooser = random.Random(1)
    for _ in range(60):
        offset = chooser.randrange(image.size - 3000)
        data = chooser.randbytes(chooser.randint(1, 3000))
        await image.write(offset, data)
        expected[offset : offset + len(data)] = data
    assert await read_whole(image) == expected
    await image.aclose()
    after = contents_of(files)
    assert len(after[TOP]) == len(top), "a write took new space"
    report = check_image_bytes(after[TOP])
    assert not report.errors, report.errors[:3]
    assert not report.leaks
    again = await open_memory_image(after, read_only=True)
    assert await read_whole(again) == expected
    await again.aclose()


@pytest.mark.parametrize("spec", ["v3", "v2", "v1", "extended", "backing-raw", "snapshot-4k", "data-file", "aes"])
async def test_a_part_is_reserved_at_any_offset(spec: str) -> None:
    """Only clusters that the range touches are taken, and a second time takes none."""
    built = build_image(SPECS[spec])
    image, _, files = await opened(built)
    start, end = 3 * KIB + 100, 60 * KIB + 1
    sizes = []
    for _ in range(2):
        await image.allocate(start, end - start)
        await image.flush()
        sizes.append(len(contents_of(files)[TOP]))
    assert sizes[0] == sizes[1]
    assert await read_whole(image) == built.contents
    with pytest.raises(Exception, match="disk of"):
        await image.allocate(image.size - 1, 2)
    await image.aclose()
    assert not check_image_bytes(contents_of(files)[TOP]).leaks


@pytest.mark.parametrize("spec", ["v3", "v2", "v1", "extended", "backing-raw", "snapshot-4k", "zlib", "aes"])
async def test_a_full_disk_leaves_nothing_behind(spec: str) -> None:
    """ENOSPC from the Nth allocation or write on, for many N: it is answered, nothing leaks, contents stay, and a
    later try succeeds."""
    built = build_image(SPECS[spec])
    number = 0
    while True:
        image, faulty, files = await opened(built)
        count = 0

        def check(operation: Operation, number: int = number) -> int:
            nonlocal count
            count += operation.kind in ("allocate", "write")
            return errno.ENOSPC if count > number and operation.kind in ("allocate", "write") else 0

        faulty.check = check
        try:
            await image.allocate(0, image.size)
            is_full = False
        except OSError as error:
            is_full = error.errno == errno.ENOSPC
            if not is_full:
                raise
        faulty.check = None
        assert await read_whole(image) == built.contents
        if is_full and number % 2:
            await image.allocate(0, image.size)
            assert await read_whole(image) == built.contents
        await image.aclose()
        report = check_image_bytes(contents_of(files)[TOP])
        assert not report.errors, report.errors[:3]
        assert not report.leaks, f"{report.leaks} leaks after {number}"
        if not is_full:
            assert number > 1
            return
        number += 1 if number < 10 else 11


async def test_writers_among_it() -> None:
    """Writes while space is set aside below them are neither lost nor torn."""
    for spec in ("v3", "v2", "backing-raw", "extended-backing"):
        built = build_image(SPECS[spec])
        memory = MemoryStorage(built.top, suspend=True)
        files: dict[str, bytes | bytearray | MemoryStorage] = {**built.files, TOP: memory}
        image = await open_memory_image(files)
        expected = bytearray(built.contents)

        async def write(image: QcowImage = image, expected: bytearray = expected) -> None:
            chooser = random.Random(3)
            for _ in range(60):
                sector = chooser.randrange(image.size // 512 - 4)
                data = chooser.randbytes(2048)
                expected[sector * 512 : sector * 512 + 2048] = data
                await image.write(sector * 512, data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            nursery.start_soon(image.allocate, 0, image.size)
            nursery.start_soon(image.allocate, 0, image.size)
        assert await read_whole(image) == expected
        await image.aclose()
        report = check_image_bytes(memory.data)
        assert not report.errors
        assert not report.leaks


async def test_a_read_only_image_refuses() -> None:
    """ReadOnlyImageError."""
    built = build_image(SPECS["v3"])
    image = await open_memory_image(built.files, read_only=True)
    with pytest.raises(ReadOnlyImageError):
        await image.allocate(0, 512)
    await image.aclose()


async def test_what_can_never_fit_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A range that is larger than the free space of the host with all that the image has is not begun."""
    built = build_image(SPECS["v3"])
    image, faulty, _ = await opened(built)
    monkeypatch.setattr(MemoryStorage, "free_bytes", lambda self: 4 * KIB)
    monkeypatch.setattr(MemoryStorage, "allocated_bytes", lambda self: 2 * KIB)
    with pytest.raises(OSError, match="No space") as caught:
        await image.allocate(0, 6 * KIB + 1)
    assert caught.value.errno == errno.ENOSPC
    assert not [operation for operation in faulty.operations if operation.kind in ("write", "allocate")]
    await image.allocate(0, 6 * KIB)
    assert await read_whole(image) == built.contents
    await image.aclose()
