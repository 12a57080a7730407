"""Failing the Nth storage operation, for every N: the guest hears of it, and nothing is lost or damaged."""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field

import pytest
import trio

from qcowfuse.driver.layers import table_cache
from qcowfuse.driver.options import L2CacheSize
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.errors import ReadOnlyImageError
from qcowfuse.storage.base import Storage
from tests.support.checker import check_image_bytes
from tests.support.faults import Check, FaultyStorage, fail_at
from tests.support.flushing import flush_image
from tests.support.images import DATA, TOP, BuiltImage, ImageSpec, build_image, open_memory_image
from tests.support.memory_storage import MemoryStorage
from tests.support.powercut import read_image
from tests.support.recording import GuestRecord, RecordingStorage, cuts, moments_of

KIB = 1 << 10
SPECS = {
    "v3": ImageSpec(size=128 * KIB, fill=0.2),
    "v1": ImageSpec(version=1, size=128 * KIB),
    "refcount-64": ImageSpec(size=128 * KIB, refcount_bits=64),
    "backing": ImageSpec(size=128 * KIB, backing="raw", backing_size=70 * KIB),
    "snapshot": ImageSpec(size=128 * KIB, fill=0.6, snapshot=True),
    "zlib": ImageSpec(size=128 * KIB, cluster_size=4096, fill=0.8, compression="zlib"),
    "extended": ImageSpec(size=256 * KIB, cluster_size=16384, extended_l2=True, fill=0.4, zeroes=True, snapshot=True),
    "data-file": ImageSpec(size=128 * KIB, fill=0.2, data_file="plain"),
    "data-file-raw": ImageSpec(size=128 * KIB, data_file="raw"),
    "extended-data-file": ImageSpec(
        size=256 * KIB, cluster_size=16384, extended_l2=True, fill=0.4, zeroes=True, data_file="plain"
    ),
    "extended-data-file-raw": ImageSpec(size=256 * KIB, cluster_size=16384, extended_l2=True, data_file="raw"),
    "zeroes": ImageSpec(size=128 * KIB, fill=0.6, zeroes=True),
}


@dataclass
class Run:
    """One run of the workload against storages that fail: the image's, and that of its data file if it has one.
    Both number their operations as one."""

    image: QcowImage
    faulty: FaultyStorage
    recording: RecordingStorage
    memory: MemoryStorage
    record: GuestRecord
    built: BuiltImage
    data_faulty: FaultyStorage | None = None
    data_memory: MemoryStorage | None = None
    errors: list[Exception] = field(default_factory=list)
    closed_cleanly: bool = False

    def set_check(self, check: Check | None) -> None:
        """Which operations fail from now on."""
        for faulty in (self.faulty, self.data_faulty):
            if faulty is not None:
                faulty.check = check

    @property
    def flush_failure(self) -> int:
        """errno of the flush that has failed, or 0."""
        return self.faulty.flush_failure or (0 if self.data_faulty is None else self.data_faulty.flush_failure)

    def left_behind(self) -> dict[str, bytes]:
        """The files as they are now."""
        left = {**self.built.files, TOP: bytes(self.memory.data)}
        return left if self.data_memory is None else {**left, DATA: bytes(self.data_memory.data)}

    async def write(self, guest_offset: int, data: bytes) -> None:
        """A guest write; an error is noted."""
        begun = self.record.begin_write(guest_offset, data)
        try:
            await self.image.write(guest_offset, data)
        except (OSError, ReadOnlyImageError) as error:
            self.errors.append(error)
        else:
            self.record.end_write(begun)

    async def flush(self) -> None:
        """A guest fsync; an error is noted."""
        begun = self.record.begin_flush()
        try:
            await flush_image(self.image)
        except OSError as error:
            self.errors.append(error)
        else:
            self.record.end_flush(begun)

    async def read(self, guest_offset: int, n_bytes: int) -> None:
        """A guest read; an error is noted."""
        try:
            await read_image(self.image, guest_offset, n_bytes)
        except OSError as error:
            self.errors.append(error)


