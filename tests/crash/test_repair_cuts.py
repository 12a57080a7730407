"""Power cuts and failing operations in a repair: a second repair mends the rest, and no byte of a guest is lost.

The crash points are those of :mod:`qcowfuse.consistency.repair`.
"""

from __future__ import annotations

import errno
import random

import pytest
import trio

from qcowfuse.consistency.repair import repair_storage
from qcowfuse.consistency.result import Fix
from tests.support import damage
from tests.support.checker import check_image_bytes
from tests.support.damage import Damage
from tests.support.faults import FaultyStorage, fail_at
from tests.support.images import TOP, BuiltImage, ImageSpec, open_memory_image, qemu_check, qemu_read
from tests.support.memory_storage import MemoryStorage
from tests.support.old_bytes import build_over_old_bytes
from tests.support.recording import SECTOR, RecordingStorage, cuts

PLAIN = ImageSpec(fill=0.3, size=128 << 10)
SNAPSHOT = ImageSpec(fill=0.3, size=128 << 10, snapshot=True, zeroes=True)
LARGER = ImageSpec(fill=0.4, size=256 << 10, cluster_size=4096, snapshot=True)
CASES: list[tuple[str, ImageSpec, Damage]] = [
    ("leaks", PLAIN, damage.leak_clusters),
    ("low", PLAIN, damage.lower_counts),
    ("flags", SNAPSHOT, damage.flip_copied),
    ("everything", SNAPSHOT, damage.everything),
    ("everything-4k", LARGER, damage.everything),
    ("no-block", PLAIN, damage.drop_refcount_block),
    ("no-block-snapshot", SNAPSHOT, damage.drop_refcount_block),
    ("block-outside", LARGER, damage.misplace_refcount_block),
    ("snapshot-table", SNAPSHOT, damage.shorten_snapshot_entry),
]
IDS = [name for name, _, _ in CASES]
N_STATES = 500
N_QEMU = 5


def damaged(spec: ImageSpec, kind: Damage) -> tuple[BuiltImage, bytearray]:
    """A built image and its bytes with the damage done."""
    built = build_over_old_bytes(spec, "used" if spec.cluster_size > SECTOR else "file")
    data = bytearray(built.top)
    kind(data)
    return built, data


async def repair(storage: MemoryStorage | RecordingStorage | FaultyStorage) -> None:
    """A whole repair that must leave nothing to do."""
    result = await repair_storage(storage, Fix.ALL, report=lambda _: None)
    assert result.is_clean


async def attempt(storage: FaultyStorage) -> int | None:
    """A repair that may fail; the errno that it fails with."""
    try:
        await repair(storage)
    except OSError as error:
        return error.errno
    return None


async def contents_of(built: BuiltImage, data: bytes | bytearray) -> bytes:
    """What the guest reads."""
    image = await open_memory_image({**built.files, TOP: data}, read_only=True)
    try:
        return bytes(await image.read(0, image.size))
    finally:
        await image.aclose()


async def mend_and_judge(built: BuiltImage, data: bytes | bytearray) -> bytearray:
    """A second repair leaves a clean image with the guest's bytes; what it has become."""
    memory = MemoryStorage(data)
    await repair(memory)
    report = check_image_bytes(memory.data)
    assert not report.errors
    assert not report.leaks
    assert not memory.data[79] & 3
    assert await contents_of(built, memory.data) == built.contents
    return memory.data


def dangers(data: bytes | bytearray) -> set[str]:
    """What is wrong beyond COPIED flags, which may be behind the counts for a while (repair-flags-partly-set)."""
    return {error for error in check_image_bytes(data).errors if "COPIED" not in error}


@pytest.mark.parametrize(("name", "spec", "kind"), CASES, ids=IDS)
async def test_power_cuts_in_a_repair(name: str, spec: ImageSpec, kind: Damage) -> None:
    """After a cut nothing is wrong that was not before, and a second repair gets the image clean.

    Crash points: repair-counts-partly-raised, repair-header-unwritten, repair-old-structures-kept,
    repair-counts-partly-lowered, repair-flags-partly-set, repair-still-dirty.
    """
    built, data = damaged(spec, kind)
    before = dangers(data)
    recording = RecordingStorage(MemoryStorage(data))
    await repair(recording)
    rng = random.Random(name)
    moments = list(cuts(bytes(data), recording))
    assert len(moments) >= 2
    n_states = 0
    for cut in moments:
        for state in cut.states(max(4, N_STATES // len(moments)), rng):
            n_states += 1
            assert dangers(state) <= before, (cut.moment, n_states)
            assert await contents_of(built, state) == built.contents, (cut.moment, n_states)
            mended = await mend_and_judge(built, state)
            if n_states % (N_STATES // N_QEMU) == 0:
                code, said = qemu_check({TOP: mended})
                assert code == 0, said
                if built.snapshot_contents is not None:
                    assert qemu_read({TOP: mended}, snapshot="s1") == built.snapshot_contents


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for-ever"])
@pytest.mark.parametrize(("name", "spec", "kind"), CASES, ids=IDS)
async def test_failing_operations_in_a_repair(name: str, spec: ImageSpec, kind: Damage, for_ever: bool) -> None:
    """Whichever operation fails, the repair says so, loses nothing, and another repair finishes the work."""
    built, data = damaged(spec, kind)
    before = dangers(data)
    whole = FaultyStorage(MemoryStorage(data))
    await repair(whole)
    n_operations = len(whole.operations)
    writes = [operation.number for operation in whole.operations if operation.kind != "read"]
    reads = random.Random(name).sample(range(n_operations), min(10, n_operations))
    for number in sorted({*writes, *reads}):
        code = errno.EIO if number % 2 else errno.ENOSPC
        memory = MemoryStorage(data)
        faulty = FaultyStorage(memory, check=fail_at(number, code=code, for_ever=for_ever))
        failed_with = await attempt(faulty)
        # Only a lack of room behind the end of the file can be got around.
        assert failed_with == code or (failed_with is None and code == errno.ENOSPC and not for_ever)
        assert dangers(memory.data) <= before, number
        assert await contents_of(built, memory.data) == built.contents, number
        await mend_and_judge(built, memory.data)


@pytest.mark.parametrize(("name", "spec", "kind"), CASES, ids=IDS)
async def test_a_repair_that_is_given_up(name: str, spec: ImageSpec, kind: Damage) -> None:
    """Cancelled at any checkpoint (SIGTERM while an image is opened does that): the next repair does the rest."""
    built, data = damaged(spec, kind)
    n_turns = 0
    while True:
        storage = MemoryStorage(data, suspend=True)
        scope = trio.CancelScope()

        async def start(storage: MemoryStorage = storage, scope: trio.CancelScope = scope) -> None:
            with scope:
                await repair(storage)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(start)
            for _ in range(n_turns):
                await trio.lowlevel.checkpoint()
            scope.cancel()
        await mend_and_judge(built, storage.data)
        if not scope.cancelled_caught:
            break
        n_turns += max(1, n_turns // 3)
    assert n_turns > 10
