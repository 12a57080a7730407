"""Power cuts and failing operations with persistent bitmaps: one that looks valid never misses a write.

Crash point: bitmaps-in-use.
"""

from __future__ import annotations

import errno
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import pytest
import trio

from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.driver.writing.dirty_bitmaps import DirtyBitmaps
from qcowfuse.errors import QcowFuseError
from qcowfuse.format.bitmaps import DirtyBits
from qcowfuse.storage.base import Storage
from tests.support.bitmaps import AUTO, Range, bitmap_directory, granules_of, stored_bitmaps, with_bitmaps
from tests.support.checker import check_image_bytes
from tests.support.faults import FaultyStorage, fail_at
from tests.support.images import TOP, BuiltImage, ImageSpec, StorageKind, build_image, open_memory_image, qemu_check
from tests.support.memory_storage import MemoryStorage
from tests.support.old_bytes import KINDS, over_old_bytes
from tests.support.powercut import Guest, Recorded, record_workload
from tests.support.recording import RecordingStorage, cuts, moments_of

KIB = 1 << 10
SPECS = {
    "v3": ImageSpec(size=5 << 20),
    "refcount-1": ImageSpec(refcount_bits=1, size=1 << 20),
    "refcount-64": ImageSpec(refcount_bits=64, fill=0.4),
    "full": ImageSpec(cluster_size=1024, fill=1.0),
    "4k": ImageSpec(cluster_size=4096, fill=0.3),
    "64k": ImageSpec(cluster_size=65536, size=512 * KIB, fill=0.3),
    "snapshot": ImageSpec(fill=0.6, snapshot=True),
    "extended": ImageSpec(size=512 * KIB, cluster_size=16384, extended_l2=True, zeroes=True, fill=0.4),
    "backing": ImageSpec(backing="raw", backing_size=150 * KIB),
}
# Names so long that entries of the directory lie across sectors; of the second, the place of its table is the end of
# one, and length and flags the beginning of the next.
BITMAPS = {"k4" * 240: 4096, "fine" * 125: 512, "k64": 65536, "g": 1 << 31}


async def mixed(guest: Guest) -> None:
    """Writes, zeroes and discards over the disk, with an fsync now and then."""
    size = guest.image.size
    for number in range(30):
        if number % 5 == 4:
            n_bytes = min(guest.chooser.choice([700, 5 * KIB, 40 * KIB]), size)
            await guest.zero(guest.chooser.randrange(size - n_bytes + 1), n_bytes, unmap=guest.chooser.random() < 0.6)
        else:
            await guest.write_random(0, size, 5000)
        if number % 10 == 9:
            await guest.flush()


async def all_of_it(guest: Guest) -> None:
    """A discard of the whole disk, so that parts are all ones, and one write."""
    await guest.zero(0, guest.image.size, unmap=True)
    await guest.write(5 * KIB, b"x" * 700)


WORKLOADS: dict[str, Callable[[Guest], Awaitable[None]]] = {"mixed": mixed, "all of it": all_of_it}


async def image_with_bitmaps(spec: str, kinds: Sequence[StorageKind] = KINDS) -> BuiltImage:
    """An image whose bitmaps have seen one session already, so that some of their clusters exist."""
    built = with_bitmaps(build_image(SPECS[spec]), BITMAPS, disabled={"disabled": 4096})
    memory = MemoryStorage(built.top)
    image = await open_memory_image({**built.files, TOP: memory})
    for start in (3 * KIB, 100 * KIB, 200 * KIB):
        await image.write(start, b"before" * 100)
    await image.aclose()
    image = await open_memory_image({**built.files, TOP: bytes(memory.data)}, read_only=True)
    contents = bytes(await image.read(0, image.size))
    assert all(bitmap.is_valid for bitmap in stored_bitmaps(memory.data).values())
    left = BuiltImage(built.spec, {**built.files, TOP: bytes(memory.data)}, contents, built.snapshot_contents)
    return over_old_bytes(left, kinds[list(SPECS).index(spec) % len(kinds)])


