"""Repairs where it matters what they do: where new tables go, what is left alone, what is given back."""

from __future__ import annotations

import errno
import random
import struct
from array import array
from collections.abc import Sequence
from itertools import pairwise

import pytest
import trio

from qcowfuse.buffer import Buffer
from qcowfuse.consistency.compare import check_storage
from qcowfuse.consistency.counted_refcounts import ReferenceCounts, is_zero_or_one
from qcowfuse.consistency.plain_tables import PlainTables
from qcowfuse.consistency.repair import repair_storage
from qcowfuse.consistency.result import CheckResult, Fix
from qcowfuse.consistency.walk import ITEMS_PER_CHECKPOINT
from qcowfuse.errors import ImageUsageError, UnsupportedFeatureError
from qcowfuse.format.entries import READS_ZERO, serialise_table
from qcowfuse.format.header import Qcow2Header
from qcowfuse.format.header_parsing import parse_header
from tests.driver.test_holes import Turns
from tests.support import damage
from tests.support.checker import check_image_bytes
from tests.support.damage import COPIED, OFFSET_MASK, Damage, Tables
from tests.support.images import (
    TOP,
    ImageSpec,
    build_image,
    open_memory_image,
    qemu_check,
    qemu_read,
    run_tool,
    scratch_folder,
)
from tests.support.memory_storage import MemoryStorage

SPEC = ImageSpec(fill=0.3, size=128 << 10)
LARGE = ImageSpec(fill=0.3, size=128 << 10, cluster_size=4096)
EXTENDED = ImageSpec(fill=0.3, size=1 << 20, cluster_size=16384, extended_l2=True)


class FullStorage(MemoryStorage):
    """Cannot grow."""

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """Only inside."""
        return host_offset + sum(map(len, buffers)) <= len(self.data) and super().try_pwritev(host_offset, buffers)

    async def pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """Only inside."""
        if host_offset + sum(map(len, buffers)) > len(self.data):
            raise OSError(errno.ENOSPC, "No space left on device")
        await super().pwritev(host_offset, buffers)


async def repair(storage: MemoryStorage, fix: Fix = Fix.ALL) -> CheckResult:
    """Repair; the result of the second check."""
    return await repair_storage(storage, fix, report=lambda _: None)


async def read_all(data: bytes | bytearray) -> bytes:
    """What the guest reads."""
    image = await open_memory_image({TOP: data}, read_only=True)
    contents = bytes(await image.read(0, image.size))
    await image.aclose()
    return contents


async def test_new_tables_go_inside_where_the_file_cannot_grow() -> None:
    """On a device that is full to its end the structure is rebuilt in clusters that nothing refers to."""
    built = build_image(SPEC)
    data = bytearray(built.top) + bytes(8 << 10)
    damage.drop_refcount_block(data)
    storage = FullStorage(data)
    assert (await repair(storage)).is_clean
    assert len(storage.data) == len(data)
    assert qemu_check({TOP: storage.data})[0] == 0
    assert await read_all(storage.data) == built.contents


async def test_no_room_for_new_tables() -> None:
    """Where there is no room at all the repair fails with the system's reason and has changed nothing."""
    built = build_image(SPEC)
    data = bytearray(built.top)
    damage.drop_refcount_block(data)
    storage = FullStorage(data)
    with pytest.raises(OSError, match="No space"):
        await repair(storage)
    assert storage.data == data


