"""--growable through a mount: truncate, writes and fallocate past the end, loop devices, old versions, snapshots."""

from __future__ import annotations

import errno
import json
import mmap
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from qcowfuse.fuse.holes_at_once import FALLOC_ZERO_RANGE
from qcowfuse.fuse.unsent_data import is_waited_for
from tests.support import qemu
from tests.support.loops import EXT4, loop_device, mounted_file_system, served
from tests.support.mounting import Mounted, check_image_file, create_image, run_qcowfuse, wait_until
from tests.support.syscalls import fallocate

MIB = 1 << 20
GIB = 1 << 30
pytestmark = [pytest.mark.mount]


def virtual_size(image: Path) -> int:
    """What qemu-img says."""
    size = json.loads(qemu.must_run("qemu-img", "info", "--output=json", image))["virtual-size"]
    assert isinstance(size, int)
    return size


def raw_bytes(image: Path, source_format: str = "qcow2") -> bytes:
    """What QEMU reads."""
    raw = image.with_suffix(".raw")
    qemu.must_run("qemu-img", "convert", "-f", source_format, "-O", "raw", image, raw)
    return raw.read_bytes()


@pytest.mark.parametrize("options", [(), ("--no-writeback-cache",)], ids=["writeback", "through"])
@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_truncate_grows_the_disk(tmp_path: Path, is_folder: bool, options: tuple[str, ...]) -> None:
    """The new size shows at once, reads as zeroes, takes writes, and is in the image; less zeroes the rest."""
    image = create_image(tmp_path / "disk.qcow2", "1M", "-o", "cluster_size=4k")
    point = tmp_path / "point"
    if is_folder:
        point.mkdir()
    else:
        point.touch()
    with Mounted(image, point, "--growable", *options) as mount:
        fd = os.open(mount.file, os.O_RDWR)
        os.pwrite(fd, b"a" * MIB, 0)
        os.ftruncate(fd, 3 * MIB + 100)
        size = 3 * MIB + 512
        assert os.fstat(fd).st_size == os.stat(mount.file).st_size == os.lseek(fd, 0, os.SEEK_END) == size
        os.pwrite(fd, b"b" * 5000, 3 * MIB - 4500)
        expected = (b"a" * MIB).ljust(3 * MIB - 4500, b"\0") + b"b" * 5000
        expected = expected.ljust(size, b"\0")
        assert os.pread(fd, size + 10, 0) == expected
        os.ftruncate(fd, size - 600)  # the size stays, what lies behind becomes zeroes
        expected = expected[: size - 600].ljust(size, b"\0")
        assert os.fstat(fd).st_size == size
        assert os.pread(fd, size + 10, 0) == expected
        with pytest.raises(OSError, match="too large"):
            os.ftruncate(fd, 1 << 60)
        assert os.fstat(fd).st_size == size
        os.truncate(mount.file, 5 * MIB)
        assert os.fstat(fd).st_size == 5 * MIB
        with mmap.mmap(fd, 4096, mmap.MAP_SHARED, offset=5 * MIB - 4096) as area:
            area[-3:] = b"end"
        os.close(fd)
        assert os.statvfs(mount.file).f_blocks * 4096 == 5 * MIB
    check_image_file(image)
    assert virtual_size(image) == 5 * MIB
    assert raw_bytes(image) == expected.ljust(5 * MIB - 3, b"\0") + b"end"


