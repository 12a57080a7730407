"""Zeroing and discarding that need not wait: all of it at once or nothing, with the same outcome as by waiting."""

from __future__ import annotations

import pytest

from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.driver.writing.zeroing import MAX_AT_ONCE
from qcowfuse.format.entries import ClusterKind
from tests.driver.test_discard_of_zeroes import CLUSTER, KIB, PATTERN, SIZE, SPECS
from tests.support.checker import check_image_bytes
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
    assert not image.try_write_zeroes(last, image.size - last - 512, unmap=True)
    assert image.try_write_zeroes(last, image.size - last, unmap=True)
    assert (await kinds(image))[-1] == ClusterKind.ZERO
    assert bytes(await image.read(0, last)) == PATTERN[:last]
    await image.aclose()


@pytest.mark.parametrize(
    ("place", "n_bytes"),
    [
        (512, CLUSTER),
        (0, CLUSTER - 512),
        (0, CLUSTER + 512),
        (0, 0),
        (SIZE - CLUSTER, 2 * CLUSTER),
        (-CLUSTER, CLUSTER),
        (SIZE, CLUSTER),
    ],
)
async def test_what_is_not_done_changes_nothing(place: int, n_bytes: int) -> None:
    """Parts of clusters, and what lies outside of the disk."""
    image = await open_memory_image(build_image(PLAIN).files)
    await image.write(0, PATTERN)
    assert not image.try_write_zeroes(place, n_bytes, unmap=True)
    assert bytes(await image.read(0, SIZE)) == PATTERN
    await image.aclose()


async def test_more_clusters_are_left_to_what_lets_others_have_their_turn() -> None:
    """The bound is in clusters."""
    spec = ImageSpec(cluster_size=512, size=256 * KIB)
    image = await open_memory_image(build_image(spec).files)
    await image.write(0, PATTERN[: 128 * 512])
    assert not image.try_write_zeroes(0, (MAX_AT_ONCE + 1) * 512, unmap=True)
    for start in (0, MAX_AT_ONCE * 512):
        assert image.try_write_zeroes(start, MAX_AT_ONCE * 512, unmap=True)
    await image.aclose()


@pytest.mark.parametrize("kind", ["data file", "data file, extended"])
async def test_data_files_take_the_other_way(kind: str) -> None:
    """Their space is given back by a call that may wait."""
    image = await open_memory_image(build_image(SPECS[kind]).files)
    await image.write(0, PATTERN)
    assert not image.try_write_zeroes(0, CLUSTER, unmap=True)
    await image.aclose()


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
    changes = image.changes
    assert changes is not None
    claim = changes.writer.claims.take(0, 1)
    assert not image.try_write_zeroes(0, CLUSTER, unmap=True)
    changes.writer.claims.release(claim)
    assert image.try_write_zeroes(0, CLUSTER, unmap=True)
    await image.aclose()
