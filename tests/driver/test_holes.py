"""Where an image holds data: the same as a look at every sector, with a bounded number of looks, reads and turns."""

from __future__ import annotations

import random
import struct
from dataclasses import replace

import pytest
import trio

from qcowfuse.buffer import Buffer
from qcowfuse.driver.layers.holes import LOOKS_PER_CHECKPOINT
from qcowfuse.driver.options import L2CacheSize
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.errors import CorruptImageError
from qcowfuse.format.entries import READS_ZERO, ClusterKind
from tests.driver.test_random_operations import SPECS as MANY
from tests.support.forwarding import ForwardingStorage
from tests.support.images import BASE, FOLDER, TOP, ImageSpec, build_image, open_memory_image
from tests.support.memory_storage import MemoryStorage

KIB = 1 << 10
MIB = 1 << 20
SECTOR = 512
SPECS = {
    **{name: spec for name, spec in MANY.items() if "refcount" not in name},
    "encrypted": ImageSpec(size=192 * KIB, cluster_size=4096, fill=0.5, zeroes=True, encryption="aes"),
    "data file": ImageSpec(size=192 * KIB, cluster_size=4096, fill=0.5, zeroes=True, data_file="plain"),
    "raw data file": ImageSpec(size=192 * KIB, cluster_size=4096, fill=0.5, data_file="raw"),
    "extended data file": ImageSpec(
        size=512 * KIB, cluster_size=16384, extended_l2=True, fill=0.5, zeroes=True, data_file="plain"
    ),
}


async def data_sectors(image: QcowImage) -> list[bool]:
    """By a look-up of every sector on its own, down the chain."""
    found: list[bool] = []
    for place in range(0, image.size, SECTOR):
        extents = await image.reader.lookup(place, min(SECTOR, image.size - place))
        found.append(extents[0].kind != ClusterKind.ZERO)
    return found