@pytest.mark.parametrize("options", [(), ("--no-writeback-cache",)], ids=["writeback", "through"])
def test_writing_past_the_end_grows_the_disk(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Appending, writing far behind the end, direct writes and fallocate, as one file that QEMU reads."""
    image = create_image(tmp_path / "disk.qcow2", "1M")
    with served(image, "--growable", *options) as mount:
        fd = os.open(mount.file, os.O_RDWR)
        expected = bytearray(MIB)
        for number in range(20):  # more than the disk, in pieces of odd lengths
            data = bytes([65 + number]) * 77_777
            os.pwrite(fd, data, len(expected))
            expected += data
        os.pwrite(fd, b"far", 9 * MIB)
        expected = expected.ljust(9 * MIB, b"\0") + b"far"
        if options or is_waited_for(os.uname().release):
            assert 9 * MIB - 65536 < os.lseek(fd, 8 * MIB, os.SEEK_DATA) <= 9 * MIB
        else:  # not known, so programs copy everything
            with pytest.raises(OSError, match="Invalid"):
                os.lseek(fd, 8 * MIB, os.SEEK_DATA)
        os.fsync(fd)
        direct = os.open(mount.file, os.O_RDWR | os.O_DIRECT)
        with mmap.mmap(-1, 8192) as area:
            area[:] = b"d" * 8192
            os.pwrite(direct, area, 10 * MIB)
        os.close(direct)
        expected = expected.ljust(10 * MIB, b"\0") + b"d" * 8192
        fallocate(fd, 0, 0, 11 * MIB)
        assert os.fstat(fd).st_size == 11 * MIB
        fallocate(fd, FALLOC_ZERO_RANGE, 10 * MIB + 4096, 3 * MIB - 4096)
        expected[10 * MIB + 4096 :] = bytes(4096)
        expected = expected.ljust(13 * MIB, b"\0")
        assert os.fstat(fd).st_size == 13 * MIB
        fallocate(fd, 0, 0, 13 * MIB)
        assert os.pread(fd, 14 * MIB, 0) == expected
        os.close(fd)
    check_image_file(image)
    assert raw_bytes(image) == expected


def test_an_odd_end_is_rounded_up(tmp_path: Path) -> None:
    """What is written past the end is there after the next mount, the size a multiple of 512."""
    image = create_image(tmp_path / "disk.qcow2", "1M")
    with served(image, "--growable") as mount, mount.file.open("ab") as file:
        file.write(b"tail")
    with served(image) as mount:
        assert mount.file.stat().st_size == MIB + 512
        with mount.file.open("rb") as file:
            file.seek(MIB)
            assert file.read() == b"tail".ljust(512, b"\0")
        with pytest.raises(OSError, match="too large"):
            os.truncate(mount.file, 2 * MIB)
    check_image_file(image)


def test_a_longer_backing_file_does_not_show(tmp_path: Path) -> None:
    """Where the backing file is longer than the disk was, the new part is zeroes all the same."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"B" * 4 * MIB)
    for number, options in enumerate((("-o", "compat=0.10"), (), ("-o", "extended_l2=on,cluster_size=16k"))):
        image = create_image(tmp_path / f"disk{number}.qcow2", "1000k", *options, "-b", str(base), "-F", "raw")
        with served(image, "--growable") as mount:
            os.truncate(mount.file, 6 * MIB)
            expected = (b"B" * 1000 * 1024).ljust(6 * MIB, b"\0")
            assert mount.file.read_bytes() == expected
        check_image_file(image)
        assert raw_bytes(image) == expected


def test_version_1_grows(tmp_path: Path) -> None:
    """QEMU reads the larger disk of version 1, which it cannot make larger itself."""
    image = tmp_path / "disk.qcow"
    qemu.create(image, "qcow", MIB)
    with served(image, "--growable") as mount:
        mount.file.write_bytes(b"1" * MIB)
        os.truncate(mount.file, GIB)
        with mount.file.open("r+b") as file:
            file.seek(GIB - 4)
            file.write(b"last")
    qemu.must_run("qemu-io", "-f", "qcow", "-r", "-c", f"read -P 0x31 0 {MIB}", image)
    shown = qemu.must_run("qemu-io", "-f", "qcow", "-r", "-c", f"read -v {GIB - 4} 4", image)
    assert "last" in shown


def check_refused_growth(mount: Mounted, contents: bytes, far: int) -> None:
    """Writes past the end that cannot grow the disk fail; what fits is there, size and contents are the true ones."""
    size = len(contents)
    for offset in (far, size - 3):
        fd = os.open(mount.file, os.O_RDWR)
        with pytest.raises(OSError) as caught:
            write_all_and_sync(fd, b"abcdef", offset)
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
        os.close(fd)
        wait_until(lambda: mount.file.stat().st_size == size, "the true size")
        with mount.file.open("rb") as file:
            wait_until(lambda file=file: file.seek(0, os.SEEK_END) == size, "the true size")  # type: ignore[misc]
            if offset < size:
                contents = contents[:-3] + b"abc"
            file.seek(0)
            assert file.read() == contents
    with mount.file.open("r+b") as file:
        with pytest.raises(OSError):
            fallocate(file.fileno(), 0, 0, far)
        assert os.fstat(file.fileno()).st_size == file.seek(0, os.SEEK_END) == size
        file.seek(-3, os.SEEK_END)
        file.write(contents[-1:] * 3)


def write_all_and_sync(fd: int, data: bytes, offset: int) -> None:
    """Write on after a short write, as programs do, and fsync."""
    while data:
        n_written = os.pwrite(fd, data, offset)
        data, offset = data[n_written:], offset + n_written
    os.fsync(fd)


@pytest.mark.parametrize("options", [(), ("--no-writeback-cache",)], ids=["writeback", "through"])
def test_a_read_behind_a_truncation_is_whole(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Again and again: the size is what it was, and the zeroes up to it are there to be read, at once."""
    image = create_image(tmp_path / "disk.qcow2", "1M", "-o", "cluster_size=4k")
    expected = b"\0" * 3000 + b"b" * 400 + bytes(600)
    with served(image, "--growable", *options) as mount:
        fd = os.open(mount.file, os.O_RDWR)
        for number in range(150):
            os.pwrite(fd, b"b" * 1000, MIB - 1000)
            os.ftruncate(fd, MIB - 600)
            assert os.fstat(fd).st_size == MIB
            assert os.pread(fd, 5000, MIB - 4000) == expected, f"round {number}"
        os.close(fd)
    check_image_file(image)
    assert raw_bytes(image) == bytes(MIB - 4000) + expected


@pytest.mark.parametrize("options", [(), ("--no-writeback-cache",)], ids=["writeback", "through"])
def test_a_size_beyond_the_format_is_refused(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Clusters of 512 bytes cannot map 1 PiB: a write there fails and leaves no trace, one that fits still grows."""
    image = create_image(tmp_path / "disk.qcow2", "1M", "-o", "cluster_size=512")
    qemu.must_run("qemu-io", "-c", "write -P 5 0 1M", image)
    with served(image, "--growable", *options) as mount:
        fd = os.open(mount.file, os.O_RDWR)
        with pytest.raises(OSError):
            write_all_and_sync(fd, b"far", 1 << 50)
        wait_until(lambda: os.fstat(fd).st_size == MIB, "the true size")
        os.pwrite(fd, b"near", MIB)
        os.fsync(fd)
        assert os.pread(fd, 2 * MIB, 0) == (b"\x05" * MIB + b"near").ljust(os.fstat(fd).st_size, b"\0")
        os.close(fd)
    check_image_file(image)
    assert raw_bytes(image) == (b"\x05" * MIB + b"near").ljust(MIB + 512, b"\0")


def test_snapshots_of_version_2_are_in_the_way(tmp_path: Path) -> None:
    """EOPNOTSUPP, as QEMU has it; version 3 grows, and the snapshot keeps its size."""
    for compat in ("0.10", "1.1"):
        image = create_image(tmp_path / f"disk{compat}.qcow2", "1M", "-o", f"compat={compat}")
        qemu.must_run("qemu-io", "-c", "write -P 5 0 1M", image)
        qemu.must_run("qemu-img", "snapshot", "-c", "s", image)
        with served(image, "--growable") as mount:
            if compat == "0.10":
                with pytest.raises(OSError) as caught:
                    os.truncate(mount.file, 2 * MIB)
                assert caught.value.errno == errno.EOPNOTSUPP
                check_refused_growth(mount, b"\x05" * MIB, 3 * MIB)
            else:
                os.truncate(mount.file, 2 * MIB)
                mount.file.write_bytes(b"n" * 2 * MIB)
        check_image_file(image)
        with served(image, "-r", "--snapshot", "s") as mount:
            assert mount.file.read_bytes() == b"\x05" * MIB


@pytest.mark.root
@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_a_loop_device_and_its_file_system_grow(tmp_path: Path, is_folder: bool) -> None:
    """``losetup -c`` after truncate, while the file system is mounted; then resize2fs."""
    image = create_image(tmp_path / "disk.qcow2", "64M")
    point = tmp_path / "point"
    if is_folder:
        point.mkdir()
    else:
        point.touch()
    with Mounted(image, point, "--growable") as mount, loop_device(mount.file, direct_io=True) as device:
        qemu.must_run(*EXT4.make, device)
        with mounted_file_system(device, tmp_path / "fs") as folder:
            (folder / "kept").write_bytes(b"k" * MIB)
            qemu.must_run("truncate", "-s", "256M", mount.file)
            qemu.must_run("losetup", "-c", device)
            assert int(qemu.must_run("blockdev", "--getsize64", device)) == 256 * MIB
            (folder / "more").write_bytes(b"m" * MIB)
        qemu.must_run("e2fsck", "-fp", device)
        qemu.must_run("resize2fs", device)
        with mounted_file_system(device, tmp_path / "fs") as folder:
            assert os.statvfs(folder).f_blocks * os.statvfs(folder).f_frsize > 200 * MIB
            (folder / "large").write_bytes(b"l" * 100 * MIB)
        qemu.must_run(*EXT4.check, device)
        with mounted_file_system(device, tmp_path / "fs") as folder:
            assert (folder / "kept").read_bytes() == b"k" * MIB
            assert (folder / "large").read_bytes() == b"l" * 100 * MIB
    check_image_file(image)


def test_a_kill_after_truncate_loses_nothing(tmp_path: Path) -> None:
    """The size is durable when truncate returns; what fsync promised of the new part is there."""
    image = create_image(tmp_path / "disk.qcow2", "1M", "-o", "cluster_size=512")
    point = tmp_path / "point"
    point.mkdir()
    with Mounted(image, point, "--growable") as mount:
        fd = os.open(mount.file, os.O_RDWR)
        os.ftruncate(fd, 40 * MIB)
        os.pwrite(fd, b"promised", 39 * MIB)
        os.fsync(fd)
        os.ftruncate(fd, 900 * MIB)
        assert mount.process is not None
        mount.process.kill()
        mount.process.wait()
        with suppress(OSError):
            os.close(fd)
        subprocess.run(["fusermount3", "-u", "-z", point], check=True)
    assert qemu.check(image).code in (0, 3)
    assert virtual_size(image) == 900 * MIB
    with served(image, "-r") as again, again.file.open("rb") as file:
        file.seek(39 * MIB)
        assert file.read(8) == b"promised"


def test_the_option_list_takes_it(tmp_path: Path) -> None:
    """``-o growable`` for mount(8) and fstab."""
    image = create_image(tmp_path / "disk.qcow2", "1M")
    with served(image, "-o", "growable") as mount:
        os.truncate(mount.file, 2 * MIB)
        assert mount.file.stat().st_size == 2 * MIB
    assert "--growable" in run_qcowfuse("--help").stdout
