"""Discard, write zeroes and holes through a mount: fallocate, fstrim over a loop device, SEEK_DATA and SEEK_HOLE."""

from __future__ import annotations

import json
import os
import random
import time
from functools import partial
from pathlib import Path

import pytest

from qcowfuse.fuse.holes_at_once import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from tests.support import qemu
from tests.support.loops import BTRFS, EXT4, XFS, FileSystem, loop_device, mounted_file_system, served
from tests.support.mounting import check_image_file, create_image, wait_until
from tests.support.syscalls import fallocate

MIB = 1 << 20
pytestmark = [pytest.mark.mount]


@pytest.mark.parametrize("options", [(), ("-o", "compat=0.10"), ("-o", "cluster_size=16k,extended_l2=on")])
@pytest.mark.parametrize("arguments", [(), ("--no-writeback-cache",), ("--discard", "ignore")])
def test_zeroing_at_any_offset(tmp_path: Path, options: tuple[str, ...], arguments: tuple[str, ...]) -> None:
    """Holes punched and ranges zeroed anywhere, between writes, read as zeroes and touch nothing else."""
    image = create_image(tmp_path / "disk.qcow2", "8M", *options)
    chooser = random.Random(1)
    expected = bytearray(8 * MIB)
    with served(image, *arguments) as mount:
        fd = os.open(mount.file, os.O_RDWR)
        for number in range(120):
            length = chooser.choice([1, 700, 4096, 65536, 300_000])
            offset = chooser.randrange(8 * MIB - length)
            if number % 3:
                data = chooser.randbytes(length)
                os.pwrite(fd, data, offset)
            else:
                data = bytes(length)
                mode = chooser.choice([FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE])
                fallocate(fd, mode | FALLOC_KEEP_SIZE, offset, length)
            expected[offset : offset + length] = data
        assert os.pread(fd, 8 * MIB, 0) == expected
        os.close(fd)
    check_image_file(image)
    raw = tmp_path / "raw"
    qemu.must_run("qemu-img", "convert", "-O", "raw", image, raw)
    assert raw.read_bytes() == expected


def test_what_fallocate_refuses(tmp_path: Path) -> None:
    """Modes that would move data are refused, and so is all that needs a larger disk; past the end is nothing to
    punch. Inside of the disk, space can be set aside."""
    with served(create_image(tmp_path / "disk.qcow2", "1M")) as mount:
        fd = os.open(mount.file, os.O_RDWR)
        for mode in (0x08, 0x20):
            with pytest.raises(OSError, match=r"not supported|Invalid argument"):
                fallocate(fd, mode, 0, 4096)
        for mode in (0, FALLOC_ZERO_RANGE):
            with pytest.raises(OSError, match="No space"):
                fallocate(fd, mode, MIB - 4096, 8192)
        for mode in (0, FALLOC_KEEP_SIZE):
            fallocate(fd, mode, 0, 4096)
        fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, MIB + 4096, 4096)
        fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, MIB - 4096, 8192)
        assert os.fstat(fd).st_size == MIB
        os.close(fd)


def test_holes_are_where_qemu_sees_them(tmp_path: Path) -> None:
    """SEEK_DATA and SEEK_HOLE on a read-only mount follow the mapping of the image and of its backing file."""
    base = create_image(tmp_path / "base.qcow2", "4M")
    qemu.must_run("qemu-io", "-c", "write -P 1 1M 64k", "-c", "write -P 1 3M 64k", base)
    image = create_image(tmp_path / "disk.qcow2", "4M", "-b", str(base), "-F", "qcow2")
    qemu.must_run("qemu-io", "-c", "write -P 2 2M 128k", "-c", "write -z 3M 64k", image)
    entries = json.loads(qemu.must_run("qemu-img", "map", "--output=json", image))
    expected = [entry["start"] + step for entry in entries if entry["data"] for step in (0, entry["length"])]
    with served(image, "-r") as mount:
        fd = os.open(mount.file, os.O_RDONLY)
        found, place = [], 0
        while True:
            try:
                start = os.lseek(fd, place, os.SEEK_DATA)
            except OSError:
                break
            place = os.lseek(fd, start, os.SEEK_HOLE)
            found += [start, place]
        os.close(fd)
        assert found == expected
        wait_until(lambda: os.stat(mount.file).st_blocks * 512 == 192 * 1024, "the count of what is allocated")


def test_new_data_is_never_taken_for_a_hole(tmp_path: Path) -> None:
    """Data that only the page cache has yet is found by SEEK_DATA: a sparse copy must not lose it."""
    with served(create_image(tmp_path / "disk.qcow2", "64M")) as mount:
        fd = os.open(mount.file, os.O_RDWR)
        os.pwrite(fd, b"new", 40 * MIB)
        assert os.lseek(fd, 39 * MIB, os.SEEK_DATA) <= 40 * MIB
        os.close(fd)


FLUSHED_SOON = "import qcowfuse.daemon.session as session; session._DISCARD_FLUSH_SECONDS = 0.2"
"""What is discarded is given back with a flush, two seconds later at most."""


def has_shrunk(point: Path, image: Path, most: int, seconds: float) -> bool:
    """Trim, and see whether the image takes less than ``most`` bytes on the host at most ``seconds`` later."""
    qemu.must_run("fstrim", point)  # again each time: a file system frees the blocks of a deleted file when it likes
    end = time.monotonic() + seconds
    while image.stat().st_blocks * 512 >= most and time.monotonic() < end:
        time.sleep(0.05)
    return image.stat().st_blocks * 512 < most


@pytest.mark.root
@pytest.mark.parametrize("direct_io", [False, True])
@pytest.mark.parametrize("system", [EXT4, XFS, BTRFS], ids=lambda system: system.name)
def test_fstrim_shrinks_the_image_file(tmp_path: Path, system: FileSystem, direct_io: bool) -> None:
    """What a file system no longer needs goes back to the host, twice in a row, and nothing else is harmed."""
    image = create_image(tmp_path / "disk.qcow2", "512M")
    keep = random.Random(2).randbytes(3 * MIB)
    patch = "" if system is EXT4 and direct_io else FLUSHED_SOON
    with served(image, patch=patch) as mount:
        with loop_device(mount.file, direct_io=direct_io) as device:
            qemu.must_run(*system.make, device)
            with mounted_file_system(device, tmp_path / "point") as point:
                for _ in range(2):
                    (point / "keep").write_bytes(keep)
                    (point / "drop").write_bytes(os.urandom(64 * MIB))
                    qemu.must_run("sync", "-f", point)
                    full = image.stat().st_blocks * 512
                    (point / "drop").unlink()
                    qemu.must_run("sync", "-f", point)
                    wait_until(
                        partial(has_shrunk, point, image, full - 48 * MIB, 0.4 if patch else 2.2), "a smaller image"
                    )
            qemu.must_run(*system.check, device)
            with mounted_file_system(device, tmp_path / "point") as point:
                assert (point / "keep").read_bytes() == keep
    check_image_file(image)
