"""Persistent dirty bitmaps through real mounts: incremental backups by QEMU are complete."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import qemu
from tests.support.bitmaps import (
    Range,
    add_bitmap,
    granules_of,
    qemu_dirty,
    qemu_incremental_backup,
    ranges_of,
    stored_bitmaps,
)
from tests.support.loops import EXT4, loop_device, mounted_file_system, served
from tests.support.mounting import check_image_file, create_image

MIB = 1 << 20
PAGE = 4096
pytestmark = [pytest.mark.mount]


def change_at_random(file: Path, chooser: random.Random, n_changes: int) -> list[Range]:
    """Writes and holes of whole pages (the kernel writes no less) into a served file; where they were."""
    size = file.stat().st_size
    ranges = []
    fd = os.open(file, os.O_RDWR)
    for number in range(n_changes):
        n_bytes = chooser.choice([1, 2, 17, 100]) * PAGE
        start = chooser.randrange((size - n_bytes) // PAGE) * PAGE
        ranges.append((start, n_bytes))
        if number % 4 == 3:
            mode = chooser.choice(["--punch-hole", "--zero-range"])
            qemu.must_run("fallocate", mode, "--keep-size", "-o", str(start), "-l", str(n_bytes), file)
        else:
            os.pwrite(fd, chooser.randbytes(n_bytes), start)
        if number % 20 == 10:
            os.fsync(fd)
    os.close(fd)
    return ranges


@pytest.mark.parametrize("arguments", [(), ("--no-writeback-cache",)])
@pytest.mark.parametrize("options", [(), ("-o", "cluster_size=512"), ("-o", "cluster_size=16k,extended_l2=on")])
def test_what_is_dirty_after_two_mounts(tmp_path: Path, options: tuple[str, ...], arguments: tuple[str, ...]) -> None:
    """Bits add up over mounts, and QEMU sees the pages that were changed and no other."""
    image = create_image(tmp_path / "disk.qcow2", "32M", *options)
    bitmaps = {"p": PAGE, "m": MIB}
    for name, granularity in bitmaps.items():
        add_bitmap(image, name, granularity)
    ranges: list[Range] = []
    for session in range(2):
        with served(image, *arguments) as mount:
            ranges += change_at_random(mount.file, random.Random(session), 60)
        check_image_file(image)
        for name, granularity in bitmaps.items():
            expected = ranges_of(granules_of(ranges, granularity), granularity, 32 * MIB)
            assert qemu_dirty(image, name) == expected


def test_incremental_backup_by_qemu_of_a_file_system(tmp_path: Path) -> None:
    """ext4 on a loop device is changed over two mounts; each time QEMU's incremental backup equals the disk."""
    image, backup = create_image(tmp_path / "disk.qcow2", "64M"), tmp_path / "backup.raw"
    with served(image) as mount, loop_device(mount.file) as device:
        qemu.must_run(*EXT4.make, device)
    qemu.convert(image, backup, "raw", source_format="qcow2")
    add_bitmap(image, "b", 65536)
    for session in range(2):
        with served(image) as mount, loop_device(mount.file) as device:
            with mounted_file_system(device, tmp_path / "mnt") as point:
                (point / f"file{session}").write_bytes(random.Random(session).randbytes(3 * MIB))
                if session:
                    (point / "file0").unlink()
        check_image_file(image)
        assert not qemu.is_same(image, backup, "qcow2", "raw")
        assert 3 * MIB <= qemu_incremental_backup(image, "b", backup) < 40 * MIB
        assert qemu.is_same(image, backup, "qcow2", "raw")
        assert qemu_dirty(image, "b") == []


def test_a_killed_daemon_leaves_the_bitmap_in_use(tmp_path: Path) -> None:
    """After kill -9 nobody takes the bitmap for valid, and a later mount leaves it so and serves the disk."""
    image = create_image(tmp_path / "disk.qcow2", "8M")
    add_bitmap(image, "b", 65536)
    with served(image) as mount:
        fd = os.open(mount.file, os.O_RDWR)
        os.pwrite(fd, b"x" * PAGE, MIB)
        os.fsync(fd)
        mount.send_signal(signal.SIGKILL)
        mount.wait_for_end(-signal.SIGKILL)
        with suppress(OSError):  # ENOTCONN
            os.close(fd)
        qemu.must_run("fusermount3", "-u", mount.mount_point)
    for _ in range(2):
        flags = qemu.info(image)["format-specific"]["data"]["bitmaps"][0]["flags"]
        assert sorted(flags) == ["auto", "in-use"]
        assert not qemu.check(image).corruptions
        before = stored_bitmaps(image.read_bytes())["b"]
        with served(image) as mount:
            change_at_random(mount.file, random.Random(3), 8)
        assert stored_bitmaps(image.read_bytes())["b"] == before


def test_a_read_only_mount_leaves_bitmaps_alone(tmp_path: Path) -> None:
    """Mounted with -r, or as a snapshot: the image file stays the same, byte for byte."""
    image = create_image(tmp_path / "disk.qcow2", "8M")
    add_bitmap(image, "b", 65536)
    qemu.must_run("qemu-img", "snapshot", "-c", "s", image)
    before = image.read_bytes()
    for arguments in (("-r",), ("--snapshot", "s")):
        with served(image, *arguments) as mount:
            mount.file.read_bytes()
    assert image.read_bytes() == before
