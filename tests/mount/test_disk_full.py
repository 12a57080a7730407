"""The disk below the image fills up: clients get ENOSPC, the image stays consistent, and goes on with room again."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support import loops, qemu
from tests.support.loops import EXT4, served
from tests.support.mounting import Mounted
from tests.support.oracle import DiskModel, first_difference, reference_bytes

pytestmark = [pytest.mark.mount, pytest.mark.root]

SIZE = 64 << 20
HOST_SIZE = 12 << 20
BTRFS_SIZE = 112 << 20
BLOCK = 16 << 10
LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def small_disk(folder: Path, kind: str) -> Iterator[Path]:
    """A small file system of its own: ``tmpfs``, or ``ext4`` or ``btrfs`` on a loop device."""
    point = folder / "small"
    point.mkdir()
    if kind == "tmpfs":
        qemu.must_run("mount", "-t", "tmpfs", "-o", f"size={HOST_SIZE}", "tmpfs", point)
        try:
            yield point
        finally:
            qemu.must_run("umount", point)
        return
    disk = folder / "small.raw"
    with open(disk, "wb") as stream:
        stream.truncate(BTRFS_SIZE if kind == "btrfs" else HOST_SIZE)
    if kind == "btrfs":
        qemu.must_run("mkfs.btrfs", "-q", "-f", disk)
    else:
        # Small blocks: with those of 4096 bytes, the default on Ubuntu, a third of the disk is journal.
        qemu.must_run("mkfs.ext4", "-q", "-F", "-m", "0", "-b", "1024", disk)
    with loops.loop_device(disk) as device, loops.mounted_file_system(device, point):
        yield point


def fill_up(folder: Path, *, leave: int = 0) -> Path:
    """A file that takes all space but about ``leave`` bytes."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as stream:
        for n_bytes in (1 << 20, 1 << 16, 1 << 12):
            try:
                while True:
                    stream.write(bytes(n_bytes))
                    os.fsync(stream.fileno())
            except OSError as exc:
                if exc.errno != errno.ENOSPC:
                    raise
        stream.truncate(max(0, stream.tell() - leave))
    return filler


