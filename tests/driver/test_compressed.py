"""Compressed clusters: decoded once, on all processors, and ahead of sequential readers only."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import trio
import trio.testing

from qcowfuse.driver import decoded
from qcowfuse.driver.decoded import AHEAD_BYTES, CACHE_BYTES, SequentialReads
from qcowfuse.driver.options import L2CacheSize
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.driver.reading import ChainReader
from qcowfuse.errors import FormatError
from qcowfuse.format.compression import decompress_cluster
from qcowfuse.storage.base import Buffer, Storage
from tests.support.faults import FaultyStorage, Operation
from tests.support.images import TOP, ImageSpec, build_image, open_memory_image
from tests.support.memory_storage import MemoryStorage

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB
SPEC = ImageSpec(size=8 * MIB, cluster_size=CLUSTER, fill=1.0, compression="zlib")
ZSTD = ImageSpec(size=8 * MIB, cluster_size=CLUSTER, fill=1.0, compression="zstd")


@asynccontextmanager
async def opened(
    spec: ImageSpec = SPEC, *, read_only: bool = True, **options: object
) -> AsyncIterator[tuple[QcowImage, ChainReader, bytes]]:
    """The image of ``spec`` from memory, its reader, and its contents."""
    built = build_image(spec)
    image = await open_memory_image(built.files, read_only=read_only, **options)  # type: ignore[arg-type]
    try:
        yield image, image._reader, built.contents
    finally:
        await image.aclose()


async def read(image: QcowImage, guest_offset: int, n_bytes: int) -> bytes:
    """As export reads."""
    data = image.try_read(guest_offset, n_bytes)
    return bytes(await image.read(guest_offset, n_bytes) if data is None else data)


async def until_idle(reader: ChainReader) -> None:
    """Wait until nothing is decoded ahead."""
    with trio.fail_after(10):
        for ended in list(reader.decoded._runners.values()):
            await ended.wait()


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The compressed data of every decoding, in the order in which they begin."""
    seen: list[bytes] = []

    def noting(data: Buffer, compression_type: int, cluster_size: int) -> bytes:
        seen.append(bytes(data))
        return decompress_cluster(data, compression_type, cluster_size)

    monkeypatch.setattr(decoded, "decompress_cluster", noting)
    return seen


@pytest.mark.parametrize("spec", [SPEC, ZSTD], ids=["zlib", "zstd"])
@pytest.mark.parametrize("suspend", [False, True], ids=["inline", "suspending"])
async def test_small_sequential_reads_decode_each_cluster_once(
    spec: ImageSpec, suspend: bool, decodings: list[bytes]
) -> None:
    """A whole disk in steps of 4 KiB: the right bytes, and as many decodings as clusters."""
    async with opened(spec, suspend=suspend) as (image, _, contents):
        for guest_offset in range(0, spec.size, 4 * KIB):
            assert await read(image, guest_offset, 4 * KIB) == contents[guest_offset : guest_offset + 4 * KIB]
        assert len(decodings) == spec.size // CLUSTER == image.statistics()["decoded_clusters.misses"]


async def test_a_sequential_reader_finds_the_next_clusters_ready() -> None:
    """After some sequential reads the next clusters are in memory, and not more than AHEAD_BYTES of them."""
    async with opened() as (image, reader, contents):
        for number in range(4):
            await read(image, number * CLUSTER, CLUSTER)
        await until_idle(reader)
        n_decoded = image.statistics()["decoded_clusters.misses"]
        assert 4 + AHEAD_BYTES // CLUSTER // 2 <= n_decoded <= 4 + AHEAD_BYTES // CLUSTER
        ready = image.try_read(4 * CLUSTER, CLUSTER)
        assert ready is not None
        assert bytes(ready) == contents[4 * CLUSTER : 5 * CLUSTER]


