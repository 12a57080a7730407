"""Images whose metadata contradict each other: a write must never go over the tables, whatever an entry says."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from qcowfuse.driver.chain import open_image
from qcowfuse.errors import CorruptImageError, FormatError, QcowFuseError, ReadOnlyImageError
from tests.support import battery, qemu
from tests.support.matrix import KIB, MIB

CLUSTER = 4 * KIB
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
TABLES = ("L1 table", "refcount table", "refcount block", "L2 table")


def tables_of(data: bytes | bytearray) -> dict[str, int]:
    """Offsets of the first of each kind of table."""
    l1, refcount_table = struct.unpack_from(">QQ", data, 40)
    return {
        "L1 table": l1,
        "refcount table": refcount_table,
        "refcount block": struct.unpack_from(">Q", data, refcount_table)[0],
        "L2 table": struct.unpack_from(">Q", data, l1)[0] & OFFSET_MASK,
    }


def make(folder: Path) -> tuple[Path, bytearray]:
    """An image of 1 MiB with data in its first 64 KiB, and its bytes."""
    path = folder / "image.qcow2"
    qemu.create(path, "qcow2", MIB, options=f"cluster_size={CLUSTER}")
    qemu.io(path, ["write -P 1 0 64k"])
    return path, bytearray(path.read_bytes())


async def write_is_refused(path: Path, guest_offset: int) -> None:
    """The write fails as QEMU's does: the image is frozen and marked."""
    image = await open_image(str(path))
    try:
        with pytest.raises(CorruptImageError):
            await battery.write(image, guest_offset, b"Z" * CLUSTER)
        assert image.read_only
        with pytest.raises(ReadOnlyImageError):
            await image.write(guest_offset, b"Z" * CLUSTER)
    finally:
        await image.aclose()
    assert qemu.info(path)["format-specific"]["data"]["corrupt"]


@pytest.mark.parametrize("table", TABLES)
async def test_an_entry_that_points_at_a_table(table: str, image_folder: Path) -> None:
    """A guest cluster mapped onto a table is not written in place: the table stays, the image is marked."""
    path, data = make(image_folder)
    tables = tables_of(data)
    struct.pack_into(">Q", data, tables["L2 table"], tables[table] | 1 << 63)
    path.write_bytes(data)
    await write_is_refused(path, 0)
    place = tables[table]
    assert path.read_bytes()[place : place + CLUSTER] == data[place : place + CLUSTER]


@pytest.mark.parametrize("table", TABLES)
async def test_a_table_that_counts_as_free(table: str, image_folder: Path) -> None:
    """A table whose refcount is 0 is not handed out for data: the table stays, the image is marked."""
    path, data = make(image_folder)
    tables = tables_of(data)
    place = tables[table]
    struct.pack_into(">H", data, tables["refcount block"] + place // CLUSTER * 2, 0)
    path.write_bytes(data)
    await write_is_refused(path, MIB // 2)
    if table != "refcount block":
        assert path.read_bytes()[place : place + CLUSTER] == data[place : place + CLUSTER]


@pytest.mark.parametrize("entry", [1 << 63 | 0x1200, (1 << 56) - 512, 1 << 63 | 1 << 40 | 0x200])
async def test_impossible_entries_freeze_the_image(entry: int, image_folder: Path) -> None:
    """An L2 entry that no writer makes fails the request with one of our errors and leaves the rest readable."""
    path, data = make(image_folder)
    struct.pack_into(">Q", data, tables_of(data)["L2 table"], entry)
    path.write_bytes(data)
    image = await open_image(str(path))
    try:
        with pytest.raises(QcowFuseError):
            await battery.read(image, 0, CLUSTER)
        assert await battery.read(image, CLUSTER, CLUSTER) == b"\x01" * CLUSTER
        assert image.read_only
    finally:
        await image.aclose()


async def test_a_broken_compressed_cluster_is_an_error_of_its_own(image_folder: Path) -> None:
    """A compressed cluster that does not unpack fails its own reads, as in QEMU, and stops no other request."""
    path, data = make(image_folder)
    struct.pack_into(">Q", data, tables_of(data)["L2 table"], 1 << 62 | len(data))
    path.write_bytes(data)
    image = await open_image(str(path))
    try:
        with pytest.raises(FormatError):
            await image.read(0, 100)
        assert await battery.read(image, CLUSTER, CLUSTER) == b"\x01" * CLUSTER
    finally:
        await image.aclose()
    assert qemu.run("qemu-io", "-f", "qcow2", "-c", "read 0 4k", path).code == 1


@pytest.mark.parametrize("shift", [0, 1, 8, 256, 511, 512, 1024, 3 * 512])
@pytest.mark.parametrize("what", ["read", "write"])
async def test_version_1_clusters_lie_at_sectors(shift: int, what: str, image_folder: Path) -> None:
    """A cluster at any sector is served, one inside a sector is an I/O error, as in QEMU."""
    path = image_folder / "image.qcow"
    qemu.create(path, "qcow", MIB)
    qemu.io(path, ["write -P 1 0 64k"], "qcow")
    data = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", data, 40)
    (l2,) = struct.unpack_from(">Q", data, l1)
    (place,) = struct.unpack_from(">Q", data, l2 + 8)
    struct.pack_into(">Q", data, l2 + 8, place + shift)
    path.write_bytes(data)
    command = f"{what} {CLUSTER} 512"
    done = qemu.run("qemu-io", "-f", "qcow", "-c", command, path)
    is_served = "Input/output error" not in done.stdout + done.stderr
    assert is_served == (shift % 512 == 0), done
    path.write_bytes(data)
    image = await open_image(str(path))
    try:
        if what == "write":
            if is_served:
                await battery.write(image, CLUSTER, b"Z" * 512)
                assert await battery.read(image, CLUSTER, 512) == b"Z" * 512
            else:
                with pytest.raises(CorruptImageError):
                    await battery.write(image, CLUSTER, b"Z" * 512)
        elif is_served:
            assert await battery.read(image, CLUSTER, 512) == b"\1" * 512
        else:
            with pytest.raises(CorruptImageError):
                await battery.read(image, CLUSTER, 512)
        if not is_served:
            assert path.read_bytes() == data
    finally:
        await image.aclose()
