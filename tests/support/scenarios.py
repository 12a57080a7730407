"""Scenarios: an image, a list of guest operations, perhaps a fault; run, then cut the power at every moment.

1. A scenario is plain values: it can be written down as JSON, run again, and shrunk.
2. Whatever can go wrong is in its ``operations``; what they write follows from the numbers in them.
3. Operations of one ``together`` begin at the same time and touch different sectors. With faults or cancelled
   operations everything is whole sectors: a sector of which a part failed could be anything.
"""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import trio

from qcowfuse.driver.layers import table_cache
from qcowfuse.driver.options import L2CacheSize
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.driver.writing import refcount_blocks
from qcowfuse.errors import QcowFuseError
from qcowfuse.storage.base import Storage

from .checker import check_image_bytes
from .faults import FaultyStorage, Operation, fail_at
from .images import DATA, TOP, ImageSpec, StorageKind, open_memory_image
from .memory_storage import MemoryStorage
from .old_bytes import build_over_old_bytes, storage_of
from .powercut import Recorded, check_cuts, read_image, read_whole
from .recording import SECTOR, GuestRecord, RecordingStorage
from .shrink import shrink

KIB = 1 << 10
Step = tuple[Any, ...]
"""``("write", offset, n_bytes, seed)``, ``("zero" | "discard" | "reserve" | "read", offset, n_bytes)``,
``("flush",)``, ``("grow", n_bytes)``, ``("together", steps)``, ``("cancel", number, step)``: cancelled at its storage
operation ``number``. What lies behind the end, because the disk could not grow, is passed over."""


@dataclass(frozen=True)
class Fault:
    """Storage operation ``number`` (from 0, after opening) fails with ``code``; with ``for_ever`` all later ones."""

    number: int
    code: int = errno.EIO
    for_ever: bool = False


@dataclass(frozen=True)
class Scenario:
    """``suspend``: nothing is answered at once. ``tiny_caches``: L2 slices and refcount blocks hardly fit.
    ``storage``: what the image lies on, see :mod:`.old_bytes`."""

    spec: ImageSpec
    steps: tuple[Step, ...]
    suspend: bool = False
    tiny_caches: bool = False
    fault: Fault | None = None
    seed: int = 0
    storage: StorageKind = "file"

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Scenario:
        """The scenario that :meth:`to_json` wrote."""
        values = json.loads(text)
        fault = values["fault"]
        values["spec"] = ImageSpec(**values["spec"])
        values["fault"] = None if fault is None else Fault(**fault)
        values["steps"] = tuple(_tuples(values["steps"]))
        return Scenario(**values)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


@dataclass
class Outcome:
    """``problems`` should be empty. ``n_operations``: storage operations up to the end of closing. ``n_leaks``: after
    a close without an error."""

    n_operations: int = 0
    n_states: int = 0
    n_errors: int = 0
    n_leaks: int = 0
    problems: list[str] | None = None

    @property
    def failed(self) -> bool:
        """Whether anything was found."""
        return bool(self.problems)


