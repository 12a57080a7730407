"""Damaged snapshot tables: what qemu-img refuses or reports is mended, and the snapshots are still there."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import trio

from qcowfuse.cli.img.main import main
from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import OpenOptions
from qcowfuse.format.header_fields import MAX_SNAPSHOTS
from tests.support import battery, qemu
from tests.support.damage import Tables
from tests.support.matrix import KIB, MIB

CLUSTER = 64 * KIB


@pytest.fixture
def image(image_folder: Path) -> Path:
    """An image with the snapshots one and two."""
    path = image_folder / "disk.qcow2"
    qemu.create(path, "qcow2", 4 * MIB)
    for number, name in enumerate(("one", "two"), 1):
        qemu.io(path, [f"write -P {number} {number * 256}k 512k"])
        qemu.must_run("qemu-img", "snapshot", "-c", name, path)
    return path


def repair(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    """check -r all, which must succeed; its JSON."""
    assert main(["check", "-r", "all", "--output=json", str(path)]) == 0
    found: dict[str, int] = json.loads(capsys.readouterr().out)
    assert qemu.check(path).clean
    return found


def snapshot_names(path: Path) -> list[str]:
    """The names that QEMU lists."""
    return [snapshot["name"] for snapshot in qemu.info(path)["snapshots"]]


def first_snapshot_is_whole(path: Path) -> None:
    """Snapshot one has the bytes that it was made of."""

    async def read() -> bytes:
        snapshot = await open_image(str(path), OpenOptions(snapshot="one"))
        try:
            return await battery.read(snapshot, 256 * KIB, 512 * KIB)
        finally:
            await snapshot.aclose()

    assert trio.run(read) == b"\x01" * 512 * KIB


def test_too_much_extra_data(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Extra data beyond the limit, which no QEMU opens, is cut."""
    data = bytearray(image.read_bytes())
    tables = Tables(data)
    old = tables.snapshots_offset
    table = bytes(data[old : old + 512])
    longer = table[:36] + struct.pack(">I", 24 + 3000) + table[40:64] + b"Z" * 3000 + table[64:]
    place = -(-len(data) // CLUSTER) * CLUSTER
    data += bytes(place - len(data)) + longer.ljust(CLUSTER, b"\0")
    struct.pack_into(">Q", data, 64, place)
    struct.pack_into(">H", data, tables.refcount_block + 2 * (place // CLUSTER), 1)
    struct.pack_into(">H", data, tables.refcount_block + 2 * (old // CLUSTER), 0)
    image.write_bytes(data)
    assert main(["check", str(image)]) == 1
    assert qemu.run("qemu-img", "check", image).code == 1
    capsys.readouterr()
    assert repair(image, capsys)["corruptions-fixed"] == 1
    assert snapshot_names(image) == ["one", "two"]
    first_snapshot_is_whole(image)


def test_more_snapshots_than_there_can_be(
    image: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A count beyond the limit is cut, and the first ones are still there (QEMU gives up half way)."""
    assert MAX_SNAPSHOTS == 65_536  # QEMU's, which takes seconds to read as many
    monkeypatch.setattr("qcowfuse.consistency.repair.MAX_SNAPSHOTS", 1000)
    data = bytearray(image.read_bytes())
    struct.pack_into(">I", data, 60, 70_000)
    image.write_bytes(data)
    assert main(["check", str(image)]) == 1
    capsys.readouterr()
    assert repair(image, capsys)["corruptions-fixed"] >= 70_000 - 1000
    assert snapshot_names(image)[:2] == ["one", "two"]
    first_snapshot_is_whole(image)


def test_snapshots_without_a_table(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Snapshots whose table has no place cannot be saved: they go, and the disk stays."""
    data = bytearray(image.read_bytes())
    struct.pack_into(">Q", data, 64, 0)
    image.write_bytes(data)
    assert repair(image, capsys)["corruptions-fixed"] >= 2
    qemu.io(image, ["read -P 1 256k 256k", "read -P 2 512k 512k"])


def test_snapshots_survive_a_repair_with_bitmaps(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Repairing an image with bitmaps keeps snapshots and bitmaps. (qemu-img 10 loses the snapshots.)"""
    qemu.must_run("qemu-img", "bitmap", "--add", image, "nightly")
    data = bytearray(image.read_bytes())
    struct.pack_into(">H", data, Tables(data).refcount_block + 2 * (len(data) // CLUSTER - 1), 9)
    image.write_bytes(data)
    assert repair(image, capsys)["leaks-fixed"] == 1
    assert snapshot_names(image) == ["one", "two"]
    assert [bitmap["name"] for bitmap in qemu.info(image)["format-specific"]["data"]["bitmaps"]] == ["nightly"]
    first_snapshot_is_whole(image)
