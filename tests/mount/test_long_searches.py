"""Searches for data and holes in a disk that takes minutes to look through: others are served, signals are heard."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import qemu
from tests.support.loops import served
from tests.support.mounting import Mounted, command, create_image, environment, is_mounted, wait_until

pytestmark = [pytest.mark.mount]
GIB = 1 << 30
SIZE = 128 << 50
N_TABLES = SIZE >> 39
WITHOUT_LIMIT = "import qcowfuse.fuse.seeking as s; s.DATA_SECONDS = s.HOLE_SECONDS = 1e9"
SEARCH = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
fd = os.open(sys.argv[1], os.O_RDONLY)
print("searching", flush=True)
print(os.lseek(fd, 0, getattr(os, sys.argv[2])), flush=True)
"""


def create_endless(path: Path, entry: int) -> Path:
    """128 PiB, each half TiB of it mapped by the same L2 table, which is full of ``entry``."""
    image = create_image(path, str(SIZE), "-o", "cluster_size=2M")
    with open(image, "r+b") as file:
        (l1_offset,) = struct.unpack_from(">Q", file.read(48), 40)
        end = (image.stat().st_size + (2 << 20) - 1) >> 21 << 21
        file.seek(l1_offset)
        file.write(struct.pack(">Q", end) * N_TABLES)
        file.seek(end)
        file.write(struct.pack(">Q", entry) * (1 << 18))
    return image


@contextmanager
def searching(mount: Mounted, whence: str) -> Iterator[subprocess.Popen[str]]:
    """A process that asks for the next data or hole, while it is at it."""
    process = subprocess.Popen([sys.executable, "-c", SEARCH, mount.file, whence], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "searching\n"
        wait_until(
            lambda: "fuse" in Path(f"/proc/{process.pid}/wchan").read_text() or is_asleep(process), "the search"
        )
        yield process
    finally:
        process.kill()
        process.wait(20)
        if process.stdout is not None:
            process.stdout.close()


def is_asleep(process: subprocess.Popen[str]) -> bool:
    """Whether it waits in the kernel."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] in "SD"


def test_a_reader_that_searches_can_be_killed_and_others_are_served(tmp_path: Path) -> None:
    """While one search without end is going on: a read is answered, SIGKILL ends the reader, SIGTERM the daemon."""
    image = create_endless(tmp_path / "disk.qcow2", 1)
    with Mounted(image, make_point(tmp_path), "-r", patch=WITHOUT_LIMIT) as mount:
        with searching(mount, "SEEK_DATA") as process:
            with open(mount.file, "rb", buffering=0) as file:
                file.seek(100 * GIB)
                assert file.read(4096) == bytes(4096)
            assert process.poll() is None
            process.kill()
            assert process.wait(20) == -signal.SIGKILL
        with searching(mount, "SEEK_DATA") as process:
            assert mount.process is not None
            mount.process.terminate()
            process.kill()
            assert process.wait(20) == -signal.SIGKILL
            assert mount.process.wait(20) == 0


@pytest.mark.parametrize(("whence", "entry"), [("SEEK_DATA", 1), ("SEEK_HOLE", 1 << 22)])
def test_a_signal_gets_a_safe_answer(tmp_path: Path, whence: str, entry: int) -> None:
    """A signal that the program has a handler for is no error: the answer may be early, or the end of the file."""
    image = create_endless(tmp_path / "disk.qcow2", entry)
    with Mounted(image, make_point(tmp_path), "-r", patch=WITHOUT_LIMIT) as mount:
        with searching(mount, whence) as process:
            assert process.poll() is None
            process.send_signal(signal.SIGUSR1)
            answer = int(process.communicate(timeout=20)[0])
    if whence == "SEEK_HOLE":
        assert answer == SIZE
    else:
        assert 0 < answer < SIZE


def test_without_a_signal_the_answer_comes_in_time(tmp_path: Path) -> None:
    """Steps through a disk without end: each goes further, none claims a hole of no length."""
    image = create_endless(tmp_path / "disk.qcow2", 1)
    with served(image, "-r") as mount:
        fd = os.open(mount.file, os.O_RDONLY)
        first = os.lseek(fd, 0, os.SEEK_DATA)
        hole = os.lseek(fd, first, os.SEEK_HOLE)
        assert 0 < first < hole < os.lseek(fd, hole, os.SEEK_DATA) < SIZE
        assert os.lseek(fd, 5 * GIB, os.SEEK_HOLE) == 5 * GIB
        os.close(fd)


def test_an_ordinary_disk_is_looked_through(tmp_path: Path) -> None:
    """1 TiB of zero clusters, as after a discard, is a hole, for QEMU too; and one cluster of data is found in it."""
    image = create_image(tmp_path / "disk.qcow2", "1T", "-o", "cluster_size=2M")
    qemu.io(image, [f"write -z {place}G 1G" for place in range(0, 1024, 1)])
    qemu.io(image, ["write 700G 2M"])
    with served(image, "-r") as mount:
        fd = os.open(mount.file, os.O_RDONLY)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 700 * GIB
        assert os.lseek(fd, 700 * GIB, os.SEEK_HOLE) == 700 * GIB + (2 << 20)
        with pytest.raises(OSError, match="No such device or address"):
            os.lseek(fd, 701 * GIB, os.SEEK_DATA)
        os.close(fd)


def test_sigterm_ends_a_repair_before_the_mount(tmp_path: Path) -> None:
    """An image that was not closed cleanly, and whose check takes an hour: one line, no mount, nothing changed."""
    image = create_endless(tmp_path / "disk.qcow2", 1)
    with open(image, "r+b") as file:
        file.seek(79)
        file.write(b"\1")  # the dirty bit
        file.seek(0)
        before = file.read(1 << 20)
    point = make_point(tmp_path)
    process = subprocess.Popen(command("-f", image, point), stderr=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stderr is not None
        assert "was not closed cleanly: repairing" in process.stderr.readline()
        process.terminate()
        _, rest = process.communicate(timeout=20)
        assert process.returncode == 5
        assert "SIGTERM" in rest
        assert rest.count("\n") == 1
        assert not is_mounted(point)
        with open(image, "rb") as file:
            assert file.read(1 << 20) == before
    finally:
        process.kill()


def make_point(tmp_path: Path) -> Path:
    """A folder to mount at."""
    point = tmp_path / "point"
    point.mkdir()
    return point
