"""Images, backing files and data files on block devices: their length, read-only ones, and making images there."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from qcowfuse.cli.img.main import main
from qcowfuse.storage.syscalls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, fallocate
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


def write_far_apart(device: Path, n_places: int) -> None:
    """Data in as many L2 tables: with more than 32 of them, what is free is looked for in the background."""
    qemu.io(device, [f"write -P 7 {number << 29} 4k" for number in range(n_places)])


def test_a_large_image_on_a_device_takes_new_clusters(tmp_path: Path) -> None:
    """A device has no room behind its end: the first write waits until the clusters that are free are known."""
    raw = backing(tmp_path, 16 * MIB)
    with loop_device(raw) as device:
        qemu.create(device, "qcow2", "1T")
        write_far_apart(device, 60)
        with served(device) as mount:
            fd = os.open(mount.file, os.O_RDWR | os.O_DSYNC)
            for number in range(20):
                os.pwrite(fd, b"x" * 4096, MIB * (number + 1))
            os.close(fd)
        assert qemu.check(device).clean
        qemu.io(device, [f"read -P 120 {MIB * 20} 4k", f"read -P 7 {59 << 29} 4k"])


def test_a_device_that_is_full(tmp_path: Path) -> None:
    """ENOSPC is told, what was synced stays, metadata finds no place behind the end; a discard makes room again."""
    raw = backing(tmp_path, 5 * MIB + 32768)
    with loop_device(raw) as device:
        qemu.create(device, "qcow2", "1T")
        with served(device) as mount:
            fd = os.open(mount.file, os.O_RDWR | os.O_DSYNC)
            n_written = 0
            with pytest.raises(OSError, match="No space left"):  # noqa: PT012
                while n_written < 200:
                    os.pwrite(fd, b"x" * 4096, n_written << 29)
                    n_written += 1
            assert 30 <= n_written <= 40
            os.fsync(fd)
            fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 0, 1 << 30)
            os.fsync(fd)
            os.pwrite(fd, b"y" * 4096, 5 << 29)
            os.close(fd)
            assert os.getxattr(mount.file, "user.qcowfuse.image.flush_failed") == b"0"
        assert qemu.check(device).clean
        qemu.io(device, [f"read -P 120 {number << 29} 4k" for number in range(2, n_written) if number != 5])
        qemu.io(device, [f"read -P 121 {5 << 29} 4k", "read -P 0 0 4k"])


def test_a_full_device_that_is_enlarged(tmp_path: Path) -> None:
    """As by lvextend, while it is mounted: the next write finds the room, from inside the sandbox."""
    raw = backing(tmp_path, 2 * MIB)
    with loop_device(raw) as device:
        qemu.create(device, "qcow2", "64M")
        with served(device) as mount:
            fd = os.open(mount.file, os.O_RDWR | os.O_DSYNC)
            with pytest.raises(OSError, match="No space left"):
                os.pwrite(fd, b"x" * 4 * MIB, 0)
            os.truncate(raw, 16 * MIB)
            qemu.must_run("losetup", "-c", device)
            os.pwrite(fd, b"y" * 4 * MIB, 0)
            os.close(fd)
        assert qemu.check(device).clean
        qemu.io(device, [f"read -P 121 0 {4 * MIB}"])


def test_a_disk_grows_with_the_device_of_its_data_file(tmp_path: Path) -> None:
    """By a truncation of the file that is served, after lvextend."""
    raw = backing(tmp_path, 2 * MIB)
    image = tmp_path / "disk.qcow2"
    with loop_device(raw) as device:
        qemu.create(image, "qcow2", "2M", options=f"data_file={device},data_file_raw=on")
        with served(image, ALLOWED, "--growable") as mount:
            with pytest.raises(OSError, match="File too large"):
                os.truncate(mount.file, 4 * MIB)
            os.truncate(raw, 8 * MIB)
            qemu.must_run("losetup", "-c", device)
            os.truncate(mount.file, 4 * MIB)
            with mount.file.open("r+b") as file:
                file.seek(3 * MIB)
                file.write(b"y" * MIB)
        assert qemu.check(image).clean
        qemu.io(image, ["read -P 0 2M 1M", "read -P 121 3M 1M"])


def test_a_discard_reaches_the_device(tmp_path: Path) -> None:
    """The file below a loop device gets its space back; one that cannot discard is not written to for that."""
    raw = backing(tmp_path, 32 * MIB)
    with loop_device(raw) as device:
        qemu.create(device, "qcow2", "24M")
        qemu.io(device, ["write -P 9 0 24M"])
        qemu.must_run("sync", "-f", raw)
        before = raw.stat().st_blocks
        with served(device) as mount:
            fd = os.open(mount.file, os.O_RDWR)
            fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 0, 16 * MIB)
            os.fsync(fd)
            os.close(fd)
        qemu.must_run("sync", "-f", raw)
        assert before - raw.stat().st_blocks >= 15 * MIB // 512
        assert qemu.check(device).clean
        qemu.io(device, ["read -P 0 0 16M", "read -P 9 16M 8M"])


def test_check_snapshots_and_growth_on_a_device(tmp_path: Path) -> None:
    """A refcount table that is gone is made anew inside the device; tables of several clusters find a place there,
    and where there is none, nothing is changed."""
    raw = backing(tmp_path, 16 * MIB)
    with loop_device(raw) as device:
        qemu.create(device, "qcow2", "1T")
        write_far_apart(device, 60)
        with open(device, "r+b") as stream:
            stream.seek(65536)
            stream.write(bytes(8))
        assert main(["check", "-q", "-r", "all", str(device)]) == 0
        assert qemu.check(device).clean
        for words in (["-c", "a"], ["-c", "b"], ["-d", "a"], ["-a", "b"]):
            assert main(["snapshot", *words, str(device)]) == 0
            assert qemu.check(device).clean
        assert main(["resize", "-q", str(device), "9T"]) == 0
        assert qemu.check(device).clean
        assert main(["resize", "-q", str(device), "900T"]) == 1
        assert qemu.check(device).clean
        assert qemu.info(device, "qcow2")["virtual-size"] == 9 << 40
        qemu.io(device, [f"read -P 7 {59 << 29} 4k"])


def test_an_image_on_a_device_over_one_on_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chain of two devices, as volume managers make them: it needs --allow-dir, and both are locked."""
    (tmp_path / "point").mkdir()
    raws = [tmp_path / name for name in ("a", "b")]
    for raw in raws:
        raw.write_bytes(bytes(8 * MIB))
    with loop_device(raws[0]) as base, loop_device(raws[1]) as top:
        qemu.create(base, "qcow2", "4M")
        qemu.io(base, ["write -P 1 0 4M"])
        qemu.create(top, "qcow2", backing=str(base), backing_format="qcow2")
        refused = run_qcowfuse(top, tmp_path / "point")
        assert (refused.returncode, refused.stderr.count("\n")) == (3, 1)
        assert "which is a block device: not opened; --backing-file PATH allows it, and --allow-dir" in refused.stderr
        with served(top, ALLOWED) as mount:
            mount.file.open("r+b").write(b"top")
            assert mount.file.read_bytes() == b"top" + b"\1" * (4 * MIB - 3)
            assert qemu.run("qemu-io", "-c", "write 0 512", base).code
            refused = run_qcowfuse("--lock-wait=0", ALLOWED, base, tmp_path / "point")
            assert refused.returncode == 4
        assert qemu.check(top).clean
        assert main(["map", ALLOWED, "--output=json", str(top)]) == 0
        assert json.loads(capsys.readouterr().out) == qemu.map_extents(top)
