"""Sectors of encrypted images that several read and write at the same time, and damaged LUKS areas."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from qcowfuse.buffer import Buffer
from qcowfuse.cli.img.create_options import parse_create_options
from qcowfuse.errors import FormatError, QcowFuseError
from qcowfuse.format.luks import parse_luks_header
from qcowfuse.tools.create import create_image
from tests.support.images import PASSPHRASE, TOP, ImageSpec, build_image, open_memory_image
from tests.support.memory_storage import MemoryStorage
from tests.support.powercut import read_image

KIB = 1 << 10
SPEC = ImageSpec(size=64 * KIB, cluster_size=4096, fill=1.0, encryption="aes")
SPECS = [
    SPEC,
    replace(SPEC, encryption="luks"),
]  # by what the guest sees, and by where it lies: two ways of a request
PIECE = 96
each_method = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.encryption)


class SlowStorage(MemoryStorage):
    """Nothing is done at once: reads and writes go piece by piece, and others come in between."""

    async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
        """The pieces."""
        parts: list[Buffer] = []
        for at in range(0, n_bytes, PIECE):
            parts.append(await super().pread(host_offset + at, min(PIECE, n_bytes - at)))
        return b"".join(parts)

    async def pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """The pieces."""
        data = b"".join(buffers)
        for at in range(0, len(data), PIECE):
            await super().pwritev(host_offset + at, [data[at : at + PIECE]])


async def pause(chooser: random.Random, n_most: int) -> None:
    """Let others go on for a while."""
    for _ in range(chooser.randrange(n_most)):
        await trio.lowlevel.checkpoint()


@each_method
async def test_writers_of_one_sector_lose_nothing(spec: ImageSpec) -> None:
    """Eight writers, each with its own bytes of the same few sectors: all that each wrote last is there."""
    built = build_image(spec)
    memory = SlowStorage(built.top, suspend=True)
    image = await open_memory_image({TOP: memory})
    expected = bytearray(built.contents)
    chooser = random.Random(1)

    async def writer(number: int) -> None:
        for _ in range(12):
            start = chooser.randrange(6) * 512 + number * 64 + 1
            data = chooser.randbytes(62)
            expected[start : start + 62] = data
            await image.write(start, data)

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(writer, number)
    assert await read_image(image, 0, image.size) == expected
    await image.aclose()


class HalfSlowStorage(SlowStorage):
    """A sector that is read to be completed is slow every other time, the rest is done at once."""

    def __init__(self, data: Buffer, chooser: random.Random) -> None:
        super().__init__(data)
        self.chooser = chooser
        self.n_slow = self.n_at_once = 0

    def try_pread(self, host_offset: int, n_bytes: int) -> Buffer | None:
        """None every other time for one sector."""
        self.suspend = n_bytes == 512 and self.chooser.random() < 0.5
        try:
            return super().try_pread(host_offset, n_bytes)
        finally:
            self.suspend = False

    async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
        """As of a slow disk."""
        self.n_slow += 1
        data = await super().pread(host_offset, n_bytes)
        await pause(self.chooser, 6)
        return data

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """At once."""
        self.n_at_once += 1
        return super().try_pwritev(host_offset, buffers)


@each_method
async def test_what_is_written_at_once_minds_what_is_under_way(spec: ImageSpec) -> None:
    """Writers of parts of sectors that wait for the disk, others that find all at once, and others that need nothing
    of it: each byte is in the end what was written to it last, and was at no time anything that nobody wrote."""
    built = build_image(spec)
    chooser = random.Random(5)
    memory = HalfSlowStorage(built.top, chooser)
    image = await open_memory_image({TOP: memory})
    expected = bytearray(built.contents)

    async def write(start: int, data: bytes) -> None:
        expected[start : start + len(data)] = data
        await image.write(start, data)

    async def writer(number: int) -> None:
        for _ in range(40):
            start = chooser.randrange(6) * 512 + number * 64 + 1
            await write(start, chooser.randbytes(62))
            await pause(chooser, 4)

    async def writer_of_sectors() -> None:
        for _ in range(40):
            # Whole sectors of its own, and the first byte of each of theirs.
            start = chooser.randrange(6) * 512 + 4096
            await write(start, chooser.randbytes(512))
            await write(chooser.randrange(6) * 512, b"!")
            await pause(chooser, 4)

    async with trio.open_nursery() as nursery:
        for number in range(7):
            nursery.start_soon(writer, number)
        nursery.start_soon(writer_of_sectors)
    assert memory.n_slow > 20
    assert memory.n_at_once > 100
    assert await read_image(image, 0, image.size) == expected
    await image.aclose()


@each_method
async def test_whole_sectors_next_to_parts_of_sectors(spec: ImageSpec) -> None:
    """A write of whole sectors while part of one is being read and written back: the later one of both is there."""
    built = build_image(spec)
    chooser = random.Random(2)
    image = await open_memory_image({TOP: SlowStorage(built.top, suspend=True)})
    for _ in range(60):
        start = chooser.randrange(20) * 512
        whole, part = chooser.randbytes(1024), chooser.randbytes(100)

        async def late(guest_offset: int, data: bytes) -> None:
            await pause(chooser, 15)
            await image.write(guest_offset, data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(late, start, whole)
            nursery.start_soon(late, start + 300, part)
        found = await read_image(image, start, 1024)
        assert found in (whole, whole[:300] + part + whole[400:])
    await image.aclose()


@each_method
async def test_readers_see_the_old_or_the_new(spec: ImageSpec) -> None:
    """While a sector is being written, a reader gets all of its old or all of its new bytes, and no garbage."""
    built = build_image(spec)
    image = await open_memory_image({TOP: SlowStorage(built.top, suspend=True)})
    states = [b"a" * 512, b"b" * 512]
    await image.write(1024, states[0])
    done = False
    chooser = random.Random(4)

    async def reader() -> None:
        while not done:
            await pause(chooser, 8)
            assert await read_image(image, 1024, 512) in states
            assert await read_image(image, 1100, 7) in (b"a" * 7, b"b" * 7)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        nursery.start_soon(reader)
        for number in range(60):
            await pause(chooser, 8)
            await image.write(1024, states[number % 2])
        done = True
    await image.aclose()


class HalfAtOnceStorage(SlowStorage):
    """Reads go piece by piece and writes are done at once, or the other way round."""

    def __init__(self, data: Buffer, slow: str) -> None:
        super().__init__(data, suspend=True)
        self.slow = slow

    def try_pread(self, host_offset: int, n_bytes: int) -> Buffer | None:
        """See the class."""
        self.suspend = self.slow == "reads"
        return super().try_pread(host_offset, n_bytes)

    def try_pread_into(self, host_offset: int, buffer: memoryview) -> bool:
        """See the class."""
        self.suspend = self.slow == "reads"
        return super().try_pread_into(host_offset, buffer)

    async def pread_into(self, host_offset: int, buffer: memoryview) -> None:
        """The pieces."""
        buffer[:] = await self.pread(host_offset, len(buffer))

    async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
        """The pieces."""
        self.suspend = True
        return await super().pread(host_offset, n_bytes)

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """See the class."""
        self.suspend = self.slow == "writes"
        return super().try_pwritev(host_offset, buffers)

    async def pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """The pieces."""
        self.suspend = True
        await super().pwritev(host_offset, buffers)


@pytest.mark.parametrize("slow", ["reads", "writes"])
@each_method
async def test_what_is_done_at_once_minds_what_goes_on(spec: ImageSpec, slow: str) -> None:
    """Whole sectors that are written at once while others read them, and the other way round: each that is read is
    one that was written."""
    built = build_image(spec)
    image = await open_memory_image({TOP: HalfAtOnceStorage(built.top, slow)})
    chooser = random.Random(slow)
    kinds = [bytes([number]) * 512 for number in range(1, 8)]
    await image.write(0, kinds[0] * 8)
    ended = trio.Event()
    n_read = 0

    async def reader() -> None:
        nonlocal n_read
        while not ended.is_set():
            found = await read_image(image, 512 * chooser.randrange(8), 512)
            assert found in kinds
            n_read += 1
            await pause(chooser, 3)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(reader)
        for _ in range(100):
            await image.write(512 * chooser.randrange(8), chooser.choice(kinds))
            await pause(chooser, 3)
        ended.set()
    assert n_read > 20
    await image.aclose()


async def test_damaged_luks_areas_are_refused(tmp_path: Path) -> None:
    """Changed bytes of the LUKS header, its pointer or the key material: an error of ours, or the right bytes."""
    path = tmp_path / "image"
    options = parse_create_options("qcow2", ["encrypt.format=luks,encrypt.iter-time=1"], size="1M")
    await create_image(str(path), options, passphrase=PASSPHRASE)
    original = path.read_bytes()
    place = original.index(b"LUKS\xba\xbe")
    chooser = random.Random(3)
    n_refused = 0
    for _ in range(100):
        damaged = bytearray(original)
        for _ in range(chooser.choice([1, 1, 3])):
            start, length = chooser.choice([(place, 592), (112, 32), (place + 4096, 256_000)])
            damaged[start + chooser.randrange(length)] = chooser.randrange(256)
        with contextlib.suppress(FormatError):
            header = parse_luks_header(bytes(damaged[place : place + 592]), 2068480)
            if any(slot.iterations > 1 << 17 for slot in header.slots if slot.active) or (
                header.digest_iterations > 1 << 17
            ):
                continue  # right, but it would take its time
        try:
            image = await open_memory_image({TOP: bytes(damaged)})
            assert await read_image(image, 0, 4096) == bytes(4096)
            await image.aclose()
        except QcowFuseError:
            n_refused += 1
    assert n_refused > 50
