"""Images whose writer died: a writable open repairs them first, to the same bytes as QEMU's repair."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from pathlib import Path

import pytest

from qcowfuse.cli.img.main import main
from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import OpenOptions
from qcowfuse.errors import ImageUsageError
from tests.support import battery, qemu
from tests.support.damage import OFFSET_MASK, Tables
from tests.support.matrix import MIB

OPTIONS = (
    "cluster_size=64k",
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=2M,refcount_bits=64",
)
WRITES = ("write -P 1 0 300k", "write -P 2 1M 64k", "write -z 100k 50k", "write -P 3 3000k 200k", "flush")


def make_dirty(path: Path, options: str, *, snapshot: bool = False) -> None:
    """An image with lazy refcounts, killed in the middle of its work."""
    qemu.create(path, "qcow2", 8 * MIB, options=f"lazy_refcounts=on,{options}")
    qemu.io(path, ["write -P 9 5M 100k"])
    if snapshot:
        qemu.must_run("qemu-img", "snapshot", "-c", "before", path)
    words = [word for command in (*WRITES, "sigraise 9") for word in ("-c", command)]
    assert qemu.run("qemu-io", "-t", "unsafe", "-f", "qcow2", *words, path).code != 0
    assert qemu.info(path)["dirty-flag"]


def compatible_bits(path: Path) -> int:
    """The header's compatible features."""
    return int.from_bytes(path.read_bytes()[80:88], "big")


@pytest.mark.parametrize("options", OPTIONS)
async def test_a_dirty_image_is_repaired_when_opened(
    options: str, image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A writable open repairs, says so, and serves; the bytes are those after QEMU's repair; lazy refcounts stay."""
    ours, theirs = image_folder / "ours.qcow2", image_folder / "theirs.qcow2"
    make_dirty(ours, options)
    shutil.copy(ours, theirs)
    assert not qemu.check(ours).clean
    image = await open_image(str(ours))
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("not closed cleanly" in message for message in messages)
    assert any("repaired in" in message for message in messages)
    assert not qemu.info(ours)["dirty-flag"]
    await battery.write(image, 6 * MIB, b"after" * 3000)
    await image.aclose()
    qemu.io(theirs, ["write -P 0 0 0"])
    assert not qemu.info(theirs)["dirty-flag"]
    assert qemu.check(ours).clean
    assert compatible_bits(ours) == 1
    (image_folder / "after").write_bytes(b"after" * 3000)
    qemu.io(theirs, [f"write -s {image_folder / 'after'} 6M 15000"])
    assert qemu.is_same(ours, theirs, "qcow2", "qcow2")


async def test_a_dirty_image_with_a_snapshot(image_folder: Path) -> None:
    """What the snapshot shares with the disk stays counted twice, and the snapshot's bytes stay."""
    path = image_folder / "disk.qcow2"
    make_dirty(path, "cluster_size=4k", snapshot=True)
    image = await open_image(str(path))
    await battery.write(image, 5 * MIB, b"x" * 100_000)
    await image.aclose()
    assert qemu.check(path).clean
    snapshot = await open_image(str(path), OpenOptions(snapshot="before"))
    assert await battery.read(snapshot, 5 * MIB, 100 << 10) == b"\x09" * (100 << 10)
    await snapshot.aclose()


async def test_a_dirty_image_is_not_touched_by_readers(image_folder: Path) -> None:
    """A read-only open serves a dirty image as it is."""
    path = image_folder / "disk.qcow2"
    make_dirty(path, "cluster_size=64k")
    before = path.read_bytes()
    image = await open_image(str(path), OpenOptions(read_only=True))
    assert await battery.read(image, MIB, 64 << 10) == b"\x02" * (64 << 10)
    await image.aclose()
    assert path.read_bytes() == before


async def test_a_dirty_image_beyond_repair_is_refused(image_folder: Path) -> None:
    """Where errors are left, the open is refused in one line with the advice to look, and the image stays dirty."""
    path = image_folder / "disk.qcow2"
    make_dirty(path, "cluster_size=64k")
    data = bytearray(path.read_bytes())
    tables = Tables(data)
    entry = tables.u64(tables.l1_offset) & OFFSET_MASK
    struct.pack_into(">Q", data, entry, tables.u64(entry) | 0x200)
    path.write_bytes(data)
    with pytest.raises(ImageUsageError, match=r"1 errors are beyond repair.*qcowfuse-img check") as caught:
        await open_image(str(path))
    assert "\n" not in str(caught.value)
    assert qemu.info(path)["dirty-flag"]


def test_check_clears_the_marks(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """check -r all takes the dirty and the corrupt bit away when all is well; -r leaks refuses, as QEMU does."""
    path = image_folder / "disk.qcow2"
    make_dirty(path, "cluster_size=64k")
    data = bytearray(path.read_bytes())
    data[79] |= 2
    path.write_bytes(data)
    assert main(["check", "-r", "leaks", str(path)]) == 1
    assert "-r all" in capsys.readouterr().err
    assert path.read_bytes() == data
    assert qemu.run("qemu-img", "check", "-r", "leaks", path).code == 1
    assert main(["check", "-r", "all", "--output=json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["corruptions-fixed"] > 0
    assert path.read_bytes()[79] == 0
    assert qemu.check(path).clean
