"""Serving an internal snapshot: the same bytes as QEMU's, its own size, read-only, and clear answers otherwise."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import OpenOptions
from qcowfuse.errors import FormatError, ImageUsageError, ReadOnlyImageError
from tests.support import battery, qemu
from tests.support.matrix import MIB
from tests.support.mounting import Mounted, run_qcowfuse

SIZE = 4 * MIB
OPTIONS = {
    "v2": "compat=0.10",
    "v3": "compat=1.1",
    "small-clusters": "cluster_size=512",
    "zstd": "compression_type=zstd",
    "extended-l2": "extended_l2=on,cluster_size=16k",
    "narrow-refcounts": "refcount_bits=8",
}


def snapshot(path: Path, name: str) -> None:
    qemu.must_run("qemu-img", "snapshot", "-c", name, path)


def make(folder: Path, options: str = "compat=1.1", *, backing: bool = False) -> Path:
    """Three states, two of them snapshots ("first", "second"), with data, zeroes and what they share."""
    path = folder / "image.qcow2"
    if backing:
        qemu.create(folder / "base.raw", "raw", SIZE // 2)
        qemu.io(folder / "base.raw", ["write -P 9 0 1536k"], "raw")
        qemu.create(path, "qcow2", SIZE, options=options, backing="base.raw", backing_format="raw")
    else:
        qemu.create(path, "qcow2", SIZE, options=options)
    qemu.io(path, ["write -P 1 0 300k", "write -P 2 2M 100k", "write -c -P 3 3M 64k"])
    snapshot(path, "first")
    qemu.io(path, ["write -P 4 100k 64k", "write -z 2M 64k", "write -P 5 3M 4k"])
    snapshot(path, "second")
    qemu.io(path, ["write -P 6 0 4M"])
    return path


async def contents(path: Path, id_or_name: str) -> bytes:
    """What we serve for a snapshot."""
    image = await open_image(str(path), OpenOptions(snapshot=id_or_name))
    try:
        return await battery.read(image, 0, image.size)
    finally:
        await image.aclose()


def expected(path: Path, id_or_name: str) -> bytes:
    """What QEMU converts for a snapshot."""
    target = path.with_suffix(".expected")
    qemu.must_run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", id_or_name, path, target)
    return target.read_bytes()


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("options", OPTIONS)
async def test_same_bytes_as_qemu(options: str, backing: bool, image_folder: Path) -> None:
    """Each snapshot reads as ``qemu-img convert -l`` has it, by name and by id, and the image stays as it was."""
    path = make(image_folder, OPTIONS[options], backing=backing)
    before = path.read_bytes()
    for name, number in (("first", "1"), ("second", "2")):
        wanted = expected(path, name)
        assert await contents(path, name) == wanted
        assert await contents(path, number) == wanted
    assert await contents(path, "first") != await contents(path, "second")
    assert path.read_bytes() == before


async def test_ids_go_before_names(image_folder: Path) -> None:
    """A snapshot named like the id of another one: the id wins, as in QEMU."""
    path = image_folder / "image.qcow2"
    qemu.create(path, "qcow2", MIB)
    qemu.io(path, ["write -P 1 0 1M"])
    snapshot(path, "2")
    qemu.io(path, ["write -P 2 0 1M"])
    snapshot(path, "1")
    for wanted, byte in (("1", 1), ("2", 2)):
        assert await contents(path, wanted) == bytes([byte]) * MIB == expected(path, wanted)


@pytest.mark.parametrize(("old", "new"), [(MIB, 3 * MIB), (3 * MIB, MIB)], ids=["grown", "shrunk"])
async def test_its_own_size(old: int, new: int, image_folder: Path) -> None:
    """A disk that has been resized since: the snapshot has the size and the bytes of its time."""
    path = image_folder / "image.qcow2"
    qemu.create(path, "qcow2", old, options="cluster_size=512")
    qemu.io(path, [f"write -P 1 0 {old}"])
    snapshot(path, "old")
    qemu.must_run("qemu-img", "resize", "-q", "--shrink", path, str(new))
    qemu.io(path, [f"write -P 2 0 {new}"])
    assert await contents(path, "old") == bytes([1]) * old


async def test_a_snapshot_without_a_size(image_folder: Path) -> None:
    """An entry without extra data, as old programs wrote it: the size is the header's, and what its L1 table is
    too short for reads as zeroes."""
    path = image_folder / "image.qcow2"
    cluster = 512
    qemu.create(path, "qcow2", MIB, options=f"compat=0.10,cluster_size={cluster}")
    qemu.io(path, ["write -P 1 0 1M"])
    snapshot(path, "old")
    data = bytearray(path.read_bytes())
    (table,) = struct.unpack_from(">Q", data, 64)
    id_size, name_size = struct.unpack_from(">HH", data, table + 12)
    (n_extra,) = struct.unpack_from(">I", data, table + 36)
    names = table + 40 + n_extra
    data[table + 40 : table + 40 + id_size + name_size] = data[names : names + id_size + name_size]
    struct.pack_into(">I", data, table + 36, 0)
    struct.pack_into(">I", data, table + 8, struct.unpack_from(">I", data, table + 8)[0] // 2)
    path.write_bytes(data)
    mapped = MIB // 2
    assert await contents(path, "old") == bytes([1]) * mapped + bytes(MIB - mapped)


async def test_it_is_read_only(image_folder: Path) -> None:
    """Nothing can be written to a snapshot, though writing was not excluded."""
    image = await open_image(str(make(image_folder)), OpenOptions(read_only=False, snapshot="first"))
    try:
        assert image.read_only
        with pytest.raises(ReadOnlyImageError):
            await image.write(0, b"x" * 512)
    finally:
        await image.aclose()


async def test_no_such_snapshot(image_folder: Path) -> None:
    """The message names what there is."""
    path = make(image_folder)
    with pytest.raises(ImageUsageError, match=r"no snapshot 'third'; there are: first \(id 1\), second \(id 2\)$"):
        await contents(path, "third")
    for number in range(30):
        snapshot(path, f"more{number}")
    with pytest.raises(ImageUsageError, match=r"more17 \(id 20\), 12 more$"):
        await contents(path, "third")


@pytest.mark.parametrize(("format_name", "reason"), [("qcow2", "the image has none"), ("qcow", "version 1")])
async def test_images_without_snapshots(format_name: str, reason: str, image_folder: Path) -> None:
    """An image that has no snapshots, or can't have any, says so."""
    path = image_folder / "image"
    qemu.create(path, format_name, MIB)
    with pytest.raises(ImageUsageError, match=f"no snapshot '1'.*{reason}"):
        await contents(path, "1")


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, struct.pack(">Q", 12345), "L1 table of a snapshot at offset 0x3039"),
        (8, struct.pack(">I", 0xFFFFFFFF), "4294967295 entries; too many"),
        (36, struct.pack(">I", 4096), "extra data of 4096 bytes"),
        (48, struct.pack(">Q", 1 << 62), "more than any L1 table can map"),
    ],
    ids=["unaligned", "large-l1", "large-extra", "large-disk"],
)
async def test_damaged_entries(position: int, value: bytes, message: str, image_folder: Path) -> None:
    """An entry that can't be true is refused; the image itself still opens."""
    path = make(image_folder)
    data = bytearray(path.read_bytes())
    (table,) = struct.unpack_from(">Q", data, 64)
    data[table + position : table + position + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        await contents(path, "first")
    image = await open_image(str(path), OpenOptions(read_only=True))
    await image.aclose()


async def test_an_l1_table_past_the_end(image_folder: Path) -> None:
    """It reads as zeroes, as in QEMU."""
    path = make(image_folder)
    data = bytearray(path.read_bytes())
    (table,) = struct.unpack_from(">Q", data, 64)
    struct.pack_into(">Q", data, table, 1 << 40)
    path.write_bytes(data)
    assert await contents(path, "first") == expected(path, "first") == bytes(SIZE)


@pytest.mark.mount
def test_through_a_mount(image_folder: Path) -> None:
    """``--snapshot`` and ``-o snapshot=`` serve a snapshot; a wrong name is one line and an exit code."""
    path = make(image_folder)
    point = image_folder / "mnt"
    point.mkdir()
    for option in (("--snapshot", "first"), ("-o", "snapshot=2")):
        with Mounted(path, point, *option) as mounted:
            assert mounted.file.read_bytes() == expected(path, option[1].rpartition("=")[2])
            with pytest.raises(OSError):
                mounted.file.open("r+b")
    done = run_qcowfuse("--snapshot", "third", path, point)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "there are: first (id 1), second (id 2)" in done.stderr
