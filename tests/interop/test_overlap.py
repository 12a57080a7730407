"""Images whose structures overlap: a write that would land on metadata is stopped, the image marked as corrupt and
not written any more, where QEMU's default overlap check does the same."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcowfuse.driver.chain import open_image
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.driver.writing import guarded_clusters
from qcowfuse.errors import CorruptImageError, ReadOnlyImageError
from tests.support import battery, qemu
from tests.support.matrix import MIB

CLUSTER = 4096
KIB = 1 << 10
OFFSET = (1 << 56) - 512
COPIED = 1 << 63
SIZE = 16 * MIB
USED = 64 * KIB
"""Guest bytes that are data; the second half of the first L2 table and all other tables are free."""


class Parts:
    """An image file and where its structures are."""

    def __init__(self, path: Path) -> None:
        self.data = bytearray(path.read_bytes())
        self.l1 = self.word(40)
        self.l2 = self.word(self.l1) & OFFSET
        self.refcount_table = self.word(48)
        self.block = self.word(self.refcount_table)
        self.snapshots = self.word(64)
        self.snapshot_l1 = self.word(self.snapshots)

    def word(self, position: int) -> int:
        return int(struct.unpack_from(">Q", self.data, position)[0])

    def set(self, position: int, value: int) -> None:
        struct.pack_into(">Q", self.data, position, value)

    def set_count(self, host_offset: int, count: int) -> None:
        struct.pack_into(">H", self.data, self.block + 2 * (host_offset // CLUSTER), count)

    def bitmap_directory(self) -> int:
        position = 104 if self.word(100) >> 32 == 104 else 112
        while True:
            kind, size = struct.unpack_from(">II", self.data, position)
            if kind == 0x23852875:
                return self.word(position + 8 + 16)
            assert kind
            position += 8 + (size + 7) // 8 * 8


def in_place(structure: Callable[[Parts], int]) -> Callable[[Parts], None]:
    """Guest cluster 0 lies on ``structure`` and may be written in place."""
    return lambda parts: parts.set(parts.l2, structure(parts) | COPIED)


def free(structure: Callable[[Parts], int]) -> Callable[[Parts], None]:
    """``structure`` is free by its refcount, and nothing below it is."""

    def damage(parts: Parts) -> None:
        place = structure(parts)
        for host_offset in range(0, place, CLUSTER):
            parts.set_count(host_offset, 1)
        parts.set_count(place, 0)

    return damage


@dataclass(frozen=True)
class Damage:
    """``write``: where the guest writes."""

    damage: Callable[[Parts], None]
    write: int = SIZE // 2


NEW_CLUSTER, FIRST_CLUSTER = USED + CLUSTER, 0
DAMAGES = {
    "block on L2": Damage(lambda parts: parts.set(parts.refcount_table, parts.l2)),
    "block on L2, data free": Damage(lambda parts: block_on_l2(parts)),
    "block on L1": Damage(lambda parts: parts.set(parts.refcount_table, parts.l1)),
    "block on snapshot table": Damage(lambda parts: parts.set(parts.refcount_table, parts.snapshots)),
    "block on snapshot L1": Damage(lambda parts: parts.set(parts.refcount_table, parts.snapshot_l1)),
    "block on refcount table": Damage(lambda parts: parts.set(parts.refcount_table, parts.refcount_table)),
    "L2 on block": Damage(lambda parts: parts.set(parts.l1, parts.block | COPIED), NEW_CLUSTER),
    "shared L2 on block": Damage(lambda parts: parts.set(parts.l1, parts.block), NEW_CLUSTER),
    "L2 on L1": Damage(lambda parts: parts.set(parts.l1, parts.l1 | COPIED), NEW_CLUSTER),
    "L2 on snapshot L1": Damage(lambda parts: parts.set(parts.l1, parts.snapshot_l1 | COPIED), NEW_CLUSTER),
    "snapshot table on L2": Damage(lambda parts: move_snapshots_to_l2(parts), NEW_CLUSTER),
    "data on L1": Damage(in_place(lambda parts: parts.l1), FIRST_CLUSTER),
    "data on L2": Damage(in_place(lambda parts: parts.l2), FIRST_CLUSTER),
    "data on block": Damage(in_place(lambda parts: parts.block), FIRST_CLUSTER),
    "data on refcount table": Damage(in_place(lambda parts: parts.refcount_table), FIRST_CLUSTER),
    "data on snapshot table": Damage(in_place(lambda parts: parts.snapshots), FIRST_CLUSTER),
    "data on its second cluster": Damage(in_place(lambda parts: parts.snapshots + CLUSTER), FIRST_CLUSTER),
    "data on snapshot L1": Damage(in_place(lambda parts: parts.snapshot_l1), FIRST_CLUSTER),
    "data on bitmap directory": Damage(in_place(lambda parts: parts.bitmap_directory()), FIRST_CLUSTER),
    "free L1": Damage(free(lambda parts: parts.l1), NEW_CLUSTER),
    "free L2": Damage(free(lambda parts: parts.l2), NEW_CLUSTER),
    "free block": Damage(free(lambda parts: parts.block), NEW_CLUSTER),
    "free snapshot L1": Damage(free(lambda parts: parts.snapshot_l1), NEW_CLUSTER),
    "free snapshot table": Damage(free(lambda parts: parts.snapshots), NEW_CLUSTER),
    "free second cluster": Damage(free(lambda parts: parts.snapshots + CLUSTER), NEW_CLUSTER),
}


def block_on_l2(parts: Parts) -> None:
    """Read as refcounts, the L2 table says that a cluster is free which is data."""
    data = parts.word(parts.l2 + 8 * (USED // CLUSTER - 1)) & OFFSET
    parts.set(parts.refcount_table, parts.l2)
    position = 2 * (data // CLUSTER)
    parts.data[parts.l2 : parts.l2 + position] = bytes([1]) * position
    parts.data[parts.l2 + position : parts.l2 + position + 2] = bytes(2)


def move_snapshots_to_l2(parts: Parts) -> None:
    """An L2 table of one entry is an entry of the snapshot table, too: one without a name and without an L1 table."""
    parts.data[parts.l2 + 8 : parts.l2 + 40] = bytes(32)
    parts.data[60:72] = struct.pack(">IQ", 1, parts.l2)


@pytest.fixture
def image(image_folder: Path) -> Path:
    """Several L2 tables, snapshots with a table of two clusters, a bitmap; the tables of the disk are its own."""
    path = image_folder / "image.qcow2"
    qemu.create(path, "qcow2", SIZE, options=f"cluster_size={CLUSTER}")
    qemu.io(path, [f"write -P 1 0 {USED}"])
    for number in range(22):
        qemu.must_run("qemu-img", "snapshot", "-c", f"{number:0200}", path)
    qemu.io(path, [f"write -P 2 0 {USED}"])
    qemu.must_run("qemu-img", "bitmap", "--add", path, "nightly")
    return path


async def try_to_write(image: QcowImage, guest_offset: int) -> None:
    """As the mount does, with an fsync."""
    for _ in range(2):  # the first one may be the one that clears header bits
        await image.write(guest_offset, b"x" * 512)
    await image.flush()


@pytest.mark.parametrize("kind", ["set", "array"])
@pytest.mark.parametrize("name", DAMAGES)
async def test_nothing_is_written_on_top_of_metadata(
    name: str, kind: str, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest gets an error, the image is read-only and marked, and no structure has changed but for the mark (and
    what says that bitmaps are in use); QEMU stops where we do."""
    if kind == "array":
        monkeypatch.setattr(guarded_clusters, "MAX_IN_SET", 0)
    damage = DAMAGES[name]
    parts = Parts(image)
    damage.damage(parts)
    image.write_bytes(parts.data)
    opened = await open_image(str(image))
    with pytest.raises(CorruptImageError):
        await try_to_write(opened, damage.write)
    assert opened.read_only
    with pytest.raises(ReadOnlyImageError):
        await opened.write(damage.write, b"y" * 512)
    with suppress(CorruptImageError):
        await opened.aclose()
    after = image.read_bytes()
    assert after[72:80] == struct.pack(">Q", 2), "not marked as corrupt"
    expected = bytearray(parts.data)
    expected[72:80] = after[72:80]
    directory = Parts(image).bitmap_directory()
    if expected[directory + 15] != after[directory + 15]:
        expected[directory + 15] |= 1
    if expected[88:96] != after[88:96]:
        expected[88:96] = bytes(8)
    changed = [at for at in range(0, len(expected), 512) if expected[at : at + 512] != after[at : at + 512]]
    assert not [at for at in changed if at < len(parts.data)], [hex(at) for at in changed]
    if kind == "set":
        image.write_bytes(parts.data)
        done = qemu.run("qemu-io", "-f", "qcow2", "-c", f"write {damage.write} 512", "-c", "flush", image)
        stopped = "corrupt" in (done.stdout + done.stderr) or qemu.info(image)["format-specific"]["data"]["corrupt"]
        assert stopped, done.stdout + done.stderr


