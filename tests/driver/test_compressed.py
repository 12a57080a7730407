"""Compressed clusters: decoded once, on all processors, and ahead of sequential readers only."""

from __future__ import annotations

import errno
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Literal

import pytest
import trio
import trio.testing

from qcowfuse.buffer import Buffer
from qcowfuse.driver.options import L2CacheSize
from qcowfuse.driver.pending import PendingRead
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.driver.reading import decoded_cache, decoding
from qcowfuse.driver.reading.decoded_cache import CACHE_BYTES, DecodedCache
from qcowfuse.driver.reading.read_ahead import AHEAD_BYTES, SequentialReads
from qcowfuse.driver.reading.reader import ChainReader
from qcowfuse.errors import FormatError
from qcowfuse.format.compression import Outcome, decompress_cluster, decompress_clusters
from qcowfuse.storage.base import Storage
from tests.support.faults import FaultyStorage, Operation
from tests.support.images import TOP, ImageSpec, build_image, open_memory_image
from tests.support.memory_storage import MemoryStorage
from tests.support.starting import read_alone, read_at_once

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
        yield image, image.reader, built.contents
    finally:
        await image.aclose()


async def read(image: QcowImage, guest_offset: int, n_bytes: int) -> bytes:
    """As the daemon reads."""
    return bytes(await image.read(guest_offset, n_bytes))


def if_ready(image: QcowImage, guest_offset: int, n_bytes: int) -> Buffer | None:
    """The bytes, if all of them were decoded before."""
    n_decoded = image.statistics()["decoded_clusters.misses"]
    data = read_at_once(image, guest_offset, n_bytes)
    return data if image.statistics()["decoded_clusters.misses"] == n_decoded else None


async def until_idle(reader: ChainReader) -> None:
    """Wait until nothing is decoded ahead."""
    with trio.fail_after(10):
        await reader.compressed.ahead.wait_until_idle()


def held(reader: ChainReader) -> int:
    """Bytes of all buffers in which anything that can be found lies."""
    return sum(reader.compressed.decoded.cache.buffer_sizes())


