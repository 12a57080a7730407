"""qcowfuse-img create against qemu-img create: the same answers to info, clean to check, usable by QEMU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qcowfuse.cli.img import main
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
        (["-o", "data_file=x", "{}", "1M"], "unknown option data_file"),
        (["-o", "preallocation=full", "{}", "1M"], "preallocation=full"),
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
