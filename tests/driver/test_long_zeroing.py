"""Zeroing and discarding long ranges: in steps that let others in between, few where there is nothing to do."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.driver.reading.reader import ChainReader
from qcowfuse.driver.writing import allocation, write_back, zeroing
from qcowfuse.format.extents import Extent
from qcowfuse.storage.base import Storage
from tests.driver.test_holes import Turns
from tests.support.checker import check_image_bytes
from tests.support.forwarding import ForwardingStorage
from tests.support.images import TOP, BuiltImage, ImageSpec, build_image, open_memory_image, run_tool, scratch_folder
from tests.support.memory_storage import MemoryStorage

KIB = 1 << 10
MIB = 1 << 20
CLUSTER = 512
N_CLUSTERS = 4096
SLICES = N_CLUSTERS // 64
DENSE = ImageSpec(size=N_CLUSTERS * CLUSTER, cluster_size=CLUSTER, fill=1.0)


@asynccontextmanager
async def counted_turns() -> AsyncIterator[Turns]:
    """How often others get a turn inside of the block."""
    turns = Turns()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.count)
        await trio.lowlevel.checkpoint()
        turns.n = 0
        yield turns
        nursery.cancel_scope.cancel()


class Steps:
    """Counts the steps of zeroing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        real = zeroing.Zeroer.zero_some

        async def zero_some(zeroer: zeroing.Zeroer, guest_offset: int, n_bytes: int, *, unmap: bool) -> int:
            self.n += 1
            return await real(zeroer, guest_offset, n_bytes, unmap=unmap)

        monkeypatch.setattr(zeroing.Zeroer, "zero_some", zero_some)


def is_clean(data: bytes | bytearray) -> bool:
    """Neither damage nor leaks."""
    return check_image_bytes(data).exit_code == 0


