"""Operations in the middle of others: discards against reads and writes, writes and evictions against flushes."""

from __future__ import annotations

from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qcowfuse.driver.layers import table_cache
from qcowfuse.driver.options import L2CacheSize
from qcowfuse.driver.qcow_image import QcowImage
from tests.driver.test_concurrency import KIB, finish, held_image, is_data_write
from tests.support.checker import check_image_bytes
from tests.support.faults import Hold, Operation
from tests.support.images import TOP, ImageSpec, build_image, open_memory_image
from tests.support.powercut import read_image


def is_full_write(operation: Operation) -> bool:
    """A write of a whole cluster of 4 KiB: data in place, or a copy."""
    return operation.kind == "write" and operation.n_bytes == 4096 and operation.host_offset >= 20 * KIB


async def test_a_discard_during_a_write_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that is being written in place is let go by a discard: nobody else gets it before that write ends."""
    built = build_image(ImageSpec(size=64 * KIB, cluster_size=4096, fill=1.0))
    image, faulty, memory = await held_image(built)
    await image.write(60 * KIB, b"x" * 512)
    await image.flush()
    hold = Hold(is_full_write)
    faulty.gate = hold
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.write, 8 * KIB, b"w" * 4096)
        await hold.reached.wait()
        (held,) = hold.held
        hold.wanted = lambda operation: False
        await image.write_zeroes(8 * KIB, 4096, unmap=True)
        for _ in range(3):
            await image.flush()
        await image.write(8 * KIB, b"n" * 4096)
        await image.flush()
        newest = faulty.operations[held.number + 1 :]
        assert not any(
            operation.kind == "write" and operation.host_offset == held.host_offset for operation in newest
        )
        hold.release()
    oracle = bytearray(built.contents)
    oracle[60 * KIB : 60 * KIB + 512] = b"x" * 512
    oracle[8 * KIB : 12 * KIB] = b"n" * 4096
    await finish(image, memory, oracle)


async def test_a_discard_during_a_read() -> None:
    """A read in flight gives the bytes from before, though their cluster is discarded and written meanwhile."""
    built = build_image(ImageSpec(size=64 * KIB, cluster_size=4096, fill=1.0))
    image, faulty, memory = await held_image(built)
    await image.write(60 * KIB, built.contents[60 * KIB : 60 * KIB + 512])
    hold = Hold(lambda operation: operation.kind == "read")
    faulty.gate = hold
    found: list[bytes] = []

    async def reader() -> None:
        found.append(bytes(await image.read(8 * KIB, 4096)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        await hold.reached.wait()
        hold.wanted = lambda operation: False
        await image.write_zeroes(8 * KIB, 8 * KIB, unmap=True)
        for number in range(3):
            await image.flush()
            await image.write(8 * KIB, b"%d" % number * 8 * KIB)
            await image.write_zeroes(8 * KIB, 8 * KIB, unmap=True)
        assert not any(operation.kind == "punch" for operation in faulty.operations)
        hold.release()
    assert found == [built.contents[8 * KIB : 12 * KIB]]
    await image.flush()
    assert any(operation.kind == "punch" for operation in faulty.operations)
    await finish(image, memory, built.contents[: 8 * KIB] + bytes(8 * KIB) + built.contents[16 * KIB :])


async def test_a_discard_waits_for_an_allocation() -> None:
    """A discard of a cluster that is being allocated comes after it, and so its zeroes stay."""
    built = build_image(ImageSpec(size=64 * KIB, cluster_size=4096, backing="raw", backing_size=64 * KIB))
    image, faulty, memory = await held_image(built)
    await image.write(60 * KIB, b"x" * 512)
    hold = Hold(is_data_write)
    faulty.gate = hold
    done = trio.Event()

    async def discard() -> None:
        await image.write_zeroes(8 * KIB, 4096, unmap=True)
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.write, 8 * KIB, b"w" * 4096)
        await hold.reached.wait()
        nursery.start_soon(discard)
        await wait_all_tasks_blocked()
        assert not done.is_set()
        hold.release()
    oracle = bytearray(built.contents)
    oracle[60 * KIB : 60 * KIB + 512] = b"x" * 512
    oracle[8 * KIB : 12 * KIB] = bytes(4096)
    await finish(image, memory, oracle)


async def test_a_write_during_each_operation_of_a_flush() -> None:
    """Whichever operation of an fsync is under way: a write that completes meanwhile is neither lost nor torn."""
    built = build_image(ImageSpec(size=64 * KIB, fill=0.5, snapshot=True))
    number = 0
    while True:
        image, faulty, memory = await held_image(built)
        oracle = bytearray(built.contents)

        async def write(offset: int, data: bytes, image: QcowImage = image, oracle: bytearray = oracle) -> None:
            oracle[offset : offset + len(data)] = data
            await image.write(offset, data)

        await write(0, b"a" * 9000)
        await image.write_zeroes(20 * KIB, 4096, unmap=True)
        oracle[20 * KIB : 24 * KIB] = bytes(4096)
        first = len(faulty.operations)
        hold = Hold(lambda operation, wanted=first + number: operation.number == wanted)  # type: ignore[misc]
        faulty.gate = hold
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.flush)
            await wait_all_tasks_blocked()
            was_held = bool(hold.held)
            nursery.start_soon(write, 2048, b"b" * 700)  # in place
            nursery.start_soon(write, 40 * KIB, b"c" * 3000)  # allocates, below the same tables
            nursery.start_soon(partial(image.write_zeroes, 20 * KIB, 512, unmap=False))
            await wait_all_tasks_blocked()  # all done, unless they need the very block that is held
            hold.release()
        left = await open_memory_image({TOP: bytes(memory.data)}, read_only=True)
        assert await read_image(left, 4096, 4904) == b"a" * 4904
        report = check_image_bytes(memory.data)
        assert not report.errors, report.errors[:3]
        await finish(image, memory, oracle)
        if not was_held:
            assert number >= 5
            return
        number += 1


async def test_eviction_while_a_flush_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who needs room for a slice while an fsync runs waits for it, and neither hangs nor loses a link."""
    monkeypatch.setattr(table_cache, "MIN_DIRTY_BYTES", 512)
    built = build_image(ImageSpec(size=256 * KIB, fill=0.5))
    image, faulty, memory = await held_image(built, cache=L2CacheSize(n_tables=0))
    oracle = bytearray(built.contents)
    for offset in (0, 40 * KIB, 80 * KIB):
        oracle[offset : offset + 512] = b"a" * 512
        await image.write(offset, b"a" * 512)
    hold = Hold(lambda operation: operation.kind == "flush")
    faulty.gate = hold
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.flush)
            await hold.reached.wait()
            for offset in (0, 120 * KIB, 160 * KIB, 200 * KIB, 240 * KIB):
                oracle[offset + 512 : offset + 1024] = b"b" * 512
                nursery.start_soon(image.write, offset + 512, b"b" * 512)
            await wait_all_tasks_blocked()
            hold.release()
    await finish(image, memory, oracle)
