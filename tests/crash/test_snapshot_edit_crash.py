"""Power cuts and failing operations while snapshots are created, applied and deleted: the image is wholly
what it was or wholly what it shall be, and clean, not even with leaks.

Crash points: snapshot-header-unwritten, snapshot-header-unflushed, snapshot-clusters-freed.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from qcowfuse.driver.chain import open_image
from qcowfuse.driver.files import StorageOpener
from qcowfuse.driver.options import OpenOptions
from qcowfuse.storage.base import Storage
from qcowfuse.tools import shadow_refcounts
from qcowfuse.tools.snapshot_edit import apply_snapshot, create_snapshot, delete_snapshot
from tests.support.checker import check_image_bytes
from tests.support.faults import FaultyStorage, fail_at
from tests.support.images import TOP, BuiltImage, ImageSpec, open_memory_image, qemu_check
from tests.support.memory_storage import MemoryStorage
from tests.support.old_bytes import build_in_turn
from tests.support.recording import RecordedFlush, RecordingStorage, cuts

KIB = 1 << 10
SPECS = {
    "v3": ImageSpec(fill=0.5, snapshot=True),
    "v2": ImageSpec(version=2, fill=0.4, snapshot=True),
    "4k": ImageSpec(cluster_size=4096, size=512 * KIB, fill=0.6, snapshot=True),
    "64k": ImageSpec(cluster_size=65536, size=512 * KIB, fill=0.6, snapshot=True),
    "refcount-2": ImageSpec(refcount_bits=2, fill=0.4, snapshot=True),
    "refcount-64": ImageSpec(refcount_bits=64, size=512 * KIB, fill=0.8, snapshot=True),
    "extended": ImageSpec(size=512 * KIB, cluster_size=16384, extended_l2=True, fill=0.6, zeroes=True, snapshot=True),
    "zeroes": ImageSpec(fill=0.8, zeroes=True, snapshot=True, cluster_size=1024),
    "zstd": ImageSpec(cluster_size=4096, fill=0.8, compression="zstd", snapshot=True),
    "backing": ImageSpec(backing="raw", backing_size=150 * KIB, fill=0.3, snapshot=True),
}

Change = Callable[[StorageOpener], Awaitable[object]]
CHANGES: dict[str, Change] = {
    "create": lambda opener: create_snapshot(TOP, "new", opener=opener),
    "apply": lambda opener: apply_snapshot(TOP, "s1", opener=opener),
    "delete": lambda opener: delete_snapshot(TOP, "s1", opener=opener),
}


@dataclass
class State:
    """What an image holds: the disk, and each snapshot by name."""

    disk: bytes
    snapshots: dict[str, bytes]

    def after(self, change: str) -> State:
        """What it holds after a change."""
        if change == "create":
            return State(self.disk, {**self.snapshots, "new": self.disk})
        if change == "apply":
            return State(self.snapshots["s1"], self.snapshots)
        return State(self.disk, {name: held for name, held in self.snapshots.items() if name != "s1"})


def opener_of(built: BuiltImage, top: Storage) -> StorageOpener:
    async def opener(path: str, writable: bool, options: OpenOptions) -> Storage:
        return top if path == TOP else MemoryStorage(built.files[path], writable=False)

    return opener


async def prepared(spec: str) -> tuple[BuiltImage, bytes, State]:
    """An image whose disk has changed since its snapshot was made, and what it holds."""
    built = build_in_turn(SPECS, spec, ("used", "file"))
    memory = MemoryStorage(built.top)
    image = await open_memory_image({**built.files, TOP: memory})
    chooser = random.Random(3)
    for _ in range(12):
        offset = chooser.randrange(image.size - 5000)
        await image.write(offset, chooser.randbytes(chooser.randint(1, 5000)))
    await image.write_zeroes(image.size // 2, 20 * KIB, unmap=True)
    disk = bytes(await image.read(0, image.size))
    await image.aclose()
    assert built.snapshot_contents is not None
    return built, bytes(memory.data), State(disk, {"s1": built.snapshot_contents})


async def held_by(built: BuiltImage, data: bytes | bytearray, names: set[str]) -> State:
    """What an image holds, with those snapshots that it has."""

    async def contents(name: str | None) -> bytes:
        opener = opener_of(built, MemoryStorage(data, writable=False))
        image = await open_image(TOP, OpenOptions(read_only=True, snapshot=name), opener=opener)
        found = bytes(await image.read(0, image.size))
        await image.aclose()
        return found

    n_snapshots = int.from_bytes(data[60:64], "big")
    found = State(await contents(None), {})
    for name in names:
        if n_snapshots == 2 or (n_snapshots == 1 and name == "s1"):
            found.snapshots[name] = await contents(name)
    return found


async def assert_old_or_new(built: BuiltImage, data: bytes | bytearray, old: State, new: State, where: str) -> bool:
    """The image holds one of both, and is clean; whether it is the new one."""
    report = check_image_bytes(data)
    assert not report.errors, f"{where}: {report.errors[:3]}"
    assert not report.leaks, f"{where}: {report.leaks} leaks"
    found = await held_by(built, data, {"s1", "new"})
    assert found in (old, new), f"{where}: neither what it was nor what it shall be"
    return found == new


async def problems_of_cuts(spec: str, change: str, *, n_states: int = 60) -> str:
    """Record a change and look at what power cuts leave; the first problem, or nothing."""
    built, data, old = await prepared(spec)
    memory = MemoryStorage(data)
    recording = RecordingStorage(memory)
    await CHANGES[change](opener_of(built, recording))
    new = old.after(change)
    assert len(recording.flushes) == 2
    if change != "create":
        assert any(not any(write.data) for write in recording.writes), "no space was given back"
    chooser = random.Random(1)
    seen = set()
    try:
        for cut in cuts(data, recording):
            for number, state in enumerate(cut.states(n_states // 3, chooser)):
                where = f"cut at {cut.moment}, state {number}"
                seen.add(await assert_old_or_new(built, state, old, new, where))
                if number % 20 == 10:
                    assert qemu_check({**built.files, TOP: state})[0] == 0, where
    except AssertionError as error:
        return str(error)
    assert seen == {False, True}
    assert await assert_old_or_new(built, memory.data, old, new, "the end") is True
    return ""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("spec", SPECS)
async def test_a_power_cut_leaves_the_old_or_the_new(spec: str, change: str) -> None:
    """Any part of the volatile writes, torn or missing: all old or all new, without leaks; QEMU agrees."""
    assert await problems_of_cuts(spec, change) == ""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("spec", ["v3", "refcount-64"])
async def test_a_power_cut_when_memory_is_short(spec: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refcount blocks that are written early and read again for want of room change nothing."""
    monkeypatch.setattr(shadow_refcounts, "CACHE_BYTES", 0)
    monkeypatch.setattr(shadow_refcounts, "MIN_BLOCKS", 3)
    assert await problems_of_cuts(spec, change) == ""


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("spec", ["v3", "4k", "zstd"])
async def test_every_operation_may_fail(spec: str, change: str, for_ever: bool) -> None:
    """Whichever operation fails: an error unless all was done, all old or all new, the old length if it is the old
    one; and a second try succeeds."""
    built, data, old = await prepared(spec)
    new = old.after(change)
    counting = FaultyStorage(MemoryStorage(data))
    await CHANGES[change](opener_of(built, counting))
    n_operations = len(counting.operations)
    assert n_operations > 15
    n_failed = 0
    for number in range(n_operations):
        code = errno.ENOSPC if number % 2 else errno.EIO
        memory = MemoryStorage(data)
        faulty = FaultyStorage(memory, check=fail_at(number, code=code, for_ever=for_ever))
        failure: OSError | None = None
        try:
            await CHANGES[change](opener_of(built, faulty))
        except OSError as error:
            failure = error
        assert memory.closed
        assert failure is None or failure.errno == code
        is_new = await assert_old_or_new(built, memory.data, old, new, f"operation {number}")
        assert failure is not None or is_new
        n_failed += failure is not None
        if is_new:
            continue
        again = MemoryStorage(memory.data)
        if not any(operation.host_offset == 24 for operation in faulty.operations):
            assert len(memory.data) == len(data)
        await CHANGES[change](opener_of(built, again))
        assert await assert_old_or_new(built, again.data, old, new, f"operation {number}, second try") is True
    assert n_failed > 10


async def test_the_harness_catches_a_missing_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the flush before the header's write a power cut is seen to do damage."""
    flush = RecordingStorage.flush

    async def second_only(self: RecordingStorage) -> None:
        if any(write.host_offset == 24 for write in self.writes):
            await flush(self)
        else:  # one that makes nothing durable
            self.flushes.append(RecordedFlush(-1, self.clock.tick()))

    monkeypatch.setattr(RecordingStorage, "flush", second_only)
    assert await problems_of_cuts("v3", "create")
