"""Holes as other programs see them: qemu-img map, cp, convert, du; before, during and after writing."""

from __future__ import annotations

import json
import mmap
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfuse.fuse.holes_at_once import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from qcowfuse.fuse.unsent_data import is_waited_for
from tests.support import container, qemu
from tests.support.loops import served
from tests.support.mounting import check_image_file, create_image, run_qcowfuse, wait_until
from tests.support.syscalls import fallocate

MIB = 1 << 20
pytestmark = [pytest.mark.mount]


def data_ranges(*words: str | Path) -> list[tuple[int, int]]:
    """Where ``qemu-img map`` sees data, adjacent ranges joined."""
    found: list[tuple[int, int]] = []
    for entry in json.loads(qemu.must_run("qemu-img", "map", "--output=json", *words)):
        start, length = entry["start"], entry["length"]
        if not entry["data"]:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], start + length)
        else:
            found.append((start, start + length))
    return found


def seek_ranges(path: Path) -> Iterator[tuple[int, int]]:
    """Where SEEK_DATA and SEEK_HOLE see data, for a reader."""
    fd = os.open(path, os.O_RDONLY)
    place = 0
    try:
        while True:
            start = os.lseek(fd, place, os.SEEK_DATA)
            place = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, place
    except OSError:
        return
    finally:
        os.close(fd)


@pytest.mark.parametrize("arguments", [(), ("--no-writeback-cache",), ("-r",)], ids=["writeback", "through", "ro"])
@pytest.mark.parametrize("options", [(), ("-o", "extended_l2=on,cluster_size=16k")], ids=["v3", "extended"])
def test_the_map_of_the_file_is_that_of_the_image(
    tmp_path: Path, arguments: tuple[str, ...], options: tuple[str, ...]
) -> None:
    """While nobody writes, with whatever was written, zeroed and discarded before, compressed data and a backing
    file: qemu-img map of the served file and of the image agree, and so do SEEK_DATA, du and cp."""
    base = create_image(tmp_path / "base.qcow2", "40M")
    qemu.io(base, ["write -P 1 1M 64k", "write -P 1 39M 64k"])
    image = create_image(tmp_path / "disk.qcow2", "64M", *options, "-b", str(base), "-F", "qcow2")
    qemu.io(image, ["write -P 2 2M 128k", "write -z 3M 64k", "write -c -P 3 5M 64k", "write -P 4 20M 1M"])
    with served(image, *arguments) as mount:
        if "-r" not in arguments:
            fd = os.open(mount.file, os.O_RDWR)
            os.pwrite(fd, b"w" * 300_000, 30 * MIB)
            os.pwrite(fd, b"w" * 300_000, 50 * MIB)
            fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 20 * MIB, MIB // 2)
            fallocate(fd, FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE, 39 * MIB, 65536)
            os.close(fd)
        wait_until(lambda: len(list(seek_ranges(mount.file))) > 1, "the release of the writer")
        served_map = data_ranges("-f", "raw", mount.file)
        assert list(seek_ranges(mount.file)) == served_map
        n_data = sum(end - start for start, end in served_map)
        wait_until(lambda: os.stat(mount.file).st_blocks * 512 == n_data, "the count of what is allocated")
        assert int(qemu.must_run("du", "-B1", mount.file).split()[0]) == n_data
        copy, converted = tmp_path / "copy", tmp_path / "converted.qcow2"
        qemu.must_run("cp", "--sparse=auto", mount.file, copy)
        qemu.must_run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", mount.file, converted)
        assert copy.stat().st_blocks * 512 <= n_data + MIB // 4
        assert sum(end - start for start, end in data_ranges(converted)) <= n_data + MIB // 4
    assert served_map == data_ranges(image)
    check_image_file(image)
    qemu.must_run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", copy, image)
    qemu.must_run("qemu-img", "compare", converted, image)


needs_waiting_kernel = pytest.mark.skipif(
    not is_waited_for(os.uname().release), reason=f"{container.OLDER_KERNEL} Linux 6.16, and does not wait for pages"
)