def last_used(reader: ChainReader) -> int:
    """Bytes of the buffer that was used last."""
    return reader.compressed.decoded.cache.buffer_sizes()[-1]


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The compressed data of every decoding, in the order in which they begin."""
    seen: list[bytes] = []

    def noting(data: Buffer, compression_type: int, cluster_size: int) -> bytes:
        seen.append(bytes(data))
        return decompress_cluster(data, compression_type, cluster_size)

    def noting_all(packed: Sequence[Buffer], compression_type: int, cluster_size: int) -> list[Outcome]:
        seen.extend(map(bytes, packed))
        return decompress_clusters(packed, compression_type, cluster_size)

    monkeypatch.setattr(decoding, "decompress_cluster", noting)
    monkeypatch.setattr(decoding, "decompress_clusters", noting_all)
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
        ready = if_ready(image, 4 * CLUSTER, CLUSTER)
        assert ready is not None
        assert bytes(ready) == contents[4 * CLUSTER : 5 * CLUSTER]


async def test_reads_served_from_memory_keep_the_lead() -> None:
    """A reader that finds everything ready goes on being decoded ahead for."""
    async with opened() as (image, reader, _):
        for number in range(4):
            await read(image, number * CLUSTER, CLUSTER)
        for number in range(4, SPEC.size // CLUSTER):
            await until_idle(reader)
            assert if_ready(image, number * CLUSTER, CLUSTER) is not None, number


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
            is_ready = if_ready(image, guest_offset, step) is not None
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
        assert if_ready(image, 4 * CLUSTER, CLUSTER) is not None
        assert if_ready(image, 4 * MIB + 4 * CLUSTER, CLUSTER) is not None


@pytest.mark.parametrize("n_threads", [2, 4])
@pytest.mark.parametrize("is_alone", [False, True], ids=["in a thread", "on the spot"])
async def test_random_small_reads_decode_only_the_start(
    is_alone: bool, n_threads: int, decodings: list[bytes]
) -> None:
    """A read that follows no other has its cluster decoded as far as it reads; one further on is right."""
    async with opened() as (image, reader, contents):
        reader.compressed.decoded.n_threads = n_threads
        for number in (90, 3, 70, 20, 50, 110):
            for in_cluster in (20 * KIB, 4 * KIB, 40 * KIB, 5 * KIB + 7):
                guest_offset = number * CLUSTER + in_cluster
                found = await read_alone(image, guest_offset, KIB, is_alone=is_alone)
                assert bytes(found) == contents[guest_offset : guest_offset + KIB]
                if in_cluster == 20 * KIB:
                    assert last_used(reader) == 21 * KIB
            assert last_used(reader) == CLUSTER
        assert len(decodings) == 6
        assert held(reader) == reader.compressed.decoded.cache.used


async def test_a_read_without_company_is_computed_at_once() -> None:
    """A random read in one compressed cluster does not wait while nobody else does, which is asked once; one across
    two clusters waits, and one of a cluster that is not compressed does not ask."""
    n_asked = 0

    def is_alone() -> bool:
        nonlocal n_asked
        n_asked += 1
        return True

    async with opened() as (image, reader, contents):
        await reader.lookup(0, image.size)  # has the tables in memory
        reader.compressed.decoded.n_threads = 4
        for number in (90, 3, 70):
            guest_offset = number * CLUSTER + 20 * KIB
            assert read_at_once(image, guest_offset + 2 * MIB, KIB) is None
            found = read_at_once(image, guest_offset, KIB, is_alone)
            assert found is not None
            assert bytes(found) == contents[guest_offset : guest_offset + KIB]
            assert last_used(reader) == 21 * KIB
        assert reader.compressed.decoded.misses == n_asked == 3
        assert read_at_once(image, 5 * CLUSTER - KIB, 2 * KIB, is_alone) is None
    async with opened(ImageSpec(size=MIB, cluster_size=CLUSTER, fill=1.0)) as (image, _, _contents):
        await image.read(20 * KIB, KIB)
        assert read_at_once(image, 20 * KIB, KIB, is_alone) is not None
    assert n_asked == 3


async def test_a_pending_read_of_a_cluster_is_one_read() -> None:
    """What goes on later is no second read: it is still a random one, and counted once."""
    async with opened() as (image, reader, contents):
        await reader.lookup(0, image.size)
        reader.compressed.decoded.n_threads = 4
        hits = image.statistics()["l2_cache.hits"]
        guest_offset = 70 * CLUSTER + 20 * KIB
        pending = image.start_read(guest_offset, KIB)
        assert isinstance(pending, PendingRead)
        assert bytes(await pending.finish()) == contents[guest_offset : guest_offset + KIB]
        assert last_used(reader) == 21 * KIB
        assert image.statistics()["l2_cache.hits"] == hits + 1
        assert image.statistics()["decoded_clusters.misses"] == 1


async def test_the_cache_stays_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading more than the cache holds keeps no more than it may."""
    monkeypatch.setattr(decoded_cache, "CACHE_BYTES", CACHE_BYTES // 4)
    spec = ImageSpec(size=12 * MIB, cluster_size=CLUSTER, fill=1.0, compression="zstd")
    async with opened(spec) as (image, reader, _):
        for guest_offset in range(0, spec.size, CLUSTER):
            await read(image, guest_offset, CLUSTER)
            assert held(reader) == reader.compressed.decoded.cache.used <= decoded_cache.CACHE_BYTES
        assert image.statistics()["decoded_clusters.misses"] == spec.size // CLUSTER


async def test_one_large_read_decodes_on_two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read over 16 clusters has two of them in decoding at the same time."""
    barrier = threading.Barrier(2, timeout=10)
    first_two = iter((True, True))

    def meeting(packed: Sequence[Buffer], compression_type: int, cluster_size: int) -> list[Outcome]:
        if next(first_two, False):
            barrier.wait()
        return decompress_clusters(packed, compression_type, cluster_size)

    monkeypatch.setattr(decoding, "decompress_clusters", meeting)
    async with opened() as (image, reader, contents):
        reader.compressed.decoded.n_threads = 2
        assert bytes(await image.read(0, MIB)) == contents[:MIB]


@pytest.mark.parametrize("spec", [SPEC, ZSTD], ids=["zlib", "zstd"])
@pytest.mark.parametrize("suspend", [False, True], ids=["inline", "suspending"])
async def test_reads_at_the_same_time_are_decoded_together(
    spec: ImageSpec, suspend: bool, decodings: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many random reads at once: the right bytes, few hops to a thread, each cluster decoded once, each in a buffer
    of its own."""
    n_jobs = 0
    async with opened(spec, suspend=suspend) as (image, reader, contents):
        run_jobs = reader.compressed.decoded.run_jobs

        async def counting(jobs: Sequence[decoding.Job]) -> list[decoding.Outcomes]:
            nonlocal n_jobs
            n_jobs += len(jobs)
            return await run_jobs(jobs)

        monkeypatch.setattr(reader.compressed.decoded, "run_jobs", counting)

        async def check(number: int) -> None:
            guest_offset = number * 5 % 16 * 8 * CLUSTER + 5 * KIB
            data = await image.read(guest_offset, 4 * KIB)
            assert bytes(data) == contents[guest_offset : guest_offset + 4 * KIB]

        async with trio.open_nursery() as nursery:
            for number in (*range(16), *range(8)):
                nursery.start_soon(check, number)
        n_decoded = image.statistics()["decoded_clusters.misses"]
        if spec is SPEC:  # of a cluster packed with deflate the start, and all of it for a read that comes again
            assert 16 <= n_decoded <= 24
        else:
            assert n_decoded == len(decodings) == 16
        assert n_jobs <= 6
        assert len(reader.compressed.decoded.cache.buffer_sizes()) == 16
        assert not reader.compressed.decoded.decoding
        assert held(reader) == reader.compressed.decoded.cache.used


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
async def test_an_error_among_reads_at_the_same_time(compression: Literal["zlib", "zstd"]) -> None:
    """Of reads that are decoded together those fail whose cluster is broken or can't be read, and no others."""
    spec = ImageSpec(size=4 * MIB, cluster_size=CLUSTER, fill=1.0, compression=compression)
    built = build_image(spec)
    image = await open_memory_image(built.files, read_only=True)
    places = []
    for number in range(8):
        extent = (await image.reader.lookup(number * 3 * CLUSTER, CLUSTER))[0]
        source = image.reader.compressed.sources[0]
        assert source is not None
        places.append(source.entry_format.compressed_cluster(extent.value))
    await image.aclose()
    broken = bytearray(built.files[TOP])
    broken[places[2].host_offset : places[2].host_offset + 16] = b"\xff" * 16
    faulty: list[FaultyStorage] = []

    def wrap(inner: MemoryStorage) -> Storage:
        faulty.append(FaultyStorage(inner))
        return faulty[0]

    async def refuse(operation: Operation) -> None:
        if operation.host_offset == places[5].host_offset:
            raise OSError(errno.EIO, "no such sector")

    image = await open_memory_image({**built.files, TOP: bytes(broken)}, read_only=True, wrap=wrap)
    faulty[0].gate = refuse
    outcomes: dict[int, object] = {}

    async def attempt(number: int) -> None:
        try:
            outcomes[number] = bytes(await image.read(number * 3 * CLUSTER + 512, 4 * KIB))
        except (OSError, FormatError) as error:
            outcomes[number] = type(error)

    for _ in range(2):
        outcomes.clear()
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(attempt, number)
        assert outcomes.pop(2) is FormatError
        assert outcomes.pop(5) is OSError
        for number, data in outcomes.items():
            start = number * 3 * CLUSTER + 512
            assert data == built.contents[start : start + 4 * KIB]
        assert len(outcomes) == 6
    await image.aclose()


@pytest.mark.parametrize("spec", [SPEC, ZSTD], ids=["zlib", "zstd"])
async def test_single_clusters_are_decoded_where_that_is_quickest(spec: ImageSpec) -> None:
    """A random read is answered at once where a hop to a thread gives nothing; and never one of several clusters, of
    a large one, or of one that is broken."""
    async with opened(spec) as (image, reader, contents):
        await reader.lookup(0, 1)
        for n_threads in (1, 2, 3, 8):
            reader.compressed.decoded.n_threads = n_threads
            guest_offset = (20 + 10 * n_threads) * CLUSTER + 700
            data = read_at_once(image, guest_offset, 900)
            if spec is ZSTD or n_threads <= 2:
                assert data == contents[guest_offset : guest_offset + 900]
            else:
                assert data is None
            assert read_at_once(image, guest_offset + 5 * CLUSTER - 100, CLUSTER) is None
    large = ImageSpec(size=4 * MIB, cluster_size=128 * KIB, fill=1.0, compression=spec.compression)
    async with opened(large) as (image, reader, _):
        reader.compressed.decoded.n_threads = 1
        await reader.lookup(0, 1)
        assert read_at_once(image, 5 * KIB, KIB) is None
    built = build_image(spec)
    async with opened(spec) as (image, reader, _):
        extent = (await reader.lookup(6 * CLUSTER, CLUSTER))[0]
        source = reader.compressed.sources[0]
        assert source is not None
        where = source.entry_format.compressed_cluster(extent.value)
    broken = bytearray(built.files[TOP])
    broken[where.host_offset : where.host_offset + 16] = b"\xff" * 16
    image = await open_memory_image({**built.files, TOP: bytes(broken)}, read_only=True)
    image.reader.compressed.decoded.n_threads = 1
    await image.reader.lookup(6 * CLUSTER, CLUSTER)
    for _ in range(2):
        for is_alone in (False, True):
            with pytest.raises(FormatError, match="compressed cluster"):
                await read_alone(image, 6 * CLUSTER, KIB, is_alone=is_alone)
    assert read_at_once(image, 7 * CLUSTER, KIB) == built.contents[7 * CLUSTER : 7 * CLUSTER + KIB]
    await image.aclose()


async def test_a_read_that_is_cancelled_while_others_want_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two that wait for a cluster gives up: the other one gets it, and so does a third one afterwards."""
    async with opened(suspend=True) as (image, reader, contents):
        expected = contents[3 * CLUSTER + 100 : 3 * CLUSTER + 200]
        for n_steps in range(12):
            fresh = reader.compressed.decoded.cache = DecodedCache()
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(image.read, 3 * CLUSTER + 100, 100)
                    for _ in range(n_steps):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            assert bytes(await image.read(3 * CLUSTER + 100, 100)) == expected
            assert len(fresh) == 1
            assert not reader.compressed.decoded.decoding


async def test_closing_while_reads_wait() -> None:
    """Reads that wait for a thread when the image's background work is ended are answered all the same."""
    async with opened(suspend=True) as (image, reader, contents):
        results: dict[int, bytes] = {}

        async def note(number: int) -> None:
            results[number] = bytes(await image.read(number * CLUSTER + 100, 100))

        async with trio.open_nursery() as nursery:
            for number in range(0, 60, 2):
                nursery.start_soon(note, number)
            for _ in range(3):
                await trio.lowlevel.checkpoint()
            await reader.aclose()
        assert results == {n: contents[n * CLUSTER + 100 : n * CLUSTER + 200] for n in range(0, 60, 2)}
        assert reader.compressed.ahead.is_idle


async def test_a_read_of_what_was_decoded_together_copies_nothing() -> None:
    """Clusters that one thread decoded for a reader are handed out as they lie, also across their borders."""
    async with opened(ZSTD) as (image, reader, contents):
        for number in range(3):
            await read(image, number * MIB, MIB)
        await until_idle(reader)
        for guest_offset, n_bytes in ((3 * MIB, MIB), (3 * MIB + 1000, 3 * CLUSTER), (4 * MIB + CLUSTER - 1, 2)):
            data = if_ready(image, guest_offset, n_bytes)
            assert isinstance(data, memoryview)
            assert data == contents[guest_offset : guest_offset + n_bytes]
        data = if_ready(image, 3 * MIB + 5, 2 * MIB)
        assert data == contents[3 * MIB + 5 : 5 * MIB + 5]


def test_the_cache_counts_whole_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer counts until it goes, and goes with all of its clusters, whichever of them is in use."""
    monkeypatch.setattr(decoded_cache, "CACHE_BYTES", 1000)
    cache = DecodedCache()
    cache.insert([(0, entry) for entry in range(4)], bytes(400))
    for entry in range(10, 15):
        cache.insert([(0, entry)], bytes(100))
        assert cache.get((0, 2), 100) is not None
    assert cache.used == 900
    cache.insert([(0, 2)], bytes(100))  # again, while the first one is still there
    assert cache.used == 1000
    cache.insert([(0, 20)], bytes(50))
    assert cache.used == 950
    assert not cache.has((0, 10), 1)
    assert cache.has((0, 3), 100)
    for entry in range(30, 39):
        cache.insert([(0, entry)], bytes(100))
    assert cache.used <= 1000
    assert not cache.has((0, 3), 1)
    assert not cache.has((0, 2), 1)
    assert len(cache) == len(cache.buffer_sizes())
    cache.insert([(0, 38)], bytes(200))  # more of a cluster takes the place of its start
    assert cache.has((0, 38), 200)
    assert cache.used <= 1000
    assert sum(cache.buffer_sizes()) == cache.used


async def test_an_error_ahead_is_for_the_read_that_meets_it() -> None:
    """A cluster that does not decode fails the read that wants it, each time, and no read before it."""
    built = build_image(SPEC)
    files = dict(built.files)
    async with opened() as (image, reader, _):
        extent = (await reader.lookup(6 * CLUSTER, CLUSTER))[0]
        source = reader.compressed.sources[0]
        assert source is not None
        where = source.entry_format.compressed_cluster(extent.value)
    broken = bytearray(files[TOP])
    broken[where.host_offset : where.host_offset + 16] = b"\xff" * 16
    files[TOP] = bytes(broken)
    image = await open_memory_image(files, read_only=True)
    for number in range(6):
        await read(image, number * CLUSTER, CLUSTER)
    await until_idle(image.reader)
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
            patch.setattr(decoding, "decompress_cluster", failing)
            patch.setattr(decoding, "decompress_clusters", failing)
            with pytest.raises(ZeroDivisionError):
                await image.read(2 * CLUSTER, CLUSTER)
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
    reader = image.reader
    extent = (await reader.lookup(4 * CLUSTER, CLUSTER))[0]
    source = reader.compressed.sources[0]
    assert source is not None
    first_held = source.entry_format.compressed_cluster(extent.value).host_offset

    async def hold(operation: Operation) -> None:
        if operation.host_offset >= first_held:
            await trio.sleep_forever()

    faulty[0].gate = hold
    for number in range(4):
        await read(image, number * CLUSTER, CLUSTER)
    await trio.testing.wait_all_tasks_blocked()
    assert not reader.compressed.ahead.is_idle
    with trio.fail_after(5):
        await reader.aclose()
        await image.aclose()
    assert reader.compressed.ahead.is_idle
    assert not reader.compressed.decoded.decoding
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