async def problem_of(built: BuiltImage, state: bytes | bytearray, *, may_mark_disabled: bool = False) -> str | None:
    """What is wrong with an image that was left behind: damage, or a valid bitmap that misses a change."""
    report = check_image_bytes(state)
    if report.errors:
        return str(report.errors[:3])
    if bitmap_directory(state) is None:
        return "the bitmaps were given up"
    image = await open_memory_image({**built.files, TOP: bytes(state)}, read_only=True)
    changed = await changes_of(built, image)
    await image.aclose()
    before = stored_bitmaps(built.top)
    cluster_size = built.spec.cluster_size
    for name, bitmap in stored_bitmaps(state).items():
        if bitmap.is_valid and len(bitmap.table) * cluster_size * 8 * bitmap.granularity < image.size:
            return f"{name[:9]}: is valid and too short for the disk"
        if not bitmap.flags & AUTO:
            if bitmap.is_valid and bitmap.dirty != before[name].dirty:
                return f"{name}: a disabled bitmap has changed"
            if image.size == built.spec.size and bitmap != before[name] and not may_mark_disabled:
                return f"{name}: a disabled bitmap has been touched"
        elif bitmap.is_valid:
            wanted = granules_of(changed, bitmap.granularity) | before[name].dirty
            if missing := wanted - bitmap.dirty:
                return f"{name[:9]}: is valid and misses {sorted(missing)[:5]}"
    return None


async def changes_of(built: BuiltImage, image: QcowImage) -> list[Range]:
    """The sectors that are not what they were when the image was built; what the disk has grown by was zero."""
    changed = []
    old_size = len(built.contents)
    position = 0
    while position < image.size:
        is_data, n_bytes = True, old_size
        if position >= old_size:
            is_data, n_bytes = await image.find_extent(position, image.size - position)
        if is_data:
            found = bytes(await image.read(position, n_bytes))
            before = built.contents[position : position + n_bytes].ljust(n_bytes, b"\0")
            changed += [
                (position + start, 512)
                for start in range(0, n_bytes, 512)
                if found[start : start + 512] != before[start : start + 512]
            ]
        position += n_bytes
    return changed