async def by_extents(image: QcowImage, chooser: random.Random) -> list[bool]:
    """By extents, each asked for in full or in part."""
    found: list[bool] = []
    place = 0
    while place < image.size:
        n_wanted = min(chooser.choice([SECTOR, 40 * KIB, image.size]), image.size - place)
        at_once = image.try_find_extent(place, n_wanted)
        is_data, n_bytes = await image.find_extent(place, n_wanted, keep=chooser.random() < 0.5)
        assert at_once is None or at_once[:2] == (is_data, n_bytes)
        if at_once is not None and at_once[2]:
            assert n_bytes < n_wanted
            assert (await image.find_extent(place + n_bytes, 1))[0] is not is_data
        assert 0 < n_bytes <= n_wanted
        place += n_bytes
        found += [is_data] * (-(-place // SECTOR) - len(found))
    return found


@pytest.mark.parametrize("suspend", [False, True])
@pytest.mark.parametrize("name", SPECS)
async def test_extents_are_those_of_all_sectors(name: str, suspend: bool) -> None:
    """In every format and chain: as it was built, with changes that only memory has, and after they were written."""
    built = build_image(SPECS[name])
    chooser = random.Random(name)
    image = await open_memory_image(
        built.files, suspend=suspend, cache=L2CacheSize(n_tables=chooser.choice([0, 1, 9]))
    )
    for _ in range(3):
        assert await by_extents(image, chooser) == await data_sectors(image)
        for _ in range(4):
            n_bytes = chooser.choice([SECTOR, 9000, 70 * KIB])
            place = chooser.randrange(image.size - n_bytes)
            if chooser.random() < 0.5:
                await image.write(place, chooser.randbytes(n_bytes))
            else:
                await image.write_zeroes(place, n_bytes, unmap=chooser.random() < 0.5)
        if chooser.random() < 0.5:
            await image.flush()
    assert await by_extents(image, chooser) == await data_sectors(image)
    assert all(not slice_.n_pins for slice_ in image.cache.slices.values())
    await image.aclose()


async def test_a_chain_with_longer_and_shorter_layers() -> None:
    """Behind the end of a backing file is nothing, whatever is below that."""
    top = build_image(ImageSpec(size=256 * KIB, cluster_size=4096, backing="qcow2", backing_size=72 * KIB))
    middle = build_image(ImageSpec(size=72 * KIB, cluster_size=4096, backing="raw", backing_size=256 * KIB))
    lowest = f"{FOLDER}/last.img"
    files = {TOP: top.top, BASE: middle.top.replace(b"base.img", b"last.img"), lowest: b"x" * 256 * KIB}
    image = await open_memory_image(files)
    assert len(image.layers) == 3
    await image.write(200 * KIB, b"x")
    found = await data_sectors(image)
    assert found == [place < 72 * KIB or 0 <= place - 200 * KIB < 4096 for place in range(0, 256 * KIB, SECTOR)]
    assert await by_extents(image, random.Random(5)) == found
    await image.aclose()


@pytest.mark.parametrize("n_below", [72 * KIB, 2 * MIB], ids=["shorter", "with absent tables"])
async def test_a_hole_that_ends_sooner_below_is_not_said_to_be_followed(n_below: int) -> None:
    """The top layer's hole ends with data. The look at the layer below ends before that, and tells nothing of what
    follows: behind its end, and behind a table that it does not have, the hole goes on."""
    base = MemoryStorage(build_image(ImageSpec(size=n_below, cluster_size=512)).top)
    below = await open_memory_image({TOP: base})
    for place in range(168 * KIB, n_below, 128 * KIB):  # in the second quarter of the 32 KiB of a table
        await below.write(place, b"x" * 512)
    await below.aclose()
    top = build_image(ImageSpec(size=2 * MIB, cluster_size=4096, backing="qcow2", backing_size=72 * KIB))
    image = await open_memory_image({TOP: top.top, BASE: bytes(base.data)})
    for place in range(256 * KIB, 2 * MIB, 512 * KIB):
        await image.write(place, b"x" * 4096)
    for seed in range(8):
        assert await by_extents(image, random.Random(seed)) == await data_sectors(image)
    await image.aclose()


def one_table(n_tables: int, cluster_size: int = 512) -> ImageSpec:
    """A disk of so many L2 tables."""
    return ImageSpec(size=n_tables * (cluster_size // 8) * cluster_size, cluster_size=cluster_size)


def with_one_table(spec: ImageSpec, entry: int) -> bytes:
    """An image in which every L1 entry refers to the same L2 table, full of ``entry``."""
    data = bytearray(build_image(spec).top)
    data += bytes(-len(data) % spec.cluster_size)
    n_entries = spec.cluster_size // 8
    n_tables = spec.size // (n_entries * spec.cluster_size)
    (l1_offset,) = struct.unpack_from(">Q", data, 40)
    struct.pack_into(f">{n_tables}Q", data, l1_offset, *[len(data)] * n_tables)
    return bytes(data) + struct.pack(">Q", entry) * n_entries


class Turns:
    """How often anybody else got a turn."""

    def __init__(self) -> None:
        self.n = 0

    async def count(self) -> None:
        """Take every turn."""
        while True:
            self.n += 1
            await trio.lowlevel.checkpoint()


async def searched(image: QcowImage) -> tuple[int, int]:
    """How many calls and how many turns of others a walk through all of it takes."""
    turns = Turns()
    n_calls = place = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.count)
        await trio.lowlevel.checkpoint()
        before = turns.n
        while place < image.size:
            is_data, n_bytes = await image.find_extent(place, image.size - place, keep=not n_calls)
            assert not is_data
            place += n_bytes
            n_calls += 1
        n_turns = turns.n - before
        nursery.cancel_scope.cancel()
    return n_calls, n_turns


@pytest.mark.parametrize("entry", [READS_ZERO, 0])
async def test_a_table_is_looked_at_once(entry: int) -> None:
    """One call and one read a table, a turn for the others every few of them, and nothing is driven out or kept."""
    n_tables = 1000
    memory = MemoryStorage(with_one_table(one_table(n_tables), entry))
    image = await open_memory_image({TOP: memory}, read_only=True)
    await image.read(100 * 32 * KIB, SECTOR)
    slices_before, reads_before = set(image.cache.slices), memory.counters.reads
    n_calls, n_turns = await searched(image)
    assert n_calls == n_tables
    assert memory.counters.reads - reads_before == n_tables - 1, "the table in memory needs no read"
    assert n_turns >= n_tables // LOOKS_PER_CHECKPOINT - 1
    assert set(image.cache.slices) - slices_before == {0}, "only the first table of a search is kept"
    await image.aclose()


async def test_absent_tables_cost_nothing() -> None:
    """Runs of empty L1 entries are passed over in one look."""
    memory = MemoryStorage(build_image(one_table(4000)).top)
    image = await open_memory_image({TOP: memory}, read_only=True)
    reads_before = memory.counters.reads
    n_calls, _ = await searched(image)
    assert n_calls == 1
    assert memory.counters.reads == reads_before
    await image.aclose()


async def test_all_layers_of_a_chain_count() -> None:
    """A look at a layer below is a look: others get as many turns."""
    n_tables = 200
    below = one_table(n_tables)
    above = replace(below, backing="qcow2", backing_size=below.size)
    files = {TOP: with_one_table(above, 0), BASE: with_one_table(below, READS_ZERO)}
    image = await open_memory_image(files, read_only=True)
    assert len(image.layers) == 2
    n_calls, n_turns = await searched(image)
    assert n_calls == n_tables
    assert n_turns >= 2 * n_tables // LOOKS_PER_CHECKPOINT - 1
    await image.aclose()


async def test_a_corrupt_entry_is_met_where_it_is() -> None:
    """What lies before it is answered."""
    data = bytearray(with_one_table(one_table(1, 4096), READS_ZERO))
    struct.pack_into(">Q", data, len(data) - 8 * 10, 512)  # not cluster aligned
    image = await open_memory_image({TOP: bytes(data)}, read_only=True)
    assert await image.find_extent(0, image.size) == (False, 502 * 4096)
    with pytest.raises(CorruptImageError):
        await image.find_extent(502 * 4096, SECTOR)
    assert await image.find_extent(503 * 4096, SECTOR) == (False, SECTOR)
    await image.aclose()


async def test_a_slice_that_is_loaded_meanwhile_counts_as_it_is_in_memory() -> None:
    """The bytes that were read past the cache may be older than a write that has ended."""
    memory = MemoryStorage(build_image(ImageSpec(size=MIB, cluster_size=65536)).top)
    image = await open_memory_image({TOP: memory})
    await image.write(0, b"has a table now")
    await image.aclose()
    place = 5 * 65536
    images: list[QcowImage] = []

    class WritesMeanwhile(ForwardingStorage):
        def try_pread(self, host_offset: int, n_bytes: int) -> Buffer | None:
            return None

        async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
            data = await super().pread(host_offset, n_bytes)
            if images:
                image = images.pop()
                await image.write(place, b"x")
                assert image.cache.slices
            return data

    image = await open_memory_image({TOP: bytes(memory.data)}, wrap=WritesMeanwhile)
    assert not image.cache.slices
    images.append(image)
    assert (await image.find_extent(place, 65536, keep=False)) == (True, 65536)
    assert not images
    await image.aclose()
