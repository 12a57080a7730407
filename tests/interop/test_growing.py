"""qcowfuse-img resize beside qemu-img resize: the same disk, a clean image; bitmaps and data files grow along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from qcowfuse.cli.img.main import main
from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import OpenOptions
from tests.support import qemu
from tests.support.oracle import reference_bytes

MIB = 1 << 20
OPTIONS = {
    "v2": "compat=0.10",
    "v3": "compat=1.1",
    "512-byte clusters": "cluster_size=512",
    "2M clusters": "cluster_size=2M",
    "1-bit refcounts": "refcount_bits=1",
    "extended": "extended_l2=on,cluster_size=16k",
    "preallocated": "preallocation=metadata",
    "lazy refcounts": "lazy_refcounts=on",
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", ["3000000k", "+512"])
def test_the_same_as_qemu(image_folder: Path, options: str, size: str) -> None:
    """Same size, same contents, no leak; QEMU goes on growing and writing where we ended."""
    ours, theirs = image_folder / "ours.qcow2", image_folder / "theirs.qcow2"
    qemu.create(ours, "qcow2", "5M", options=OPTIONS[options])
    qemu.io(ours, ["write -P 7 0 70k", "write -P 8 4800k 320k"])
    theirs.write_bytes(ours.read_bytes())
    assert main(["resize", "-q", str(ours), size]) == 0
    qemu.must_run("qemu-img", "resize", "-q", theirs, size)
    assert qemu.check(ours).clean, qemu.check(ours).text
    qemu.must_run("qemu-img", "compare", ours, theirs)
    sizes = {
        json.loads(qemu.must_run("qemu-img", "info", "--output=json", path))["virtual-size"]
        for path in (ours, theirs)
    }
    assert len(sizes) == 1
    qemu.must_run("qemu-img", "resize", "-q", ours, "+10M")
    qemu.io(ours, ["write -P 9 5M 10k", "read -P 8 4800k 320k", "read -P 0 5130k 4k"])
    assert qemu.check(ours).clean


@pytest.mark.parametrize("options", ["", "compat=0.10", "extended_l2=on,cluster_size=16k"])
@pytest.mark.parametrize("backing_format", ["raw", "qcow2"])
def test_a_longer_backing_file(image_folder: Path, options: str, backing_format: str) -> None:
    """What the backing file holds behind the old end stays hidden, in QEMU's eyes too."""
    base, image = image_folder / "base", image_folder / "disk.qcow2"
    qemu.create(base, backing_format, "3M")
    qemu.must_run("qemu-io", "-f", backing_format, "-c", "write -P 5 0 3M", base)
    qemu.create(image, "qcow2", 1_000_448, options=options, backing="base", backing_format=backing_format)
    assert main(["resize", "-q", str(image), "4M"]) == 0
    qemu.io(image, ["read -P 5 0 1000448", f"read -P 0 1000448 {4 * MIB - 1_000_448}"])
    assert qemu.check(image).clean, qemu.check(image).text


@pytest.mark.parametrize("is_raw", ["on", "off"])
def test_a_data_file_grows_along(image_folder: Path, is_raw: str) -> None:
    """The data file is as long as the disk. What stood behind its old end is still there: a raw one goes on with it,
    as in QEMU; of another one it does not show."""
    data, image = image_folder / "data", image_folder / "disk.qcow2"
    qemu.create(image, "qcow2", MIB, options=f"data_file={data},data_file_raw={is_raw}")
    qemu.io(image, ["write -P 5 0 1M"])
    with data.open("ab") as file:
        file.write(b"junk" * 1000)
    assert main(["resize", "-q", str(image), "3M"]) == 0
    assert data.read_bytes() == (b"\x05" * MIB + b"junk" * 1000).ljust(3 * MIB, b"\0")
    shown = data.read_bytes() if is_raw == "on" else (b"\x05" * MIB).ljust(3 * MIB, b"\0")
    assert reference_bytes(image, "qcow2") == shown
    qemu.io(image, ["write -P 6 2M 1M"])
    assert qemu.check(image).clean, qemu.check(image).text
    if is_raw == "on":
        assert data.read_bytes() == shown[: 2 * MIB] + b"\x06" * MIB


