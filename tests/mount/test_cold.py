"""Reads of an image of which nothing is in memory, on a real mount, by io_uring and by threads."""

from __future__ import annotations

import mmap
import os
import random
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import qemu
from tests.support.container import is_in_memory, lacks
from tests.support.io_uring import need_io_uring
from tests.support.mounting import Mounted

pytestmark = [pytest.mark.mount, pytest.mark.root]

SIZE = 32 << 20
REFUSED = """
from qcowfuse.storage import ring
def refuse():
    raise ImportError('not today')
ring.load_binding = refuse
"""


def drop_pages(path: Path) -> None:
    """Drop what the page cache has of a file."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def uses_io_uring(pid: int) -> bool:
    """Whether the process holds an io_uring."""
    folder = f"/proc/{pid}/fd"
    return any("io_uring" in os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder))


@pytest.fixture
def disk_folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder on a disk: /tmp may be in memory, where no read has to wait."""
    if not is_in_memory(tmp_path):
        yield tmp_path
        return
    if is_in_memory(Path("/var/tmp")):
        lacks("a disk below /tmp or /var/tmp")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        yield Path(name)


@pytest.mark.parametrize(
    ("options", "patch", "by_ring"),
    [((), "", True), (("--aio", "threads"), "", False), ((), REFUSED, False)],
    ids=["io_uring", "threads", "refused"],
)
def test_cold_reads_give_the_right_bytes(
    disk_folder: Path, options: tuple[str, ...], patch: str, *, by_ring: bool
) -> None:
    """Sixteen readers at once and a writer, while the page cache is emptied under them again and again. Where there
    is no io_uring, the log says so."""
    if by_ring:
        need_io_uring()
    image, raw = disk_folder / "image", disk_folder / "raw"
    contents = bytearray(random.Random(3).randbytes(SIZE))
    raw.write_bytes(contents)
    qemu.must_run("qemu-img", "convert", "-O", "qcow2", str(raw), str(image))
    (disk_folder / "mnt").mkdir()
    ended = threading.Event()

    def keep_dropping() -> None:
        while not ended.wait(0.002):
            drop_pages(image)

    def read(seed: int) -> None:
        chooser = random.Random(seed)
        fd = os.open(mount.file, os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, 1 << 20)
        for _ in range(150):
            n_bytes = chooser.choice((512, 4096, 65536, 256 << 10, 1 << 20))
            # The last MiB is the writer's.
            offset = chooser.randrange((SIZE - (1 << 20) - n_bytes) // 512) * 512
            assert os.preadv(fd, [memoryview(buffer)[:n_bytes]], offset) == n_bytes
            assert buffer[:n_bytes] == contents[offset : offset + n_bytes]
        os.close(fd)

    with Mounted(image, disk_folder / "mnt", *options, patch=patch) as mount:
        dropper = threading.Thread(target=keep_dropping)
        dropper.start()
        try:
            with ThreadPoolExecutor(16) as readers, open(mount.file, "r+b", buffering=0) as file:
                results = [readers.submit(read, seed) for seed in range(16)]
                for number in range(64):
                    offset, data = SIZE - (1 << 20) + number * 16384, os.urandom(16384)
                    contents[offset : offset + 16384] = data
                    file.seek(offset)
                    assert file.write(data) == 16384
                for result in results:
                    result.result()
        finally:
            ended.set()
            dropper.join()
        assert uses_io_uring(mount.pid) is by_ring
        mount.close()
        assert ("not today" in mount.log) is bool(patch)
    assert qemu.check(image).clean
    served = disk_folder / "served"
    qemu.must_run("qemu-img", "convert", "-O", "raw", str(image), str(served))
    assert served.read_bytes() == contents
