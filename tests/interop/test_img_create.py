"""qcowfuse-img create against qemu-img create: the same answers to info, clean to check, usable by QEMU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qcowfuse.cli.img.main import main
from qcowfuse.storage.locks import acquire_image_lock
from tests.support import qemu

QCOW2_OPTIONS = (
    "",
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "cluster_size=2M",
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "refcount_bits=64,cluster_size=512",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k,lazy_refcounts=on",
    "compression_type=zstd",
    "lazy_refcounts=on,refcount_bits=32",
)


def same_info(ours: Path, theirs: Path, format_name: str) -> None:
    """Compare what qemu-img says, but for names and what the host has allocated."""

    def said(path: Path) -> dict[str, Any]:
        found = qemu.info(path, format_name)
        for name in ("filename", "actual-size", "children", "full-backing-filename"):
            found.pop(name, None)
        return found

    assert said(ours) == said(theirs)


@pytest.mark.parametrize("size", ["0", "1000", "1.5M", "200G"])
@pytest.mark.parametrize("options", QCOW2_OPTIONS)
def test_makes_what_qemu_img_makes(options: str, size: str, image_folder: Path) -> None:
    """An image has qemu-img's properties, is clean, and QEMU can write to it and read it back."""
    ours, theirs = image_folder / "ours.qcow2", image_folder / "theirs.qcow2"
    words = ["-o", options] if options else []
    expected = qemu.run("qemu-img", "create", "-q", "-f", "qcow2", *words, theirs, size)
    code = main(["create", "-q", "-f", "qcow2", *words, str(ours), size])
    assert (code == 0) == (expected.code == 0)
    if expected.code:
        assert not ours.exists()
        return
    same_info(ours, theirs, "qcow2")
    assert qemu.check(ours).clean
    if qemu.info(ours)["virtual-size"] >= 1024:
        qemu.io(ours, ["write -P 7 512 512", "read -P 7 512 512", "read -P 0 0 512"])
        assert qemu.check(ours).clean


PREALLOCATED = (
    "",
    "compat=0.10,cluster_size=4k",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=2M",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "data_file={}",
    "data_file={},data_file_raw=on",
    "data_file={},cluster_size=512",
    "data_file={},extended_l2=on",
    "data_file={},data_file_raw=on,extended_l2=on",
)
MODES = [
    (options, mode)
    for options in PREALLOCATED
    for mode in ("off", "metadata", "falloc", "full")
    if mode != "off" or "data_file" in options
]


@pytest.mark.parametrize("size", ["0", "5000k"])
@pytest.mark.parametrize(("options", "mode"), MODES)
def test_preallocates_as_qemu_img_does(options: str, mode: str, size: str, image_folder: Path) -> None:
    """The same clusters are allocated, the space is really there, it is clean, and QEMU writes to it."""
    ours, theirs = image_folder / "ours.qcow2", image_folder / "theirs.qcow2"
    our_data, their_data = image_folder / "ours.raw", image_folder / "theirs.raw"
    option = f"{options},preallocation={mode}".removeprefix(",")
    qemu.create(theirs, "qcow2", size, options=option.format(their_data))
    assert main(["create", "-q", "-o", option.format(our_data), str(ours), size]) == 0
    assert qemu.check(ours).clean
    assert allocated(ours) == allocated(theirs)
    said, expected = (qemu.info(path)["format-specific"]["data"] for path in (ours, theirs))
    assert said.get("data-file-raw") == expected.get("data-file-raw")
    assert qemu.is_same(ours, theirs, "qcow2", "qcow2")
    data_path = our_data if "data_file" in options else ours
    virtual_size = qemu.info(ours)["virtual-size"]
    if mode in ("falloc", "full"):
        assert data_path.stat().st_blocks * 512 >= virtual_size
    if "data_file" in options:
        assert data_path.stat().st_size == virtual_size
    if virtual_size >= 1024:
        before = ours.stat().st_size
        qemu.io(ours, ["write -P 7 512 512", "read -P 7 512 512", "read -P 0 0 512"])
        assert qemu.check(ours).clean
        assert mode == "off" or ours.stat().st_size == before, "a preallocated image has grown"


def allocated(path: Path) -> list[tuple[int, int, bool, bool]]:
    """The map without places and without what only says whether the host has holes."""
    runs: list[tuple[int, int, bool, bool]] = []
    for entry in qemu.map_extents(path):
        start, length, present, data = entry["start"], entry["length"], entry["present"], entry["data"]
        if runs and runs[-1][2:] == (present, data):
            start, length = runs[-1][0], runs[-1][1] + length
            runs.pop()
        runs.append((start, length, present, data))
    return runs