async def test_metadata_is_never_given_back(image: Path) -> None:
    """A guest cluster that wrongly lies on the L1 table is overwritten elsewhere: the table keeps its count and its
    bytes, where letting go of it would have freed it."""
    parts = Parts(image)
    parts.set(parts.l2, parts.l1)
    image.write_bytes(parts.data)
    opened = await open_image(str(image))
    for _ in range(3):
        await opened.write(0, b"x" * CLUSTER)
        await opened.flush()
    await opened.aclose()
    after = Parts(image)
    assert after.data[parts.l1 : parts.l1 + 64] == parts.data[parts.l1 : parts.l1 + 64]
    count = parts.block + 2 * (parts.l1 // CLUSTER)
    assert after.data[count : count + 2] == b"\0\1"
    again = await open_image(str(image))
    assert await battery.read(again, 0, 2 * CLUSTER) == b"x" * CLUSTER + bytes([2]) * CLUSTER
    await again.aclose()


async def test_a_table_of_two_l1_entries_is_no_overlap(image: Path) -> None:
    """An L2 table that is referred to twice, with the count for it, is valid and is copied when written."""
    parts = Parts(image)
    parts.set(parts.l1, parts.l2)
    parts.set(parts.l1 + 8, parts.l2)
    parts.set_count(parts.l2, 2)
    for index in range(USED // CLUSTER):
        entry = parts.word(parts.l2 + 8 * index)
        parts.set(parts.l2 + 8 * index, entry & ~COPIED)
        parts.set_count(entry & OFFSET, 2)
    image.write_bytes(parts.data)
    assert qemu.check(image).code == 0
    opened = await open_image(str(image))
    before = await battery.read(opened, 0, 2 * SIZE // 8)
    await try_to_write(opened, 0)
    assert await battery.read(opened, 0, len(before)) == b"x" * 512 + before[512:]
    await opened.aclose()
    assert Parts(image).data[72:80] == bytes(8)
