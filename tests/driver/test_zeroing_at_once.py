"""Zeroing and discarding that need not wait: all of it at once or nothing, with the same outcome as by waiting."""

from __future__ import annotations

import errno
import random
from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from qcowfuse.driver.chain import open_image
from qcowfuse.driver.layers.mapping import Mapping
from qcowfuse.driver.options import OpenOptions
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.driver.writing import changes, zeroing_at_once
from qcowfuse.format.entries import ClusterKind
from tests.driver.test_discard_of_zeroes import CLUSTER, KIB, PATTERN, SIZE, SPECS
from tests.support import qemu
from tests.support.checker import check_image_bytes
from tests.support.faults import FaultyStorage
from tests.support.images import TOP, ImageSpec, build_image, open_memory_image, qemu_check, qemu_read
from tests.support.memory_storage import MemoryStorage

AT_ONCE = {name: spec for name, spec in SPECS.items() if not spec.data_file}
PLAIN = ImageSpec(cluster_size=CLUSTER, size=SIZE)


async def kinds(image: QcowImage) -> list[int]:
    """Of each cluster."""
    found = []
    for place in range(0, image.size, CLUSTER):
        found.append((await image.reader.lookup(place, 1))[0].kind)
    return found


@pytest.mark.parametrize("unmap", [False, True], ids=["zero", "discard"])
@pytest.mark.parametrize("kind", AT_ONCE)
async def test_the_outcome_is_that_of_waiting(kind: str, unmap: bool) -> None:
    """Clusters with data, with zeroes, and never written: bytes, allocation and the space that is given back."""
    spec = AT_ONCE[kind]
    outcomes = []
    for at_once in (False, True):
        memory = {path: MemoryStorage(part) for path, part in build_image(spec).files.items()}
        image = await open_memory_image(memory)
        await image.count_allocated()
        await image.write(0, PATTERN[: 8 * CLUSTER])
        await image.write_zeroes(6 * CLUSTER, CLUSTER, unmap=False)
        await image.write(spec.size - KIB, PATTERN[:KIB])
        for place, n_bytes in ((2 * CLUSTER, CLUSTER), (4 * CLUSTER, 6 * CLUSTER), (20 * CLUSTER, 2 * CLUSTER)):
            if not at_once or not image.try_write_zeroes(place, n_bytes, unmap=unmap):
                assert not at_once or spec.version == 2, "not done at once"
                await image.write_zeroes(place, n_bytes, unmap=unmap)
        await image.flush()
        outcomes.append((await kinds(image), bytes(await image.read(0, spec.size)), image.allocated_bytes()))
        await image.aclose()
        files = {path: bytes(part.data) for path, part in memory.items()}
        outcomes[-1] += (len(files[TOP].replace(bytes(512), b"")) // CLUSTER,)  # type: ignore[assignment]
        assert check_image_bytes(files[TOP]).exit_code == 0
        assert qemu_check(files)[0] == 0
        if not spec.encryption:
            assert qemu_read(files) == outcomes[-1][1]
    assert outcomes[0] == outcomes[1]


async def test_the_last_cluster_may_be_cut_short() -> None:
    """At the end of the disk, and nowhere else."""
    image = await open_memory_image(build_image(SPECS["end inside a cluster"]).files)
    await image.write(0, PATTERN[: image.size])
    last = image.size // CLUSTER * CLUSTER
    assert image.try_write_zeroes(last, image.size - last - 512, unmap=True)
    assert (await kinds(image))[-1] == ClusterKind.DATA, "its end is no part of the range"
    assert image.try_write_zeroes(last, image.size - last, unmap=True)
    assert (await kinds(image))[-1] == ClusterKind.ZERO
    assert bytes(await image.read(0, last)) == PATTERN[:last]
    await image.aclose()


@pytest.mark.parametrize(
    ("place", "n_bytes"),
    [
        (SIZE - CLUSTER, 2 * CLUSTER),
        (-CLUSTER, CLUSTER),
        (SIZE, CLUSTER),
    ],
)
async def test_what_is_not_done_changes_nothing(place: int, n_bytes: int) -> None:
    """What lies outside of the disk."""
    image = await open_memory_image(build_image(PLAIN).files)
    await image.write(0, PATTERN)
    assert not image.try_write_zeroes(place, n_bytes, unmap=True)
    assert bytes(await image.read(0, SIZE)) == PATTERN
    await image.aclose()


async def test_more_clusters_are_left_to_what_lets_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is in clusters with something to do; what is passed over has a bound of its own."""
    monkeypatch.setattr(zeroing_at_once, "MAX_CLUSTERS", 64)
    spec = ImageSpec(cluster_size=512, size=256 * KIB)
    image = await open_memory_image(build_image(spec).files)
    await image.write(0, PATTERN[: 128 * 512])
    for unmap in (False, True):
        assert not image.try_write_zeroes(0, 65 * 512, unmap=unmap)
        assert bytes(await image.read(0, 128 * 512)) == PATTERN[: 128 * 512]
    assert image.try_write_zeroes(64 * 512, image.size - 64 * 512, unmap=True)
    assert image.try_write_zeroes(0, image.size, unmap=True)
    monkeypatch.setattr(zeroing_at_once, "MAX_ENTRIES", 1000)
    assert not image.try_write_zeroes(0, image.size, unmap=True)
    assert image.try_write_zeroes(0, 64 * 512, unmap=True)
    assert not any(await image.read(0, image.size))
    await image.aclose()


@pytest.mark.parametrize("unmap", [False, True], ids=["zero", "discard"])
@pytest.mark.parametrize("kind", ["standard", "extended", "over a backing file", "encrypted", "end inside a cluster"])
async def test_long_ranges_with_odd_ends_are_zeroed_at_once(kind: str, unmap: bool) -> None:
    """Whatever is in them: the same bytes, and the same clusters, as by waiting. Slices are as short as a cluster."""
    spec = replace(AT_ONCE[kind], cluster_size=16 * KIB if kind == "extended" else 512, size=SIZE - 5 * KIB)
    chooser = random.Random(len(kind))
    places = [(chooser.randrange(spec.size), chooser.choice([1, 512, 5000, 40_000])) for _ in range(30)]
    outcomes, n_done = [], 0
    for at_once in (False, True):
        memory = {path: MemoryStorage(part) for path, part in build_image(spec).files.items()}
        image = await open_memory_image(memory)
        await image.count_allocated()
        for place, n_bytes in places:
            await image.write(place, PATTERN[: min(n_bytes, image.size - place)])
        for place, n_bytes in places[::3]:
            await image.write_zeroes(place, min(n_bytes, image.size - place), unmap=False)
        for start, end in ((0, 512), (1000, 60_001), (70_000, 70_100), (100_000, 400_512), (300_000, spec.size)):
            is_done = at_once and image.try_write_zeroes(start, end - start, unmap=unmap)
            n_done += is_done
            if not is_done:
                await image.write_zeroes(start, end - start, unmap=unmap)
            assert not any(await image.read(start, end - start))
        await image.flush()
        outcomes.append((await kinds(image), bytes(await image.read(0, spec.size)), image.allocated_bytes()))
        await image.aclose()
        assert check_image_bytes(memory[TOP].data).exit_code == 0
        assert qemu_check({path: bytes(part.data) for path, part in memory.items()})[0] == 0
    assert outcomes[0] == outcomes[1]
    assert n_done >= 2


async def test_a_part_of_a_cluster_that_cannot_be_written_changes_nothing_else() -> None:
    """The caller hears of the error."""
    memory = MemoryStorage(build_image(PLAIN).top)
    faulty = FaultyStorage(memory, inline=True)
    image = await open_memory_image({TOP: memory}, wrap=lambda inner: faulty)
    await image.write(0, PATTERN)
    await image.write_zeroes(8 * CLUSTER, CLUSTER, unmap=True)
    faulty.check = lambda operation: errno.EIO if operation.kind == "write" else 0
    with pytest.raises(OSError, match="error"):
        image.try_write_zeroes(512, 4 * CLUSTER, unmap=True)
    faulty.check = None
    assert bytes(await image.read(CLUSTER, 7 * CLUSTER)) == PATTERN[CLUSTER : 8 * CLUSTER]
    assert image.try_write_zeroes(512, 4 * CLUSTER, unmap=True)
    assert bytes(await image.read(0, 8 * CLUSTER)) == (
        PATTERN[:512] + bytes(4 * CLUSTER) + PATTERN[512 + 4 * CLUSTER : 8 * CLUSTER]
    )
    await image.aclose()
    assert check_image_bytes(memory.data).exit_code == 0


@pytest.mark.parametrize("kind", ["data file", "data file, extended"])
async def test_data_files_take_the_other_way(kind: str) -> None:
    """Their space is given back by a call that may wait."""
    image = await open_memory_image(build_image(SPECS[kind]).files)
    await image.write(0, PATTERN)
    assert not image.try_write_zeroes(0, CLUSTER, unmap=True)
    await image.aclose()


@pytest.mark.parametrize("unmap", [False, True], ids=["zero", "discard"])
@pytest.mark.parametrize(
    "spec", [ImageSpec(version=1), ImageSpec(version=2, backing="raw", backing_size=64 * KIB)], ids=["v1", "v2"]
)
async def test_where_no_entry_can_say_zeroes_they_are_written(spec: ImageSpec, unmap: bool) -> None:
    """Whole clusters are left to the way that writes; what is below them does not show through."""
    files = build_image(spec).files
    image = await open_memory_image(files)
    await image.write(0, PATTERN[: 32 * KIB])
    await image.write_zeroes(0, 4 * KIB, unmap=unmap)
    assert not image.try_write_zeroes(8 * KIB, 8 * KIB, unmap=unmap)
    assert bytes(await image.read(8 * KIB, 8 * KIB)) == PATTERN[8 * KIB : 16 * KIB]
    await image.write_zeroes(8 * KIB, 8 * KIB, unmap=unmap)
    assert not any(await image.read(8 * KIB, 8 * KIB))
    await image.aclose()


async def test_what_is_let_go_of_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a bound a flush comes first, and that waits."""
    monkeypatch.setattr(changes, "MAX_UNLINKED", 4)
    image = await open_memory_image(build_image(PLAIN).files)
    await image.write(0, PATTERN)
    at_once = [image.try_write_zeroes(2 * number * CLUSTER, CLUSTER, unmap=True) for number in range(6)]
    assert at_once == [True] * 4 + [False] * 2
    await image.flush()
    assert image.try_write_zeroes(8 * CLUSTER, CLUSTER, unmap=True)
    await image.aclose()


async def test_nothing_is_done_at_once_after_a_failed_flush() -> None:
    """The image is read-only then, and goes on showing what it held."""
    memory = MemoryStorage(build_image(PLAIN).top)
    faulty = FaultyStorage(memory, inline=True)
    image = await open_memory_image({TOP: memory}, wrap=lambda inner: faulty)
    await image.write(0, PATTERN)
    faulty.check = lambda operation: errno.EIO if operation.kind == "flush" else 0
    with pytest.raises(OSError, match="error"):
        await image.flush()
    faulty.check = None
    assert not image.try_write_zeroes(0, 4 * CLUSTER, unmap=True)
    assert bytes(await image.read(0, 4 * CLUSTER)) == PATTERN[: 4 * CLUSTER]
    with pytest.raises(OSError, match="may be lost"):
        await image.aclose()


async def test_a_discard_that_only_zeroes_keeps_the_space(tmp_path: Path) -> None:
    """At once, too, where that was asked for (``--discard ignore``)."""
    path = tmp_path / "image"
    path.write_bytes(build_image(PLAIN).top)
    image = await open_image(str(path), OpenOptions(discard=False))
    await image.write(0, PATTERN)
    await image.flush()
    assert image.try_write_zeroes(0, 4 * CLUSTER, unmap=True)
    await image.aclose()
    clusters = [extent for extent in qemu.map_extents(path) if extent["start"] < 4 * CLUSTER]
    assert all(extent["zero"] and "offset" in extent for extent in clusters)
    assert qemu.check(path).clean


async def test_nothing_is_done_at_once_before_the_first_write() -> None:
    """What has to happen before it takes waiting; and never in an image that is only read, or is closed."""
    built = build_image(ImageSpec(cluster_size=CLUSTER, size=SIZE, fill=1.0))
    image = await open_memory_image(built.files)
    await image.read(0, SIZE)
    assert not image.try_write_zeroes(0, CLUSTER, unmap=True)
    await image.write(0, b"x")
    assert not image.try_write_zeroes(0, CLUSTER, unmap=True), "the L2 table has no space of its own yet"
    await image.write_zeroes(2 * CLUSTER, CLUSTER, unmap=True)
    assert image.try_write_zeroes(0, CLUSTER, unmap=True)
    await image.aclose()
    assert not image.try_write_zeroes(CLUSTER, CLUSTER, unmap=True)
    image = await open_memory_image(built.files, read_only=True)
    assert not image.try_write_zeroes(0, CLUSTER, unmap=True)
    await image.aclose()


async def test_a_cluster_that_a_write_is_making_is_left_alone() -> None:
    """The write has claimed it: zeroing comes behind it, and waits."""
    memory = {path: MemoryStorage(part) for path, part in build_image(PLAIN).files.items()}
    image = await open_memory_image(memory)
    await image.write(0, PATTERN[:CLUSTER])
    assert image.changes is not None
    claim = image.changes.writer.claims.take(0, 1)
    assert not image.try_write_zeroes(0, CLUSTER, unmap=True)
    image.changes.writer.claims.release(claim)
    assert image.try_write_zeroes(0, CLUSTER, unmap=True)
    await image.aclose()


def _counting_looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry for each look at a slice."""
    looks: list[int] = []
    presence = Mapping.presence

    def counting(
        mapping: Mapping, entries: array[int], guest_offset: int, n_bytes: int
    ) -> tuple[ClusterKind, int, bool]:
        looks.append(guest_offset)
        return presence(mapping, entries, guest_offset, n_bytes)

    monkeypatch.setattr(Mapping, "presence", counting)
    return looks


async def test_looks_inside_of_clusters_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second subcluster holds data, in each cluster."""
    image = await open_memory_image(build_image(SPECS["extended"]).files)
    for place in range(0, SIZE, KIB):
        await image.write(place, PATTERN[:512])
    looks = _counting_looks(monkeypatch)
    assert not image.try_write_zeroes(0, SIZE, unmap=True)
    assert 100 < len(looks) <= 256
    assert image.try_write_zeroes(0, CLUSTER, unmap=True)
    await image.aclose()


async def test_looks_are_bounded_over_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second cluster of a backing file holds data, which the disk above it does not have."""
    spec = ImageSpec(cluster_size=512, size=256 * KIB, backing="qcow2", backing_size=256 * KIB)
    below = MemoryStorage(build_image(replace(spec, backing=None)).top)
    image = await open_memory_image({TOP: below})
    for place in range(0, spec.size, KIB):
        await image.write(place, PATTERN[:512])
    await image.aclose()
    files = {path: MemoryStorage(part) for path, part in build_image(spec).files.items()}
    (below_path,) = set(files) - {TOP}
    image = await open_memory_image({**files, below_path: MemoryStorage(bytes(below.data))})
    for place in range(0, spec.size, 32 * KIB):
        await image.write(place, PATTERN[:512])
    await image.read(0, spec.size)
    looks = _counting_looks(monkeypatch)
    assert not image.try_write_zeroes(0, spec.size, unmap=True)
    assert 100 < len(looks) <= 256
    assert image.try_write_zeroes(0, 20 * KIB, unmap=True)
    await image.aclose()