async def test_new_tables_are_nowhere_that_an_entry_points() -> None:
    """Guest clusters that point just past the end (a truncated image) do not get new tables for contents."""
    built = build_image(SPEC)
    data = bytearray(built.top)
    places = list(Tables(data).l2_entries())
    end = -(-len(data) // 512)
    wanted = [end, end + 1, end + 4, end + 30]
    for place, cluster in zip(places, wanted, strict=False):
        struct.pack_into(">Q", data, place, cluster * 512 | COPIED)
    damage.drop_refcount_block(data)
    storage = MemoryStorage(data)
    await repair(storage)
    again = await repair(storage)
    for cluster in wanted:
        assert not any(storage.data[cluster * 512 : cluster * 512 + 512]), cluster
    assert again.check_errors == 0
    tables = Tables(storage.data)
    assert tables.refcount_table_offset // 512 not in wanted
    assert tables.refcount_block // 512 not in wanted


@pytest.mark.parametrize("spec", [LARGE, EXTENDED], ids=["standard", "extended"])
async def test_an_impossible_place_without_data_becomes_zero(spec: ImageSpec) -> None:
    """A zero cluster at a place that none can have is made a plain zero cluster; one with data is left alone."""
    data = bytearray(build_image(spec).top)
    places = list(Tables(data).l2_entries())
    for place, is_zero in ((places[0], True), (places[4], False)):
        flag = 0 if spec.extended_l2 else is_zero
        struct.pack_into(">Q", data, place, COPIED | 0x8200 | flag)
        if spec.extended_l2:
            struct.pack_into(">Q", data, place + 8, 0xFFFF_FFFF << 32 if is_zero else 0xFFFF_FFFF)
    storage = MemoryStorage(data)
    result = await repair(storage)
    found = Tables(storage.data)
    if spec.extended_l2:
        assert (found.u64(places[0]), found.u64(places[0] + 8)) == (0, 0xFFFF_FFFF << 32)
    else:
        assert found.u64(places[0]) == 1
    assert found.u64(places[4]) & OFFSET_MASK == 0x8200
    assert result.corruptions == 1
    assert qemu_check({TOP: storage.data})[0] == 2


async def test_a_table_on_top_of_another_is_not_written() -> None:
    """An L1 entry that makes a refcount block an L2 table: counts move to a new block, the old one stays as it was
    but for COPIED flags, and the image is as consistent as qemu-img says."""
    data = bytearray(build_image(LARGE).top)
    tables = Tables(data)
    block = tables.refcount_block
    struct.pack_into(">Q", data, tables.l1_offset, block | COPIED)
    struct.pack_into(">Q", data, block + 1024, 0x8201)
    storage = MemoryStorage(data)
    result = await repair(storage)
    found = Tables(storage.data)
    assert found.refcount_block != block
    assert found.u64(block + 1024) & ~COPIED == 0x8201
    assert qemu_check({TOP: storage.data})[0] == (0 if result.is_clean else 2)


async def test_leaks_alone() -> None:
    """-r leaks lowers what is too high and touches nothing else; what takes more is refused with nothing changed."""
    built = build_image(SPEC)
    data = bytearray(built.top)
    damage.leak_clusters(data)
    storage = MemoryStorage(data)
    result = await repair(storage, Fix.LEAKS)
    assert result.is_clean
    assert result.leaks_fixed > 1
    assert await read_all(storage.data) == built.contents
    damage.lower_counts(data)
    storage = MemoryStorage(data)
    with pytest.raises(ImageUsageError, match="-r all"):
        await repair(storage, Fix.LEAKS)
    assert storage.data == data


async def test_freed_space_is_given_back_only_in_a_sound_image() -> None:
    """A leaked cluster becomes a hole, but not while an entry elsewhere is impossible: it may be what that lost."""
    built = build_image(SPEC)
    for is_sound in (True, False):
        data = bytearray(built.top)
        place = list(Tables(data).l2_entries())[3]
        lost = Tables(data).u64(place) & OFFSET_MASK
        struct.pack_into(">Q", data, place, 0 if is_sound else 1 << 45)
        storage = MemoryStorage(data)
        await repair(storage)
        assert any(storage.data[lost : lost + 512]) != is_sound


async def test_a_snapshot_entry_that_is_too_short() -> None:
    """The entry gets its extra data in a new table, and the snapshot's bytes are what they were."""
    built = build_image(ImageSpec(fill=0.3, size=128 << 10, snapshot=True, zeroes=True))
    data = bytearray(built.top)
    damage.shorten_snapshot_entry(data)
    storage = MemoryStorage(data)
    result = await repair(storage)
    assert (result.is_clean, result.corruptions_fixed) == (True, 1)
    assert qemu_check({TOP: storage.data})[0] == 0
    assert qemu_read({TOP: storage.data}, snapshot="s1") == built.snapshot_contents


async def test_version_1_has_nothing_to_repair() -> None:
    """Version 1 is refused by name."""
    with pytest.raises(UnsupportedFeatureError, match="version 1"):
        await repair(MemoryStorage(build_image(ImageSpec(version=1, size=64 << 10)).top))


async def test_a_second_repair_changes_nothing() -> None:
    """A repaired image is left byte for byte as it is."""
    data = bytearray(build_image(SPEC).top)
    damage.everything(data)
    storage = MemoryStorage(data)
    await repair(storage)
    before = bytes(storage.data)
    result = await repair(storage)
    assert (result.leaks_fixed, result.corruptions_fixed) == (0, 0)
    assert storage.data == before


async def test_progress_ends_at_its_end() -> None:
    """Progress rises within a pass, never past the whole, and ends with all of it."""
    built = build_image(ImageSpec(fill=0.5, size=8 << 20))
    storage = MemoryStorage(built.top)
    header = parse_header(built.top[:512], len(built.top))
    assert isinstance(header, Qcow2Header)
    seen: list[tuple[int, int]] = []
    result = await check_storage(storage, header, lambda _: None, lambda done, whole: seen.append((done, whole)))
    assert result.is_clean
    assert len(seen) > 3
    assert all(0 <= done <= whole for done, whole in seen)
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen[:-1]] == sorted(done for done, _ in seen[:-1])