@pytest.mark.parametrize("unmap", [False, True])
async def test_others_get_a_turn_after_each_step(unmap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense disk takes a step a slice at least, and more where a slice has many clusters."""
    memory = MemoryStorage(build_image(DENSE).top)
    image = await open_memory_image({TOP: memory})
    async with counted_turns() as turns:
        await image.write_zeroes(0, image.size // 2, unmap=unmap)
        assert turns.n >= SLICES // 2 - 1
    monkeypatch.setattr(zeroing, "MAX_ZEROED_AT_ONCE", 16)
    async with counted_turns() as turns:
        await image.write_zeroes(image.size // 2, image.size // 2, unmap=unmap)
        assert turns.n >= SLICES // 2 * 4 - 1
    assert not any(await image.read(0, image.size))
    await image.aclose()
    assert is_clean(memory.data)


@pytest.mark.parametrize("depth", [1, 4])
async def test_steps_are_shorter_over_a_deep_chain(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step looks every cluster up in every layer: as many look-ups as there are clusters without a backing file."""
    files: dict[str, bytes] = {}
    with scratch_folder() as folder:
        for number in range(depth):
            name = "top.img" if number == depth - 1 else f"{number}.img"
            backing = ["-b", f"{number - 1}.img", "-F", "qcow2"] if number else []
            options = ["-f", "qcow2", "-o", f"cluster_size={CLUSTER}", *backing, name, "64K"]
            run_tool("qemu-img", "create", "-q", *options, cwd=folder)
            if not number:
                run_tool("qemu-io", "-c", "write -q -P 1 0 64K", name, cwd=folder)
            files[os.path.join(os.path.dirname(TOP), name)] = Path(folder, name).read_bytes()
    n_looked_up: list[int] = []
    real = ChainReader.lookup

    async def lookup(reader: ChainReader, guest_offset: int, n_bytes: int, **options: int) -> list[Extent]:
        n_looked_up.append(n_bytes // CLUSTER)
        return await real(reader, guest_offset, n_bytes, **options)

    monkeypatch.setattr(ChainReader, "lookup", lookup)
    monkeypatch.setattr(zeroing, "MAX_ZEROED_AT_ONCE", 32)
    image = await open_memory_image(files)
    await image.write_zeroes(0, 64 * KIB, unmap=False)
    assert n_looked_up == [32 // depth] * (4 * depth)
    assert not any(await image.read(0, 64 * KIB))
    await image.aclose()


async def test_a_disk_without_tables_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large; one with a table somewhere takes a few, and no slice is read but that one."""
    built = build_image(ImageSpec(size=16 * MIB, cluster_size=CLUSTER))
    memory = MemoryStorage(built.top)
    image = await open_memory_image({TOP: memory})
    await image.write_zeroes(0, CLUSTER, unmap=True)
    steps = Steps(monkeypatch)
    reads = memory.counters.reads
    for unmap in (False, True):
        await image.write_zeroes(0, image.size, unmap=unmap)
    assert steps.n == 2
    assert memory.counters.reads == reads
    await image.write(5 * MIB, b"x")
    steps.n = 0
    await image.write_zeroes(0, image.size, unmap=True)
    assert steps.n <= 5
    assert not any(await image.read(5 * MIB, 4096))
    await image.aclose()
    assert is_clean(memory.data)


async def test_a_backing_file_shows_where_no_tables_are() -> None:
    """What only lower layers have is zeroed, whether the ranges without tables are long or short."""
    spec = ImageSpec(size=8 * MIB, cluster_size=CLUSTER, backing="raw", backing_size=300 * KIB)
    memory = MemoryStorage(build_image(spec).top)
    image = await open_memory_image({**build_image(spec).files, TOP: memory})
    assert any(await image.read(64 * KIB, 200 * KIB))
    await image.write_zeroes(64 * KIB, image.size - 64 * KIB, unmap=True)
    assert not any(await image.read(64 * KIB, image.size - 64 * KIB))
    assert bytes(await image.read(0, 64 * KIB)) == build_image(spec).contents[: 64 * KIB]
    await image.aclose()
    assert is_clean(memory.data)


async def test_scattered_space_takes_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero clusters of which every other one has space: not a step for each."""
    memory = MemoryStorage(build_image(DENSE).top)
    image = await open_memory_image({TOP: memory})
    for cluster in range(0, 256, 2):
        await image.write_zeroes(cluster * CLUSTER, CLUSTER, unmap=True)
    await image.write_zeroes(0, 256 * CLUSTER, unmap=False)
    steps = Steps(monkeypatch)
    await image.write_zeroes(0, 256 * CLUSTER, unmap=True)
    assert steps.n <= 3 * 4
    await image.flush()
    steps.n = 0
    await image.write_zeroes(0, 256 * CLUSTER, unmap=True)
    assert steps.n <= 4
    await image.aclose()
    assert is_clean(memory.data)


@pytest.mark.parametrize("n_bytes", [40 * KIB, 24 * KIB, 8 * KIB])
async def test_a_discard_that_ends_inside_a_cluster_leaves_what_is_behind(n_bytes: int) -> None:
    """Zeroed clusters give their space back, the cluster that the range only begins keeps its data."""
    cluster = 16 * KIB
    memory = MemoryStorage(build_image(ImageSpec(cluster_size=cluster, size=MIB, extended_l2=True)).top)
    image = await open_memory_image({TOP: memory})
    await image.write(0, b"a" * 2 * cluster)
    await image.write_zeroes(0, 2 * cluster, unmap=False)
    await image.write(2 * cluster + 8 * KIB, b"b" * 8 * KIB)
    await image.write_zeroes(0, n_bytes, unmap=True)
    assert bytes(await image.read(2 * cluster + 8 * KIB, 8 * KIB)) == b"b" * 8 * KIB
    assert not any(await image.read(0, 40 * KIB))
    await image.aclose()
    assert is_clean(memory.data)


@pytest.mark.parametrize("suspend", [False, True])
async def test_writes_between_the_steps(suspend: bool) -> None:
    """Each sector that is written while a range is zeroed has the new bytes or zeroes at the end, all others zeroes;
    what is written where the zeroing has been stays."""
    memory = MemoryStorage(build_image(DENSE).top, suspend=suspend)
    image = await open_memory_image({TOP: memory})
    chooser = random.Random(suspend)
    written: dict[int, bytes] = {}

    async def write() -> None:
        while True:
            sector = chooser.randrange(N_CLUSTERS)
            written[sector] = data = chooser.randbytes(CLUSTER)
            await image.write(sector * CLUSTER, data)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await image.write_zeroes(0, image.size, unmap=True)
        nursery.cancel_scope.cancel()
    late = [0, 1, N_CLUSTERS - 1]
    for sector in late:
        written[sector] = data = chooser.randbytes(CLUSTER)
        await image.write(sector * CLUSTER, data)
    n_kept = 0
    contents = bytes(await image.read(0, image.size))
    for sector in range(N_CLUSTERS):
        found = contents[sector * CLUSTER : (sector + 1) * CLUSTER]
        n_kept += any(found)
        assert not any(found) or found == written[sector]
    assert n_kept > len(late), "nothing was written between the steps"
    assert all(contents[sector * CLUSTER : (sector + 1) * CLUSTER] == written[sector] for sector in late)
    await image.aclose()
    assert is_clean(memory.data)


@pytest.mark.parametrize("n_turns", [0, 1, 9, 30])
async def test_cancelled_between_the_steps(n_turns: int) -> None:
    """A part at the start is zeroed, the rest is as it was; nothing leaks."""
    built = build_image(DENSE)
    memory = MemoryStorage(built.top)
    image = await open_memory_image({TOP: memory})
    await image.write_zeroes(0, CLUSTER, unmap=True)

    async def zero(scope: trio.CancelScope) -> None:
        with scope:
            await image.write_zeroes(0, image.size, unmap=True)

    scope = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(zero, scope)
        for _ in range(n_turns):
            await trio.lowlevel.checkpoint()
        scope.cancel()
    contents = bytes(await image.read(0, image.size))
    n_zeroed = len(contents) - len(contents.lstrip(b"\0"))
    assert n_zeroed // CLUSTER % 64 <= 1
    assert contents[n_zeroed:] == built.contents[n_zeroed:]
    assert scope.cancelled_caught == (n_zeroed < image.size)
    await image.aclose()
    assert is_clean(memory.data)


async def released(built: BuiltImage, chosen: list[int]) -> tuple[int, list[tuple[int, int]], MemoryStorage]:
    """Let go of single clusters; how many turns others get while a flush gives them back, and what is punched."""
    memory = MemoryStorage(built.top)
    punched: list[tuple[int, int]] = []

    class Noting(ForwardingStorage):
        async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
            punched.append((host_offset, n_bytes))
            await super().punch_hole(host_offset, n_bytes, in_use=in_use)

    def wrap(inner: Storage) -> Storage:
        return Noting(inner)

    image: QcowImage = await open_memory_image({**built.files, TOP: memory}, wrap=wrap)
    for cluster in chosen:
        await image.write_zeroes(cluster * CLUSTER, CLUSTER, unmap=True)
    async with counted_turns() as turns:
        await image.flush()
        n_turns = turns.n
    await image.aclose()
    return n_turns, punched, memory


async def test_scattered_clusters_are_given_back_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a turn for others after each part; neighbours in a part are one hole."""
    monkeypatch.setattr(write_back, "RUNS_AT_ONCE", 16)
    chosen = list(range(0, N_CLUSTERS, 3))
    random.Random(3).shuffle(chosen)
    n_turns, punched, memory = await released(build_image(DENSE), chosen)
    assert n_turns >= len(chosen) // 16
    assert sum(n_bytes for _, n_bytes in punched) >= len(chosen) * CLUSTER
    assert is_clean(memory.data)


async def test_a_long_run_is_given_back_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters that follow each other are one run however they were let go of, and large holes."""
    monkeypatch.setattr(allocation, "CLUSTERS_AT_ONCE", 24)
    _, punched, memory = await released(build_image(DENSE), list(range(1000)))
    assert is_clean(memory.data)
    assert 40 <= len(punched) <= 60, "1000 clusters, after each 64 of which there is a table"
    assert max(n_bytes for _, n_bytes in punched) == 24 * CLUSTER


@pytest.mark.parametrize("is_first", [False, True], ids=["inside", "first of a block"])
@pytest.mark.parametrize("count", [0, 2, 3])
async def test_other_counts_among_those_of_a_run(count: int, is_first: bool) -> None:
    """Where not all counts are 1 each cluster is looked at: shared ones keep their bytes, wrong ones are left."""
    built = build_image(DENSE)
    data = bytearray(built.top)
    (table,) = struct.unpack_from(">Q", data, 48)
    first_data = built.top.find(built.contents[:CLUSTER]) // CLUSTER
    cluster = first_data + 20
    first_guest = 0
    if is_first:  # of a refcount block, in the middle of the clusters of a table
        cluster = -(-cluster // (CLUSTER // 2)) * (CLUSTER // 2)
        start = cluster * CLUSTER
        first_guest = built.contents.find(built.top[start : start + CLUSTER]) // CLUSTER // 64 * 64
        assert (
            built.contents[first_guest * CLUSTER : (first_guest + 1) * CLUSTER] != built.top[start : start + CLUSTER]
        )
    (block,) = struct.unpack_from(">Q", data, table + 8 * (cluster // (CLUSTER // 2)))
    struct.pack_into(">H", data, block + 2 * (cluster % (CLUSTER // 2)), count)
    chosen = list(range(first_guest, first_guest + 64))
    changed = BuiltImage(built.spec, {TOP: bytes(data)}, built.contents)
    _, punched, memory = await released(changed, chosen)
    holes = {start // CLUSTER + number for start, n_bytes in punched for number in range(n_bytes // CLUSTER)}
    assert cluster not in holes
    assert len(holes) >= 63
    (left,) = struct.unpack_from(">H", memory.data, block + 2 * (cluster % (CLUSTER // 2)))
    assert left == max(count - 1, 0)