async def test_reads_served_from_memory_keep_the_lead() -> None:
    """A reader that finds everything ready goes on being decoded ahead for."""
    async with opened() as (image, reader, _):
        for number in range(4):
            await read(image, number * CLUSTER, CLUSTER)
        for number in range(4, SPEC.size // CLUSTER):
            await until_idle(reader)
            assert image.try_read(number * CLUSTER, CLUSTER) is not None, number


async def test_random_reads_decode_nothing_else() -> None:
    """Reads all over the disk decode the clusters that they want, no others."""
    async with opened() as (image, reader, _):
        wanted = [number * 37 % 128 for number in range(0, 128, 9)]
        for number in wanted:
            await read(image, number * CLUSTER, 4 * KIB)
        await until_idle(reader)
        assert image.statistics()["decoded_clusters.misses"] == len(set(wanted))


@pytest.mark.parametrize("cluster_size", [4 * KIB, 16 * KIB, 32 * KIB, 2 * MIB])
async def test_other_cluster_sizes(cluster_size: int) -> None:
    """The next clusters are ready where they are worth a thread, nearest first; each is decoded once."""
    spec = ImageSpec(size=8 * MIB, cluster_size=cluster_size, fill=1.0, compression="zstd")
    async with opened(spec) as (image, reader, contents):
        step = 32 * KIB
        for guest_offset in range(0, spec.size, step):
            await until_idle(reader)
            is_ready = image.try_read(guest_offset, step) is not None
            is_expected = guest_offset >= 4 * step if cluster_size > 16 * KIB else False
            assert is_ready == is_expected or guest_offset < 4 * step, guest_offset
            assert await read(image, guest_offset, step) == contents[guest_offset : guest_offset + step]
        assert image.statistics()["decoded_clusters.misses"] == spec.size // cluster_size


async def test_two_sequential_readers_at_once() -> None:
    """Two readers that take turns are both decoded ahead for."""
    async with opened() as (image, reader, _):
        for number in range(4):
            await read(image, number * CLUSTER, CLUSTER)
            await read(image, 4 * MIB + number * CLUSTER, CLUSTER)
        await until_idle(reader)
        assert image.try_read(4 * CLUSTER, CLUSTER) is not None
        assert image.try_read(4 * MIB + 4 * CLUSTER, CLUSTER) is not None


@pytest.mark.parametrize("alone", [False, True], ids=["in a thread", "on the spot"])
async def test_random_small_reads_decode_only_the_start(alone: bool, decodings: list[bytes]) -> None:
    """A read that follows no other has its cluster decoded as far as it reads; one further on is right."""
    async with opened() as (image, reader, contents):
        for number in (90, 3, 70, 20, 50, 110):
            for in_cluster in (20 * KIB, 4 * KIB, 40 * KIB, 5 * KIB + 7):
                guest_offset = number * CLUSTER + in_cluster
                found = image.try_read(guest_offset, KIB)
                if found is None:
                    found = await image.read(guest_offset, KIB, alone=alone)
                assert bytes(found) == contents[guest_offset : guest_offset + KIB]
                if in_cluster == 20 * KIB:
                    assert len(next(reversed(reader.decoded._clusters.values()))) == 21 * KIB
            assert len(next(reversed(reader.decoded._clusters.values()))) == CLUSTER
        assert len(decodings) == 6
        assert sum(map(len, reader.decoded._clusters.values())) == reader.decoded._used


async def test_the_cache_stays_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading more than the cache holds keeps no more than it may."""
    monkeypatch.setattr(decoded, "CACHE_BYTES", CACHE_BYTES // 4)
    spec = ImageSpec(size=12 * MIB, cluster_size=CLUSTER, fill=1.0, compression="zstd")
    async with opened(spec) as (image, reader, _):
        for guest_offset in range(0, spec.size, CLUSTER):
            await read(image, guest_offset, CLUSTER)
            kept = reader.decoded._clusters.values()
            assert sum(map(len, kept)) == reader.decoded._used <= decoded.CACHE_BYTES
        assert image.statistics()["decoded_clusters.misses"] == spec.size // CLUSTER


async def test_one_large_read_decodes_on_two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read over 16 clusters has two of them in decoding at the same time."""
    barrier = threading.Barrier(2, timeout=10)
    first_two = iter((True, True))

    def meeting(data: Buffer, compression_type: int, cluster_size: int) -> bytes:
        if next(first_two, False):
            barrier.wait()
        return decompress_cluster(data, compression_type, cluster_size)

    monkeypatch.setattr(decoded, "decompress_cluster", meeting)
    async with opened() as (image, reader, contents):
        reader.decoded._n_threads = 2
        assert bytes(await image.read(0, MIB)) == contents[:MIB]


async def test_an_error_ahead_is_for_the_read_that_meets_it() -> None:
    """A cluster that does not decode fails the read that wants it, each time, and no read before it."""
    built = build_image(SPEC)
    files = dict(built.files)
    async with opened() as (image, reader, _):
        extent = (await reader.lookup(6 * CLUSTER, CLUSTER))[0]
        source = reader._sources[0]
        assert source is not None
        where = source.entry_format.compressed_cluster(extent.value)
    broken = bytearray(files[TOP])
    broken[where.host_offset : where.host_offset + 16] = b"\xff" * 16
    files[TOP] = bytes(broken)
    image = await open_memory_image(files, read_only=True)
    for number in range(6):
        await read(image, number * CLUSTER, CLUSTER)
    await until_idle(image._reader)
    for _ in range(2):
        with pytest.raises(FormatError, match="compressed cluster"):
            await read(image, 6 * CLUSTER, CLUSTER)
    assert await read(image, 7 * CLUSTER, CLUSTER) == built.contents[7 * CLUSTER : 8 * CLUSTER]
    await image.aclose()


async def test_an_unexpected_error_ahead_does_not_end_the_program(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug that shows while decoding ahead is logged, and reading goes on."""
    async with opened() as (image, reader, contents):
        for number in range(2):
            await read(image, number * CLUSTER, CLUSTER)

        def failing(*_: object) -> bytes:
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(decoded, "decompress_cluster", failing)
            with pytest.raises(ZeroDivisionError):
                await read(image, 2 * CLUSTER, CLUSTER)
            await until_idle(reader)
        assert "decoding ahead failed" in caplog.text
        assert await read(image, 5 * CLUSTER, CLUSTER) == contents[5 * CLUSTER : 6 * CLUSTER]


async def test_closing_ends_what_is_decoded_ahead() -> None:
    """With reads ahead that would never end, closing does, and leaves no task and no thread."""
    faulty: list[FaultyStorage] = []
    n_threads = threading.active_count()

    def wrap(inner: MemoryStorage) -> Storage:
        faulty.append(FaultyStorage(inner))
        return faulty[0]

    image = await open_memory_image(build_image(SPEC).files, read_only=True, wrap=wrap)
    reader = image._reader
    extent = (await reader.lookup(4 * CLUSTER, CLUSTER))[0]
    source = reader._sources[0]
    assert source is not None
    first_held = source.entry_format.compressed_cluster(extent.value).host_offset

    async def hold(operation: Operation) -> None:
        if operation.host_offset >= first_held:
            await trio.sleep_forever()

    faulty[0].gate = hold
    for number in range(4):
        await read(image, number * CLUSTER, CLUSTER)
    await trio.testing.wait_all_tasks_blocked()
    assert reader.decoded._runners
    with trio.fail_after(5):
        await reader.aclose()
        await image.aclose()
    assert not reader.decoded._runners
    assert not reader.decoded._decoding
    for _ in range(500):
        if threading.active_count() <= n_threads:
            break
        await trio.sleep(0.01)
    assert threading.active_count() <= n_threads


async def test_a_run_that_ends_without_closing() -> None:
    """A trio run that is left in the middle of decoding ahead ends all the same, without an error."""

    async def leave() -> None:
        image = await open_memory_image(build_image(SPEC).files, read_only=True, suspend=True)
        for number in range(4):
            await read(image, number * CLUSTER, CLUSTER)

    await trio.to_thread.run_sync(trio.run, leave)


async def test_with_the_l2_cache_off() -> None:
    """Without L2 tables in memory nothing can be foreseen, and every read is right."""
    async with opened(cache=L2CacheSize(n_bytes=0)) as (image, _, contents):
        for guest_offset in range(0, MIB, 16 * KIB):
            assert await read(image, guest_offset, 16 * KIB) == contents[guest_offset : guest_offset + 16 * KIB]


async def test_writing_over_what_is_decoded_ahead() -> None:
    """A reader close behind a writer sees what was written, never what was decoded before."""
    async with opened(read_only=False, suspend=True) as (image, _, contents):
        disk = bytearray(contents)
        for number in range(SPEC.size // CLUSTER - 4):
            await read(image, number * CLUSTER, CLUSTER)
            at = (number + 2) * CLUSTER + 100
            await image.write(at, b"new" * 100)
            disk[at : at + 300] = b"new" * 100
            if number % 16 == 0:
                await image.flush()
            guest_offset = (number + 1) * CLUSTER
            assert await read(image, guest_offset, 2 * CLUSTER) == disk[guest_offset : guest_offset + 2 * CLUSTER]


def test_requests_that_come_out_of_order() -> None:
    """The kernel's read-ahead sends requests in parallel; swapped neighbours are still one reader."""
    reads = SequentialReads()
    step = 128 * KIB
    foreseen = [reads.note(index * step, step) for index in (0, 2, 1, 4, 3)]
    start, end = next(found for found in foreseen if found[0] < found[1])
    assert start == 5 * step
    assert end - start == AHEAD_BYTES


def test_what_is_foreseen_has_no_gaps_and_no_overlaps() -> None:
    """The ranges made ready for one reader follow one another."""
    reads = SequentialReads()
    ranges = [reads.note(position, 4 * KIB) for position in range(0, 32 * MIB, 4 * KIB)]
    ranges = [found for found in ranges if found[0] < found[1]]
    assert len(ranges) > 8
    for (_, end), (start, _) in pairwise(ranges):
        assert start == end


def test_backwards_is_not_sequential() -> None:
    """Reading towards the start, in small steps or large, foresees nothing."""
    for step in (4 * KIB, MIB):
        reads = SequentialReads()
        found = [reads.note(position, step) for position in range(32 * MIB, 0, -step)]
        assert all(start == end for start, end in found)
