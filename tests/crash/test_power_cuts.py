"""Power cuts at every flush, with any part of the volatile writes missing or torn: leaks at most, fsync holds."""

from __future__ import annotations

import random
import struct
from dataclasses import replace

import pytest
import trio

from qcowfuse.driver.layers import table_cache
from qcowfuse.driver.layers.host_run import HostRun
from qcowfuse.driver.options import L2CacheSize
from qcowfuse.driver.writing import write_back
from qcowfuse.driver.writing.allocation import DirtyRefcounts, MetadataWrite
from qcowfuse.errors import CorruptImageError
from qcowfuse.storage.base import Storage
from tests.support.images import TOP, BuiltImage, ImageSpec, StorageKind, build_image, open_memory_image
from tests.support.old_bytes import KINDS, build_over_old_bytes
from tests.support.powercut import Guest, Recorded, check_cuts, record_workload
from tests.support.recording import cuts, moments_of

KIB = 1 << 10


async def scattered(guest: Guest) -> None:
    """Small writes all over the disk, with an fsync now and then."""
    size = guest.image.size
    for number in range(60):
        await guest.write_random(0, size, 3000)
        if number % 12 == 5:
            await guest.flush()


async def sequential(guest: Guest) -> None:
    """Large writes over several L2 tables, then small ones over the same, then fsyncs with nothing between."""
    size = guest.image.size
    for start in range(0, size, 24 * KIB):
        await guest.write(start, guest.chooser.randbytes(min(24 * KIB, size - start)))
        if start % (48 * KIB):
            await guest.flush()
    for _ in range(20):
        await guest.write_random(0, size, 600)
    await guest.flush()
    await guest.flush()


async def whole_clusters(guest: Guest) -> None:
    """Overwrites of whole clusters in a small range again and again: frees, and takes what was freed."""
    size = guest.image.size
    for number in range(50):
        await guest.write_random(0, size, 8 * KIB, unit=4 * KIB)
        if number % 6 == 5:
            await guest.flush()


async def discarding(guest: Guest) -> None:
    """Writes, discards and write zeroes in turn over the same range: space is given back and taken again."""
    size = guest.image.size
    for number in range(70):
        if number % 3 == 2:
            n_bytes = min(guest.chooser.choice([700, 5 * KIB, 40 * KIB]), size)
            start = guest.chooser.randrange(size - n_bytes + 1)
            await guest.zero(start, n_bytes, unmap=guest.chooser.random() < 0.6)
        else:
            await guest.write_random(0, size, 9 * KIB)
        if number % 6 == 5:
            await guest.flush()


