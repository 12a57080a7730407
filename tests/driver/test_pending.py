"""Requests that go on from where they were started: nothing is looked up, written, marked or counted twice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcowfuse.driver.layers.mapping import Mapping
from qcowfuse.driver.pending import PendingRead
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.errors import CorruptImageError, ReadOnlyImageError
from qcowfuse.format.bitmaps import DirtyBits
from qcowfuse.storage.base import Storage
from tests.support.bitmaps import with_bitmaps
from tests.support.checker import check_image_bytes
from tests.support.damage import Tables
from tests.support.faults import FaultyStorage
from tests.support.images import TOP, BuiltImage, ImageSpec, build_image, open_memory_image
from tests.support.memory_storage import MemoryStorage

KIB = 1 << 10
FULL = ImageSpec(size=64 * KIB, cluster_size=512, fill=1.0)


async def opened(built: BuiltImage) -> tuple[QcowImage, FaultyStorage, MemoryStorage]:
    """An image whose storage answers nothing at once."""
    memory = MemoryStorage(built.top)
    made: list[FaultyStorage] = []

    def wrap(inner: MemoryStorage) -> Storage:
        made.append(FaultyStorage(inner))
        return made[0]

    image = await open_memory_image({**built.files, TOP: memory}, wrap=wrap)
    return image, made[0], memory


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The guest offsets of all look-ups in slices from now on."""
    seen: list[int] = []
    lookup_in = Mapping.lookup_in

    def noting(self: Mapping, slice_: object, guest_offset: int, n_bytes: int) -> object:
        seen.append(guest_offset)
        return lookup_in(self, slice_, guest_offset, n_bytes)  # type: ignore[arg-type]

    monkeypatch.setattr(Mapping, "lookup_in", noting)
    return seen


async def test_a_cold_read_looks_up_once(looked_at: list[int]) -> None:
    """A read that has to wait for its bytes knows where they are, and reads them with one operation."""
    built = build_image(FULL)
    image, faulty, _ = await opened(built)
    await image.read(0, 512)
    looked_at.clear()
    before, n_hits = len(faulty.operations), image.statistics()["l2_cache.hits"]
    pending = image.start_read(700, 200)
    assert isinstance(pending, PendingRead)
    assert bytes(await pending.finish()) == built.contents[700:900]
    assert not looked_at, "the branch that is written out has looked already"
    assert [operation.kind for operation in faulty.operations[before:]] == ["read"]
    assert image.statistics()["l2_cache.hits"] == n_hits + 1
    await image.aclose()


async def test_a_look_up_goes_on_behind_a_missing_table(looked_at: list[int]) -> None:
    """A read over two tables that are not in memory looks at each entry once; that is two misses and no hit."""
    built = build_image(FULL)
    image, _, _ = await opened(built)
    await image.read(0, 0)
    before = image.statistics()
    pending = image.start_read(32 * KIB - 1000, 2000)
    assert isinstance(pending, PendingRead)
    assert bytes(await pending.finish()) == built.contents[32 * KIB - 1000 : 32 * KIB + 1000]
    assert len(looked_at) == len(set(looked_at))
    after = image.statistics()
    assert after["l2_cache.misses"] - before["l2_cache.misses"] == 2
    assert after["l2_cache.hits"] == before["l2_cache.hits"]
    assert all(not slice_.n_pins for slice_ in image.cache.slices.values())
    await image.aclose()


@pytest.mark.parametrize("compression", [None, "zlib"])
async def test_what_a_started_read_has_found_stays(compression: str | None) -> None:
    """From its start on a read sees the old bytes, though all of them are given back meanwhile, over any number of
    flushes; and one that is given up lets the clusters go."""
    spec = ImageSpec(size=32 * KIB, cluster_size=4096, fill=1.0, compression=compression)  # type: ignore[arg-type]
    built = build_image(spec)
    image, _, memory = await opened(built)
    await image.read(28 * KIB, 4096)
    started = [image.start_read(0, 4096), image.start_read(100, 50)]
    assert image.life.epochs.n_in_flight == 2
    await image.write_zeroes(0, 32 * KIB, unmap=True)
    for _ in range(3):
        await image.flush()
        await image.write(8 * KIB, b"n" * 16 * KIB)
    first, second = started
    assert isinstance(first, PendingRead)
    assert isinstance(second, PendingRead)
    assert bytes(await first.finish()) == built.contents[:4096]
    second.abandon()
    assert not image.life.epochs.n_in_flight
    await image.aclose()
    assert check_image_bytes(memory.data).exit_code == 0


@pytest.mark.parametrize("has_begun", [False, True])
@pytest.mark.parametrize("place", [0, 40 * KIB], ids=["in place", "new cluster"])
async def test_a_write_that_waits_is_written_and_marked_once(
    monkeypatch: pytest.MonkeyPatch, has_begun: bool, place: int
) -> None:
    """One operation carries the data to the file, and the bitmap hears of it once, before that."""
    built = with_bitmaps(build_image(ImageSpec(size=64 * KIB, cluster_size=4096)), {"a": 4096})
    prepared = MemoryStorage(built.top)
    image = await open_memory_image({TOP: prepared})
    await image.write(0, b"x" * 4096)
    await image.aclose()
    image, faulty, memory = await opened(BuiltImage(built.spec, {TOP: bytes(prepared.data)}, b""))
    if has_begun:
        await image.write(100, b"y")
    marked: list[tuple[int, int]] = []
    mark = DirtyBits.mark

    def noting(self: DirtyBits, guest_offset: int, n_bytes: int) -> None:
        marked.append((guest_offset, n_bytes))
        mark(self, guest_offset, n_bytes)

    monkeypatch.setattr(DirtyBits, "mark", noting)
    pending = image.start_write(place, b"z" * 512)
    assert pending is not None
    assert marked == [(place, 512)] * has_begun
    before = len(faulty.operations)
    pending.use(b"z" * 512)
    await pending.finish()
    assert marked == [(place, 512)]
    written = [operation for operation in faulty.operations[before:] if operation.kind == "write"]
    assert sum(operation.host_offset + operation.n_bytes > len(prepared.data) for operation in written) <= 1
    assert bytes(await image.read(place, 512)) == b"z" * 512
    assert not image.life.epochs.n_in_flight
    await image.aclose()
    assert check_image_bytes(memory.data).exit_code == 0


@pytest.mark.parametrize("fill", [1.0, 0.0], ids=["in place", "to new clusters"])
async def test_a_pending_write_does_not_outlive_the_image(fill: float) -> None:
    """Where the image is closed between the start and the end of a write, nothing is written any more."""
    built = build_image(replace(FULL, fill=fill))
    image, faulty, _ = await opened(built)
    await image.write(0, b"x")
    pending = image.start_write(512, b"y" * 512)
    assert pending is not None
    await image.aclose()
    n_before = len(faulty.operations)
    with pytest.raises(ReadOnlyImageError, match="is being closed"):
        await pending.finish()
    assert len(faulty.operations) == n_before


async def test_a_pending_read_that_finds_damage_freezes_the_image() -> None:
    """Nothing is written on what was found impossible when it had been waited for."""
    spec = replace(FULL, cluster_size=4096)
    data = bytearray(build_image(spec).top)
    data[next(Tables(data).l2_entries()) + 6] |= 2  # a place within a cluster
    image, _, _ = await opened(BuiltImage(spec, {TOP: bytes(data)}, b""))
    pending = image.start_read(0, 512)
    assert isinstance(pending, PendingRead)
    with pytest.raises(CorruptImageError):
        await pending.finish()
    assert image.read_only
    await image.aclose()
