"""The file system has room for N blocks more, then none, then room again : whatever N is, no write that was
answered with success is lost, no flush fails for want of space, and closing leaves neither damage nor a leak.

Crash point: space-set-aside.
"""

from __future__ import annotations

import errno
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.driver.writing import metadata_space, refcount_blocks, write_back
from qcowfuse.storage.base import Storage
from tests.support.bitmaps import bitmap_directory, stored_bitmaps, with_bitmaps
from tests.support.checker import check_image_bytes
from tests.support.flushing import flush_image
from tests.support.images import (
    DATA,
    TOP,
    BuiltImage,
    ImageSpec,
    build_image,
    open_memory_image,
    qemu_check,
    qemu_read,
)
from tests.support.limited_space import LimitedStorage, Room
from tests.support.memory_storage import MemoryStorage
from tests.support.powercut import read_whole
from tests.support.recording import GuestRecord, RecordingStorage, cuts, moments_of

KIB = 1 << 10
SPECS = {
    "v3": ImageSpec(size=128 * KIB, fill=0.2),
    "v2": ImageSpec(version=2, size=128 * KIB),
    "v1": ImageSpec(version=1, size=128 * KIB),
    "v1-backing": ImageSpec(version=1, size=128 * KIB, cluster_size=4096, backing="raw", backing_size=70 * KIB),
    "4k": ImageSpec(size=512 * KIB, cluster_size=4096),
    "holes": ImageSpec(size=2048 * KIB, cluster_size=4096, refcount_bits=64, fill=0.01),
    "64k": ImageSpec(size=1024 * KIB, cluster_size=65536),
    "refcount-1": ImageSpec(size=128 * KIB, refcount_bits=1),
    "refcount-64": ImageSpec(size=128 * KIB, refcount_bits=64),
    "backing": ImageSpec(size=128 * KIB, backing="qcow2", backing_size=70 * KIB),
    "snapshot": ImageSpec(size=128 * KIB, fill=0.6, snapshot=True),
    "zlib": ImageSpec(size=128 * KIB, cluster_size=4096, fill=0.8, compression="zlib"),
    "extended": ImageSpec(size=256 * KIB, cluster_size=16384, extended_l2=True, fill=0.4, zeroes=True, snapshot=True),
    "data-file": ImageSpec(size=128 * KIB, fill=0.2, data_file="plain"),
    "data-file-raw": ImageSpec(size=128 * KIB, data_file="raw"),
    "zeroes": ImageSpec(size=128 * KIB, fill=0.6, zeroes=True),
    "luks": ImageSpec(size=128 * KIB, cluster_size=4096, encryption="luks"),
    "aes": ImageSpec(size=128 * KIB, cluster_size=4096, encryption="aes"),
    "full-table": ImageSpec(size=2200 * KIB, refcount_bits=64, fill=0.86),
}
N_TRIES = 24


@dataclass
class Run:
    """An image on a file system of ``room``; what the guest wrote, and what it was told."""

    built: BuiltImage
    room: Room
    files: dict[str, bytes | bytearray | MemoryStorage]
    image: QcowImage
    recording: RecordingStorage
    record: GuestRecord
    full: list[str] = field(default_factory=list)
    flush_errors: int = 0

    @property
    def top(self) -> bytes:
        """The image file."""
        return self.left()[TOP]

    def left(self) -> dict[str, bytes]:
        """All files as they are."""
        return {
            path: bytes(file.data) if isinstance(file, MemoryStorage) else bytes(file)
            for path, file in self.files.items()
        }

    async def change(self, kind: str, offset: int, data: bytes) -> None:
        """A write, zeroing or discard; ENOSPC is noted and nothing else may happen."""
        begun = self.record.begin_write(offset, data)
        try:
            if kind != "write":
                await self.image.write_zeroes(offset, len(data), unmap=kind == "discard")
            else:
                await self.image.write(offset, data)
        except OSError as error:
            self.note_full(kind, error)
        else:
            self.record.end_write(begun)

    async def reserve(self, offset: int, n_bytes: int) -> None:
        """Set space aside, which changes nothing that is read."""
        try:
            await self.image.allocate(offset, n_bytes)
        except OSError as error:
            self.note_full("reserve", error)

    def note_full(self, kind: str, error: OSError) -> None:
        """A request that found no room. Raises any other error."""
        if error.errno not in (errno.ENOSPC, errno.EOPNOTSUPP):
            raise error
        self.full.append(kind)

    async def grow(self, size: int) -> None:
        """Make the disk larger."""
        begun = self.record.begin_grow(size)
        try:
            await self.image.grow(size)
        except OSError as error:
            self.note_full("grow", error)
        else:
            self.record.end_grow(begun)

    async def flush(self, *, may_fail: bool = False) -> bool:
        """An fsync, which fails for want of space only where it ``may_fail``."""
        begun = self.record.begin_flush()
        try:
            await flush_image(self.image)
        except OSError as error:
            if not may_fail or error.errno != errno.ENOSPC:
                raise
            self.flush_errors += 1
            return False
        self.record.end_flush(begun)
        return True

    async def check_contents(self) -> None:
        """What the running image reads is what was written."""
        assert not self.record.expected_now().mismatches(await read_whole(self.image))


