"""The disk below the image loses writes: a failed fdatasync is final, and everybody can see it."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support import qemu
from tests.support.loops import loop_device, mounted_file_system
from tests.support.mounting import Mounted, create_image, is_mounted

pytestmark = [pytest.mark.mount, pytest.mark.root]

MIB = 1 << 20
LOST = (errno.EIO, errno.ENOSPC)
"""What the kernel says of pages that it could not write: a loop device passes on that its file has no space."""


@contextmanager
def failing_disk(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A file system on a loop device whose file is sparse, on a tmpfs that can be filled: then writes that the page
    cache has taken fail on their way down. Gives the folder for the image, and the one to fill."""
    below = folder / "below"
    below.mkdir()
    qemu.must_run("mount", "-t", "tmpfs", "-o", f"size={12 * MIB}", "tmpfs", below)
    try:
        disk = below / "disk.raw"
        with open(disk, "wb") as stream:
            stream.truncate(64 * MIB)
        qemu.must_run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=0", disk)
        with loop_device(disk) as device, mounted_file_system(device, folder / "host", "errors=continue") as host:
            yield host, below
    finally:
        qemu.must_run("umount", below)


def fill(folder: Path) -> Path:
    """Take all the space."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(1 << 16))
    return filler


def counters(file: Path) -> dict[str, int]:
    """Those that tell of the image's state."""
    return {
        name: int(os.getxattr(file, f"user.qcowfuse.image.{name}"))
        for name in ("read_only", "flush_failed", "corrupt")
    }


def test_a_failed_flush_is_final_and_can_be_seen(tmp_path: Path) -> None:
    """A medium that fails at fsync: an error then and ever after though it has recovered, the image read-only, the
    log and the extended attributes say so, what was fsynced before is there."""
    mount_point = tmp_path / "mnt"
    mount_point.mkdir()
    with failing_disk(tmp_path) as (host, below):
        image = create_image(host / "disk.qcow2", "48M")
        early = os.urandom(MIB)
        with Mounted(image, mount_point) as mount:
            fd = os.open(mount.file, os.O_RDWR)
            os.pwrite(fd, early, 0)
            os.fsync(fd)
            assert counters(mount.file) == {"read_only": 0, "flush_failed": 0, "corrupt": 0}
            filler = fill(below)
            for number in range(16):
                os.pwrite(fd, os.urandom(MIB), (2 + number) * MIB)
            with pytest.raises(OSError) as caught:
                os.fsync(fd)
            assert caught.value.errno in LOST
            filler.unlink()
            assert counters(mount.file) == {"read_only": 1, "flush_failed": 1, "corrupt": 0}
            for _ in range(2):
                with pytest.raises(OSError) as caught:
                    os.fsync(fd)
                assert caught.value.errno in LOST
            with pytest.raises(OSError) as caught:
                os.open(mount.file, os.O_RDWR)
            assert caught.value.errno == errno.EROFS
            assert os.pread(fd, MIB, 0) == early
            with pytest.raises(OSError):
                os.close(fd)
            subprocess.run(["fusermount3", "-u", mount_point], check=True)
            log = mount.wait_for_end(6)
            assert "the image is read-only from now on" in log
            assert "could not be closed cleanly" in log
            assert not is_mounted(mount_point)
        found = qemu.run("qemu-img", "check", image)
        assert found.code in (0, 3), found.stdout
        raw = tmp_path / "left.raw"
        qemu.must_run("qemu-img", "convert", "-O", "raw", image, raw)
        with raw.open("rb") as stream:
            assert stream.read(MIB) == early


def test_what_a_throw_away_overlay_loses_is_told(tmp_path: Path) -> None:
    """A flush of it waits for no disk; when the kernel has tried in vain to write it back, the next one fails."""
    mount_point = tmp_path / "mnt"
    mount_point.mkdir()
    image = create_image(tmp_path / "disk.qcow2", "48M")
    with failing_disk(tmp_path) as (host, below):
        with Mounted(image, mount_point, f"--ephemeral={host}") as mount:
            fd = os.open(mount.file, os.O_RDWR)
            fill(below)
            for number in range(16):
                os.pwrite(fd, os.urandom(MIB), number * MIB)
            os.fsync(fd)
            assert counters(mount.file)["flush_failed"] == 0
            qemu.run("sync", "-f", host)
            with pytest.raises(OSError) as caught:
                os.fsync(fd)
            assert caught.value.errno in LOST
            assert counters(mount.file)["flush_failed"] == 1
            with suppress(OSError):
                os.close(fd)
            subprocess.run(["fusermount3", "-u", mount_point], check=True)
            mount.wait_for_end(6)
