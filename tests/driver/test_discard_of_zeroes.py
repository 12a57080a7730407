"""A discard gives back the space of clusters that read as zeroes already, and does nothing where there is none."""

from __future__ import annotations

from array import array

import pytest

from qcowfuse.driver.options import DetectZeroes
from qcowfuse.format.entries import COMPRESSED, COPIED, READS_ZERO, entry_format
from qcowfuse.format.subclusters import ALL_ZERO
from qcowfuse.format.zero_plan import clusters_to_give_back
from qcowfuse.storage.base import Storage
from tests.support.checker import check_image_bytes
from tests.support.forwarding import ForwardingStorage
from tests.support.images import DATA, TOP, ImageSpec, build_image, open_memory_image, qemu_check, qemu_read
from tests.support.memory_storage import MemoryStorage

KIB = 1 << 10
CLUSTER = 16 * KIB
SIZE = 32 * CLUSTER
PATTERN = b"space that is to be given back !" * (SIZE // 32)
SPECS = {
    "standard": ImageSpec(cluster_size=CLUSTER, size=SIZE),
    "version 2": ImageSpec(cluster_size=CLUSTER, size=SIZE, version=2),
    "end inside a cluster": ImageSpec(cluster_size=CLUSTER, size=SIZE - 5 * KIB),
    "extended": ImageSpec(cluster_size=CLUSTER, size=SIZE, extended_l2=True),
    "over a backing file": ImageSpec(cluster_size=CLUSTER, size=SIZE, backing="raw", backing_size=SIZE),
    "data file": ImageSpec(cluster_size=CLUSTER, size=SIZE, data_file="plain"),
    "data file, extended": ImageSpec(cluster_size=CLUSTER, size=SIZE, data_file="plain", extended_l2=True),
    "encrypted": ImageSpec(cluster_size=CLUSTER, size=SIZE, encryption="luks"),
}


class NotedPunches(ForwardingStorage):
    """Notes where holes are punched."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.punched: list[tuple[int, int]] = []

    async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
        """Note it."""
        self.punched.append((host_offset, n_bytes))
        await super().punch_hole(host_offset, n_bytes, in_use=in_use)

    async def write_zeroes(self, host_offset: int, n_bytes: int, *, unmap: bool = False) -> None:
        """Note it, where space is given back."""
        if unmap:
            self.punched.append((host_offset, n_bytes))
        await super().write_zeroes(host_offset, n_bytes, unmap=unmap)


def n_set(data: bytes | bytearray) -> int:
    """How many bytes are not zero."""
    return len(data) - data.count(0)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("from_file", [False, True], ids=["zeroed here", "found zeroed"])
async def test_space_of_zeroed_clusters_is_given_back(kind: str, from_file: bool) -> None:
    """Written, zeroed with the space kept, then discarded: none of the bytes is left in the file."""
    spec = SPECS[kind]
    built = build_image(spec)
    data = PATTERN[: spec.size]
    memory = {path: MemoryStorage(part) for path, part in built.files.items()}
    image = await open_memory_image(memory)
    await image.write(0, data)
    await image.write_zeroes(0, spec.size, unmap=False)
    if from_file:
        await image.aclose()
        memory = {path: MemoryStorage(bytes(part.data)) for path, part in memory.items()}
        image = await open_memory_image(memory)
    where = DATA if spec.data_file else TOP
    if spec.version > 2 and not spec.encryption:
        assert data[:CLUSTER] in memory[where].data, "zeroing gave the space back, so there is nothing to see here"
    await image.write_zeroes(0, spec.size, unmap=True)
    await image.flush()
    await image.aclose()
    assert n_set(memory[where].data) < n_set(built.files[where]) + KIB, "more is left than an L2 table"
    files = {path: bytes(part.data) for path, part in memory.items()}
    assert check_image_bytes(files[TOP]).exit_code == 0
    if not spec.data_file:
        assert qemu_check(files)[0] == 0
    if not spec.encryption:
        assert not any(qemu_read(files))


@pytest.mark.parametrize("kind", ["preallocated", "partly"])
async def test_zero_clusters_of_qemu(kind: str) -> None:
    """Zero clusters with space that QEMU made, between data and plain zero clusters."""
    spec = ImageSpec(cluster_size=CLUSTER, size=SIZE, fill=1.0 if kind == "preallocated" else 0.5, zeroes=True)
    built = build_image(spec)
    memory = MemoryStorage(built.top)
    image = await open_memory_image({TOP: memory})
    await image.write_zeroes(0, spec.size, unmap=True)
    await image.flush()
    await image.aclose()
    assert check_image_bytes(memory.data).exit_code == 0
    assert n_set(memory.data) < 4 * KIB
    assert not any(qemu_read({TOP: bytes(memory.data)}))


async def test_a_snapshot_keeps_its_clusters() -> None:
    """Zero clusters with space that a snapshot shares: the disk lets go of them, the snapshot has them."""
    built = build_image(ImageSpec(cluster_size=CLUSTER, size=SIZE, fill=1.0, zeroes=True, snapshot=True))
    memory = MemoryStorage(built.top)
    image = await open_memory_image({TOP: memory})
    await image.write_zeroes(0, SIZE, unmap=True)
    await image.flush()
    await image.aclose()
    files = {TOP: bytes(memory.data)}
    assert check_image_bytes(memory.data).exit_code == 0
    assert qemu_check(files)[0] == 0
    assert not any(qemu_read(files))
    assert qemu_read(files, snapshot="s1") == built.snapshot_contents


async def test_a_raw_data_file_is_punched() -> None:
    """What is zeroes in a raw data file may still take space there."""
    built = build_image(ImageSpec(cluster_size=CLUSTER, size=SIZE, data_file="raw"))
    noted: list[NotedPunches] = []

    def wrap(inner: MemoryStorage) -> Storage:
        noted.append(NotedPunches(inner))
        return noted[0]

    image = await open_memory_image(built.files, wrap_data=wrap)
    await image.write(0, PATTERN)
    await image.write_zeroes(0, SIZE, unmap=False)
    assert not noted[0].punched
    await image.write_zeroes(0, SIZE, unmap=True)
    await image.aclose()
    covered = {cluster for start, size in noted[0].punched for cluster in range(start, start + size, CLUSTER)}
    assert covered >= set(range(0, SIZE, CLUSTER))


async def test_written_zeroes_are_given_back_with_detect_zeroes() -> None:
    """``--detect-zeroes unmap`` does what a discard does."""
    built = build_image(ImageSpec(cluster_size=CLUSTER, size=SIZE))
    memory = MemoryStorage(built.top)
    image = await open_memory_image({TOP: memory}, detect_zeroes=DetectZeroes.UNMAP)
    await image.write(0, PATTERN)
    await image.write_zeroes(0, SIZE, unmap=False)
    await image.write(0, bytes(SIZE))
    await image.flush()
    await image.aclose()
    assert PATTERN[:CLUSTER] not in memory.data
    assert check_image_bytes(memory.data).exit_code == 0


@pytest.mark.parametrize("kind", ["standard", "extended", "data file"])
async def test_nothing_changes_where_there_is_nothing_to_give(kind: str) -> None:
    """A second discard writes nothing at all, and an empty disk gets no tables by one."""
    spec = SPECS[kind]
    built = build_image(spec)
    memory = {path: MemoryStorage(part) for path, part in built.files.items()}
    image = await open_memory_image(memory)
    await image.write_zeroes(0, SIZE, unmap=True)
    await image.flush()
    assert len(memory[TOP].data) == len(built.top)
    await image.write(0, PATTERN)
    for _ in range(2):
        await image.write_zeroes(0, SIZE, unmap=True)
        await image.flush()
    for storage in memory.values():
        storage.counters.writes = 0
    await image.write_zeroes(0, SIZE, unmap=True)
    await image.flush()
    assert [storage.counters.writes for storage in memory.values()] == [0] * len(memory)
    await image.aclose()


@pytest.mark.parametrize("words", [1, 2])
def test_entries_that_own_clusters_are_found(words: int) -> None:
    """Wherever they are, and of every kind; flags and bitmaps alone own nothing."""
    entries_of = entry_format(3, 16, is_extended=words == 2)
    rest = [ALL_ZERO | 0xFFFF] * (words - 1)
    nothing = [READS_ZERO * (words == 1), *rest]
    for owner in (0x50000, 0x50000 | COPIED | READS_ZERO, COMPRESSED, COMPRESSED | 1 << 54, 1 << 55):
        for first, n_owners in ((0, 1), (3, 2), (7, 1), (0, 8)):
            table = [*nothing * first, *[owner, *rest] * n_owners, *nothing * (8 - first - n_owners)]
            assert clusters_to_give_back(array("Q", [*table, owner, *rest]), entries_of, 0, 8) == (first, n_owners)
            assert clusters_to_give_back(array("Q", [*nothing, *table]), entries_of, 1, 8) == (first, n_owners)
    assert clusters_to_give_back(array("Q", [COPIED, *rest] * 8), entries_of, 2, 6) == (6, 0)
    with_data_file = entry_format(3, 16, is_extended=words == 2, has_data_file=True)
    assert clusters_to_give_back(array("Q", [*nothing, COPIED, *rest, *nothing]), with_data_file, 0, 3) == (1, 1)
