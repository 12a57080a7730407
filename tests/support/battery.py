"""check_image: the one battery that everything that claims to be an image must pass.

1. It is given a way to open the image and the bytes that the image must show, nothing else.
2. It is deterministic: the same ``seed`` asks for the same things in the same order.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio

from qcowfuse.buffer import Buffer
from qcowfuse.driver.image import Image
from qcowfuse.driver.pending import PendingRead
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.errors import OutOfRangeError, ReadOnlyImageError

from .flushing import flush_image
from .oracle import DiskModel, first_difference

OpenImage = Callable[[], Awaitable[Image]]
SEQUENTIAL_SIZES = (1_000_003, 131_071, 65_536, 4_097)


async def read(image: Image, guest_offset: int, n_bytes: int, *, is_alone: bool = True) -> bytes:
    """Read as the FUSE layer does: start it, and finish what is pending."""
    started = image.start_read(guest_offset, n_bytes, lambda: is_alone)
    if isinstance(started, PendingRead):
        started = await started.finish()
    return bytes(started)


async def write(image: Image, guest_offset: int, data: Buffer) -> None:
    """Write as the FUSE layer does: start it, and finish what is pending with another copy of the data, since the
    memory of the first one is used again."""
    lent = bytearray(data)
    pending = image.start_write(guest_offset, memoryview(lent))
    lent[:] = b"\xee" * len(lent)
    if pending is not None:
        pending.use(bytes(data))
        await pending.finish()


async def check_reads(image: Image, expected: Buffer, *, seed: int = 0, n_random: int = 60) -> None:
    """Sequential reads in odd sizes, random ones, the last byte, nothing at all, and past the end."""
    size = len(expected)
    assert image.size == size
    for step in SEQUENTIAL_SIZES[-1 if size <= 65536 else 0 :]:
        for offset in range(0, size, step):
            n_bytes = min(step, size - offset)
            _must_match(await read(image, offset, n_bytes), expected, offset)
        if size > 16 << 20:
            break
    rng = random.Random(seed)
    for guest_offset, n_bytes in random_ranges(rng, size, n_random):
        _must_match(await read(image, guest_offset, n_bytes), expected, guest_offset)
    if size:
        _must_match(await read(image, size - 1, 1), expected, size - 1)
    assert await read(image, size, 0) == b""
    for guest_offset, n_bytes in ((size, 1), (max(size - 1, 0), 2), (size + 4096, 4096), (-1, 1), (0, size + 1)):
        with pytest.raises(OutOfRangeError):
            image.start_read(guest_offset, n_bytes)
        with pytest.raises(OutOfRangeError):
            await image.read(guest_offset, n_bytes)


async def check_writes(image: Image, model: DiskModel, *, seed: int = 0, n_writes: int = 40) -> None:
    """Random writes, each visible at once; writes past the end are refused and change nothing."""
    rng = random.Random(seed)
    for number, (guest_offset, n_bytes) in enumerate(random_ranges(rng, model.size, n_writes)):
        data = rng.randbytes(n_bytes)
        await write(image, guest_offset, data)
        model.write(guest_offset, data)
        low = max(guest_offset - 700, 0)
        n_around = min(guest_offset + n_bytes + 700, model.size) - low
        _must_match(await read(image, low, n_around), model.data, low)
        if number % 16 == 9:
            await flush_image(image)
    size = model.size
    for guest_offset, n_bytes in ((size, 1), (max(size - 1, 0), 2), (-1, 1)):
        with pytest.raises(OutOfRangeError):
            image.start_write(guest_offset, b"x" * n_bytes)
        with pytest.raises(OutOfRangeError):
            await image.write(guest_offset, b"x" * n_bytes)


async def check_concurrency(image: Image, model: DiskModel, *, seed: int = 0, n_tasks: int = 8) -> None:
    """Tasks write neighbouring and interleaved pieces at once, with readers and a flush in between.

    Every byte has one writer; a reader sees the old or the new value of each sector that it asks for.
    """
    size = model.size
    if size < 512 * n_tasks:
        return
    rng = random.Random(seed)
    before = bytes(model.data)
    pieces: list[tuple[int, bytes]] = []
    # Pieces of three sectors: no cluster size divides into them, so that most clusters have several writers.
    unit = 1536
    for _ in range(3):
        first = rng.randrange(max(size // unit - 40, 1)) * unit
        for number in range(40):
            guest_offset = first + number * unit
            n_bytes = min(unit, size - guest_offset)
            if n_bytes > 0 and all(guest_offset != other for other, _ in pieces):
                pieces.append((guest_offset, rng.randbytes(n_bytes)))
    pieces = _disjoint(pieces)
    shares = [pieces[number::n_tasks] for number in range(n_tasks)]
    for guest_offset, data in pieces:
        model.write(guest_offset, data)

    async def writer(share: list[tuple[int, bytes]]) -> None:
        for guest_offset, data in share:
            await write(image, guest_offset, data)
            await trio.lowlevel.checkpoint()

    async def reader(ranges: list[tuple[int, int]]) -> None:
        for guest_offset, n_bytes in ranges:
            low = guest_offset // 512 * 512
            got = await read(image, low, min(guest_offset + n_bytes, size) - low)
            for at in range(0, len(got), 512):
                piece, place = got[at : at + 512], low + at
                old, new = before[place : place + len(piece)], model.read(place, len(piece))
                assert piece in (old, new), f"sector at {place:#x} is neither old nor new"
            await trio.lowlevel.checkpoint()

    async def flusher() -> None:
        for _ in range(2):
            await flush_image(image)

    async with trio.open_nursery() as nursery:
        for share in shares:
            nursery.start_soon(writer, share)
        for _ in range(2):
            nursery.start_soon(reader, list(random_ranges(rng, size, 10)))
        nursery.start_soon(flusher)
    for guest_offset, data in pieces:
        _must_match(await read(image, guest_offset, len(data)), model.data, guest_offset)


async def check_pending(image: Image, model: DiskModel, *, seed: int = 0, n_requests: int = 24) -> None:
    """Requests that are all started before the first one is finished, in another order; some reads are given up.

    Each has bytes of its own, many in the clusters of others. A client beside which there are others may not keep
    them waiting, and one that is alone may.
    """
    rng = random.Random(seed)
    places = [
        (start, rng.randbytes(min(n_bytes, 5000))) for start, n_bytes in random_ranges(rng, model.size, n_requests)
    ]
    first = rng.randrange(max(model.size - 24 * 700, 1))
    near = range(first, min(first + 24 * 700, model.size - 700), 700)
    places += [(start, rng.randbytes(700)) for start in near]
    rests: list[Callable[[], Awaitable[None]]] = []
    for number, (guest_offset, data) in enumerate(_disjoint(places)):
        if number % 2:
            lent = bytearray(data)
            pending = image.start_write(guest_offset, memoryview(lent))
            lent[:] = bytes(len(lent))
            model.write(guest_offset, data)
            if pending is not None:
                pending.use(data)
                rests.append(pending.finish)
            continue
        is_alone = bool(number % 4)
        started = image.start_read(guest_offset, len(data), lambda is_alone=is_alone: is_alone)  # type: ignore[misc]
        if not isinstance(started, PendingRead):
            _must_match(bytes(started), model.data, guest_offset)
        elif number % 8 == 2:
            started.abandon()
        else:
            rests.append(partial(_finish_read, started, model, guest_offset))
    rng.shuffle(rests)
    for rest in rests[::2]:
        await rest()
    async with trio.open_nursery() as nursery:
        for rest in rests[1::2]:
            nursery.start_soon(rest)
    for guest_offset, data in places:
        _must_match(await read(image, guest_offset, len(data), is_alone=False), model.data, guest_offset)


async def _finish_read(started: PendingRead, model: DiskModel, guest_offset: int) -> None:
    _must_match(bytes(await started.finish()), model.data, guest_offset)


async def check_image(open_it: OpenImage, reference: bytes, *, seed: int = 0, writes: bool = True) -> DiskModel:
    """Run it all on the image that ``open_it`` opens, which must show ``reference`` at the start.

    With ``writes`` the image is changed; what it must show from then on is returned. Without, writes must be
    refused with ReadOnlyImageError.
    """
    model = DiskModel(reference)
    image = await open_it()
    try:
        await check_reads(image, model.data, seed=seed)
        if not writes:
            assert image.read_only
            if model.size:
                with pytest.raises(ReadOnlyImageError):
                    image.start_write(0, b"x")
                with pytest.raises(ReadOnlyImageError):
                    await image.write(0, b"x")
            return model
        await check_writes(image, model, seed=seed + 1)
        await check_concurrency(image, model, seed=seed + 2)
        await check_pending(image, model, seed=seed + 5)
        await flush_image(image)
        await check_reads(image, model.data, seed=seed + 3, n_random=20)
        if isinstance(image, QcowImage):
            assert not image.life.epochs.n_in_flight
    finally:
        await image.aclose()
    image = await open_it()
    try:
        await check_pending(image, model, seed=seed + 6)
        await check_reads(image, model.data, seed=seed + 4, n_random=20)
    finally:
        await image.aclose()
        await image.aclose()
    return model


def random_ranges(rng: random.Random, size: int, n: int) -> list[tuple[int, int]]:
    """``n`` ranges inside a disk: mostly small and odd, some aligned, some large, some at the very end."""
    ranges = []
    for _ in range(n if size else 0):
        n_bytes = min(size, rng.choice((1, 13, 511, 512, 513, 4096, 5000, 65536, 70001, rng.randrange(1, 200_000))))
        guest_offset = rng.choice((rng.randrange(size - n_bytes + 1), size - n_bytes, 0))
        if rng.random() < 0.8:
            guest_offset = rng.randrange(size - n_bytes + 1)
        if rng.random() < 0.4:
            guest_offset = guest_offset // 4096 * 4096
        ranges.append((guest_offset, n_bytes))
    return ranges


def _disjoint(pieces: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    kept: list[tuple[int, bytes]] = []
    end = 0
    for guest_offset, data in sorted(pieces):
        if guest_offset >= end:
            kept.append((guest_offset, data))
            end = guest_offset + len(data)
    return kept


def _must_match(found: bytes, expected: Buffer, guest_offset: int) -> None:
    part = bytes(expected[guest_offset : guest_offset + len(found)])
    if found != part:
        raise AssertionError(
            f"read of {len(found)} bytes at {guest_offset:#x} differs {first_difference(found, part)}"
        )