def test_holes_are_not_told_while_somebody_writes(tmp_path: Path) -> None:
    """Where the kernel can't be made to send what it holds: from the open for writing to the release of the last
    descriptor or mapping all of the file is data."""
    image = create_image(tmp_path / "disk.qcow2", "64M")
    cluster = (10 * MIB, 10 * MIB + 65536)
    everything = [(0, 64 * MIB)]
    if is_waited_for(os.uname().release):
        everything = [cluster]
    with served(image) as mount:
        assert list(seek_ranges(mount.file)) == []
        writer = os.open(mount.file, os.O_RDWR)
        assert list(seek_ranges(mount.file)) in (everything, [])
        other = os.dup(writer)
        os.pwrite(writer, b"x", 10 * MIB)
        os.close(writer)
        assert list(seek_ranges(mount.file)) == everything
        os.close(other)
        wait_until(lambda: list(seek_ranges(mount.file)) == [cluster], "the release")


@needs_waiting_kernel
@pytest.mark.parametrize("arguments", [(), ("--growable",)], ids=["fixed", "growable"])
def test_holes_beside_a_writer(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """What was written through one descriptor, or a mapping, is seen through another one at once, without a sync.
    Holes of less than a MiB count as data."""
    image = create_image(tmp_path / "disk.qcow2", "64M")
    with served(image, *arguments) as mount:
        writer = os.open(mount.file, os.O_RDWR)
        expected: list[tuple[int, int]] = []
        for place in (40 * MIB, 10 * MIB, 20 * MIB + 100):
            os.pwrite(writer, b"x", place)
            start = place & -65536
            expected = sorted([*expected, (start, start + 65536)])
            assert list(seek_ranges(mount.file)) == expected
        os.pwrite(writer, b"x", 10 * MIB + 600 * 1024)
        expected[0] = (10 * MIB, 10 * MIB + 640 * 1024)
        assert list(seek_ranges(mount.file)) == expected
        with mmap.mmap(writer, 64 * MIB) as mapping:
            mapping[50 * MIB] = 1
            assert list(seek_ranges(mount.file)) == [*expected, (50 * MIB, 50 * MIB + 65536)]
            mapping[52 * MIB] = 1
            assert list(seek_ranges(mount.file))[-1] == (52 * MIB, 52 * MIB + 65536)
        if arguments:
            os.pwrite(writer, b"x", 70 * MIB)
            assert list(seek_ranges(mount.file))[-1][0] == 70 * MIB
            assert mount.file.stat().st_size > 70 * MIB
        expected = list(seek_ranges(mount.file))
        os.close(writer)
        assert subprocess.run(["fusermount3", "-u", mount.mount_point]).returncode == 0, (
            "a look from outside is in the way"
        )
        mount.wait_for_end()
    check_image_file(image)


@needs_waiting_kernel
def test_nothing_that_was_written_is_in_a_hole(tmp_path: Path) -> None:
    """While another thread goes on writing: what it had written when the walk began is in the data that it finds."""
    image = create_image(tmp_path / "disk.qcow2", "256M")
    chooser = random.Random(1)
    written: list[int] = []
    is_over = threading.Event()

    def write(fd: int) -> None:
        while not is_over.wait(0.001):
            place = chooser.randrange(256 * MIB)
            os.pwrite(fd, b"y", place)
            written.append(place)

    with served(image) as mount:
        writer = os.open(mount.file, os.O_RDWR)
        thread = threading.Thread(target=write, args=(writer,))
        thread.start()
        try:
            for _ in range(10):
                n_before = len(written)
                found = list(seek_ranges(mount.file))
                for place in written[:n_before]:
                    assert any(start <= place < end for start, end in found), f"{place} is in a hole"
        finally:
            is_over.set()
            thread.join()
            os.close(writer)
        assert written
    check_image_file(image)


def test_st_blocks_follows_what_happens(tmp_path: Path) -> None:
    """Written, zeroed, discarded, grown: du says what holds data at any time."""
    image = create_image(tmp_path / "disk.qcow2", "16M")
    qemu.io(image, ["write -c -P 3 0 64k"])
    with served(image, "--growable") as mount:
        fd = os.open(mount.file, os.O_RDWR)

        def n_clusters() -> float:
            os.fsync(fd)
            return os.fstat(fd).st_blocks * 512 / 65536

        wait_until(lambda: n_clusters() == 1, "the count")
        os.pwrite(fd, b"x", 65536 * 5)
        wait_until(lambda: n_clusters() == 2, "a cluster more")
        os.ftruncate(fd, 40 * MIB)
        assert n_clusters() == 2
        os.pwrite(fd, b"x" * 65536 * 3, 30 * MIB)
        wait_until(lambda: n_clusters() == 5, "three clusters more")
        fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 30 * MIB, 65536 * 2)
        fallocate(fd, FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE, 0, 65536)
        wait_until(lambda: n_clusters() == 2, "three clusters less")
        os.close(fd)
    check_image_file(image)


