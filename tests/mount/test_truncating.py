"""Truncation of the served file through the kernel: what is cached, what tools leave, what each kind of disk has."""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import qemu
from tests.support.loops import loop_device, served
from tests.support.mounting import REPOSITORY, Mounted, check_image_file, create_image, wait_until

pytestmark = pytest.mark.mount

MIB = 1 << 20
SIZE = 4 * MIB
OPTIONS = {"writeback": (), "growable": ("--growable",), "through": ("--no-writeback-cache",)}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_no_cached_page_outlives_a_truncation(tmp_path: Path, is_folder: bool, options: str) -> None:
    """Clean and dirty pages, mapped ones too: after a truncation every reader sees zeroes and the whole size, by
    whatever it asks first, and nothing old is written over the zeroes later."""
    image = create_image(tmp_path / "disk.qcow2", str(SIZE))
    point = tmp_path / "point"
    if is_folder:
        point.mkdir()
    else:
        point.touch()
    chooser = random.Random(1)
    model = bytearray(SIZE)
    with Mounted(image, point, *OPTIONS[options]) as mount:
        fd, reader = os.open(mount.file, os.O_RDWR), os.open(mount.file, os.O_RDONLY)

        def write(offset: int, data: bytes) -> None:
            os.pwrite(fd, data, offset)
            model[offset : offset + len(data)] = data

        for number in range(60):
            for _ in range(3):
                write(chooser.randrange(SIZE - 70_000), chooser.randbytes(chooser.randrange(1, 70_000)))
            if number % 7 == 0:
                os.fsync(fd)
            assert os.pread(reader, SIZE, 0) == model
            with mmap.mmap(fd, SIZE) as area:
                area[-10:] = model[-10:] = b"mapped end"
            end = chooser.choice((0, SIZE - 1, SIZE - 100, SIZE - 5000, chooser.randrange(SIZE)))
            if number % 3 == 0:
                end = 0
                os.close(os.open(mount.file, os.O_WRONLY | os.O_TRUNC))
            elif number % 3 == 1:
                os.truncate(mount.file, end)
            else:
                os.ftruncate(fd, end)
            model[end:] = bytes(SIZE - end)
            kind = number % 5
            if kind == 0:
                assert os.fstat(reader).st_size == SIZE
            elif kind == 1:
                assert os.lseek(fd, 0, os.SEEK_END) == SIZE
            elif kind == 2:
                write(SIZE - 100, b"L" * 100)
            elif kind == 3:
                os.ftruncate(fd, SIZE)
            assert os.pread(reader, SIZE + 1, 0) == model
            assert os.fstat(fd).st_size == SIZE
        os.close(fd)
        os.close(reader)
    check_image_file(image)
    qemu.must_run("qemu-img", "convert", "-O", "raw", image, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == model


SLOW_ANSWER = f"""
import sys, trio
sys.path.insert(0, {str(REPOSITORY)!r})
from qcowfuse.fuse.operations import Operations
usual = Operations.setattr
async def setattr(self, inode, attr, fields, fh, ctx):
    answer = await usual(self, inode, attr, fields, fh, ctx)
    if fields.update_size and attr.st_size == 1000:
        await trio.sleep(0.5)
    return answer
Operations.setattr = setattr
"""


@pytest.mark.parametrize("asks", ["the thread itself", "another one", "nobody"])
def test_the_kernel_takes_its_time_with_an_answer(tmp_path: Path, asks: str) -> None:
    """As on a busy machine: the daemon has answered a truncation, and the kernel takes the smaller size in later."""
    (tmp_path / "mnt").mkdir()
    with Mounted(create_image(tmp_path / "disk.qcow2", str(SIZE)), tmp_path / "mnt", patch=SLOW_ANSWER) as mount:
        with ThreadPoolExecutor(1) as another:
            with mount.file.open("r+b", buffering=0) as disk:
                disk.write(b"head")  # now the kernel asks for what it does not know of the file
            truncation = another.submit(os.truncate, mount.file, 1000)
            if asks == "another one":
                time.sleep(0.1)
                assert os.stat(mount.file).st_size == SIZE
            truncation.result()
            if asks == "the thread itself":
                assert another.submit(os.stat, mount.file).result().st_size == SIZE
            elif asks == "another one":
                wait_until(lambda: os.stat(mount.file).st_size == SIZE, "the size that is put right")
        with mount.file.open("r+b", buffering=0) as disk:
            disk.seek(-4, os.SEEK_END)
            disk.write(b"tail")
        time.sleep(0.5)
        assert mount.file.stat().st_size == SIZE
        assert mount.file.read_bytes() == b"head" + bytes(SIZE - 8) + b"tail"
    check_image_file(tmp_path / "disk.qcow2")


TOOLS = {
    "cp": "cp source t/disk.raw",
    "cp --sparse": "cp --sparse=always source t/disk.raw",
    "cat": "cat source > t/disk.raw",
    "dd": "dd if=source of=t/disk.raw bs=64k",
    "dd conv=sparse": "dd if=source of=t/disk.raw bs=64k conv=sparse",
    "dd notrunc": "dd if=source of=t/disk.raw bs=64k conv=notrunc",
    "dd seek": "dd if=source of=t/disk.raw bs=64k seek=3 count=4 conv=sparse",
    "tar -S": "tar -xSf disk.tar --overwrite -C t",
    "truncate": "truncate -s 0 t/disk.raw; truncate -s 4M t/disk.raw",
    "truncate to less": "truncate -s 70000 t/disk.raw",
    "convert": "qemu-img convert -O raw source t/disk.raw",
    "convert -n": "qemu-img convert -n -O raw source t/disk.raw",
    "rsync": "rsync --inplace source t/disk.raw",
    "rsync -S": "rsync -S --inplace source t/disk.raw",
    "ddrescue": "ddrescue -q -S -f -t source t/disk.raw",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_tools_leave_what_they_leave_on_a_plain_file(tmp_path: Path, options: str) -> None:
    """Every tool that restores a sparse disk over old contents, also from a source that is shorter than the disk."""
    image = create_image(tmp_path / "disk.qcow2", str(SIZE))
    source = tmp_path / "source"
    plain = tmp_path / "plain"
    target = tmp_path / "t"
    old = b"\x55" * SIZE
    plain.mkdir()
    target.symlink_to(plain)
    with served(image, *OPTIONS[options]) as mount:
        for length in (SIZE, SIZE // 2 + 512):
            source.unlink(missing_ok=True)
            with source.open("wb") as file:
                file.truncate(length)
                for offset, n_bytes in ((0, 1000), (65536 * 3 + 7, 70_000), (MIB, MIB), (length - 513, 513)):
                    file.seek(offset)
                    file.write(random.Random(offset).randbytes(n_bytes))
            shutil.copy(source, tmp_path / "disk.raw")
            subprocess.run(["tar", "-cSf", "disk.tar", "disk.raw"], cwd=tmp_path, check=True)
            for name, command in TOOLS.items():
                if shutil.which(command.split()[0]) is None:
                    continue
                found = {}
                for place in (mount.file, plain / "disk.raw"):
                    with place.open("r+b" if place.exists() else "wb") as file:
                        file.write(old)
                    target.unlink()
                    target.symlink_to(place.parent)
                    subprocess.run(command, shell=True, cwd=tmp_path, check=True, stderr=subprocess.DEVNULL)
                    found[place] = place.read_bytes()
                served_bytes, plain_bytes = found.values()
                assert len(served_bytes) == SIZE, name
                assert served_bytes == plain_bytes.ljust(SIZE, b"\0"), f"{name}, {length} bytes"
    check_image_file(image)


KINDS: dict[str, tuple[str, ...]] = {
    "v1": (),
    "v2": ("-o", "compat=0.10"),
    "v2 overlay": ("-o", "compat=0.10", "-b", "base.raw", "-F", "raw"),
    "v3 overlay": ("-o", "cluster_size=4k", "-b", "base.raw", "-F", "raw"),
    "extended": ("-o", "extended_l2=on"),
    "data file": ("-o", "data_file={folder}/data.bin"),
    "raw data file": ("-o", "data_file={folder}/raw.bin,data_file_raw=on"),
    "snapshot": (),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_of_each_kind_is_truncated(tmp_path: Path, kind: str) -> None:
    """Zeroes from there on whatever lies below, in QEMU's eyes too; snapshots stay, and space is given back."""
    (tmp_path / "base.raw").write_bytes(b"B" * SIZE)
    image = tmp_path / "disk.img"
    format_name = "qcow" if kind == "v1" else "qcow2"
    options = [option.format(folder=tmp_path) for option in KINDS[kind]]
    qemu.must_run("qemu-img", "create", "-q", "-f", format_name, *options, "disk.img", str(SIZE), cwd=tmp_path)
    qemu.must_run("qemu-io", "-f", format_name, "-c", f"write -P 7 512 {SIZE - 1024}", image, cwd=tmp_path)
    if kind == "snapshot":
        qemu.must_run("qemu-img", "snapshot", "-c", "s", image)
    with served(image) as mount:
        before = mount.file.read_bytes()
        os.truncate(mount.file, 100_000)
        expected = before[:100_000].ljust(SIZE, b"\0")
        assert mount.file.read_bytes() == expected
        assert mount.file.stat().st_size == SIZE
    if format_name == "qcow2":
        check_image_file(image)
    qemu.must_run("qemu-img", "convert", "-f", format_name, "-O", "raw", image, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == expected
    if kind == "raw data file":
        assert (tmp_path / "raw.bin").read_bytes() == expected
    if kind in ("v2", "v3 overlay", "extended", "data file", "raw data file"):
        files = (path for path in tmp_path.iterdir() if path.suffix in (".img", ".bin"))
        assert sum(path.stat().st_blocks * 512 for path in files) < MIB
    if kind == "snapshot":
        with served(image, "-r", "--snapshot", "s") as mount:
            assert mount.file.read_bytes() == before


def test_a_read_only_disk_is_not_truncated(tmp_path: Path) -> None:
    """EROFS, and the contents stay."""
    image = create_image(tmp_path / "disk.qcow2", "1M")
    qemu.must_run("qemu-io", "-c", "write -P 9 0 1M", image)
    with served(image, "-r") as mount:
        for truncate in (lambda: os.truncate(mount.file, 0), lambda: mount.file.open("wb")):
            with pytest.raises(OSError) as caught:
                truncate()
            assert caught.value.errno == errno.EROFS
        assert mount.file.read_bytes() == b"\x09" * MIB


def test_a_huge_sparse_disk_is_truncated_at_once(tmp_path: Path) -> None:
    """16 TiB with data at both ends: what is not mapped costs nothing, not even a look at each table."""
    image = create_image(tmp_path / "disk.qcow2", "16T")
    with served(image) as mount:
        with mount.file.open("r+b") as file:
            file.write(b"start")
            file.seek(-4, os.SEEK_END)
            file.write(b"last")
            file.flush()
            os.fsync(file.fileno())
            os.ftruncate(file.fileno(), 0)
            assert file.seek(0, os.SEEK_END) == 16 << 40
            file.seek(-4, os.SEEK_END)
            assert file.read() == bytes(4)
        wait_until(lambda: mount.file.stat().st_blocks == 0, "the space to be given back")
    check_image_file(image)


@pytest.mark.root
def test_who_opens_a_disk_to_use_it_does_not_truncate_it(tmp_path: Path) -> None:
    """A loop device, qemu and qemu-io leave the contents; truncation under an open loop device shows there."""
    image = create_image(tmp_path / "disk.qcow2", "1M")
    with served(image) as mount:
        mount.file.write_bytes(b"k" * MIB)
        qemu.must_run("qemu-io", "-f", "raw", "-c", "read -P 0x6b 0 1M", mount.file)
        quit_at_once = ("-nodefaults", "-display", "none", "-S", "-monitor", "stdio", "-machine", "none")
        subprocess.run(
            ["qemu-system-x86_64", *quit_at_once, "-drive", f"if=none,file={mount.file},format=raw"],
            input=b"quit\n",
            stdout=subprocess.DEVNULL,
            check=True,
        )
        for direct in (False, True):
            with loop_device(mount.file, direct_io=direct) as device:
                with open(device, "rb", buffering=0) as disk:
                    assert disk.read(MIB) == b"k" * MIB
                os.truncate(mount.file, 512)
                assert int(qemu.must_run("blockdev", "--getsize64", device)) == MIB
                qemu.must_run("blockdev", "--flushbufs", device)
                with open(device, "rb", buffering=0) as disk:
                    assert disk.read(MIB) == b"k" * 512 + bytes(MIB - 512)
            mount.file.write_bytes(b"k" * MIB)
