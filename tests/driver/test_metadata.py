"""The set of clusters that hold metadata: both ways to keep it are one set; what two structures share stays in."""

from __future__ import annotations

import random
import struct
from array import array

import pytest

from qcowfuse.driver.writing import guarded_clusters
from qcowfuse.driver.writing.guarded_clusters import MetadataClusters
from qcowfuse.driver.writing.sorted_clusters import SortedClusters, sorted_array
from qcowfuse.errors import CorruptImageError
from tests.support.damage import COPIED, OFFSET_MASK, Tables
from tests.support.images import TOP, ImageSpec, build_image, open_memory_image
from tests.support.memory_storage import MemoryStorage


def in_order(clusters: set[int]) -> SortedClusters:
    """All of them, put there in two parts."""
    ordered = sorted(clusters)
    made = SortedClusters(len(ordered), ordered[-1])
    made.append(ordered[:1])
    made.append(ordered[1:])
    return made


@pytest.mark.parametrize(
    "start", [0, (1 << 16) - 500, (3 << 16) + 9, (1 << 32) - 500, (5 << 32) - 500, (1 << 47) - 1010]
)
def test_a_sorted_array_is_a_set(start: int) -> None:
    """Random additions, removals and questions: the same answers as from a set, also where two groups meet."""
    chooser = random.Random(2)
    first = start
    known = set(chooser.sample(range(first, first + 1000), 300))
    tested = in_order(known)
    for _ in range(3000):
        start = first + chooser.randrange(1000)
        clusters = range(start, start + chooser.choice([1, 1, 1, 2, 7]))
        match chooser.randrange(3):
            case 0:
                known.update(clusters)
                tested.update(clusters)
            case 1:
                known.difference_update(clusters)
                tested.difference_update(clusters)
        question = range(start - 1, start + chooser.randrange(1, 5))
        assert tested.isdisjoint(question) == known.isdisjoint(question)
        edge = first + 500
        question = range(edge - chooser.randrange(1, 9), edge + chooser.randrange(1, 9))
        assert tested.isdisjoint(question) == known.isdisjoint(question)


@pytest.mark.parametrize("kind", ["set", "array"])
def test_one_of_many_clusters_is_metadata(kind: str) -> None:
    """Among clusters that lie anywhere, the one that is guarded is named; without it there is nothing to say."""
    known = {3, 70, 900}
    clusters = MetadataClusters(9, known if kind == "set" else in_order(known), frozenset())
    clusters.check_each([2, 4, 69, 71, 1000], "zeroes")
    with pytest.raises(CorruptImageError, match=f"zeroes at offset {70 << 9:#x}: would overwrite metadata"):
        clusters.check_each([2, 70, 1000], "zeroes")


def test_shared_clusters_stay() -> None:
    """A cluster of two structures is guarded when one of them has gone, and neither may be written."""
    clusters = MetadataClusters(9, {1, 2, 3}, frozenset({2}))
    clusters.discard(512, 3 * 512)
    clusters.check(512, 512, "data")
    clusters.check(3 * 512, 512, "data")
    with pytest.raises(CorruptImageError, match="data at offset 0x400: would overwrite metadata"):
        clusters.check(1024, 512, "data")
    with pytest.raises(CorruptImageError, match="L2 table at offset 0x200: lies on top of other metadata"):
        clusters.check_own(512, 1024, "L2 table")
    clusters.check_own(512, 512, "L2 table")


async def test_many_tables_are_kept_in_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number of tables the array takes over, for as long as the image is open, and it knows the same."""
    built = build_image(ImageSpec(fill=0.5, snapshot=True))
    plain = await open_memory_image(built.files)
    monkeypatch.setattr(guarded_clusters, "MAX_IN_SET", 5)
    image = await open_memory_image(built.files)
    assert plain.changes is not None
    assert image.changes is not None
    in_set, in_array = plain.changes.metadata.clusters, image.changes.metadata.clusters
    assert isinstance(in_set, set)
    assert isinstance(in_array, SortedClusters)
    for cluster in range(len(built.top) // 512 + 10):
        assert in_array.isdisjoint(range(cluster, cluster + 1)) == (cluster not in in_set)
    for opened in (plain, image):
        for start in range(0, opened.size - 1000, 3000):
            await opened.write(start, b"x" * 1000)
        await opened.aclose()


@pytest.mark.parametrize("n_items", [0, 1, 100, 70_000, 200_000])
def test_sorting_parts_is_sorting_everything(n_items: int) -> None:
    """Whatever their widths and lengths, and with equal items in several of them."""
    chooser = random.Random(n_items)
    parts = [
        array("Q", [chooser.randrange(1 << 40) for _ in range(n_items)]),
        array("I", [chooser.randrange(50) for _ in range(n_items // 2)]),
        array("Q", [7]),
    ]
    expected = sorted(item for part in parts for item in part)
    assert list(sorted_array(parts)) == expected


@pytest.mark.parametrize("n_clusters", [2, 3])
async def test_data_that_follows_into_a_table(n_clusters: int) -> None:
    """Damaged entries name clusters that follow each other, and the last one is a table: nothing is written in place,
    not before the table either."""
    data = bytearray(build_image(ImageSpec(size=256 << 10, cluster_size=512, fill=1.0)).top)
    tables = Tables(data)
    table = tables.u64(tables.l1_offset + 8) & OFFSET_MASK
    first_table = tables.u64(tables.l1_offset) & OFFSET_MASK
    start = table - (n_clusters - 1) * 512  # what lies before the second table is data of the first
    for number in range(n_clusters):
        struct.pack_into(">Q", data, first_table + 8 * (10 + number), COPIED | start + 512 * number)
    memory = MemoryStorage(bytes(data))
    image = await open_memory_image({TOP: memory})
    await image.write(0, b"x" * 512)
    before = bytes(memory.data[start : table + 512])
    with pytest.raises(CorruptImageError):
        await image.write(10 * 512, b"w" * (n_clusters * 512))
    assert bytes(memory.data[start : table + 512]) == before
    assert image.read_only
    await image.aclose()