class _Run:
    def __init__(self, image: QcowImage, faulty: FaultyStorage, record: GuestRecord, *, may_fail: bool) -> None:
        self.image = image
        self.faulty = faulty
        self.record = record
        self.may_fail = may_fail
        self.errors: list[Exception] = []
        self.problems: list[str] = []
        self.n_leaks = 0
        self.closed = False

    async def step(self, step: Step) -> None:
        """Do one step; an error is noted, and is a problem where nothing was made to fail."""
        kind = step[0]
        if kind == "together":
            async with trio.open_nursery() as nursery:
                for part in step[1]:
                    nursery.start_soon(self.step, part)
            return
        if kind == "cancel":
            await self._cancelled(step[1], step[2])
            return
        try:
            await self._do(step)
        except (OSError, QcowFuseError) as error:
            self.errors.append(error)
            if not self.may_fail:
                self.problems.append(f"{step}: {error!r}")

    async def _do(self, step: Step) -> None:
        record, image = self.record, self.image
        kind = step[0]
        if kind == "flush":
            promise = record.begin_flush()
            await image.flush()
            record.end_flush(promise)
            return
        if kind == "grow":
            await self._grow(image.size + step[1])
            return
        offset, n_bytes = step[1], step[2]
        if offset + n_bytes > image.size:
            return
        if kind == "read":
            await read_image(image, offset, n_bytes)
            return
        if kind == "reserve":
            await image.allocate(offset, n_bytes)
            return
        data = random.Random(step[3]).randbytes(n_bytes) if kind == "write" else bytes(n_bytes)
        begun = record.begin_write(offset, data)
        if kind != "write":
            is_discard, is_at_once = kind == "discard", (offset + n_bytes) // SECTOR % 2 == 0
            if not (is_at_once and image.try_write_zeroes(offset, n_bytes, unmap=is_discard)):
                await image.write_zeroes(offset, n_bytes, unmap=is_discard)
        else:
            await image.write(offset, data)
        record.end_write(begun)

    async def _grow(self, size: int) -> None:
        begun = self.record.begin_grow(size)
        try:
            await self.image.grow(size)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # version 2 with snapshots
                raise
        else:
            self.record.end_grow(begun)

    async def _cancelled(self, number: int, step: Step) -> None:
        first = len(self.faulty.operations)
        scope = trio.CancelScope()

        async def gate(operation: Operation) -> None:
            if operation.number - first == number:
                scope.cancel()
            await trio.lowlevel.checkpoint()

        self.faulty.gate = gate
        with scope:
            await self.step(step)
        self.faulty.gate = None

    async def check_contents(self, when: str) -> None:
        """What the running image reads is what was written."""
        check, self.faulty.check = self.faulty.check, None
        found = await read_whole(self.image)
        self.faulty.check = check
        if wrong := self.record.expected_now().mismatches(found):
            self.problems.append(f"{when}: sectors {wrong[:8]} do not read as they were written")


@contextmanager
def _caches(*, tiny: bool) -> Iterator[L2CacheSize | None]:
    if not tiny:
        yield None
        return
    before = table_cache.MIN_DIRTY_BYTES, refcount_blocks.BLOCK_CACHE_BYTES
    table_cache.MIN_DIRTY_BYTES, refcount_blocks.BLOCK_CACHE_BYTES = 512, 0
    try:
        yield L2CacheSize(n_tables=1)
    finally:
        table_cache.MIN_DIRTY_BYTES, refcount_blocks.BLOCK_CACHE_BYTES = before


async def run_scenario(scenario: Scenario, *, n_states: int = 60, n_qemu: int = 1) -> Outcome:
    """Run it, check the running image, what it leaves, and ``n_states`` states after power cuts."""
    built = build_over_old_bytes(scenario.spec, scenario.storage)
    memory = storage_of(built, TOP, suspend=scenario.suspend)
    recording = RecordingStorage(memory)
    faulty = FaultyStorage(recording, inline=not scenario.suspend)

    def wrap(_: MemoryStorage) -> Storage:
        return faulty

    data: list[RecordingStorage] = []
    files: dict[str, bytes | MemoryStorage] = {**built.files, TOP: memory}
    if DATA in files:
        files[DATA] = storage_of(built, DATA, suspend=scenario.suspend)

    def wrap_data(inner: MemoryStorage) -> Storage:
        data.append(RecordingStorage(inner, recording.clock))
        return data[0]

    fault = scenario.fault
    with _caches(tiny=scenario.tiny_caches) as cache:
        image = await open_memory_image(files, wrap=wrap, wrap_data=wrap_data, cache=cache)
        faulty.operations.clear()
        if fault is not None:
            faulty.check = fail_at(fault.number, code=fault.code, for_ever=fault.for_ever)
        record = GuestRecord(built.contents, recording.clock)
        run = _Run(image, faulty, record, may_fail=fault is not None)
        try:
            with trio.fail_after(30):
                for step in scenario.steps:
                    await run.step(step)
                if not faulty.flush_failure:
                    n_operations = len(faulty.operations)
                    await run.check_contents("at the end")
                    del faulty.operations[n_operations:]
                await _close(run)
        except trio.TooSlowError:
            run.problems.append("it hangs")
    _check_errors(scenario, run)
    recorded = Recorded(built, recording, record, bytes(memory.data), data[0] if data else None)
    left = {path: bytes(file.data) if isinstance(file, MemoryStorage) else file for path, file in files.items()}
    await _check_left_behind(scenario, left, recorded, run)
    outcome = Outcome(len(faulty.operations), 0, len(run.errors), run.n_leaks, run.problems)
    if not run.problems and n_states:
        cut = await check_cuts(recorded, n_states=n_states, n_qemu=n_qemu, seed=scenario.seed, may_leak=True)
        outcome.n_states = cut.n_states
        outcome.problems = cut.problems
    return outcome


