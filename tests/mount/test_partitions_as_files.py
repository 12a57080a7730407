"""Partitions beside the disk: the same bytes under two names never contradict each other."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from pathlib import Path

import pytest

from tests.mount.test_partition import MIB, N_BYTES, SIZE, START, make_image, mounted
from tests.support import qemu
from tests.support.loops import loop_device, served
from tests.support.mounting import run_qcowfuse

pytestmark = [pytest.mark.mount, pytest.mark.root]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Three partitions, ext4 in the second."""
    return make_image(tmp_path / "disk.qcow2")


def test_each_partition_is_a_file(image: Path) -> None:
    """Names, sizes, contents, and what is written to one is in the image; only the disk shows counters."""
    raw = image.with_suffix(".raw").read_bytes()
    with served(image, "--partitions") as mount:
        folder = mount.file.parent
        assert sorted(path.name for path in folder.iterdir()) == [
            "disk.raw",
            "disk.raw.p1",
            "disk.raw.p2",
            "disk.raw.p3",
        ]
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        assert sizes["disk.raw"] == SIZE
        assert sizes["disk.raw.p2"] == N_BYTES
        assert len({path.stat().st_ino for path in folder.iterdir()}) == 4
        assert (folder / "disk.raw.p2").read_bytes() == raw[START : START + N_BYTES]
        assert mount.file.read_bytes() == raw
        assert "user.qcowfuse.pid" in os.listxattr(mount.file)
        with (folder / "disk.raw.p1").open("r+b") as file:
            file.write(b"one")
    after = image.with_suffix(".after")
    qemu.must_run("qemu-img", "convert", "-O", "raw", image, after)
    assert after.read_bytes() == raw[:MIB] + b"one" + raw[MIB + 3 :]
    assert qemu.check(image).clean


def test_writers_under_both_names_see_each_other(image: Path) -> None:
    """Each writer has sectors of its own, and reads each back under the other name as soon as it is written; a third
    part is written by both: a sector there is always one that somebody wrote, and at the end the same under both."""
    failures: list[str] = []
    third = 2000

    def write(path: Path, offset: int, other: Path, other_offset: int, part: int) -> None:
        chooser = random.Random(part)
        mine, theirs = os.open(path, os.O_RDWR), os.open(other, os.O_RDWR)
        try:
            for number in range(1500):
                shared = chooser.random() < 0.3
                sector = chooser.randrange(third) + (2 if shared else part) * third
                data = bytes([part + 1, number & 0xFF]) * 256
                os.pwrite(mine, data, offset + sector * 512)
                found = os.pread(theirs, 512, other_offset + sector * 512)
                if found != data and not (shared and found == found[:2] * 256):
                    failures.append(f"{path.name}: sector {sector}: {found[:4]!r}")
        finally:
            os.close(mine)
            os.close(theirs)

    with served(image, "--partitions") as mount:
        part = mount.file.with_name("disk.raw.p2")
        mount.file.read_bytes()
        part.read_bytes()
        threads = [
            threading.Thread(target=write, args=(mount.file, START, part, 0, 0)),
            threading.Thread(target=write, args=(part, 0, mount.file, START, 1)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert mount.file.read_bytes()[START : START + N_BYTES] == part.read_bytes()
        expected = part.read_bytes()
    after = image.with_suffix(".after")
    qemu.must_run("qemu-img", "convert", "-O", "raw", image, after)
    assert after.read_bytes()[START : START + N_BYTES] == expected
    assert qemu.check(image).clean


def test_discards_and_truncations_are_seen_under_both_names(image: Path) -> None:
    """A hole that is punched in one is zeroes in the other; a truncated partition keeps its size, and ends there."""
    raw = image.with_suffix(".raw").read_bytes()
    with served(image, "--partitions") as mount:
        part, last = mount.file.with_name("disk.raw.p2"), mount.file.with_name("disk.raw.p3")
        mount.file.read_bytes()
        qemu.must_run("fallocate", "--punch-hole", "-o", str(START), "-l", str(MIB), mount.file)
        assert not any(part.read_bytes()[:MIB])
        with part.open("r+b") as file:
            os.ftruncate(file.fileno(), 2 * MIB)
            assert os.fstat(file.fileno()).st_size == N_BYTES
            with pytest.raises(OSError, match="No space left"):
                os.pwrite(file.fileno(), b"x", N_BYTES)
        assert part.stat().st_size == N_BYTES
        expected = bytearray(raw)
        expected[START : START + MIB] = bytes(MIB)
        expected[START + 2 * MIB : START + N_BYTES] = bytes(N_BYTES - 2 * MIB)
        assert mount.file.read_bytes() == expected
        with part.open("rb") as file:
            assert os.lseek(file.fileno(), 2 * MIB, os.SEEK_HOLE) == 2 * MIB
            with pytest.raises(OSError, match="No such device or address"):
                os.lseek(file.fileno(), 2 * MIB, os.SEEK_DATA)
        assert last.read_bytes() == raw[START + N_BYTES : START + N_BYTES + last.stat().st_size]
    assert qemu.check(image).clean


@pytest.mark.parametrize("direct_io", [False, True])
def test_a_file_system_in_one_of_the_files(image: Path, tmp_path: Path, direct_io: bool) -> None:
    """On a loop device, with its own cache and without; what it has written is in the disk's file."""
    data = os.urandom(2 * MIB)
    with served(image, "--partitions") as mount:
        part = mount.file.with_name("disk.raw.p2")
        with loop_device(part, direct_io=direct_io) as device, mounted(device, tmp_path / "fs") as folder:
            (folder / "file").write_bytes(data)
        assert mount.file.read_bytes()[START : START + N_BYTES] == part.read_bytes()
        with loop_device(part, read_only=True) as device, mounted(device, tmp_path / "fs") as folder:
            assert (folder / "file").read_bytes() == data
    assert qemu.check(image).clean


def test_a_shared_mapping_is_refused(image: Path) -> None:
    """It would be pages under one name; a private one of a reader is allowed, and begins with what is there."""
    with served(image, "--partitions") as mount, mount.file.with_name("disk.raw.p2").open("r+b") as file:
        with pytest.raises(OSError) as caught:
            mmap.mmap(file.fileno(), 4096, mmap.MAP_SHARED)
        assert caught.value.errno == errno.ENODEV
        os.pwrite(file.fileno(), b"fresh", 0)
        with mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ) as private:
            assert private[:5] == b"fresh"


def test_read_only_partitions(image: Path) -> None:
    """None can be written."""
    with served(image, "--partitions", "-r") as mount:
        for path in mount.file.parent.iterdir():
            with pytest.raises(OSError, match="Read-only file system"):
                path.open("r+b")
            assert path.stat().st_mode & 0o777 == 0o400


def test_what_cannot_be_is_refused(image: Path, tmp_path: Path) -> None:
    """Over a file there is no room for others; both options together say nothing."""
    file = tmp_path / "file"
    file.touch()
    done = run_qcowfuse("--partitions", image, file)
    assert (done.returncode, len(done.stderr.splitlines())) == (5, 1)
    assert "mount at a folder" in done.stderr
    done = run_qcowfuse("--partitions", "--partition", "2", image, tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "exclude each other" in done.stderr