async def start(
    built: BuiltImage,
    limit: int | None,
    *,
    has_fallocate: bool = True,
    copy_on_write: bool = False,
    suspend: bool = False,
) -> Run:
    """Open an image whose files, sparse ones, may grow by ``limit`` blocks."""
    room = Room(limit)

    def limited(path: str) -> LimitedStorage:
        return LimitedStorage(
            built.files[path],
            room,
            has_fallocate=has_fallocate,
            copy_on_write=copy_on_write,
            suspend=suspend,
            name=path,
        )

    files: dict[str, bytes | bytearray | MemoryStorage] = {**built.files, TOP: limited(TOP)}
    if DATA in files:
        files[DATA] = limited(DATA)
    recordings: list[RecordingStorage] = []

    def wrap(memory: MemoryStorage) -> Storage:
        recordings.append(RecordingStorage(memory))
        return recordings[0]

    image = await open_memory_image(files, wrap=wrap)
    return Run(built, room, files, image, recordings[0], GuestRecord(built.contents, recordings[0].clock))


async def workload(run: Run, *, seed: int = 5, may_fail: bool = False, grows: bool = True) -> None:
    """Writes, zeroes, discards and fsyncs, of whole sectors."""
    chooser = random.Random(seed)
    n_sectors = run.built.spec.size // 512
    for number in range(22):
        kind = chooser.choice(("write", "write", "write", "zero", "discard"))
        n_bytes = chooser.choice((1, 3, 9, 40)) * 512
        offset = chooser.randrange(n_sectors - 40) * 512
        await run.change(kind, offset, chooser.randbytes(n_bytes) if kind == "write" else bytes(n_bytes))
        if number % 7 == 6:
            await run.flush(may_fail=may_fail)
        if number == 9:
            await run.reserve(n_sectors // 3 * 512, 9000)
        if number == 16 and grows:
            await run.grow(run.image.size + 80 * KIB)


async def check_closed(run: Run, *, n_qemu: int = 0) -> None:
    """After a close without an error: clean, and everything is there."""
    left = run.left()
    report = check_image_bytes(left[TOP])
    assert not report.errors, report.errors[:3]
    assert not report.leaks
    again = await open_memory_image(left, read_only=True)
    found = await read_whole(again)
    assert not run.record.expected_at(run.record.clock.now).mismatches(found)
    if n_qemu:
        files: Mapping[str, bytes | bytearray] = left
        version = run.built.spec.version
        if version > 1:
            code, output = qemu_check(files)
            assert code == 0, output
        assert qemu_read(files, format_name="qcow" if version == 1 else "qcow2") == found


async def close(run: Run) -> None:
    """Close, which succeeds."""
    begun = run.record.begin_flush()
    await run.image.aclose()
    run.record.end_flush(begun)


async def limits_of(built: BuiltImage) -> list[int]:
    """Numbers of blocks after which the disk is to be full, spread over all that a run takes."""
    run = await start(built, None)
    await workload(run)
    await close(run)
    await check_closed(run, n_qemu=1)
    n_blocks = run.room.n_taken
    assert n_blocks > 20
    return sorted({number * n_blocks // N_TRIES for number in range(N_TRIES)} | set(range(min(12, n_blocks))))


@pytest.mark.parametrize("has_fallocate", [True, False], ids=["fallocate", "no fallocate"])
@pytest.mark.parametrize("spec", SPECS)
async def test_a_disk_that_fills_loses_nothing(spec: str, has_fallocate: bool) -> None:
    """No flush fails, what had success is there, and it can be closed while the disk is full, without a leak."""
    built = build_image(SPECS[spec])
    n_full = 0
    for limit in await limits_of(built):
        run = await start(built, limit, has_fallocate=has_fallocate, suspend=limit % 2 == 1)
        await workload(run)
        n_full += bool(run.full)
        await run.check_contents()
        assert not run.image.read_only
        await close(run)
        await check_closed(run, n_qemu=limit % 7 == 0)
    assert n_full > 10


@pytest.mark.parametrize("spec", SPECS)
async def test_with_room_again_everything_goes_on(spec: str) -> None:
    """The same writes succeed then, nothing is refused any more, and nothing is left behind."""
    built = build_image(SPECS[spec])
    for limit in (await limits_of(built))[::2]:
        run = await start(built, limit, suspend=limit % 2 == 0)
        await workload(run)
        run.full.clear()
        run.room.limit = None
        await workload(run, seed=6, grows=False)
        assert not run.full
        await run.check_contents()
        await close(run)
        await check_closed(run)


COPY_ON_WRITE = ["v3", "v1", "4k", "snapshot", "refcount-64", "extended", "data-file"]
RESERVE = 32 * KIB


@pytest.fixture
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a copy-on-write file system with blocks of 512 bytes, 64 of them are kept free."""
    monkeypatch.setattr(metadata_space, "RESERVE_BYTES", RESERVE)
    for module in (metadata_space, write_back, refcount_blocks):
        monkeypatch.setattr(module, "LEAST_WRITE", 512)


@pytest.mark.parametrize("has_room_at_end", [False, True], ids=["full", "room again"])
@pytest.mark.parametrize("spec", COPY_ON_WRITE)
@pytest.mark.usefixtures("small_reserve")
async def test_a_copy_on_write_file_system_that_fills_loses_nothing(spec: str, has_room_at_end: bool) -> None:
    """Where writing over a table takes new space, some is kept free: no flush fails, nothing is lost or leaked."""
    built = build_image(SPECS[spec])
    n_full = 0
    for limit in await limits_of(built):
        run = await start(built, limit + RESERVE // 512, copy_on_write=True, suspend=True)
        await workload(run)
        n_full += bool(run.full)
        await run.check_contents()
        if has_room_at_end:
            run.room.limit = None
            run.full.clear()
            await workload(run, seed=6, grows=False)
            assert not run.full
        await close(run)
        await check_closed(run)
        top = run.files[TOP]
        assert isinstance(top, LimitedStorage)
        assert not top.n_kept
    assert n_full > 10


async def test_what_is_kept_free_is_enough_for_all_that_is_dirty(
    small_reserve: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many tables change, and 8 blocks are kept free for them: write-back comes early enough."""
    monkeypatch.setattr(metadata_space, "RESERVE_BYTES", 4 * KIB)
    built = build_image(ImageSpec(size=1 << 20))
    for limit in range(10, 70, 6):
        run = await start(built, None, copy_on_write=True, suspend=True)
        for start_of_table in range(0, 1 << 20, 32 * KIB):
            await run.change("write", start_of_table, b"a" * 512)
        await run.flush()
        run.room.limit = limit
        for start_of_table in range(0, 1 << 20, 32 * KIB):
            await run.change("write", start_of_table + 512, b"b" * 512)
        assert len(run.full) < 32
        await run.flush()
        await close(run)
        await check_closed(run)


async def test_a_refused_write_gives_back_what_it_used() -> None:
    """The part of it that had found room takes none from others afterwards."""
    run = await start(build_image(ImageSpec(size=128 * KIB)), 60, suspend=True)
    await run.change("write", 0, b"a" * 512)
    await run.flush()
    run.room.limit = 20
    await run.change("write", 4096, b"b" * 512 * 40)
    assert run.full
    assert run.room.limit == 20
    await close(run)
    await check_closed(run)


@pytest.mark.parametrize("spec", COPY_ON_WRITE)
async def test_a_flush_without_room_is_tried_again(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where writing over a table takes new space and none can be kept free, a flush may fail; the next one with room
    succeeds, and nothing is lost."""

    async def keep_free(self: LimitedStorage, n_bytes: int) -> bool:
        return False

    monkeypatch.setattr(LimitedStorage, "keep_free", keep_free)
    built = build_image(SPECS[spec])
    n_failed = 0
    for limit in await limits_of(built):
        run = await start(built, limit, copy_on_write=True, suspend=limit % 2 == 1)
        await workload(run, may_fail=True)
        n_failed += run.flush_errors
        await run.check_contents()
        assert not run.image.read_only
        run.room.limit = None
        assert await run.flush()
        await close(run)
        await check_closed(run)
    assert n_failed > 5


async def test_closing_without_room_says_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where even the last flush fails, its error names the part of the disk; what was promised before is there."""

    async def keep_free(self: LimitedStorage, n_bytes: int) -> bool:
        return False

    monkeypatch.setattr(LimitedStorage, "keep_free", keep_free)
    built = build_image(SPECS["4k"])
    run = await start(built, 64, copy_on_write=True, suspend=True)
    await run.change("write", 0, b"a" * 4096)
    assert await run.flush()
    await run.change("write", 8192, b"b" * 4096)
    run.room.limit = 0
    with pytest.raises(
        OSError, match=r"No space left on device; what was written between bytes 0 and 524288"
    ) as caught:
        await run.image.aclose()
    assert caught.value.errno == errno.ENOSPC
    assert not check_image_bytes(run.top).errors
    again = await open_memory_image(run.left(), read_only=True)
    assert bytes(await again.read(0, 4096)) == b"a" * 4096


async def test_closing_without_room_writes_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """What found room is on disk when the image is closed; the error names no byte of it, and all that was lost."""

    async def keep_free(self: LimitedStorage, n_bytes: int) -> bool:
        return False

    monkeypatch.setattr(LimitedStorage, "keep_free", keep_free)
    built = build_image(ImageSpec(size=256 * KIB))
    places = (0, 64 * KIB, 192 * KIB)  # each is mapped by another slice
    n_kept_by_limit = []
    for limit in range(6):
        run = await start(built, None, copy_on_write=True, suspend=True)
        for place in places:
            await run.change("write", place, b"a" * 512)
        assert await run.flush()
        for place in places:
            await run.change("write", place + 512, b"b" * 512)
        run.room.limit = limit
        lost = (0, 0)
        try:
            await run.image.aclose()
        except OSError as error:
            found = re.search(r"between bytes (\d+) and (\d+) of the disk", str(error))
            assert found is not None
            lost = int(found[1]), int(found[2])
        assert not check_image_bytes(run.top).errors
        again = await open_memory_image(run.left(), read_only=True)
        n_kept = 0
        for place in places:
            assert bytes(await again.read(place, 512)) == b"a" * 512
            is_kept = bytes(await again.read(place + 512, 512)) == b"b" * 512
            assert is_kept or lost[0] <= place + 512 < lost[1]
            n_kept += is_kept
        n_kept_by_limit.append(n_kept)
    assert n_kept_by_limit == sorted(n_kept_by_limit)
    assert {1, 2} <= set(n_kept_by_limit)
    assert n_kept_by_limit[-1] == 3


@pytest.mark.parametrize("spec", ["v3", "v1", "4k", "snapshot", "extended", "full-table"])
async def test_a_power_cut_on_a_full_disk(spec: str) -> None:
    """The power goes while the disk is full, or when it has room again: leaks at most, and all that was promised."""
    built = build_image(SPECS[spec])
    chooser = random.Random(3)
    for limit in (await limits_of(built))[::3]:
        run = await start(built, limit)
        await workload(run, grows=False)
        run.room.limit = None
        await workload(run, seed=7, grows=False)
        await close(run)
        moments = moments_of(run.recording)
        for cut in cuts(built.top, run.recording, chooser.sample(moments, min(3, len(moments)))):
            expected = run.record.expected_at(cut.moment)
            for state in cut.states(3, chooser):
                report = check_image_bytes(state)
                assert not report.errors, f"limit {limit}, cut at {cut.moment}: {report.errors[:3]}"
                again = await open_memory_image({**built.files, TOP: state}, read_only=True)
                assert not expected.mismatches(await read_whole(again)), f"limit {limit}, cut at {cut.moment}"


@pytest.mark.parametrize("has_fallocate", [True, False], ids=["fallocate", "no fallocate"])
async def test_bitmaps_without_room_are_marked_and_leak_nothing(has_fallocate: bool) -> None:
    """Bitmaps are stored at the end: without room they stay marked as inconsistent, and the disk is whole."""
    built = with_bitmaps(build_image(ImageSpec(size=1 << 20)), {"fine": 512, "k4": 4096})
    n_valid = n_marked = 0
    for limit in range(0, 160, 4):
        run = await start(built, limit, has_fallocate=has_fallocate)
        await workload(run, grows=limit % 8 == 0)
        await close(run)
        await check_closed(run, n_qemu=limit % 20 == 0)
        assert bitmap_directory(run.top) is not None
        for bitmap in stored_bitmaps(run.top).values():
            n_valid += bitmap.is_valid
            n_marked += not bitmap.is_valid
    assert n_valid
    assert n_marked
