"""Power cuts and failing operations while a disk grows: the old size or the new, whole, and leaks at most.

Crash point: size-changing.
"""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import trio

from qcowfuse.driver.layers import table_cache
from qcowfuse.driver.options import L2CacheSize
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.driver.writing import write_back
from qcowfuse.driver.writing.allocation import MetadataWrite
from qcowfuse.errors import ReadOnlyImageError
from qcowfuse.storage.base import Storage
from tests.support.checker import check_image_bytes
from tests.support.faults import FaultyStorage, fail_at
from tests.support.images import (
    DATA,
    TOP,
    Backing,
    BuiltImage,
    ImageSpec,
    StorageKind,
    build_image,
    open_memory_image,
    qemu_read,
    run_tool,
    scratch_folder,
    write_chain,
)
from tests.support.memory_storage import MemoryStorage
from tests.support.old_bytes import build_in_turn, build_over_old_bytes, storage_of
from tests.support.powercut import Guest, check_cuts, record_workload

KIB = 1 << 10
SPECS = {
    "v3": ImageSpec(size=100 * KIB, fill=0.5),
    "v2": ImageSpec(version=2, size=100 * KIB, fill=0.5),
    "v1": ImageSpec(version=1, size=100 * KIB, fill=0.5),
    "v1-long-backing": ImageSpec(version=1, size=40 * KIB, backing="raw", backing_size=120 * KIB),
    "v2-long-backing": ImageSpec(version=2, size=40 * KIB + 512, backing="raw", backing_size=120 * KIB),
    "v3-long-backing": ImageSpec(size=40 * KIB + 512, backing="qcow2", backing_size=160 * KIB, fill=0.3),
    "snapshot": ImageSpec(size=100 * KIB, fill=0.6, snapshot=True),
    "extended": ImageSpec(
        size=100 * KIB, cluster_size=16384, extended_l2=True, fill=0.3, backing="raw", backing_size=200 * KIB
    ),
    "data-file": ImageSpec(size=100 * KIB, fill=0.5, data_file="plain", data_behind=80 * KIB),
    "data-file-raw": ImageSpec(size=100 * KIB, fill=0.5, data_file="raw", data_behind=80 * KIB),
    "data-file-raw-extended": ImageSpec(
        size=100 * KIB, cluster_size=16384, extended_l2=True, fill=0.3, data_file="raw", data_behind=400 * KIB
    ),
}


def on_device(spec: str) -> BuiltImage:
    """An image, on a block device where the version can be."""
    return build_over_old_bytes(SPECS[spec], "device")


async def growing_guest(guest: Guest) -> None:
    """Writes before and after each of three steps, the last of which needs an L1 table of several clusters."""
    await guest.write_random(0, guest.image.size, 3000)
    size = guest.image.size
    for number, larger in enumerate((size + 512, size + 60 * KIB, 2200 * KIB)):
        for _ in range(3):
            await guest.write_random(0, guest.image.size, 3000)
        await guest.grow(larger)
        for _ in range(3):
            await guest.write_random(max(0, guest.image.size - 70 * KIB), guest.image.size, 3000)
        if number != 1:
            await guest.flush()
    await guest.write_random(0, guest.image.size, 3000)


async def growing_among_writers(guest: Guest) -> None:
    """Two writers and a flusher while the disk grows."""
    size = guest.image.size // 2 // 512 * 512
    done = False

    async def write(start: int) -> None:
        while not done:
            await guest.write_random(start, start + size, 2000, unit=512)

    async def flush() -> None:
        while not done:
            await guest.flush()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, 0)
        nursery.start_soon(write, size)
        nursery.start_soon(flush)
        for larger in (300 * KIB, 700 * KIB, 2200 * KIB):
            await guest.grow(larger)
        done = True
    await guest.write_random(300 * KIB, guest.image.size, 3000)
    await guest.flush()


@pytest.mark.parametrize("spec", SPECS)
async def test_a_power_cut_while_the_disk_grows(spec: str) -> None:
    """Old size or new, never between; nothing promised is lost; the new part is zeroes or what was written there."""
    recorded = await record_workload(build_in_turn(SPECS, spec, ("file", "used")), growing_guest, seed=len(spec))
    summary = await check_cuts(recorded, n_states=200, n_qemu=6)
    assert not summary.problems, "\n".join(summary.problems[:5])


@pytest.mark.parametrize("spec", ["v3", "v1", "snapshot", "v3-long-backing"])
async def test_a_power_cut_while_the_disk_grows_among_writers(spec: str) -> None:
    """The same with writers and fsyncs between the steps of growing."""
    recorded = await record_workload(on_device(spec), growing_among_writers, suspend=True)
    summary = await check_cuts(recorded, n_states=150, n_qemu=4)
    assert not summary.problems, "\n".join(summary.problems[:5])


