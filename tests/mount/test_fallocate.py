"""fallocate of the served file: real space below the disk, contents and size as before, ENOSPC when there is none."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from qcowfuse.fuse.holes_at_once import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE
from tests.mount.test_disk_full import small_disk
from tests.support import qemu
from tests.support.loops import served
from tests.support.mounting import check_image_file, create_image
from tests.support.syscalls import fallocate

pytestmark = pytest.mark.mount

MIB = 1 << 20
SIZE = 16 * MIB


def space_of(*files: Path) -> int:
    """Bytes that the host's file system has taken for the files."""
    return sum(file.stat().st_blocks * 512 for file in files)


@pytest.mark.parametrize(
    "options", [(), ("--no-writeback-cache",), ("--growable",)], ids=["writeback", "through", "grow"]
)
def test_space_is_set_aside(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Space is there, what was written stays, later writes take none; past the end only where the disk grows."""
    image = create_image(tmp_path / "disk.qcow2", str(SIZE))
    expected = bytearray(SIZE)
    with served(image, *options) as mount, mount.file.open("r+b", buffering=0) as file:
        fd = file.fileno()
        file.write(b"start" * 1000)
        expected[:5000] = b"start" * 1000
        fallocate(fd, 0, 1000, 5 * MIB)
        fallocate(fd, FALLOC_KEEP_SIZE, 8 * MIB, 100 * MIB)
        os.fsync(fd)
        taken = space_of(image)
        assert 13 * MIB <= taken < 14 * MIB
        assert os.fstat(fd).st_size == SIZE
        assert os.pread(fd, SIZE, 0) == expected
        for offset in (70_000, 4 * MIB, 9 * MIB, SIZE - 100_000):
            os.pwrite(fd, b"w" * 100_000, offset)
            expected[offset : offset + 100_000] = b"w" * 100_000
        os.fsync(fd)
        assert space_of(image) == taken
        if "--growable" in options:
            os.posix_fallocate(fd, SIZE, MIB)
            assert os.fstat(fd).st_size == SIZE + MIB
            expected.extend(bytes(MIB))
        else:
            with pytest.raises(OSError) as caught:
                os.posix_fallocate(fd, SIZE, MIB)
            assert caught.value.errno == errno.ENOSPC
        os.posix_fallocate(fd, 0, os.fstat(fd).st_size)
        assert os.pread(fd, 2 * SIZE, 0) == expected
    assert space_of(image) > len(expected)
    check_image_file(image)
    qemu.must_run("qemu-img", "convert", "-O", "raw", image, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == expected


KINDS: dict[str, tuple[str, ...]] = {
    "v1": ("qcow",),
    "v2": ("qcow2", "-o", "compat=0.10"),
    "extended overlay": ("qcow2", "-o", "extended_l2=on", "-b", "base.raw", "-F", "raw"),
    "overlay": ("qcow2", "-b", "base.raw", "-F", "raw"),
    "data file": ("qcow2", "-o", "data_file={folder}/data.bin"),
    "raw data file": ("qcow2", "-o", "data_file={folder}/raw.bin,data_file_raw=on"),
    "metadata": ("qcow2", "-o", "preallocation=metadata"),
    "snapshot": ("qcow2",),
}


@pytest.mark.parametrize("kind", KINDS)
def test_space_on_every_kind_of_image(tmp_path: Path, kind: str) -> None:
    """The whole disk gets space, in the image or the data file, and QEMU reads what it read before."""
    with (tmp_path / "base.raw").open("wb") as base:
        base.truncate(SIZE)
        base.seek(MIB)
        base.write(b"B" * MIB)
    image = tmp_path / "disk.img"
    format_name, *options = (option.format(folder=tmp_path) for option in KINDS[kind])
    qemu.must_run("qemu-img", "create", "-q", "-f", format_name, *options, "disk.img", str(SIZE), cwd=tmp_path)
    qemu.must_run("qemu-io", "-f", format_name, "-c", "write -P 7 300k 1M", image)
    if kind == "snapshot":
        qemu.must_run("qemu-img", "snapshot", "-c", "s", image)
    before = qemu_bytes(image, format_name)
    with served(image) as mount:
        with mount.file.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, SIZE)
        assert mount.file.read_bytes() == before
    if format_name == "qcow2":
        check_image_file(image)
    assert qemu_bytes(image, format_name) == before
    assert space_of(image, *tmp_path.glob("*.bin")) >= SIZE


def qemu_bytes(image: Path, format_name: str) -> bytes:
    """The disk as QEMU reads it."""
    raw = image.with_name("converted")
    qemu.must_run("qemu-img", "convert", "-f", format_name, "-O", "raw", image, raw)
    return raw.read_bytes()


@pytest.mark.root
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize("options", ["compat=1.1", "compat=0.10", "extended_l2=on"])
def test_a_full_host_says_so(tmp_path: Path, kind: str, options: str) -> None:
    """More than the host has: ENOSPC, contents as before, no leaks, and a discard gives the space back."""
    with small_disk(tmp_path, kind) as folder:
        image = create_image(folder / "disk.qcow2", "1G", "-o", options)
        with served(image) as mount, mount.file.open("r+b", buffering=0) as file:
            fd = file.fileno()
            file.write(b"data" * 1000)
            os.fsync(fd)
            before = free_space(folder)
            with pytest.raises(OSError) as caught:
                os.posix_fallocate(fd, 0, 1 << 30)
            assert caught.value.errno == errno.ENOSPC
            assert free_space(folder) == before, "it was clear that there is not enough"
            with pytest.raises(OSError) as caught:
                os.posix_fallocate(fd, 0, before + image.stat().st_blocks * 512)  # and tables need some, too
            assert caught.value.errno == errno.ENOSPC
            assert os.pread(fd, 8000, 0) == (b"data" * 1000).ljust(8000, b"\0")
            fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 0, 1 << 30)
            os.fsync(fd)
            os.fsync(fd)
            assert free_space(folder) > before * 3 // 4
            os.posix_fallocate(fd, 0, 4 * MIB)
            assert free_space(folder) < before - 3 * MIB
        check_image_file(image)


def free_space(folder: Path) -> int:
    """Bytes that the file system of ``folder`` has left."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def test_tools_that_preallocate(tmp_path: Path) -> None:
    """qemu-img's preallocation of a raw target, and fallocate(1)."""
    image = create_image(tmp_path / "disk.qcow2", str(SIZE))
    with served(image) as mount:
        subprocess.run(["fallocate", "-l", "1M", mount.file], check=True)
        source = tmp_path / "source"
        source.write_bytes(b"s" * SIZE)
        for preallocation in ("falloc", "full"):
            qemu.must_run(
                *("qemu-img", "convert", "-O", "raw", "-o", f"preallocation={preallocation}"), source, mount.file
            )
            assert mount.file.read_bytes() == b"s" * SIZE
    check_image_file(image)