async def start(built: BuiltImage, check: Check | None, *, inline: bool, cache: L2CacheSize | None = None) -> Run:
    """Open an image; ``check`` applies from the first operation after that."""
    memory = MemoryStorage(built.top, suspend=not inline)
    recording = RecordingStorage(memory)
    faulty = FaultyStorage(recording, inline=inline)

    def wrap(_: MemoryStorage) -> Storage:
        return faulty

    data_memory: MemoryStorage | None = None
    data_faulty: FaultyStorage | None = None

    def wrap_data(inner: MemoryStorage) -> Storage:
        nonlocal data_memory, data_faulty
        inner.suspend = not inline
        data_memory = inner
        data_faulty = FaultyStorage(RecordingStorage(inner, recording.clock), inline=inline)
        data_faulty.operations = faulty.operations
        return data_faulty

    image = await open_memory_image({**built.files, TOP: memory}, wrap=wrap, wrap_data=wrap_data, cache=cache)
    faulty.operations.clear()
    record = GuestRecord(built.contents, recording.clock)
    run = Run(image, faulty, recording, memory, record, built, data_faulty, data_memory)
    run.set_check(check)
    return run


async def workload(run: Run) -> None:
    """Writes of whole sectors, reads and fsyncs."""
    chooser = random.Random(5)
    n_sectors = run.image.size // 512
    for number in range(14):
        n_bytes = chooser.randint(1, 9) * 512
        offset = chooser.randrange(n_sectors - 9) * 512
        await run.write(offset, chooser.randbytes(n_bytes))
        await run.read(chooser.randrange(n_sectors - 9) * 512, 4096)
        if number % 5 == 4:
            await run.flush()
    await run.flush()


async def close(run: Run) -> None:
    """Close, whatever comes of it."""
    begun = run.record.begin_flush()
    try:
        await run.image.aclose()
    except OSError as error:
        run.errors.append(error)
    else:
        run.record.end_flush(begun)
        run.closed_cleanly = True


async def read_undisturbed(run: Run) -> bytes:
    """The whole disk, by reads that neither fail nor count."""
    n_operations, check = len(run.faulty.operations), run.faulty.check
    run.set_check(None)
    found = await read_image(run.image, 0, run.image.size)
    del run.faulty.operations[n_operations:]
    run.set_check(check)
    return found


async def count_operations(built: BuiltImage, *, inline: bool) -> int:
    """Operations of a run in which nothing fails."""
    run = await start(built, None, inline=inline)
    await workload(run)
    await close(run)
    assert not run.errors
    return len(run.faulty.operations)


async def check_left_behind(run: Run) -> None:
    """The image as a killed daemon leaves it: leaks at most, all that was answered with success is there. So it is
    in a raw data file as it stands, of which the image must show the same."""
    left = run.left_behind()
    report = check_image_bytes(left[TOP])
    assert not report.errors, report.errors[:3]
    moment = run.record.clock.now
    again = await open_memory_image(left)
    found = bytes(await again.read(0, again.size))
    wrong = run.record.expected_at(moment).mismatches(found)
    assert not wrong, f"sectors {wrong[:8]} have lost what fsync promised"
    await again.aclose()
    if run.built.spec.data_file == "raw":
        wrong = run.record.expected_at(moment).mismatches(left[DATA][: len(found)])
        assert not wrong, f"sectors {wrong[:8]} of the raw data file have lost what fsync promised"
        if run.closed_cleanly:
            assert left[DATA][: len(found)] == found


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "awaited"])
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("spec", SPECS)
async def test_every_operation_may_fail(spec: str, for_ever: bool, inline: bool) -> None:
    """Whichever operation fails, once or from then on: an error is seen, nothing hangs, nothing promised is lost."""
    built = build_image(SPECS[spec])
    n_operations = await count_operations(built, inline=inline)
    assert n_operations > 30
    code = errno.EIO if for_ever else errno.ENOSPC
    for number in range(n_operations):
        run = await start(built, fail_at(number, code=code, for_ever=for_ever), inline=inline)
        with trio.fail_after(30):
            await workload(run)
            if not run.flush_failure and not for_ever:
                found = await read_undisturbed(run)
                assert not run.record.expected_now().mismatches(found), f"operation {number}"
            await close(run)
        failed = run.faulty.operations[number]
        if failed.kind in ("write", "flush"):
            assert run.errors, f"nobody heard that operation {number} failed: {failed}"
        assert all(
            isinstance(error, ReadOnlyImageError) or getattr(error, "errno", None) == code for error in run.errors
        )
        await check_left_behind(run)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if "data-file" in spec])
