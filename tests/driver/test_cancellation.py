"""Operations cancelled at each step that they take, with others in the same clusters: done or not, nothing lost."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest
import trio

from qcowfuse.driver.options import L2CacheSize
from qcowfuse.driver.qcow_image import QcowImage
from tests.support.checker import check_image_bytes
from tests.support.images import DATA, TOP, BuiltImage, ImageSpec, build_image, open_memory_image
from tests.support.memory_storage import MemoryStorage
from tests.support.powercut import read_image

KIB = 1 << 10
START, LENGTH = 9 * KIB, 7 * KIB
NEW = random.Random(1).randbytes(LENGTH)
SPECS = {
    "empty": ImageSpec(size=64 * KIB),
    "backing": ImageSpec(size=64 * KIB, cluster_size=4096, backing="raw", backing_size=64 * KIB),
    "snapshot": ImageSpec(size=64 * KIB, cluster_size=4096, fill=1.0, snapshot=True),
    "compressed": ImageSpec(size=64 * KIB, cluster_size=4096, fill=1.0, compression="zlib"),
    "zeroes": ImageSpec(size=64 * KIB, fill=1.0, zeroes=True),
    "extended": ImageSpec(size=64 * KIB, cluster_size=16384, extended_l2=True, fill=0.8, snapshot=True),
    "v1": ImageSpec(size=64 * KIB, version=1),
    "data-file": ImageSpec(size=64 * KIB, cluster_size=4096, fill=0.8, data_file="plain"),
    "raw-data-file": ImageSpec(size=64 * KIB, cluster_size=4096, fill=0.8, data_file="raw"),
    "encrypted": ImageSpec(size=64 * KIB, cluster_size=4096, fill=0.8, encryption="aes"),
}


class CancelAtStep(trio.abc.Instrument):
    """Cancels ``scope`` just before ``task`` takes its step ``number``."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.scope = trio.CancelScope()
        self.task: trio.lowlevel.Task | None = None
        self.n_steps = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """One step of some task."""
        if task is self.task:
            if self.n_steps == self.number:
                self.scope.cancel()
            self.n_steps += 1


Victim = Callable[[QcowImage], Awaitable[object]]
VICTIMS: dict[str, tuple[Victim, bytes | None]] = {
    "write": (lambda image: image.write(START, NEW), NEW),
    "discard": (lambda image: image.write_zeroes(START, LENGTH, unmap=True), bytes(LENGTH)),
    "write zeroes": (lambda image: image.write_zeroes(START, LENGTH, unmap=False), bytes(LENGTH)),
    "flush": (lambda image: image.flush(), None),
    "read": (lambda image: image.read(START, LENGTH), None),
}


async def others(image: QcowImage, oracle: bytearray) -> None:
    """Writers in the clusters around, a discard, and fsyncs, all at the same time as the victim."""

    async def write(offset: int, data: bytes) -> None:
        oracle[offset : offset + len(data)] = data
        await image.write(offset, data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, START - 512, b"b" * 512)
        nursery.start_soon(write, START + LENGTH, b"a" * 512)
        nursery.start_soon(write, 40 * KIB, b"f" * 3000)
        nursery.start_soon(image.flush)
        nursery.start_soon(image.flush)