async def check_all_cuts(
    recorded: Recorded, n_states: int, n_qemu: int = 0, *, may_mark_disabled: bool = False
) -> list[str]:
    """The problems in the states that power cuts leave, over all moments."""
    problems = []
    chooser = random.Random(1)
    moments = list(cuts(recorded.built.top, recorded.storage))
    n_seen = 0
    for cut in moments:
        for state in cut.states(max(3, n_states // len(moments)), chooser):
            n_seen += 1
            problem = await problem_of(recorded.built, state, may_mark_disabled=may_mark_disabled)
            if problem is None and n_qemu and n_seen % (n_states // n_qemu) == 0:
                code, output = qemu_check({**recorded.built.files, TOP: state})
                if code not in (0, 3):
                    problem = output
            if problem is not None:
                problems.append(f"cut at {cut.moment}: {problem}")
    return problems


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("spec", SPECS)
async def test_a_power_cut_leaves_no_bitmap_that_lies(spec: str, workload: str) -> None:
    """Whatever a power cut leaves: leaks at most, and each bitmap is in use or covers all that has changed."""
    built = await image_with_bitmaps(spec)
    recorded = await record_workload(built, WORKLOADS[workload], seed=3)
    problems = await check_all_cuts(recorded, 150, n_qemu=6)
    assert not problems, "\n".join(problems[:5])
    assert all(bitmap.is_valid for bitmap in stored_bitmaps(recorded.final).values())
    assert await problem_of(built, recorded.final) is None
    assert qemu_check({**built.files, TOP: recorded.final})[0] == 0


@pytest.mark.parametrize("spec", ["full", "refcount-64", "64k"])
async def test_a_power_cut_while_bitmaps_grow(spec: str) -> None:
    """The disk grows so far that tables have to move: no valid bitmap is too short, or misses a write."""
    built = await image_with_bitmaps(spec, ("file", "used"))
    new_size = built.spec.size + (600 << 20 if spec == "full" else 140 << 20)

    async def growing(guest: Guest) -> None:
        await guest.write(7 * KIB, b"a" * 3000)
        await guest.grow(new_size)
        await guest.write(new_size - 5000, b"b" * 5000)
        await guest.write(90 << 20, b"c" * 700)

    recorded = await record_workload(built, growing, seed=3)
    problems = await check_all_cuts(recorded, 150, n_qemu=6, may_mark_disabled=True)
    assert not problems, "\n".join(problems[:5])
    assert all(bitmap.is_valid for bitmap in stored_bitmaps(recorded.final).values())
    assert await problem_of(built, recorded.final) is None
    assert qemu_check({**built.files, TOP: recorded.final})[0] == 0
    tables = [
        {name: bitmap.table_offset for name, bitmap in stored_bitmaps(data).items()}
        for data in (built.top, recorded.final)
    ]
    assert (tables[0] != tables[1]) is (spec != "64k")


async def run_with_fault(
    built: BuiltImage, check: Callable[..., int] | None, *, inline: bool, grows: bool = False
) -> tuple[FaultyStorage, RecordingStorage, bytes]:
    """Open, write, zero, fsync and close on a storage that fails; errors are the guest's to see."""
    memory = MemoryStorage(built.top, suspend=not inline)
    recording = RecordingStorage(memory)
    faulty = FaultyStorage(recording, inline=inline)

    def wrap(_: MemoryStorage) -> Storage:
        return faulty

    image = await open_memory_image({**built.files, TOP: memory}, wrap=wrap)
    faulty.operations.clear()
    faulty.check = check
    chooser = random.Random(2)
    with trio.fail_after(30):
        for number in range(8):
            start = chooser.randrange(image.size - 9000)
            try:
                if number % 4 == 3:
                    await image.write_zeroes(start, 9000, unmap=True)
                else:
                    await image.write(start, chooser.randbytes(4000))
                if number == 5:
                    await image.flush()
                if number == 4 and grows:
                    await image.grow(image.size + (140 << 20))
            except (OSError, QcowFuseError):
                pass
        with suppress(OSError, QcowFuseError):
            await image.aclose()
    return faulty, recording, bytes(memory.data)


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("inline", [False, True], ids=["awaited", "inline"])
@pytest.mark.parametrize(("spec", "grows"), [("refcount-64", False), ("full", False), ("refcount-64", True)])
async def test_every_operation_may_fail(
    spec: str, grows: bool, inline: bool, for_ever: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever operation fails: leaks at most, no bitmap that lies, neither at once nor after a power cut."""
    caplog.set_level(logging.CRITICAL)
    built = await image_with_bitmaps(spec)
    faulty, _, data = await run_with_fault(built, None, inline=inline, grows=grows)
    assert all(bitmap.is_valid for bitmap in stored_bitmaps(data).values())
    n_operations = len(faulty.operations)
    chooser = random.Random(6)
    n_in_use = 0
    for number in range(n_operations):
        code = errno.EIO if for_ever else errno.ENOSPC
        faulty, recording, data = await run_with_fault(
            built, fail_at(number, code=code, for_ever=for_ever), inline=inline, grows=grows
        )
        assert await problem_of(built, data, may_mark_disabled=grows) is None, (
            f"operation {number}: {faulty.operations[number]}"
        )
        n_in_use += any(not bitmap.is_valid for bitmap in stored_bitmaps(data).values())
        for cut in cuts(built.top, recording, [chooser.choice(moments_of(recording))]):
            for state in cut.states(2, chooser):
                problem = await problem_of(built, state, may_mark_disabled=grows)
                assert problem is None, f"operation {number}, cut at {cut.moment}: {problem}"
    assert n_in_use > 5


async def test_the_harness_catches_a_mark_that_is_not_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marking bitmaps as in use without a flush before the first write is seen."""
    original = DirtyBitmaps.begin

    async def begin(self: DirtyBitmaps, write_back: object, size: int) -> None:
        class WithoutFlush:
            async def flush_storage(self) -> None:
                await trio.lowlevel.checkpoint()

        await original(self, WithoutFlush(), size)  # type: ignore[arg-type]

    built = await image_with_bitmaps("full")
    monkeypatch.setattr(DirtyBitmaps, "begin", begin)
    problems = await check_all_cuts(await record_workload(built, mixed), 200)
    assert any("misses" in problem for problem in problems)


async def test_the_harness_catches_bits_that_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that sets no bit is seen."""
    built = await image_with_bitmaps("full")
    monkeypatch.setattr(DirtyBits, "mark", lambda *_: None)
    problems = await check_all_cuts(await record_workload(built, mixed), 200)
    assert any("misses" in problem for problem in problems)


async def test_the_harness_catches_a_flag_that_is_cleared_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storing the contents of bitmaps without a flush before the directory says that they are valid is seen."""
    built = await image_with_bitmaps("v3")

    async def store(self: DirtyBitmaps, write_back: object, size: int) -> None:
        class Late:
            def __init__(self, inner: object) -> None:
                self.inner = inner

            def __getattr__(self, name: str) -> object:
                return trio.lowlevel.checkpoint if name == "flush_storage" else getattr(self.inner, name)

        await original_store(self, Late(write_back), size)  # type: ignore[arg-type]

    original_store = DirtyBitmaps.store
    monkeypatch.setattr(DirtyBitmaps, "store", store)
    problems = await check_all_cuts(await record_workload(built, all_of_it), 200)
    assert any("misses" in problem for problem in problems)