@pytest.mark.parametrize("order", range(7))
def test_counting_a_table_is_counting_its_entries(order: int) -> None:
    """Tables counted at once, and runs, give the counts that one reference after the other gives."""
    rng = random.Random(order)
    fast, slow = ReferenceCounts(9, order), ReferenceCounts(9, order)
    limit = 5000
    tables = PlainTables(fast, 9, limit, has_zeroes=True)
    overflowed, beyond = [], []
    for _ in range(60):
        words = array("Q")
        while len(words) < 64:
            entry = rng.choice((0, READS_ZERO, rng.randrange(1, limit + 40) << 9 | COPIED | rng.randrange(2)))
            words.extend(entry + (number << 9) * bool(entry >> 9) for number in range(rng.choice((1, 1, 3, 20, 64))))
        words = words[:64]
        found = tables.count(serialise_table(words, 0, len(words)))
        assert found is not None
        overflowed += found.overflowed
        beyond += found.beyond
        clusters = [(entry & OFFSET_MASK) >> 9 for entry in words if entry & OFFSET_MASK]
        assert (found.n_allocated, found.is_empty) == (len(clusters), not clusters)
        assert found.n_fragmented == sum(after != before + 1 for before, after in pairwise(clusters))
        for cluster in clusters:
            if cluster >= limit:
                beyond.remove(cluster)
            elif not slow.add(cluster):
                overflowed.remove(cluster)
        first, n_clusters = rng.randrange(limit), rng.randrange(1, 3000)
        failed = fast.add_run(first, n_clusters)
        assert failed == [cluster for cluster in range(first, first + n_clusters) if not slow.add(cluster)]
    assert (overflowed, beyond) == ([], [])
    assert fast.pages == slow.pages


@pytest.mark.parametrize("typecode", "BHIQ")
def test_zero_or_one(typecode: str) -> None:
    """Counts above 1 are seen in every width and byte."""
    assert is_zero_or_one(array(typecode, [0, 1, 1, 0]))
    for shift in range(0, 8 * array(typecode).itemsize, 8):
        assert not is_zero_or_one(array(typecode, [0, 1, 2 << shift, 0]))
        assert is_zero_or_one(array(typecode, [0, 1, 1 << shift, 0])) == (shift == 0)


@pytest.mark.parametrize("kind", [damage.leak_clusters, damage.flip_copied, damage.lower_counts, damage.everything])
async def test_agrees_with_the_checker_of_the_crash_tests(kind: Damage) -> None:
    """Two checkers, written apart, have the same verdict on damaged images."""
    data = bytearray(build_image(ImageSpec(fill=0.3, size=128 << 10, snapshot=True)).top)
    kind(data)
    header = parse_header(bytes(data[:512]), len(data))
    assert isinstance(header, Qcow2Header)
    result = await check_storage(MemoryStorage(data), header, lambda _: None)
    report = check_image_bytes(data)
    assert (result.leaks, result.corruptions > 0) == (report.leaks, bool(report.errors))


def created(options: str, size: str) -> bytearray:
    """An empty image."""
    with scratch_folder() as folder:
        run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, f"{folder}/image", size)
        with open(f"{folder}/image", "rb") as file:
            return bytearray(file.read())


@pytest.mark.parametrize("entry", [READS_ZERO | 1 << 57, 1 << 40])
async def test_others_get_turns_within_a_large_table(entry: int) -> None:
    """Of 262144 entries that are looked at one by one: a bit that means nothing, and clusters that lie outside of the
    file."""
    data = created("cluster_size=2M", "1T")
    data += bytes(-len(data) % (2 << 20))
    (l1_offset,) = struct.unpack_from(">Q", data, 40)
    struct.pack_into(">Q", data, l1_offset, len(data))
    data += struct.pack(">Q", entry) * (1 << 18)
    storage = MemoryStorage(data)
    header = parse_header(bytes(data[: 2 << 20]), len(data))
    assert isinstance(header, Qcow2Header)
    turns = Turns()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.count)
        await check_storage(storage, header, lambda _: None)
        nursery.cancel_scope.cancel()
    assert turns.n >= (2 if entry & READS_ZERO else 1) * (1 << 18) // ITEMS_PER_CHECKPOINT