@pytest.mark.parametrize("spec", ["v3-long-backing", "v1-long-backing"])
async def test_a_power_cut_while_the_disk_grows_with_a_tiny_cache(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices that are written back for want of room do not link tables that the L1 table on disk has no place for."""
    monkeypatch.setattr(table_cache, "MIN_DIRTY_BYTES", 1024)
    recorded = await record_workload(on_device(spec), growing_guest, cache=L2CacheSize(n_tables=1))
    summary = await check_cuts(recorded, n_states=150, n_qemu=4)
    assert not summary.problems, "\n".join(summary.problems[:5])


async def test_the_harness_catches_a_header_that_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header written before what it points at, and before the zeroes that hide a backing file, is seen."""
    original = write_back.WriteBack._write_all

    async def write_all(self: write_back.WriteBack, writes: list[MetadataWrite]) -> None:
        if self._size_fields is not None:
            await original(self, [self._size_fields(len(self._l1_table), self._l1_place)])
        await original(self, writes)

    monkeypatch.setattr(write_back.WriteBack, "_write_all", write_all)
    recorded = await record_workload(build_image(SPECS["v3-long-backing"]), growing_guest)
    summary = await check_cuts(recorded, n_states=100, n_qemu=0)
    assert summary.problems


async def _grow_and_write(image: QcowImage, expected: bytearray, sizes: list[int]) -> list[Exception]:
    errors: list[Exception] = []
    for size in sizes:
        try:
            await image.grow(size)
            expected.extend(bytes(size - len(expected)))
        except (OSError, ReadOnlyImageError) as error:
            errors.append(error)
        assert image.size == len(expected)
        data = b"w" * 2048
        for offset in (0, image.size - len(data)):
            try:
                await image.write(offset, data)
                expected[offset : offset + len(data)] = data
            except (OSError, ReadOnlyImageError) as error:
                errors.append(error)
    return errors


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("spec", ["v3-long-backing", "v2", "v1-long-backing", "snapshot", "extended"])
async def test_growing_fails_at_any_operation(spec: str, code: int) -> None:
    """The Nth operation fails, for every N: an error and the old size, or none and the new; later tries succeed."""
    built = build_image(SPECS[spec])
    number = 0
    while True:
        memory = MemoryStorage(built.top)
        faulty = FaultyStorage(memory)

        def wrap(_: MemoryStorage, faulty: FaultyStorage = faulty) -> Storage:
            return faulty

        image = await open_memory_image({**built.files, TOP: memory}, wrap=wrap)
        faulty.operations.clear()
        faulty.check = fail_at(number, code=code)
        expected = bytearray(built.contents)
        errors = await _grow_and_write(image, expected, [built.spec.size + 512, 2200 * KIB])
        reached = len(faulty.operations) > number
        failed_flush = reached and faulty.operations[number].kind == "flush"
        faulty.check = None
        if reached and not failed_flush:
            assert len(errors) <= 2, errors
            errors = await _grow_and_write(image, expected, [2300 * KIB])
            assert not errors, f"operation {number} {faulty.operations[number]}"
        found = bytes(await image.read(0, image.size))
        # A write that failed may have come to pass in part.
        if found != expected:
            assert all(new in (old, ord("w")) for new, old in zip(found, expected, strict=True))
        try:
            await image.aclose()
        except OSError:
            assert failed_flush
        report = check_image_bytes(memory.data)
        assert not report.errors, (number, report.errors[:3])
        if not failed_flush and reached:
            again = await open_memory_image({**built.files, TOP: memory.data}, read_only=True)
            assert again.size == len(expected)
            assert bytes(await again.read(0, again.size)) == found
            await again.aclose()
        if not reached:
            assert not errors
            assert number > 20
            break
        number += 1


@pytest.mark.parametrize("spec", ["data-file", "data-file-raw", "data-file-raw-extended"])
async def test_growing_over_a_longer_data_file_fails_at_any_operation(spec: str) -> None:
    """The Nth operation on the image fails, for every N: not a byte of the data file changes, the disk has one of its
    two sizes, shows what it then must, and a second try succeeds."""
    built = build_image(SPECS[spec])
    before = built.files[DATA]
    size = built.spec.size + 70 * KIB
    number = 0
    while True:
        memory, data = MemoryStorage(built.top), MemoryStorage(before)
        faulty = FaultyStorage(memory)

        def wrap(_: MemoryStorage, faulty: FaultyStorage = faulty) -> Storage:
            return faulty

        image = await open_memory_image({**built.files, TOP: memory, DATA: data}, wrap=wrap)
        faulty.operations.clear()
        faulty.check = fail_at(number, code=errno.ENOSPC)
        error: Exception | None = None
        try:
            await image.grow(size)
        except (OSError, ReadOnlyImageError) as caught:
            error = caught
        reached = len(faulty.operations) > number
        failed_flush = reached and faulty.operations[number].kind == "flush"
        faulty.check = None
        assert image.size == (built.spec.size if error else size)
        if error and not failed_flush:
            await image.grow(size)
        shown = before[:size] if built.spec.data_file == "raw" else built.contents.ljust(size, b"\0")
        assert bytes(await image.read(0, image.size)) == shown[: image.size]
        try:
            await image.aclose()
        except OSError:
            assert failed_flush
        assert data.data == before
        assert not check_image_bytes(memory.data).errors
        if not reached:
            assert error is None
            assert number > 5
            break
        number += 1


@pytest.mark.parametrize("storage", ["used", "device"])
@pytest.mark.parametrize("backing_size", [0, 40 * KIB + 512])
async def test_no_old_bytes_behind_the_end_of_the_disk(backing_size: int, storage: StorageKind) -> None:
    """The rest of the last cluster is zero: QEMU, where it makes the disk larger, shows it."""
    size = 40 * KIB + 512
    backing: Backing | None = "raw" if backing_size else None
    spec = ImageSpec(size=size, cluster_size=4096, backing=backing, backing_size=backing_size)
    built = build_over_old_bytes(spec, storage)
    memory = storage_of(built, TOP)
    image = await open_memory_image({**built.files, TOP: memory})
    await image.write(size - 100, b"x" * 50)
    await image.aclose()
    contents = bytearray(built.contents)
    contents[size - 100 : size - 50] = b"x" * 50
    with scratch_folder() as folder:
        path = Path(write_chain(folder, {**built.files, TOP: memory.data}))
        run_tool("qemu-img", "resize", "-q", "-f", "qcow2", path.name, str(size + 8192), cwd=folder)
        larger = {**built.files, TOP: path.read_bytes()}
    assert qemu_read(larger) == contents.ljust(size + 8192, b"\0")