async def test_each_operation_may_fail_among_new_clusters_of_a_data_file(spec: str, code: int) -> None:
    """Whichever operation on either file fails, once, while all is done at once: a disk that has grown, because QEMU
    links all clusters of one with a raw data file."""
    built = build_image(SPECS[spec])
    number, kinds = 0, set()
    while True:
        run = await start(built, None, inline=True)
        size = run.image.size
        grown = run.record.begin_grow(2 * size)
        await run.image.grow(2 * size)
        run.record.end_grow(grown)
        await run.write(size, b"b" * 512)
        run.faulty.operations.clear()
        run.set_check(fail_at(number, code=code))
        chooser = random.Random(5)
        for step in range(8):
            n_bytes = chooser.randint(1, 8) * 512
            await run.write(size + chooser.randrange(size // 512 - 8) * 512, chooser.randbytes(n_bytes))
            if step % 4 == 3:
                await run.flush()
        n_operations = len(run.faulty.operations)
        if n_operations <= number:
            break
        kinds.add(run.faulty.operations[number].kind)
        if not run.flush_failure:
            found = await read_undisturbed(run)
            assert not run.record.expected_now().mismatches(found), f"operation {number}"
        await close(run)
        assert all(
            isinstance(error, ReadOnlyImageError) or getattr(error, "errno", None) == code for error in run.errors
        )
        failed = run.faulty.operations[number]
        assert run.errors or failed.kind == "punch", f"nobody heard that operation {number} failed: {failed}"
        await check_left_behind(run)
        number += 1
    assert number > 12
    assert kinds >= {"write", "flush"}
    assert not run.errors


@pytest.mark.parametrize("spec", SPECS)
async def test_an_image_goes_on_after_the_disk_was_full_for_a_moment(spec: str) -> None:
    """ENOSPC of any write, once: a second try succeeds, and in the end everything is there and clean."""
    built = build_image(SPECS[spec])
    n_operations = await count_operations(built, inline=False)
    n_failed = 0
    for number in range(n_operations):
        run = await start(built, fail_at(number, code=errno.ENOSPC), inline=False)
        await workload(run)
        if len(run.faulty.operations) <= number or run.faulty.operations[number].kind != "write":
            await close(run)
            continue
        n_failed += 1
        heard = len(run.errors)
        assert not run.image.read_only
        await workload(run)
        await run.flush()
        assert await read_image(run.image, 0, run.image.size) == bytes(run.record.contents)
        await close(run)
        assert len(run.errors) == heard, run.errors[heard:]
        await check_left_behind(run)
        assert check_image_bytes(run.memory.data).leaks <= 2, "clusters were lost for good"
    assert n_failed > 13


@pytest.mark.parametrize("spec", ["v3", "snapshot", "v1", "refcount-64"])
async def test_a_power_cut_after_an_error(spec: str) -> None:
    """An operation fails, the image goes on, and then the power goes."""
    built = build_image(SPECS[spec])
    n_operations = await count_operations(built, inline=False)
    chooser = random.Random(1)
    for number in range(0, n_operations, 2):
        run = await start(built, fail_at(number), inline=False)
        await workload(run)
        await close(run)
        moments = moments_of(run.recording)
        for cut in cuts(built.top, run.recording, chooser.sample(moments, min(3, len(moments)))):
            expected = run.record.expected_at(cut.moment)
            for state in cut.states(3, chooser):
                report = check_image_bytes(state)
                assert not report.errors, f"operation {number}, cut at {cut.moment}: {report.errors[:3]}"
                again = await open_memory_image({**built.files, TOP: state}, read_only=True)
                found = bytes(await again.read(0, again.size))
                assert not expected.mismatches(found), f"operation {number}, cut at {cut.moment}"


async def concurrent_workload(run: Run) -> None:
    """Three writers on interleaved sectors and two who fsync, all at once."""

    async def writer(number: int) -> None:
        chooser = random.Random(number)
        for _ in range(8):
            sector = chooser.randrange(run.image.size // 512 // 3) * 3 + number
            await run.write(sector * 512, chooser.randbytes(512))

    async def flusher() -> None:
        for _ in range(4):
            await trio.lowlevel.checkpoint()
            await run.flush()

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(writer, number)
        nursery.start_soon(flusher)
        nursery.start_soon(flusher)


@pytest.mark.parametrize("n_tables", [None, 0])
@pytest.mark.parametrize("spec", ["v3", "snapshot", "v1", "refcount-64", "backing", "data-file"])
async def test_an_operation_fails_among_concurrent_ones(
    spec: str, n_tables: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is dirtied again while a write-back of it fails is not forgotten; the rest goes on."""
    if n_tables is not None:
        monkeypatch.setattr(table_cache, "MIN_DIRTY_BYTES", 512)
    cache = None if n_tables is None else L2CacheSize(n_tables=n_tables)
    built = build_image(SPECS[spec])
    run = await start(built, None, inline=False, cache=cache)
    await concurrent_workload(run)
    await close(run)
    n_operations = len(run.faulty.operations)
    assert n_operations > 40
    chooser = random.Random(4)
    for number in range(0, n_operations, 2):
        run = await start(built, fail_at(number), inline=False, cache=cache)
        with trio.fail_after(30):
            await concurrent_workload(run)
            run.set_check(None)
            if not run.flush_failure:
                found = await read_undisturbed(run)
                assert not run.record.expected_now().mismatches(found), f"operation {number}"
                heard = len(run.errors)
                await run.flush()
                assert len(run.errors) == heard
            await close(run)
        await check_left_behind(run)
        moments = moments_of(run.recording)
        for cut in cuts(built.top, run.recording, chooser.sample(moments, min(2, len(moments)))):
            for state in cut.states(2, chooser):
                report = check_image_bytes(state)
                assert not report.errors, f"operation {number}, cut at {cut.moment}: {report.errors[:3]}"


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "awaited"])
async def test_a_failed_flush_is_final(inline: bool) -> None:
    """After a failed fdatasync every flush fails the same way, nothing is written any more, reads go on."""
    built = build_image(SPECS["v3"])
    run = await start(built, None, inline=inline)
    await run.write(0, b"a" * 4096)
    await run.flush()
    run.faulty.check = lambda operation: errno.EIO if operation.kind == "flush" else 0
    await run.write(0, b"b" * 4096)
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            await run.image.flush()
        assert caught.value.errno == errno.EIO
    run.faulty.check = None
    with pytest.raises(OSError):
        await run.image.flush()
    assert run.image.read_only
    n_before = len([operation for operation in run.faulty.operations if operation.kind == "write"])
    with pytest.raises(ReadOnlyImageError):
        await run.image.write(0, b"c" * 512)
    with pytest.raises(ReadOnlyImageError):
        await run.image.write(100 * KIB, b"c" * 512)
    assert await read_image(run.image, 0, 4096) == b"b" * 4096
    with pytest.raises(OSError):
        await run.image.aclose()
    assert run.memory.closed
    assert n_before == len([operation for operation in run.faulty.operations if operation.kind == "write"])