async def cancel_once(built: BuiltImage, victim: str, number: int, *, n_tables: int | None) -> bool:
    """One run; True when the victim has no step ``number``."""
    memory = MemoryStorage(built.top, suspend=True)
    cache = None if n_tables is None else L2CacheSize(n_tables=n_tables)
    files: dict[str, bytes | MemoryStorage] = {**built.files, TOP: memory}
    if DATA in files:
        files[DATA] = MemoryStorage(built.files[DATA], suspend=True, name=DATA)
    image = await open_memory_image(files, cache=cache)
    oracle = bytearray(built.contents)
    act, new = VICTIMS[victim]
    instrument = CancelAtStep(number)
    if victim == "flush":
        await image.write(50 * KIB, b"d" * 5000)
        await image.write_zeroes(20 * KIB, 9 * KIB, unmap=True)
        oracle[50 * KIB : 50 * KIB + 5000] = b"d" * 5000
        oracle[20 * KIB : 29 * KIB] = bytes(9 * KIB)

    async def run_victim() -> None:
        instrument.task = trio.lowlevel.current_task()
        with instrument.scope:
            await act(image)
        instrument.task = None

    with trio.fail_after(20):
        trio.lowlevel.add_instrument(instrument)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run_victim)
                nursery.start_soon(others, image, oracle)
        finally:
            trio.lowlevel.remove_instrument(instrument)
        found = bytearray(await read_image(image, 0, image.size))
        complete = not instrument.scope.cancelled_caught
        for sector in range(START, START + LENGTH, 512):
            part = bytes(found[sector : sector + 512])
            allowed = [bytes(oracle[sector : sector + 512])] if new is None or not complete else []
            if new is not None:
                allowed.append(new[sector - START : sector - START + 512])
            assert part in allowed, f"step {number}: sector at {sector}"
        oracle[START : START + LENGTH] = found[START : START + LENGTH]
        assert found == oracle, f"step {number}"
        await image.aclose()
    report = check_image_bytes(memory.data)
    assert report.exit_code == 0, f"step {number}: {report}"
    left = {path: bytes(file.data) if isinstance(file, MemoryStorage) else file for path, file in files.items()}
    again = await open_memory_image(left, read_only=True)
    assert await read_image(again, 0, again.size) == oracle
    return instrument.n_steps <= number


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("spec", SPECS)
async def test_cancelled_at_every_step(spec: str, victim: str) -> None:
    """Whatever step is hit: the operation has happened or not, sector by sector; nothing leaks and nothing hangs."""
    built = build_image(SPECS[spec])
    for n_tables in (None, 0):
        number = 0
        while not await cancel_once(built, victim, number, n_tables=n_tables):
            number += 1
            assert number < 400
        # So many steps wait at least: a free lock is no step, and a raw data file makes little to flush.
        least = {"write": 3, "flush": 2 if spec == "raw-data-file" else 3}.get(victim, 0)
        assert number >= least


@pytest.mark.parametrize("spec", ["empty", "backing", "snapshot", "zeroes", "extended", "v1", "data-file"])
async def test_growing_cancelled_at_every_step(spec: str) -> None:
    """A disk that was growing has its old or its new size, its contents, and can grow again; nothing leaks."""
    built = build_image(SPECS[spec])
    grown = 3 * built.spec.size + 4096
    number = 0
    while True:
        memory = MemoryStorage(built.top, suspend=True)
        files: dict[str, bytes | MemoryStorage] = {**built.files, TOP: memory}
        if DATA in files:
            files[DATA] = MemoryStorage(built.files[DATA], suspend=True, name=DATA)
        image = await open_memory_image(files)
        instrument = CancelAtStep(number)
        oracle = bytearray(built.contents)

        async def grow(image: QcowImage = image, instrument: CancelAtStep = instrument) -> None:
            instrument.task = trio.lowlevel.current_task()
            with instrument.scope:
                await image.grow(grown)
            instrument.task = None

        with trio.fail_after(20):
            trio.lowlevel.add_instrument(instrument)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(grow)
                    nursery.start_soon(others, image, oracle)
            finally:
                trio.lowlevel.remove_instrument(instrument)
            assert image.size in (built.spec.size, grown)
            assert instrument.scope.cancelled_caught or image.size == grown
            assert await read_image(image, 0, built.spec.size) == oracle
            if number % 2:
                await image.grow(grown)
                oracle += bytes(grown - len(oracle))
                await image.write(grown - 512, b"e" * 512)
                oracle[-512:] = b"e" * 512
                assert await read_image(image, 0, grown) == oracle
            await image.aclose()
        report = check_image_bytes(memory.data)
        assert not report.errors, f"step {number}: {report}"
        assert report.leaks == 0, f"step {number}: {report}"
        if instrument.n_steps <= number:
            assert number > 3
            return
        number += 1
