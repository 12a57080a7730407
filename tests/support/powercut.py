"""Runs a workload on a recorded image and checks every state that a power cut may leave of it.

After each cut: the image opens, its consistency check finds leaks at most, every byte that an fsync had promised
is there, and other bytes are what they were or what was written. On a sample QEMU checks too, and the image
is written on.

An image and its data file are cut together: a flush makes durable what its own file has, so that any state of one may
meet any state of the other. A raw data file must keep the promises as it stands, too.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field

import trio

from qcowfuse.driver.options import L2CacheSize
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.storage.base import Storage

from .checker import check_image_bytes
from .flushing import flush_image
from .images import DATA, TOP, BuiltImage, open_memory_image, qemu_check, qemu_read
from .memory_storage import MemoryStorage
from .old_bytes import storage_of
from .recording import Cut, Expectation, GuestRecord, RecordingStorage, cuts, moments_of


class Guest:
    """Writes and fsyncs as the mount does (``try_`` first), and keeps the record of what was promised."""

    def __init__(self, image: QcowImage, record: GuestRecord, chooser: random.Random) -> None:
        self.image = image
        self.record = record
        self.chooser = chooser

    async def write(self, guest_offset: int, data: bytes) -> None:
        """One write."""
        begun = self.record.begin_write(guest_offset, data)
        await self.image.write(guest_offset, data)
        self.record.end_write(begun)

    async def zero(self, guest_offset: int, n_bytes: int, *, unmap: bool) -> None:
        """One discard (``unmap``) or write zeroes."""
        begun = self.record.begin_write(guest_offset, bytes(n_bytes))
        await self.image.write_zeroes(guest_offset, n_bytes, unmap=unmap)
        self.record.end_write(begun)

    async def grow(self, size: int) -> None:
        """Make the disk larger."""
        begun = self.record.begin_grow(size)
        await self.image.grow(size)
        self.record.end_grow(begun)

    async def flush(self) -> None:
        """One fsync."""
        begun = self.record.begin_flush()
        await flush_image(self.image)
        self.record.end_flush(begun)

    async def read(self, guest_offset: int, n_bytes: int) -> bytes:
        """One read."""
        return await read_image(self.image, guest_offset, n_bytes)

    async def write_random(self, start: int, end: int, max_bytes: int, unit: int = 1) -> None:
        """A write of random bytes somewhere in ``start`` to ``end``; whole ``unit``s."""
        n_bytes = self.chooser.randint(1, max_bytes // unit) * unit
        offset = self.chooser.randrange(start, max(start + 1, end - n_bytes + 1)) // unit * unit
        n_bytes = min(n_bytes, end - offset)
        await self.write(offset, self.chooser.randbytes(n_bytes))


async def read_image(image: QcowImage, guest_offset: int, n_bytes: int) -> bytes:
    """As the mount reads: at once if that is possible."""
    return bytes(await image.read(guest_offset, n_bytes))


async def read_whole(image: QcowImage) -> bytes:
    """The whole disk in portions: one look-up of it all would be slow."""
    step = 128 * image.cluster_size
    parts = [await read_image(image, start, min(step, image.size - start)) for start in range(0, image.size, step)]
    return b"".join(parts)


Workload = Callable[[Guest], Awaitable[None]]


@dataclass
class Recorded:
    """A run of a workload; ``data``: what reached the data file."""

    built: BuiltImage
    storage: RecordingStorage
    record: GuestRecord
    final: bytes
    data: RecordingStorage | None = None


@dataclass
class CutSummary:
    """What :func:`check_cuts` found; ``problems`` should be empty."""

    n_cuts: int = 0
    n_states: int = 0
    n_qemu: int = 0
    n_leaky: int = 0
    problems: list[str] = field(default_factory=list)


async def record_workload(
    built: BuiltImage,
    workload: Workload,
    *,
    seed: int = 0,
    suspend: bool = False,
    cache: L2CacheSize | None = None,
    close: bool = True,
    around: Callable[[Storage], Storage] = lambda storage: storage,
) -> Recorded:
    """Run ``workload`` on a fresh copy of an image, logging what reaches its storage; the driver gets what ``around``
    puts around that."""
    memory = storage_of(built, TOP, suspend=suspend)
    recording = RecordingStorage(memory)

    def wrap(_: MemoryStorage) -> Storage:
        return around(recording)

    files: dict[str, bytes | bytearray | MemoryStorage] = {**built.files, TOP: memory}
    if DATA in files:
        files[DATA] = storage_of(built, DATA, suspend=suspend)
    behind = built.files[DATA] if built.spec.data_file == "raw" else b""
    record = GuestRecord(built.contents, recording.clock, behind=behind)
    data: RecordingStorage | None = None

    def wrap_data(inner: MemoryStorage) -> Storage:
        nonlocal data
        data = RecordingStorage(inner, recording.clock)
        return data

    image = await open_memory_image(files, wrap=wrap, wrap_data=wrap_data, cache=cache)
    with trio.fail_after(60):
        await workload(Guest(image, record, random.Random(seed)))
        assert await read_whole(image) == bytes(record.contents)
        if close:
            begun = record.begin_flush()
            await image.aclose()
            record.end_flush(begun)
    return Recorded(built, recording, record, bytes(memory.data), data)


async def check_cuts(
    recorded: Recorded, *, n_states: int = 200, n_qemu: int = 20, seed: int = 0, may_leak: bool = False
) -> CutSummary:
    """Check ``n_states`` states (a few more) spread over all moments, ``n_qemu`` of them with QEMU as well; and what
    the end has left, which has no leaks unless it ``may_leak``."""
    summary = CutSummary()
    report = check_image_bytes(recorded.final)
    if report.errors or (report.leaks and not may_leak):
        summary.problems.append(f"at the end: {report.leaks} leaks; {'; '.join(report.errors[:3])}")
    chooser = random.Random(seed)
    recordings = [recorded.storage] if recorded.data is None else [recorded.storage, recorded.data]
    moments = moments_of(*recordings)
    per_cut = max(3, n_states // len(moments))
    every = max(1, n_states // max(n_qemu, 1))
    cluster_size = recorded.built.spec.cluster_size
    image_cuts = cuts(recorded.built.top, recorded.storage, moments, cluster_size=cluster_size)
    data_cuts: Iterable[Cut | None] = [None] * len(moments)
    if recorded.data is not None:
        data_cuts = cuts(recorded.built.files[DATA], recorded.data, moments, cluster_size=cluster_size)
    for cut, data_cut in zip(image_cuts, data_cuts, strict=True):
        expected = recorded.record.expected_at(cut.moment)
        summary.n_cuts += 1
        for state in joint_states(cut, data_cut, per_cut, chooser):
            summary.n_states += 1
            use_qemu = summary.n_states % every == 0
            summary.n_qemu += use_qemu
            await _check_state(recorded.built, cut, state, expected, summary, use_qemu=use_qemu)
            if len(summary.problems) > 20:
                return summary
    return summary


def joint_states(
    cut: Cut, data_cut: Cut | None, n_random: int, chooser: random.Random
) -> Iterator[dict[str, bytearray]]:
    """States of the image after a cut, with those of its data file where there is one: first the extremes of both."""
    if data_cut is None:
        yield from ({TOP: state} for state in cut.states(n_random, chooser))
        return
    for state in cut.extremes():
        yield from ({TOP: state, DATA: data} for data in data_cut.extremes())
    image_states, data_states = list(cut.states(n_random, chooser)), list(data_cut.states(n_random, chooser))
    for number in range(max(len(image_states), len(data_states))):
        state, data = (
            states[number] if number < len(states) else chooser.choice(states)
            for states in (image_states, data_states)
        )
        yield {TOP: state, DATA: data}


def recorded_bits(built: BuiltImage) -> bytes:
    """The autoclear bits that an image has at first, where they are none that a driver may know."""
    bits = built.top[88:96]
    return bits if built.spec.version >= 3 and int.from_bytes(bits, "big") >> 8 else bytes(8)


async def _check_state(
    built: BuiltImage,
    cut: Cut,
    changed: dict[str, bytearray],
    expected: Expectation,
    summary: CutSummary,
    *,
    use_qemu: bool,
) -> None:
    where = f"cut at {cut.moment}, state {summary.n_states}"
    state = changed[TOP]
    report = check_image_bytes(state)
    summary.n_leaky += report.leaks > 0
    if report.errors:
        summary.problems.append(f"{where}: {'; '.join(report.errors[:3])}")
        return
    files: dict[str, bytes | bytearray] = {**built.files, **changed}
    image = await open_memory_image(files, read_only=True)
    found = await read_whole(image)
    await image.aclose()
    if wrong := expected.mismatches(found):
        summary.problems.append(f"{where}: sectors {wrong[:8]} are neither what was promised nor written later")
    if built.spec.data_file == "raw" and (wrong := expected.mismatches(bytes(changed[DATA][: len(found)]))):
        summary.problems.append(f"{where}: sectors {wrong[:8]} of the raw data file are not what was promised")
    if state[88:96] == recorded_bits(built) != bytes(8) and found != built.contents:
        summary.problems.append(f"{where}: autoclear bits are set, and the disk has changed")
    if not use_qemu:
        return
    if built.spec.version > 1:
        code, output = qemu_check(files)
        if code != report.exit_code:
            summary.problems.append(f"{where}: qemu-img check exits {code}, own checker {report.exit_code}: {output}")
    old = built.snapshot_contents  # which QEMU shows in the size of the disk as it is
    if old is not None and qemu_read(files, snapshot="s1") != old.ljust(len(found), b"\0"):
        summary.problems.append(f"{where}: the snapshot has changed")
    await _write_on(built, changed, found, where, summary)


async def _write_on(
    built: BuiltImage, changed: dict[str, bytearray], found: bytes, where: str, summary: CutSummary
) -> None:
    """The image of a state takes writes, and QEMU reads them."""
    memories = {path: storage_of(built, path, state) for path, state in changed.items()}
    memory = memories[TOP]
    files: dict[str, bytes | bytearray | MemoryStorage] = {**built.files, **memories}
    image = await open_memory_image(files)
    contents = bytearray(found)
    chooser = random.Random(summary.n_states)
    for _ in range(20):
        offset = chooser.randrange(image.size - 3000)
        data = chooser.randbytes(chooser.randint(1, 3000))
        await image.write(offset, data)
        contents[offset : offset + len(data)] = data
    await image.aclose()
    report = check_image_bytes(memory.data)
    if report.errors:
        summary.problems.append(f"{where}: writing on damaged it: {report.errors[:3]}")
        return
    format_name = "qcow" if built.spec.version == 1 else "qcow2"
    written = {path: written.data for path, written in memories.items()}
    if qemu_read({**built.files, **written}, format_name=format_name) != contents:
        summary.problems.append(f"{where}: QEMU reads something else after writing on")