async def tables(guest: Guest) -> None:
    """The first clusters of each L2 table: tables are made while clusters are given back."""
    cluster_size = guest.image.cluster_size
    starts = range(0, guest.image.size, cluster_size // 8 * cluster_size)
    for number in range(30):
        start = guest.chooser.choice(starts)
        if number % 6 == 4:
            await guest.zero(start, 6 * cluster_size, unmap=number % 12 == 4)
        else:
            await guest.write_random(start, start + 6 * cluster_size, guest.chooser.choice([600, 3000, 9 * KIB]))
        if number % 5 == 3:
            await guest.flush()


async def concurrent(guest: Guest) -> None:
    """Writers on interleaved sectors of the same clusters, and fsyncs while they write."""

    async def writer(number: int) -> None:
        for _ in range(20):
            sector = guest.chooser.randrange(guest.image.size // 512 // 4) * 4 + number
            await guest.write(sector * 512, guest.chooser.randbytes(512))

    async def flusher() -> None:
        for _ in range(8):
            await trio.lowlevel.checkpoint()
            await guest.flush()

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(writer, number)
        nursery.start_soon(flusher)
        nursery.start_soon(flusher)


SPECS = {
    "v3": ImageSpec(),
    "v3-4k": ImageSpec(cluster_size=4096, size=512 * KIB, fill=0.3),
    "v2": ImageSpec(version=2, fill=0.3),
    "v1": ImageSpec(version=1),
    "v1-4k": ImageSpec(version=1, cluster_size=4096, size=512 * KIB, backing="raw", backing_size=300 * KIB),
    "v1-compressed": ImageSpec(version=1, cluster_size=4096, compression="zlib", fill=0.6),
    "refcount-1": ImageSpec(refcount_bits=1),
    "refcount-64": ImageSpec(refcount_bits=64),
    "backing-raw": ImageSpec(backing="raw", backing_size=150 * KIB),
    "backing-qcow2": ImageSpec(cluster_size=4096, size=512 * KIB, backing="qcow2", backing_size=300 * KIB),
    "snapshot": ImageSpec(fill=0.6, snapshot=True),
    "snapshot-4k": ImageSpec(cluster_size=4096, size=512 * KIB, fill=0.6, snapshot=True),
    "zeroes": ImageSpec(fill=0.8, zeroes=True),
    "zeroes-snapshot": ImageSpec(fill=0.8, zeroes=True, snapshot=True, cluster_size=1024),
    "extended": ImageSpec(size=512 * KIB, cluster_size=16384, extended_l2=True),
    "extended-snapshot": ImageSpec(
        size=512 * KIB, cluster_size=16384, extended_l2=True, fill=0.6, zeroes=True, snapshot=True
    ),
    "extended-backing": ImageSpec(
        size=512 * KIB, cluster_size=16384, extended_l2=True, backing="raw", backing_size=300 * KIB
    ),
    "data-file": ImageSpec(fill=0.3, data_file="plain"),
    "data-file-raw": ImageSpec(fill=0.3, data_file="raw", cluster_size=4096),
    "data-file-backing": ImageSpec(data_file="plain", backing="raw", backing_size=150 * KIB),
    "extended-data-file": ImageSpec(
        size=512 * KIB, cluster_size=16384, extended_l2=True, fill=0.4, zeroes=True, data_file="plain"
    ),
    "extended-data-file-raw": ImageSpec(size=512 * KIB, cluster_size=16384, extended_l2=True, data_file="raw"),
    "aes": ImageSpec(version=2, fill=0.3, encryption="aes"),
    "aes-v1-backing": ImageSpec(
        version=1, cluster_size=4096, size=512 * KIB, encryption="aes", backing="raw", backing_size=300 * KIB
    ),
    "zlib": ImageSpec(cluster_size=4096, fill=0.8, compression="zlib"),
    "zstd-snapshot": ImageSpec(cluster_size=4096, fill=0.8, compression="zstd", snapshot=True),
    "1k-64": ImageSpec(cluster_size=1024, refcount_bits=64, size=512 * KIB),
}
TABLES_SPECS = {
    "4k": ImageSpec(cluster_size=4096, size=5 << 20),
    "4k-snapshot": ImageSpec(cluster_size=4096, size=5 << 20, fill=0.02, snapshot=True),
    "4k-v2": ImageSpec(version=2, cluster_size=4096, size=5 << 20),
    "2k-backing": ImageSpec(cluster_size=2048, size=1 << 20, backing="raw", backing_size=600 * KIB),
    "2k-data-file": ImageSpec(cluster_size=2048, size=1 << 20, data_file="plain"),
}
"""With several L2 tables, each of four or eight sectors, one of which may be there without the others."""
WORKLOADS = {
    "scattered": scattered,
    "sequential": sequential,
    "whole-clusters": whole_clusters,
    "discarding": discarding,
}


CASES = [
    (spec, workload, KINDS[(number + shift) % len(KINDS)])
    for number, spec in enumerate(SPECS)
    for shift, workload in enumerate(WORKLOADS)
]
"""Each image with each workload, and all kinds of storage in turn."""


def in_turn(*specs: str) -> list[tuple[str, StorageKind]]:
    """Images on all kinds of storage in turn."""
    return [(spec, KINDS[number % len(KINDS)]) for number, spec in enumerate(specs)]


def summarise(problems: list[str]) -> str:
    """The first few problems, for an assertion."""
    return "\n".join(problems[:5])


@pytest.mark.parametrize(("spec", "workload", "storage"), CASES)
async def test_a_power_cut_costs_leaks_at_most(spec: str, workload: str, storage: StorageKind) -> None:
    """Whatever a power cut leaves of the volatile writes: consistent, and what fsync promised is there.

    Crash points: round-not-begun, counts-partly-written, blocks-without-pointers, tables-without-entries,
    links-partly-written, counts-not-lowered, data-file-flushed-first,
    zeroes-partly-linked, holes-partly-punched, closing, version-1-unlinked.
    """
    built = build_over_old_bytes(SPECS[spec], storage)
    recorded = await record_workload(built, WORKLOADS[workload], seed=len(spec))
    summary = await check_cuts(recorded, n_states=80, n_qemu=7)
    assert not summary.problems, summarise(summary.problems)
    assert summary.n_states >= 70


@pytest.mark.parametrize("storage", KINDS)
@pytest.mark.parametrize("spec", TABLES_SPECS)
async def test_a_power_cut_tears_tables(spec: str, storage: StorageKind) -> None:
    """A new table that takes a cluster with old bytes is whole before it is linked, whichever sector comes last.

    Crash points: tables-without-entries, links-partly-written.
    """
    recorded = await record_workload(build_over_old_bytes(TABLES_SPECS[spec], storage), tables, seed=len(spec))
    summary = await check_cuts(recorded, n_states=40, n_qemu=1)
    assert not summary.problems, summarise(summary.problems)


@pytest.mark.parametrize("workload", ["scattered", "discarding"])
async def test_a_power_cut_of_an_encrypted_image(workload: str) -> None:
    """LUKS, opened with its key after every cut: an fsynced write of part of a sector is there, as is the rest."""
    spec = ImageSpec(cluster_size=4096, encryption="luks", fill=0.3, zeroes=True)
    storage: StorageKind = "device" if workload == "scattered" else "used"
    recorded = await record_workload(build_over_old_bytes(spec, storage), WORKLOADS[workload], seed=3)
    summary = await check_cuts(recorded, n_states=60, n_qemu=4)
    assert not summary.problems, summarise(summary.problems)


@pytest.mark.parametrize(
    ("spec", "storage"),
    in_turn(
        *("v3", "v1", "refcount-64", "backing-raw", "snapshot", "zeroes", "zlib", "extended-backing"),
        *("data-file", "data-file-raw", "extended-data-file"),
    ),
)
async def test_a_power_cut_under_concurrent_writers(spec: str, storage: StorageKind) -> None:
    """Writers that share clusters, and fsyncs that overlap them, don't break the order."""
    recorded = await record_workload(build_over_old_bytes(SPECS[spec], storage), concurrent, seed=7, suspend=True)
    summary = await check_cuts(recorded, n_states=200, n_qemu=8)
    assert not summary.problems, summarise(summary.problems)


@pytest.mark.parametrize(("spec", "storage"), in_turn("v3", "v1", "backing-raw", "snapshot", "1k-64"))
async def test_a_power_cut_with_a_tiny_cache(
    spec: str, storage: StorageKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices that are written back for want of room keep the order as well.

    Crash point: links-for-eviction.
    """
    monkeypatch.setattr(table_cache, "MIN_DIRTY_BYTES", 1024)
    built = build_over_old_bytes(SPECS[spec], storage)
    recorded = await record_workload(built, scattered, cache=L2CacheSize(n_tables=1))
    assert len(recorded.storage.flushes) > 12, "there were no write-backs for want of room"
    summary = await check_cuts(recorded, n_states=200, n_qemu=8)
    assert not summary.problems, summarise(summary.problems)


@pytest.mark.parametrize("suspend", [False, True])
async def test_a_power_cut_while_the_refcount_table_grows(suspend: bool) -> None:
    """A refcount table that is full moves without ever being in doubt.

    Crash points: blocks-without-pointers, refcount-table-moved.
    """
    spec = ImageSpec(refcount_bits=64, size=2200 * KIB, fill=0.86)
    built = build_over_old_bytes(spec, "device" if suspend else "file")
    before = built.top[48:60]

    async def fill_the_rest(guest: Guest) -> None:
        for number, start in enumerate(range(0, guest.image.size, 16 * KIB)):
            await guest.write(start, guest.chooser.randbytes(min(5 * KIB, guest.image.size - start)))
            if number % 40 == 20:
                await guest.flush()
        await guest.flush()
        await guest.write_random(0, guest.image.size, 2000)

    recorded = await record_workload(built, fill_the_rest, suspend=suspend)
    assert recorded.final[48:60] != before, "the table did not grow"
    summary = await check_cuts(recorded, n_states=60, n_qemu=6)
    assert not summary.problems, summarise(summary.problems)


async def new_half(guest: Guest) -> None:
    """The disk grows, and small writes fill the new half, with an fsync and a discard now and then."""
    size = guest.image.size
    await guest.grow(2 * size)
    for number in range(40):
        await guest.write_random(size, 2 * size, 3000)
        if number % 8 == 5:
            await guest.flush()
        if number % 10 == 9:
            await guest.zero(guest.chooser.randrange(size, 2 * size - 20 * KIB), 20 * KIB, unmap=True)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "data-file" in spec])
async def test_a_power_cut_among_new_clusters_of_a_data_file(spec: str) -> None:
    """Any state of one file with any of the other: no link without its data. New ones are behind the old end, because
    QEMU links all clusters of a disk with a raw data file.

    Crash points: data-file-flushed-first, links-partly-written, zeroes-partly-linked.
    """
    recorded = await record_workload(build_image(replace(SPECS[spec], size=64 * KIB)), new_half, seed=len(spec))
    summary = await check_cuts(recorded, n_states=60, n_qemu=3)
    assert not summary.problems, summarise(summary.problems)


async def test_a_power_cut_while_autoclear_bits_are_cleared() -> None:
    """Autoclear bits are gone from the disk before the first change that makes them untrue is there.

    Crash point: autoclear-without-data.
    """
    plain = build_image(ImageSpec(fill=0.5))
    top = bytearray(plain.top)
    top[88:96] = (1 << 40).to_bytes(8, "big")
    built = BuiltImage(plain.spec, {**plain.files, "/qcowfuse-test-images/top.img": bytes(top)}, plain.contents)
    recorded = await record_workload(built, scattered)
    summary = await check_cuts(recorded, n_states=150, n_qemu=5)
    assert not summary.problems, summarise(summary.problems)
    assert recorded.final[88:96] == bytes(8)
    first_data = next(write for write in recorded.storage.writes if write.host_offset != 88)
    clearing = recorded.storage.writes[0]
    assert clearing.host_offset == 88
    assert any(clearing.ended < flush.begun < flush.ended < first_data.begun for flush in recorded.storage.flushes)


async def test_a_power_cut_while_the_image_is_marked_as_corrupt() -> None:
    """An entry that points at metadata freezes the image: the bit is there or not, and what fsync promised is there.

    Crash point: corrupt-bit-set.
    """
    built = build_image(ImageSpec(fill=0.5, cluster_size=4096))
    top = bytearray(built.top)
    (l1_offset,) = struct.unpack_from(">Q", top, 40)
    (l2_entry,) = struct.unpack_from(">Q", top, l1_offset)
    last = (l2_entry & 0x00FF_FFFF_FFFF_FE00) + 8 * (built.spec.size // 4096 - 1)
    struct.pack_into(">Q", top, last, 1 << 63 | l1_offset)

    async def into_the_trap(guest: Guest) -> None:
        await guest.write(0, b"n" * 6000)
        await guest.flush()
        await guest.write(8192, b"m" * 6000)
        with pytest.raises(CorruptImageError):
            await guest.image.write(guest.image.size - 4096, b"x" * 512)

    contents = bytearray(built.contents)
    contents[-4096:] = top[l1_offset : l1_offset + 4096]
    trapped = BuiltImage(built.spec, {**built.files, TOP: bytes(top)}, bytes(contents))
    recorded = await record_workload(trapped, into_the_trap)
    n_marked = n_states = 0
    for cut in cuts(recorded.built.top, recorded.storage, moments_of(recorded.storage)):
        expected = recorded.record.expected_at(cut.moment)
        for state in cut.states(40, random.Random(cut.moment)):
            n_states += 1
            n_marked += state[79] >> 1 & 1
            image = await open_memory_image({TOP: state}, read_only=True)
            found = bytes(await image.read(0, image.size - 4096))
            assert not expected.mismatches(found + bytes(contents[-4096:]))
    assert 0 < n_marked < n_states
    assert recorded.final[79] >> 1 & 1


async def _broken(monkeypatch: pytest.MonkeyPatch, spec: str = "v3") -> list[str]:
    recorded: Recorded = await record_workload(build_image(SPECS[spec]), scattered)
    summary = await check_cuts(recorded, n_states=400, n_qemu=0)
    return summary.problems


async def test_the_harness_catches_a_missing_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the flush between counts and links a power cut is seen to do damage."""
    original = write_back.WriteBack._run

    async def run(self: write_back.WriteBack, *, final: bool) -> None:
        calls = 0
        flush = self.flush_storage

        async def last_only(data: Storage | None = None) -> None:
            nonlocal calls
            calls += 1
            if not final or not calls % 2:
                await flush(data)

        monkeypatch.setattr(self, "flush_storage", last_only)
        await original(self, final=final)
        monkeypatch.setattr(self, "flush_storage", flush)
        await flush()

    monkeypatch.setattr(write_back.WriteBack, "_run", run)
    assert any("references" in problem or "neither" in problem for problem in await _broken(monkeypatch))


@pytest.mark.parametrize("spec", ["data-file", "extended-data-file"])
async def test_the_harness_catches_links_before_the_data_file(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the flush of the data file before the links a power cut is seen to lose what was promised."""
    original = write_back.WriteBack.flush_storage
    n_data_flushes = 0

    async def flush_late(self: write_back.WriteBack, data: Storage | None = None) -> None:
        nonlocal n_data_flushes
        n_data_flushes += data is not None
        await original(self)
        if data is not None and n_data_flushes % 2:
            await original(self, data)

    monkeypatch.setattr(write_back.WriteBack, "flush_storage", flush_late)
    assert any("neither" in problem for problem in await _broken(monkeypatch, spec))


async def test_the_harness_catches_links_written_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing refcounts after the links is seen."""
    original = write_back.WriteBack._write_all
    kept: list[MetadataWrite] = []

    async def write_counts_late(self: write_back.WriteBack, refcounts: DirtyRefcounts) -> None:
        kept.extend(refcounts.blocks + refcounts.moved_table + refcounts.table)

    async def write_all(self: write_back.WriteBack, writes: list[MetadataWrite]) -> None:
        await original(self, writes)
        if writes:
            await original(self, kept)
            kept.clear()

    monkeypatch.setattr(write_back.WriteBack, "_write_refcounts", write_counts_late)
    monkeypatch.setattr(write_back.WriteBack, "_write_all", write_all)
    assert any("refcount" in problem for problem in await _broken(monkeypatch))


async def test_the_harness_catches_a_broken_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """An fsync that ends without the last flush is seen."""
    original = write_back.WriteBack._run

    async def run(self: write_back.WriteBack, *, final: bool) -> None:
        await original(self, final=False)

    monkeypatch.setattr(write_back.WriteBack, "_run", run)
    monkeypatch.setattr(write_back.WriteBack, "is_dirty", False)
    assert any("neither" in problem for problem in await _broken(monkeypatch))


async def test_the_harness_catches_clusters_freed_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that is given back before its unlink is durable is seen."""
    release = write_back.WriteBack.unlink_cluster

    def free_at_once(self: write_back.WriteBack, run: HostRun) -> None:
        try:
            self._allocator.give_back(HostRun(run.host_offset, 1))
        except Exception:
            release(self, run)

    monkeypatch.setattr(write_back.WriteBack, "unlink_cluster", free_at_once)
    assert await _broken(monkeypatch, "snapshot")