def block_of(number: int) -> mmap.mmap:
    """A page-aligned block, as O_DIRECT wants it, that says which one it is."""
    block = mmap.mmap(-1, BLOCK)
    block.write(number.to_bytes(4, "big") * (BLOCK // 4))
    return block


def write_blocks(fd: int, numbers: range, model: DiskModel) -> int | None:
    """Write the numbered blocks one after the other into the file and the model; the number that found no space."""
    for number in numbers:
        block = block_of(number)
        try:
            assert os.pwrite(fd, block, number * BLOCK) == BLOCK
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
            return number
        model.write(number * BLOCK, block[:])
    return None


@contextmanager
def opened(file: Path, flags: int = 0) -> Iterator[int]:
    """The file, open for reading and writing."""
    fd = os.open(file, os.O_RDWR | flags)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=512", "v1"])
def test_direct_writes_go_on_after_enospc(tmp_path: Path, options: str, kind: str) -> None:
    """A direct write gets ENOSPC, what was written stays, and with room again the same write succeeds; no leaks."""
    model = DiskModel(bytes(SIZE))
    format_name = "qcow" if options == "v1" else "qcow2"
    with small_disk(tmp_path, kind) as folder:
        image = folder / "i.img"
        qemu.create(image, format_name, SIZE, options="" if options == "v1" else options)
        filler = folder / "filler"
        filler.write_bytes(bytes(HOST_SIZE // 2))
        last = SIZE // BLOCK
        with served(image) as mount, opened(mount.file, os.O_DIRECT) as fd:
            full_at = write_blocks(fd, range(last), model)
            assert full_at is not None
            assert full_at > 50
            filler.unlink()
            os.fsync(fd)
            assert write_blocks(fd, range(full_at, full_at + 50), model) is None
            os.fsync(fd)
        assert first_difference(reference_bytes_beside(image, format_name, tmp_path), model.data) == ""
        if format_name == "qcow2":
            result = qemu.check(image)
            assert result.clean, result.text


def sparse_image(image: Path, options: str, folder: Path) -> None:
    """An image that was copied without its zeroes, so that tables have holes; with a first cluster, and a snapshot
    where it is to have that."""
    made = folder / "made.img"
    name = "qcow" if options == "v1" else "qcow2"
    qemu.create(made, name, SIZE, options="" if options in ("v1", "snapshot") else options)
    if options != "v1":
        qemu.must_run("qemu-io", "-f", name, "-c", f"write -P 1 {SIZE - (1 << 20)} 64k", made)
    if options == "snapshot":
        qemu.must_run("qemu-img", "snapshot", "-c", "s", made)
    qemu.must_run("cp", "--sparse=always", made, image)
    made.unlink()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize(
    "options",
    ["cluster_size=64k", "cluster_size=4k,refcount_bits=64", "cluster_size=512", "extended_l2=on", "snapshot", "v1"],
)
def test_what_was_written_before_the_disk_was_full_stays(tmp_path: Path, options: str, kind: str) -> None:
    """No fsync before, holes below the tables, no room until after the unmount: fsync and closing succeed, all that
    was answered with success is there, and nothing has leaked."""
    format_name = "qcow" if options == "v1" else "qcow2"
    with small_disk(tmp_path, kind) as folder:
        image = folder / "i.img"
        sparse_image(image, options, tmp_path)
        model = DiskModel(reference_bytes_beside(image, format_name, tmp_path))
        numbers = range(0, SIZE // BLOCK, 3)
        with served(image) as mount, opened(mount.file, os.O_DIRECT) as fd:
            full_at = [number for number in numbers if write_blocks(fd, range(number, number + 1), model) is not None]
            assert 10 < len(full_at) < len(numbers) - 50
            os.fsync(fd)
        found = reference_bytes_beside(image, format_name, tmp_path)
        for number in full_at:  # a part of what has failed may be there
            start = number * BLOCK
            model.write(start, found[start : start + BLOCK])
        assert first_difference(found, model.data) == ""
        if format_name == "qcow2":
            result = qemu.check(image)
            assert result.clean, result.text


def reference_bytes_beside(image: Path, format_name: str, folder: Path) -> bytes:
    """What QEMU reads, by way of a file that is not on the small disk."""
    copy = folder / "copy.img"
    copy.write_bytes(image.read_bytes())
    return reference_bytes(copy, format_name)


def check_copy_of(image: Path, folder: Path) -> qemu.CheckResult:
    """What qemu-img check says of an image that is in use."""
    copy = folder / "copy.img"
    copy.write_bytes(image.read_bytes())
    return qemu.check(copy)


def test_buffered_writes_report_enospc_at_fsync(tmp_path: Path) -> None:
    """What the page cache took and the image has no room for is an error of fsync; written again later, it stays."""
    model = DiskModel(bytes(SIZE))
    with small_disk(tmp_path, "tmpfs") as folder:
        image = folder / "i.img"
        qemu.create(image, "qcow2", SIZE)
        filler = folder / "filler"
        filler.write_bytes(bytes(HOST_SIZE - (4 << 20)))
        numbers = range((8 << 20) // BLOCK)
        with served(image) as mount, opened(mount.file) as fd:
            if write_blocks(fd, numbers, model) is None:
                with pytest.raises(OSError) as caught:
                    os.fsync(fd)
                assert caught.value.errno == errno.ENOSPC
            filler.unlink()
            assert write_blocks(fd, numbers, model) is None
            os.fsync(fd)
        result = qemu.check(image)
        assert result.clean, result.text
        assert first_difference(reference_bytes_beside(image, "qcow2", tmp_path), model.data) == ""


@pytest.mark.parametrize(
    "options", ["cluster_size=64k", "cluster_size=4k", "cluster_size=64k,extended_l2=on", "data_file", "v1"]
)
def test_what_was_written_before_btrfs_was_full_stays(tmp_path: Path, options: str) -> None:
    """btrfs takes new space to write over a table: fsync and closing succeed all the same."""
    size = 256 << 20
    model = DiskModel(bytes(size))
    with small_disk(tmp_path, "btrfs") as folder:
        image = folder / "i.img"
        format_name = "qcow" if options == "v1" else "qcow2"
        given = {"v1": "", "data_file": f"data_file={folder}/data.raw"}.get(options, options)
        qemu.create(image, format_name, size, options=given)
        with served(image) as mount, opened(mount.file, os.O_DIRECT) as fd:
            full_at = write_blocks(fd, range(size // BLOCK), model)
            assert full_at is not None
            assert full_at > 500
            os.fsync(fd)
        found = reference_bytes_beside(image, format_name, tmp_path)
        assert first_difference(found[: full_at * BLOCK], model.read(0, full_at * BLOCK)) == ""
        if format_name == "qcow2":
            result = qemu.check(image)
            assert result.clean, result.text


# Clusters of a page at least: a smaller table would find room in a page that data has taken already.
@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=4k,refcount_bits=64"])
@pytest.mark.parametrize("syncs", [True, False], ids=["fsync", "unmount"])
def test_metadata_finds_its_space_when_others_fill_the_disk(tmp_path: Path, syncs: bool, options: str) -> None:
    """Somebody else takes all that is left: fsync, close and unmount succeed all the same, without a leak."""
    model = DiskModel(bytes(SIZE))
    with small_disk(tmp_path, "tmpfs") as folder:
        image = folder / "i.img"
        qemu.create(image, "qcow2", SIZE, options=options)
        with served(image) as mount, opened(mount.file, os.O_DIRECT) as fd:
            assert write_blocks(fd, range((9 << 20) // BLOCK), model) is None
            fill_up(folder)
            if syncs:
                os.fsync(fd)
                assert check_copy_of(image, tmp_path).corruptions == 0
        result = qemu.check(image)
        assert result.clean, result.text
        assert first_difference(reference_bytes_beside(image, "qcow2", tmp_path), model.data) == ""


@pytest.mark.parametrize("direct_io", [False, True], ids=["cached", "direct"])
def test_file_system_in_the_guest_survives_enospc(tmp_path: Path, direct_io: bool) -> None:
    """ext4 on a loop device gets an error when the image can't grow; with room again it is repaired and goes on."""
    with small_disk(tmp_path, "tmpfs") as folder:
        image = folder / "i.img"
        qemu.create(image, "qcow2", SIZE)
        with served(image) as mount, loops.loop_device(mount.file, direct_io=direct_io) as device:
            qemu.must_run(*EXT4.make, device)
            with loops.mounted_file_system(device, tmp_path / "guest") as guest:
                kept = loops.write_files(guest, seed=1, n_bytes=2 << 20)
                sync_file_system(guest)
                filler = fill_up(folder, leave=1 << 20)
                with pytest.raises(OSError) as caught:
                    write_files_durably(guest, seed=2, n_bytes=8 << 20)
                assert caught.value.errno in (errno.ENOSPC, errno.EIO, errno.EROFS)
            filler.unlink()
            repaired = qemu.run("e2fsck", "-fy", device)
            assert repaired.code in (0, 1), repaired.stdout
            with loops.mounted_file_system(device, tmp_path / "guest") as guest:
                more = loops.write_files(guest, seed=3, n_bytes=1 << 20)
                assert loops.file_sums(guest).items() >= (kept | more).items()
            qemu.must_run(*EXT4.check, device)
        result = qemu.check(image)
        assert result.clean, result.text


def write_files_durably(folder: Path, *, seed: int, n_bytes: int) -> None:
    """Write files, and raise OSError if not all of them can be made durable."""
    loops.write_files(folder, seed=seed, n_bytes=n_bytes)
    sync_file_system(folder)


def sync_file_system(folder: Path) -> None:
    """Write back all of the file system that ``folder`` is in. Raises OSError where something of it was lost."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        if LIBC.syncfs(fd):
            raise OSError(ctypes.get_errno(), "syncfs")
        os.fsync(fd)
    finally:
        os.close(fd)


def test_the_end_on_a_disk_that_loses_writes(tmp_path: Path) -> None:
    """The host's file system lies on a thin device that is full: the kernel drops what it had taken. fsync fails, the
    disk is read-only from then on, and the daemon ends with exit code 6 and a line that names the image."""
    pool, point, mount_point = tmp_path / "pool", tmp_path / "small", tmp_path / "mnt"
    for folder in (pool, point, mount_point):
        folder.mkdir()
    qemu.must_run("mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", pool)
    try:
        disk = pool / "thin.raw"
        with open(disk, "wb") as stream:
            stream.truncate(64 << 20)
        qemu.must_run("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", disk)
        with loops.loop_device(disk) as device, loops.mounted_file_system(device, point):
            image = point / "i.qcow2"
            qemu.create(image, "qcow2", SIZE)
            os.sync()
            with Mounted(image, mount_point) as mount:
                fd = os.open(mount.file, os.O_RDWR | os.O_DIRECT)
                write_blocks(fd, range(1200), DiskModel(bytes(SIZE)))
                with pytest.raises(OSError) as caught:
                    os.fsync(fd)
                assert caught.value.errno in (errno.EIO, errno.ENOSPC, errno.EROFS)
                with pytest.raises(OSError):
                    os.pwrite(fd, block_of(0), 0)
                with suppress(OSError):  # it tells of the failed flush again
                    os.close(fd)
                qemu.must_run("fusermount3", "-u", mount_point)
                log = mount.wait_for_end(6)
            assert str(image) in log.splitlines()[-1]
            assert "Traceback" not in log
    finally:
        qemu.must_run("umount", "-l", pool)
