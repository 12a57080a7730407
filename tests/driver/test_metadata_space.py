"""Space below metadata is set aside before memory changes, so that what a flush has to write finds its room."""

from __future__ import annotations

import errno

import pytest

from qcowfuse.driver.layers.host_run import HostRun
from qcowfuse.driver.writing.guarded_clusters import MetadataClusters
from qcowfuse.driver.writing.metadata_space import RESERVE_BYTES, MetadataSpace
from qcowfuse.driver.writing.refcount_allocation import RefcountAllocator
from qcowfuse.format.entries import parse_table
from tests.support.checker import check_image_bytes
from tests.support.images import TOP, ImageSpec, build_image, open_memory_image
from tests.support.limited_space import LimitedStorage, Room
from tests.support.memory_storage import MemoryStorage

CLUSTER = 1024
KIB = 1 << 10


def allocator_on(storage: LimitedStorage, *, n_table: int, used: int) -> RefcountAllocator:
    """Clusters of 1 KiB, counts of 64 bits: header, a table of ``n_table`` entries, and one block that says that
    ``used`` clusters are taken. The file has holes wherever there are zeroes."""
    table = [2 * CLUSTER, *[0] * (n_table - 1)]
    storage.data[CLUSTER : CLUSTER + 8] = table[0].to_bytes(8, "big")
    for cluster in range(used):
        storage.data[2 * CLUSTER + 8 * cluster : 2 * CLUSTER + 8 * cluster + 8] = (1).to_bytes(8, "big")
    return RefcountAllocator(
        storage,
        cluster_bits=10,
        refcount_order=6,
        table=parse_table(b"".join(entry.to_bytes(8, "big") for entry in table)),
        table_offset=CLUSTER,
        metadata=MetadataClusters(10),
    )


async def write_all(allocator: RefcountAllocator, storage: LimitedStorage) -> None:
    """What a round of write-back does. Raises OSError."""
    dirty = allocator.take_dirty()
    for host_offset, data in [*dirty.blocks, *dirty.moved_table, *dirty.table]:
        await storage.pwritev(host_offset, [data])
    allocator.written()