@pytest.mark.parametrize(("mode", "stored"), [("off", 8), ("on", 0), ("unmap", 0)])
def test_detect_zeroes(tmp_path: Path, mode: str, stored: int) -> None:
    """Zeroes written over data and over nothing are stored only without the option; unmap gives the space back."""
    image = create_image(tmp_path / "disk.qcow2", "64M")
    qemu.io(image, ["write -P 7 0 4M"])
    before = image.stat().st_blocks * 512
    with served(image, "--detect-zeroes", mode) as mount:
        fd = os.open(mount.file, os.O_RDWR)
        os.pwrite(fd, bytes(8 * MIB), 0)
        os.pwrite(fd, b"kept", 10 * MIB)
        os.fsync(fd)
        os.close(fd)
    check_image_file(image)
    n_data = sum(end - start for start, end in data_ranges(image))
    assert n_data == stored * MIB + 65536
    if mode == "unmap":
        assert image.stat().st_blocks * 512 < before - 3 * MIB
    qemu.io(image, ["read -P 0 0 8M", "read -P 0x6b 10M 1"])


def test_detect_zeroes_and_discard_must_agree(tmp_path: Path) -> None:
    """As QEMU has it: nothing is unmapped where discards are ignored."""
    done = run_qcowfuse("--detect-zeroes", "unmap", "--discard", "ignore", "x", tmp_path)
    assert done.returncode == 2
    assert "exclude" in done.stderr
    assert run_qcowfuse("-o", "detect_zeroes=maybe", "x", tmp_path).returncode == 2


@pytest.mark.parametrize("arguments", [(), ("--no-writeback-cache",)], ids=["writeback", "through"])
def test_copy_file_range(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Within the file and out of it, by the kernel's own means."""
    image = create_image(tmp_path / "disk.qcow2", "16M")
    with served(image, *arguments) as mount:
        fd = os.open(mount.file, os.O_RDWR)
        os.pwrite(fd, b"abc" * 100_000, MIB)
        n_copied = 0
        while n_copied < 300_000:
            n_copied += os.copy_file_range(fd, fd, 300_000 - n_copied, MIB + n_copied, 8 * MIB + n_copied)
        assert os.pread(fd, 300_000, 8 * MIB) == b"abc" * 100_000
        os.close(fd)
        subprocess.run(["cp", "--reflink=auto", mount.file, tmp_path / "copy"], check=True)
    check_image_file(image)
    qemu.must_run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "copy", image)


@pytest.mark.parametrize("cluster_size", [512, 65536, 2 * MIB])
def test_direct_io_of_512_and_4096_bytes(tmp_path: Path, cluster_size: int) -> None:
    """At every alignment that O_DIRECT allows; and what stat and statfs say of the file."""
    image = create_image(tmp_path / "disk.qcow2", "8M", "-o", f"cluster_size={cluster_size}")
    expected = bytearray(8 * MIB)
    with served(image) as mount:
        fd = os.open(mount.file, os.O_RDWR | os.O_DIRECT)
        for number, (length, offset) in enumerate(
            ((512, 512), (4096, 8192), (512, 3 * MIB - 512), (4096, 3 * MIB - 2048), (4096, 8 * MIB - 4096))
        ):
            with mmap.mmap(-1, length) as area:
                area[:] = bytes([number + 1]) * length
                assert os.pwrite(fd, area, offset) == length
                expected[offset : offset + length] = area[:]
                area[:] = bytes(length)
                assert os.preadv(fd, [area], offset) == length
                assert area[:] == expected[offset : offset + length]
        os.close(fd)
        assert mount.file.read_bytes() == expected
        status, system = os.stat(mount.file), os.statvfs(mount.file)
        assert status.st_size == 8 * MIB
        assert status.st_blksize == min(max(cluster_size, 4096), MIB)
        assert (system.f_bsize, system.f_blocks) == (cluster_size, 8 * MIB // cluster_size)
    check_image_file(image)
