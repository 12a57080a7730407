"""Images, backing files and data files on block devices: their length, read-only ones, and making images there."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from qcowfuse.cli.img.main import main
from tests.support import qemu
from tests.support.images import pattern
from tests.support.loops import loop_device, served
from tests.support.mounting import run_qcowfuse

pytestmark = [pytest.mark.mount, pytest.mark.root]
MIB = 1 << 20
ALLOWED = "--allow-dir=/dev"
"""A device that an image names is opened only where that is allowed."""


def backing(folder: Path, n_bytes: int = 8 * MIB) -> Path:
    """A file full of something, to make a device of."""
    path = folder / "device.raw"
    path.write_bytes(pattern(n_bytes, seed=3, fill=1.0))
    return path


@pytest.mark.parametrize("where", ["image", "data file"])
def test_a_read_only_device_is_refused_at_once(
    tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be written is not opened for writing, be it the image or its data file; with -r it is served."""
    point = tmp_path / "point"
    point.mkdir()
    with loop_device(backing(tmp_path)) as device, ExitStack() as undo:
        if where == "image":
            image = device
            qemu.create(device, "qcow2", "64M")
        else:
            image = tmp_path / "disk.qcow2"
            qemu.create(image, "qcow2", "8M", options=f"data_file={device},data_file_raw=on")
        undo.callback(qemu.must_run, "blockdev", "--setrw", device)  # the next file on this device would have it too
        qemu.must_run("blockdev", "--setro", device)
        refused = run_qcowfuse(ALLOWED, image, point)
        assert refused.returncode == (6 if where == "image" else 3)
        assert "block device is read-only" in refused.stderr
        assert "-r" in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert main(["resize", ALLOWED, str(image), "128M"]) == 1
        assert "block device is read-only" in capsys.readouterr().err
        with served(image, "-r", ALLOWED) as mount:
            assert mount.file.stat().st_size == (64 * MIB if where == "image" else 8 * MIB)


def test_an_overlay_takes_the_size_of_a_device(tmp_path: Path) -> None:
    """Over a raw device the new disk is as large as the device, and shows what is on it."""
    raw = backing(tmp_path)
    overlay = tmp_path / "overlay.qcow2"
    with loop_device(raw, read_only=True) as device:
        assert main(["create", "-q", "-b", str(device), "-F", "raw", str(overlay)]) == 0
        assert qemu.info(overlay, "qcow2")["virtual-size"] == 8 * MIB
        with served(overlay, ALLOWED) as mount:
            assert mount.file.read_bytes() == raw.read_bytes()


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_makes_an_image_on_a_device(tmp_path: Path, preallocation: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With --force: QEMU finds it clean, and it reads as zeroes whatever lay there."""
    with loop_device(backing(tmp_path)) as device:
        words = ["create", "-q", "-o", f"preallocation={preallocation}", str(device), "4M"]
        assert main(words) == 1
        assert "exists" in capsys.readouterr().err
        assert main([*words, "--force"]) == 0
        assert qemu.check(device).clean
        qemu.io(device, ["read -P 0 0 4M", "write -P 5 1M 64k", "read -P 5 1M 64k", "read -P 0 1088k 64k"])
        assert qemu.check(device).clean
        assert main(["info", "--output=json", str(device)]) == 0
        assert json.loads(capsys.readouterr().out) == qemu.info(device, "qcow2")
        assert device.is_block_device()


def test_what_a_device_has_no_room_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image that is larger than its device is refused before anything is written; so is version 1, which grows."""
    raw = backing(tmp_path)
    before = raw.read_bytes()
    with loop_device(raw) as device:
        words = ["create", "-q", "--force"]
        assert main([*words, "-o", "preallocation=metadata", str(device), "8M"]) == 1
        assert f"a block device of {8 * MIB} bytes is too small" in capsys.readouterr().err
        assert main([*words, "-f", "qcow", str(device), "1M"]) == 1
        assert "version 1" in capsys.readouterr().err
        assert main([*words, "-o", f"data_file={device}", str(tmp_path / "i.qcow2"), "9M"]) == 1
        assert "too small" in capsys.readouterr().err
    assert raw.read_bytes() == before
    assert os.listdir(tmp_path) == ["device.raw"]


@pytest.mark.parametrize("is_raw", ["off", "on"])
def test_a_device_as_data_file(tmp_path: Path, is_raw: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is zeroed where its contents would show, and growing past its end says how long it is."""
    image = tmp_path / "disk.qcow2"
    raw = backing(tmp_path)
    before = raw.read_bytes()
    with loop_device(raw) as device:
        options = f"data_file={device},data_file_raw={is_raw}"
        assert main(["create", "-q", "--force", "-o", options, str(image), "8M"]) == 0
        qemu.io(image, ["read -P 0 0 8M"])
        assert (raw.read_bytes() == before) == (is_raw == "off")
        with served(image, ALLOWED) as mount:
            mount.file.open("r+b").write(b"x" * 5000)
            assert mount.file.read_bytes() == b"x" * 5000 + bytes(8 * MIB - 5000)
        (tmp_path / "empty").mkdir()
        refused = run_qcowfuse(image, tmp_path / "empty")
        assert refused.returncode == 3
        assert "--allow-dir /dev allows it" in refused.stderr
        assert main(["resize", ALLOWED, str(image), "9M"]) == 1
        assert f"a block device of {8 * MIB} bytes cannot have {9 * MIB}" in capsys.readouterr().err
        assert qemu.info(image, "qcow2")["virtual-size"] == 8 * MIB
        assert qemu.check(image).clean