async def _close(run: _Run) -> None:
    promise = run.record.begin_flush()
    try:
        await run.image.aclose()
    except OSError as error:
        run.errors.append(error)
        if not run.may_fail:
            run.problems.append(f"close: {error!r}")
    else:
        run.closed = True
        run.record.end_flush(promise)


def _check_errors(scenario: Scenario, run: _Run) -> None:
    fault = scenario.fault
    if fault is None or len(run.faulty.operations) <= fault.number:
        return
    failed = run.faulty.operations[fault.number]
    # A write-back for want of room is tried again; a hole that can't be punched is no loss.
    heard_of = ("flush",) if scenario.tiny_caches and not fault.for_ever else ("write", "flush")
    if failed.kind in heard_of and not run.errors and not any(step[0] == "cancel" for step in scenario.steps):
        run.problems.append(f"nobody heard that {failed} failed")


async def _check_left_behind(scenario: Scenario, left: dict[str, bytes], recorded: Recorded, run: _Run) -> None:
    report = check_image_bytes(recorded.final)
    if report.errors:
        run.problems.append(f"left behind: {report.errors[:3]}")
        return
    run.n_leaks = report.leaks if run.closed else 0
    if report.leaks and scenario.fault is None:
        run.problems.append(f"closed with {report.leaks} leaks")
    again = await open_memory_image(left, read_only=True)
    found = await read_whole(again)
    await again.aclose()
    if wrong := recorded.record.expected_at(recorded.record.clock.now).mismatches(found):
        run.problems.append(f"left behind: sectors {wrong[:8]} have lost what fsync promised")


def check_scenario(scenario: Scenario, *, n_states: int = 60, n_qemu: int = 1) -> Outcome:
    """:func:`run_scenario` in a loop of its own; what should not be raised is a problem."""

    async def run() -> Outcome:
        return await run_scenario(scenario, n_states=n_states, n_qemu=n_qemu)

    try:
        return trio.run(run)
    except Exception as error:
        return Outcome(problems=[f"raised {error!r}"])


def shrink_scenario(scenario: Scenario, *, n_states: int = 300) -> Scenario:
    """The same failure (or another one) with as few steps, and as little around them, as possible."""

    def fails(candidate: Scenario) -> bool:
        return check_scenario(candidate, n_states=n_states, n_qemu=0).failed

    simpler: list[Callable[[Scenario], Scenario]] = [
        lambda s: replace(s, fault=None),
        lambda s: replace(s, tiny_caches=False),
        lambda s: replace(s, suspend=False),
        lambda s: replace(s, storage="file"),
        lambda s: replace(s, fault=None if s.fault is None else replace(s.fault, for_ever=False)),
    ]
    if not fails(scenario):
        return scenario  # only QEMU saw it
    current = replace(scenario, steps=tuple(_flattened(scenario)))
    if current.steps == scenario.steps or not fails(current):
        current = scenario
    while True:
        before = current
        for change in simpler:
            candidate = change(current)
            if candidate != current and fails(candidate):
                current = candidate
        shorter = shrink(current.steps, lambda steps, base=current: fails(replace(base, steps=tuple(steps))))  # type: ignore[misc]
        current = replace(current, steps=tuple(shorter))
        if current == before:
            return current


def _flattened(scenario: Scenario) -> Iterator[Step]:
    for step in scenario.steps:
        if step[0] == "together":
            yield from step[1]
        elif step[0] == "cancel":
            yield step[2]
        else:
            yield step