def test_preallocates_over_a_backing_file(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With extended L2 entries the backing file still shows; without them it would not, and is refused."""
    (image_folder / "base.raw").write_bytes(b"\x09" * (1 << 20))
    ours = image_folder / "ours.qcow2"
    words = ["create", "-q", "-b", "base.raw", "-F", "raw", "-o"]
    assert main([*words, "preallocation=metadata", str(ours)]) == 1
    assert "extended_l2" in capsys.readouterr().err
    assert main([*words, "data_file=x,data_file_raw=on", str(ours)]) == 1
    assert main([*words, "preallocation=falloc,extended_l2=on", str(ours)]) == 0
    qemu.io(ours, ["read -P 9 0 1M", "write -P 3 0 512", "read -P 3 0 512", "read -P 9 512 1000k"])
    assert qemu.check(ours).clean


def test_a_data_file_is_overwritten_only_when_forced(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither file is touched when one is there already or in use; a relative name is in the image's folder."""
    path, data = image_folder / "disk.qcow2", image_folder / "disk.raw"
    words = ["create", "-q", "-o", "data_file=disk.raw", str(path), "1M"]
    data.write_bytes(b"precious")
    assert main(words) == 1
    assert "exists" in capsys.readouterr().err
    assert (data.read_bytes(), path.exists()) == (b"precious", False)
    data.unlink()
    path.write_bytes(b"precious")
    assert main(words) == 1
    assert (path.read_bytes(), data.exists()) == (b"precious", False)
    data.write_bytes(b"precious")
    with path.open("r+b") as file:
        acquire_image_lock(file.fileno(), str(path), writable=True)
        assert main([*words, "--force"]) == 1
    assert (path.read_bytes(), data.read_bytes()) == (b"precious", b"precious")
    assert main([*words, "--force"]) == 0
    assert data.stat().st_size == 1 << 20
    assert main(["check", "-q", str(path)]) == 0


def test_large_preallocations_are_quick_and_small(image_folder: Path) -> None:
    """The metadata of a disk of 1 TiB: sparse where it can be, and right to the last cluster."""
    path = image_folder / "large.qcow2"
    assert main(["create", "-q", "-o", "preallocation=metadata,cluster_size=2M", str(path), "1T"]) == 0
    assert path.stat().st_blocks * 512 < 16 << 20
    assert qemu.check(path).clean
    qemu.io(path, [f"write -P 5 {(1 << 40) - 512} 512", f"read -P 5 {(1 << 40) - 512} 512"])


@pytest.mark.parametrize("size", ["1000", "4M", "3G"])
def test_makes_version_1(size: str, image_folder: Path) -> None:
    """A version 1 image is as qemu-img makes it, byte for byte in what QEMU reads of it."""
    ours, theirs = image_folder / "ours.qcow", image_folder / "theirs.qcow"
    qemu.create(theirs, "qcow", size)
    assert main(["create", "-q", "-f", "qcow", str(ours), size]) == 0
    same_info(ours, theirs, "qcow")
    qemu.io(ours, ["write -P 7 512 512", "read -P 7 512 512"], "qcow")


@pytest.mark.parametrize("format_name", ["qcow2", "qcow"])
@pytest.mark.parametrize("size", [None, "8M"])
def test_makes_overlays(format_name: str, size: str | None, image_folder: Path) -> None:
    """Over a backing file the name and the format are recorded, and the size is its size when none is given."""
    qemu.create(image_folder / "base.qcow2", "qcow2", "3M")
    qemu.io(image_folder / "base.qcow2", ["write -P 9 1M 64k"])
    ours, theirs = image_folder / "ours", image_folder / "theirs"
    qemu.create(theirs, format_name, size, backing="base.qcow2", backing_format="qcow2")
    words = ["-f", format_name, "-b", "base.qcow2", "-F", "qcow2", str(ours), *([size] if size else [])]
    assert main(["create", "-q", *words]) == 0
    same_info(ours, theirs, format_name)
    qemu.io(ours, ["read -P 9 1M 64k", "write -P 3 0 512", "read -P 3 0 512"], format_name)
    if format_name == "qcow2":
        assert qemu.check(ours).clean


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-o", "cluster_size=3000", "{}", "1M"], "power of two"),
        (["-o", "compat=0.10,extended_l2=on", "{}", "1M"], "needs compat=1.1"),
        (["-o", "compat=0.10,data_file=x", "{}", "1M"], "data_file needs compat=1.1"),
        (["-o", "data_file_raw=on", "{}", "1M"], "data_file_raw needs a data_file"),
        (["-o", "data_file={}", "{}", "1M"], "its own data file"),
        (["-o", "data_file=nbd:x", "{}", "1M"], "not a plain local path"),
        (["-o", "preallocation=half", "{}", "1M"], "expected off, metadata, falloc, full"),
        (["-f", "qcow", "-o", "preallocation=full", "{}", "1M"], "unknown option preallocation"),
        (["-o", "cluster_size=512,data_file=" + "x" * 450, "{}", "1M"], "do not fit into the first cluster"),
        (["-b", "nowhere", "-F", "raw", "{}"], "No such file"),
        (["-b", "nowhere", "{}", "1M"], "backing format is missing"),
        (["{}"], "size is missing"),
        (["{}", "10q"], "bad size"),
        (["{}", "9E"], "too large"),
        (["-o", "cluster_size=512", "{}", "1P"], "larger cluster_size"),
    ],
)
def test_refuses(words: list[str], reason: str, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be made is one line with the reason, exit code 1, and no file."""
    path = image_folder / "new.qcow2"
    assert main(["create", *(word.format(path) for word in words)]) == 1
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1
    assert os.listdir(image_folder) == []


def test_overwrites_only_when_forced(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that exists is left alone without --force; with it, and never while in use, it is replaced."""
    path = image_folder / "disk.qcow2"
    path.write_bytes(b"precious" * 100_000)
    assert main(["create", str(path), "1M"]) == 1
    assert "exists" in capsys.readouterr().err
    assert path.read_bytes() == b"precious" * 100_000
    assert main(["create", "-q", "--force", str(path), "1M"]) == 0
    assert qemu.check(path).clean
