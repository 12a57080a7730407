"""copy_file_range(2) on a mount: the kernel's pages and the image agree, holes stay holes, ends, and a full disk."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.mount.test_disk_full import fill_up, small_disk
from tests.mount.test_partition import MIB, N_BYTES, START, make_image
from tests.support import qemu
from tests.support.loops import served
from tests.support.mounting import check_image_file, create_image

pytestmark = [pytest.mark.mount, pytest.mark.root]

SIZE = 16 * MIB


def copied(source: int, target: int, source_off: int, off: int, n_bytes: int) -> int:
    """Copy, and ask again for what is left; how many times the kernel was asked."""
    n_calls = 0
    while n_bytes:
        n_done = os.copy_file_range(source, target, n_bytes, source_off, off)
        assert n_done > 0
        source_off, off, n_bytes = source_off + n_done, off + n_done, n_bytes - n_done
        n_calls += 1
    return n_calls


def contents(image: Path, folder: Path | None = None) -> bytes:
    """What QEMU reads, by a file in ``folder`` (default: the image's)."""
    raw = (folder or image.parent) / "contents.raw"
    qemu.must_run("qemu-img", "convert", "-O", "raw", image, raw)
    return raw.read_bytes()


@pytest.mark.parametrize(
    "options", [(), ("--no-writeback-cache",), ("--growable",)], ids=["writeback", "through", "grow"]
)
def test_pages_and_image_agree(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Ranges of any place and length, with dirty pages in the source and in the target, and old ones in the cache."""
    image = create_image(tmp_path / "disk.qcow2", str(SIZE))
    chooser = random.Random(3)
    expected = bytearray(SIZE)
    with served(image, *options) as mount, mount.file.open("r+b", buffering=0) as file:
        fd = file.fileno()
        assert int(os.getxattr(mount.file, "user.qcowfuse.libfuse.copy_file_range")) == 1
        for _ in range(60):
            for _ in range(2):
                data = chooser.randbytes(chooser.choice((100, 5000, 70_000)))
                off = chooser.randrange(SIZE - len(data))
                os.pwrite(fd, data, off)
                expected[off : off + len(data)] = data
            n_bytes = chooser.choice((1, 4096, 100_000, 3 * MIB))
            source_off, off = chooser.randrange(SIZE // 2 - n_bytes), chooser.randrange(SIZE // 2, SIZE - n_bytes)
            if chooser.random() < 0.5:
                source_off, off = off, source_off
            os.pread(fd, n_bytes, off)
            copied(fd, fd, source_off, off, n_bytes)
            expected[off : off + n_bytes] = expected[source_off : source_off + n_bytes]
            assert (
                os.pread(fd, n_bytes + 8192, max(0, off - 4096)) == expected[max(0, off - 4096) :][: n_bytes + 8192]
            )
        assert os.pread(fd, SIZE, 0) == expected
        with pytest.raises(OSError) as caught:
            os.copy_file_range(fd, fd, 8192, 0, 4096)
        assert caught.value.errno == errno.EINVAL
    check_image_file(image)
    assert contents(image) == expected


def test_holes_stay_holes(tmp_path: Path) -> None:
    """A copy of much that is not there takes no space and no time, and gives back what was in its place."""
    image = create_image(tmp_path / "disk.qcow2", "64G")
    with served(image) as mount, mount.file.open("r+b", buffering=0) as file:
        fd = file.fileno()
        os.pwrite(fd, b"d" * 8 * MIB, 0)
        assert copied(fd, fd, 1 << 30, 40 << 30, 1 << 30) == 1
        os.fsync(fd)
        assert os.fstat(fd).st_blocks * 512 == 8 * MIB
        copied(fd, fd, 1 << 30, 0, 4 * MIB)
        os.fsync(fd)
        assert os.fstat(fd).st_blocks * 512 == 4 * MIB
        copied(fd, fd, 0, 20 << 30, 16 * MIB)
        assert os.pread(fd, 8 * MIB, 20 << 30) == bytes(4 * MIB) + b"d" * 4 * MIB
        os.fsync(fd)
        assert os.fstat(fd).st_blocks * 512 == 8 * MIB
    check_image_file(image)


def test_between_a_disk_and_its_partitions(tmp_path: Path) -> None:
    """From one file to another; a partition has an end."""
    image = make_image(tmp_path / "disk.qcow2")
    with served(image, "--partitions") as mount:
        disk = os.open(mount.file, os.O_RDWR)
        first = os.open(mount.file.with_name("disk.raw.p1"), os.O_RDWR)
        second = os.open(mount.file.with_name("disk.raw.p2"), os.O_RDWR)
        try:
            n_first = os.fstat(first).st_size
            n_bytes = min(n_first, N_BYTES)
            wanted = os.pread(second, n_bytes, 0)
            copied(second, first, 0, 0, n_bytes)
            assert os.pread(first, n_bytes, 0) == wanted
            copied(disk, first, START + 1000, 3, 12_345)
            assert os.pread(first, 12_345, 3) == wanted[1000 : 1000 + 12_345]
            assert os.copy_file_range(disk, first, 1 << 20, 0, n_first - 5000) == 5000
            with pytest.raises(OSError) as caught:
                os.copy_file_range(disk, first, 4096, 0, n_first)
            assert caught.value.errno == errno.ENOSPC
            assert os.copy_file_range(second, disk, 4096, os.fstat(second).st_size, 0) == 0
        finally:
            for fd in (disk, first, second):
                os.close(fd)
    check_image_file(image)


def test_a_growable_disk_grows_by_a_copy(tmp_path: Path) -> None:
    """What reaches past its end is written as any other write there."""
    image = create_image(tmp_path / "disk.qcow2", "1M")
    with served(image, "--growable") as mount, mount.file.open("r+b", buffering=0) as file:
        fd = file.fileno()
        os.pwrite(fd, b"grow" * 1000, 0)
        copied(fd, fd, 0, MIB - 2000, 4000)
        copied(fd, fd, 0, 3 * MIB, 4000)
        assert os.fstat(fd).st_size == 3 * MIB + 4000
        os.fsync(fd)
        assert os.pread(fd, 4000, MIB - 2000) == os.pread(fd, 4000, 3 * MIB) == b"grow" * 1000
    check_image_file(image)
    assert contents(image)[3 * MIB : 3 * MIB + 4000] == b"grow" * 1000


def test_a_full_disk_ends_a_copy(tmp_path: Path) -> None:
    """ENOSPC, after what could be copied; what is read then is what is in the image, and with room it goes on."""
    with small_disk(tmp_path, "tmpfs") as folder:
        image = create_image(folder / "disk.qcow2", "32M")
        data = os.urandom(4 * MIB)
        with served(image) as mount, mount.file.open("r+b", buffering=0) as file:
            fd = file.fileno()
            os.pwrite(fd, data, 0)
            os.fsync(fd)
            os.pread(fd, 8 * MIB, 16 * MIB)
            filler = fill_up(folder, leave=2 * MIB)
            with pytest.raises(OSError) as caught:
                copied(fd, fd, 0, 16 * MIB, 4 * MIB)
            assert caught.value.errno == errno.ENOSPC
            found = os.pread(fd, 4 * MIB, 16 * MIB)
            assert all(byte in (0, wanted) for byte, wanted in zip(found, data, strict=True))
            filler.unlink()
            copied(fd, fd, 0, 16 * MIB, 4 * MIB)
            os.fsync(fd)
            assert os.pread(fd, 4 * MIB, 16 * MIB) == data
        check_image_file(image)
        assert contents(image, tmp_path)[16 * MIB : 20 * MIB] == data


NO_COPIES = """
from qcowfuse.fuse.libfuse.extra_operations import ExtraOperations

def missing(*arguments):
    raise AttributeError('undefined symbol: fuse_reply_write')
ExtraOperations.copy_callback = missing
"""


def test_without_it_the_kernel_copies(tmp_path: Path) -> None:
    """The same bytes, by reads and writes."""
    image = create_image(tmp_path / "disk.qcow2", str(SIZE))
    data = os.urandom(3 * MIB)
    with served(image, patch=NO_COPIES) as mount, mount.file.open("r+b", buffering=0) as file:
        fd = file.fileno()
        assert int(os.getxattr(mount.file, "user.qcowfuse.libfuse.copy_file_range")) == 0
        os.pwrite(fd, data, 1000)
        copied(fd, fd, 0, 8 * MIB, 4 * MIB)
        assert os.pread(fd, 4 * MIB, 8 * MIB) == (bytes(1000) + data).ljust(4 * MIB, b"\0")
    check_image_file(image)


def test_a_killed_copy_ends_soon(tmp_path: Path) -> None:
    """A caller that copies much on a slow disk can be killed, and others are served meanwhile."""
    image = create_image(tmp_path / "disk.qcow2", "4G")
    qemu.must_run("qemu-io", "-f", "qcow2", "-c", "write -q 0 256M", image)
    with served(image, "--debug-io-delay", "20ms") as mount:
        program = (
            "import os, sys\n"
            f"fd = os.open({str(mount.file)!r}, os.O_RDWR)\n"
            "print(flush=True)\n"
            "while True: os.copy_file_range(fd, fd, 256 << 20, 0, 1 << 30)\n"
        )
        with subprocess.Popen(["python3", "-c", program], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with mount.file.open("rb") as file:
                assert file.read(4096) == b"\xcd" * 4096
            process.kill()
            assert process.wait(timeout=20) < 0
    check_image_file(image)