def sparse(used: int) -> tuple[Room, LimitedStorage]:
    """A storage in which only the sectors that :func:`allocator_on` fills have their space."""
    start = bytearray(3 * CLUSTER)
    start[0] = start[CLUSTER] = 1
    for sector in range(used // 64 + 1):
        start[2 * CLUSTER + 512 * sector] = 1
    room = Room(0)
    return room, LimitedStorage(start, room)


async def test_what_is_kept_free_is_given_up_once() -> None:
    """A write that fails for want of space may be tried again with what was kept free; other errors, and a second
    failure, may not. The next allocation has to keep space free again, but not while the image is closed."""
    room = Room(RESERVE_BYTES // 512)
    storage = LimitedStorage(bytes(CLUSTER), room, copy_on_write=True)
    space = MetadataSpace(storage)
    await space.prepare()
    assert (space.is_ready, space.has_reserve, room.limit) == (True, True, 0)
    full = OSError(errno.ENOSPC, "No space left on device")
    assert not await space.can_help(OSError(errno.EIO, "Input/output error"))
    assert await space.can_help(full)
    assert room.limit == RESERVE_BYTES // 512
    assert not space.is_ready
    assert not await space.can_help(full)
    await space.prepare()
    assert space.has_reserve
    await space.end()
    assert (space.is_ready, space.has_reserve, room.limit) == (True, False, RESERVE_BYTES // 512)
    await space.end()
    assert not await space.can_help(full)


async def test_much_dirty_metadata_is_written_back_before_a_change() -> None:
    """Half of what is kept free is the limit; a failure of it is not the failure of the change."""
    space = MetadataSpace(LimitedStorage(bytes(CLUSTER), Room(), copy_on_write=True))
    await space.relieve()
    dirty = [0]
    n_rounds = 0

    async def write_back() -> None:
        nonlocal n_rounds
        n_rounds += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    space.serve(lambda: dirty[0], write_back)
    for n_bytes, expected in ((RESERVE_BYTES // 2, 0), (RESERVE_BYTES // 2 + 1, 1)):
        dirty[0] = n_bytes
        await space.relieve()
        assert n_rounds == expected


@pytest.mark.parametrize(
    ("start", "n_bytes"), [(0, 1 << 40), (8192, 1024), (8192, 1 << 40), (0, 9216), (1 << 20, 512)]
)
def test_only_what_may_have_become_a_hole_is_forgotten(start: int, n_bytes: int) -> None:
    """However many times larger than all that is known: what lies outside stays known."""
    space = MetadataSpace(LimitedStorage(bytes(CLUSTER), Room()))
    space.note_written(4096, 8192)
    space.forget(start, n_bytes)
    for place in range(0, 16384, 512):
        is_outside = place + 512 <= start or place >= start + n_bytes
        assert space.has(place, 512) == (4096 <= place < 12288 and is_outside)


@pytest.mark.parametrize("has_fallocate", [True, False])
@pytest.mark.parametrize(("n_table", "steps"), [(128, (1,) * 900), (1, (100, 9, 70, 900)), (128, (1000, 20, 9000))])
async def test_what_is_allocated_can_be_written(n_table: int, steps: tuple[int, ...], has_fallocate: bool) -> None:
    """However many blocks the file system has: allocating says that it is full, or all counts can be written. Blocks
    in holes, new ones, the sector of the table that names them, and a larger table at a new place."""
    n_full = n_succeeded = 0
    for limit in range(80):
        room, storage = sparse(3)
        storage.has_fallocate = has_fallocate
        room.limit = limit
        allocator = allocator_on(storage, n_table=n_table, used=3)
        taken = []
        try:
            for n_clusters in steps:
                taken.append(await allocator.allocate_exactly(n_clusters))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            n_full += 1
        n_succeeded += len(taken)
        await write_all(allocator, storage)
        places = [cluster for run in taken for cluster in range(run.host_offset, _end(run), CLUSTER)]
        assert len(places) == len(set(places))
        room.limit = None
        for n_clusters in steps[len(taken) :]:
            await allocator.allocate_exactly(n_clusters)
        await write_all(allocator, storage)
    assert n_full > 3
    assert n_succeeded


def _end(run: HostRun) -> int:
    return run.host_offset + run.n_clusters * CLUSTER


async def test_a_hole_that_was_punched_is_filled_again() -> None:
    """A place that had its space, and gave it back, has to get it anew when it becomes a refcount block."""
    room, storage = sparse(3)
    room.limit = 100
    allocator = allocator_on(storage, n_table=128, used=3)
    run = await allocator.allocate(1)
    await allocator.space.secure(run.host_offset, CLUSTER)
    assert allocator.space.has(run.host_offset, CLUSTER)
    await allocator.release([run], punch=True)
    assert not allocator.space.has(run.host_offset, CLUSTER)
    room.limit = 0
    with pytest.raises(OSError, match="No space left"):
        await allocator.space.secure(run.host_offset, CLUSTER)


async def test_one_call_secures_what_lies_around() -> None:
    """Up to 64 KiB of a structure at once, never more than the structure; what is known costs nothing."""
    memory = MemoryStorage(bytes(1 << 20))
    calls: list[tuple[int, int]] = []

    async def allocate(host_offset: int, n_bytes: int) -> bool:
        calls.append((host_offset, n_bytes))
        return True

    memory.allocate = allocate  # type: ignore[method-assign]
    space = MetadataSpace(memory)
    for start in (1536, 70000, 2048):
        await space.secure_part(start, 512, of=1536, of_bytes=90000)
    assert calls == [(1536, 65536), (1536 + 65536, 90000 - 65536)]
    space.forget(2048, 512)
    await space.secure_part(1536, 512, of=1536, of_bytes=90000)
    assert len(calls) == 2
    await space.secure_part(2048, 512, of=1536, of_bytes=90000)
    assert len(calls) == 3


async def test_discarding_makes_room_on_a_full_disk() -> None:
    """An L2 table with holes, no block left: data can be discarded all the same, and that lets writes succeed."""
    built = build_image(ImageSpec(size=2048 * KIB, cluster_size=4096, fill=0.01))
    room = Room(0)
    storage = LimitedStorage(built.top, room)
    image = await open_memory_image({TOP: storage})
    oracle = bytearray(built.contents)
    used = [start for start in range(0, len(oracle), 4096) if any(oracle[start : start + 4096])]
    assert len(used) > 3
    hole = next(start for start in range(0, len(oracle), 256 * KIB) if not any(oracle[start : start + 256 * KIB]))
    with pytest.raises(OSError, match="No space left"):
        await image.write(hole, b"x" * 4096)
    for start in used[1:]:
        await image.write_zeroes(start, 4096, unmap=True)
        oracle[start : start + 4096] = bytes(4096)
    await image.flush()
    assert room.limit == 8 * len(used[1:])
    await image.write(hole, b"y" * 2048)
    oracle[hole : hole + 2048] = b"y" * 2048
    await image.aclose()
    report = check_image_bytes(storage.data)
    assert report.exit_code == 0, report
    again = await open_memory_image({TOP: bytes(storage.data)}, read_only=True)
    assert bytes(await again.read(0, again.size)) == oracle