@pytest.mark.parametrize("options", ["", ",data_file_raw=on", ",extended_l2=on,data_file_raw=on"])
@pytest.mark.parametrize("size", ["+512", "+100k", "3M"])
def test_a_longer_data_file_is_not_changed(image_folder: Path, options: str, size: str) -> None:
    """Not a byte behind the end of the disk is zeroed, nor cut off, whether the file is still longer or not."""
    data, image = image_folder / "data", image_folder / "disk.qcow2"
    qemu.create(image, "qcow2", MIB - 1536, options=f"data_file={data}{options}")
    qemu.io(image, ["write -P 5 0 200k"])
    before = (data.read_bytes()[: MIB - 1536] + b"precious" * MIB)[: 2 * MIB]
    data.write_bytes(before)
    assert main(["resize", "-q", str(image), size]) == 0
    assert data.read_bytes() == before.ljust(3 * MIB if size == "3M" else 0, b"\0")
    assert qemu.check(image).clean, qemu.check(image).text
    shown = reference_bytes(image, "qcow2")
    if "raw" in options:
        assert shown == data.read_bytes()[: len(shown)]
    else:
        assert shown[MIB - 1536 :] == bytes(len(shown) - MIB + 1536)


def test_bitmaps_grow_along(image_folder: Path) -> None:
    """After growing and writing, an enabled bitmap covers the new disk and says what was written."""
    image = image_folder / "disk.qcow2"
    qemu.create(image, "qcow2", MIB)
    qemu.must_run("qemu-img", "bitmap", "--add", image, "enabled")
    qemu.must_run("qemu-img", "bitmap", "--add", "--disable", image, "disabled")

    async def grow_and_write() -> None:
        disk = await open_image(str(image), OpenOptions())
        await disk.write(0, b"x")
        await disk.grow(3000 * MIB)
        await disk.write(2900 * MIB, b"y")
        await disk.aclose()

    trio.run(grow_and_write)
    assert qemu.check(image).clean, qemu.check(image).text
    info = json.loads(qemu.must_run("qemu-img", "info", "--output=json", image))
    bitmaps = {entry["name"]: entry["flags"] for entry in info["format-specific"]["data"]["bitmaps"]}
    assert bitmaps == {"enabled": ["auto"], "disabled": []}
    qemu.io(image, ["write -P 3 100M 1k"])
    assert qemu.check(image).clean, qemu.check(image).text


def test_what_resize_refuses(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Less than there is, version 2 with snapshots, sizes that are none: one line and exit code 1."""
    image = image_folder / "disk.qcow2"
    qemu.create(image, "qcow2", MIB, options="compat=0.10")
    before = image.read_bytes()
    for size, text in (("512k", "smaller"), ("+8E", "too large"), ("+x", "bad size"), ("7E", "L1 table")):
        assert main(["resize", str(image), size]) == 1
        said = capsys.readouterr().err
        assert text in said
        assert said.count("\n") == 1
    assert image.read_bytes() == before
    assert main(["resize", str(image), "1M"]) == 0
    assert "already" in capsys.readouterr().out
    qemu.must_run("qemu-img", "snapshot", "-c", "s", image)
    assert main(["resize", str(image), "2M"]) == 1
    assert "snapshots" in capsys.readouterr().err


def test_version_1(image_folder: Path) -> None:
    """QEMU cannot resize version 1, but reads what has been."""
    image = image_folder / "disk.qcow"
    qemu.create(image, "qcow", MIB)
    qemu.must_run("qemu-io", "-f", "qcow", "-c", "write -P 5 0 1M", image)
    assert main(["resize", "-q", str(image), "+100G"]) == 0
    commands = ["read -P 5 0 1M", "read -P 0 1M 30M", "write -P 6 99G 1M", "read -P 6 99G 1M", "read -P 5 0 1M"]
    words = [word for command in commands for word in ("-c", command)]
    assert "Pattern verification failed" not in qemu.must_run("qemu-io", "-f", "qcow", *words, image)
