"""Many requests in flight: each block gets its own data, whatever has to be allocated or copied for it meanwhile.

1. A test that claims many requests in flight measures that there were: see :class:`DepthGauge`.
2. No two writers of one test write the same bytes, so the right end is known without knowing the order.
3. Accesses to the image are delayed where the steps of requests are to interleave: a page cache answers at once.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pytest

from tests.support import loops, qemu
from tests.support.images import pattern
from tests.support.loops import served
from tests.support.mounting import Mounted
from tests.support.oracle import DiskModel, first_difference, reference_bytes

pytestmark = [pytest.mark.mount, pytest.mark.root]

SIZE = 16 << 20
N_THREADS = 64
MIN_DEPTH = 16
BLKDISCARD = 0x1277
CONNECTIONS = Path("/sys/fs/fuse/connections")


@dataclass(frozen=True)
class Start:
    """An image to begin with: QCOW2 ``options`` (None: version 1), and what lies under the first writes."""

    name: str
    options: str | None = "compat=1.1"
    backing: str | None = None
    compressed: bool = False
    snapshot: bool = False
    full: bool = False

    @property
    def format_name(self) -> str:
        """What QEMU calls it."""
        return "qcow" if self.options is None else "qcow2"


STARTS = [
    Start("empty"),
    Start("empty-v1", options=None),
    Start("empty-512", options="cluster_size=512"),
    Start("empty-2M", options="cluster_size=2M"),
    Start("full", full=True),
    Start("overlay-on-raw", backing="raw"),
    Start("overlay-512-on-qcow2", options="cluster_size=512", backing="qcow2"),
    Start("overlay-2M-on-qcow2", options="cluster_size=2M", backing="qcow2"),
    Start("v1-overlay-on-qcow2", options=None, backing="qcow2"),
    Start("overlay-extended-l2-on-qcow2", options="extended_l2=on", backing="qcow2"),
    Start("compressed", compressed=True, full=True),
    Start("shared-with-a-snapshot", snapshot=True, full=True),
    Start("shared-with-a-snapshot-512", options="cluster_size=512", snapshot=True, full=True),
]
BY_NAME = {start.name: start for start in STARTS}


def prepare(folder: Path, start: Start, size: int = SIZE) -> tuple[Path, DiskModel]:
    """The image and what it holds."""
    image, raw = folder / "image", folder / "start.raw"
    options = start.options or ""
    if not start.backing and not start.full:
        qemu.create(image, start.format_name, size, options=options)
        return image, DiskModel(bytes(size))
    data = pattern(size, seed=7, fill=0.9)
    raw.write_bytes(data)
    if start.backing:
        qemu.convert(raw, folder / "base", start.backing, source_format="raw")
        qemu.create(image, start.format_name, options=options, backing="base", backing_format=start.backing)
    else:
        qemu.convert(raw, image, start.format_name, source_format="raw", options=options, compressed=start.compressed)
    if start.snapshot:
        qemu.must_run("qemu-img", "snapshot", "-c", "s", image)
    return image, DiskModel(data)


def assert_holds(image: Path, start: Start, model: DiskModel) -> None:
    """QEMU finds the image clean and reads what the model says."""
    if start.format_name == "qcow2":
        result = qemu.check(image)
        assert result.clean, result.text
    assert first_difference(reference_bytes(image, start.format_name), model.data) == ""


class DepthGauge:
    """The largest number of requests of a FUSE mount that were in flight at once, by looking often."""

    def __init__(self, mount: Mounted) -> None:
        minor = os.minor(os.stat(mount.mount_point).st_dev)
        self._file = CONNECTIONS / str(minor) / "waiting"
        if not self._file.exists():  # as in a container
            qemu.must_run("mount", "-t", "fusectl", "fusectl", CONNECTIONS)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.largest = 0

    def _look(self) -> None:
        while not self._end.is_set():
            self.largest = max(self.largest, int(self._file.read_text()))
            time.sleep(0.0005)

    def __enter__(self) -> DepthGauge:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()


@dataclass(frozen=True)
class Write:
    """``n_bytes`` at ``offset``, filled with 4-byte words that say where they belong and which write it was."""

    offset: int
    n_bytes: int
    number: int

    def data(self) -> bytes:
        """The bytes."""
        first = (self.offset >> 2) ^ (self.number << 24)
        return struct.pack(f"<{self.n_bytes >> 2}I", *range(first, first + (self.n_bytes >> 2)))


def write_all(path: Path, writes: Sequence[Write], model: DiskModel, *, meanwhile: Callable[[int], None]) -> None:
    """Make the writes from many threads past the page cache, call ``meanwhile`` in a row with a descriptor."""
    for write in writes:
        model.write(write.offset, write.data())
    shares = [writes[number::N_THREADS] for number in range(N_THREADS)]
    writing = threading.Event()
    writing.set()
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)

    def write_share(share: Sequence[Write]) -> None:
        for write in share:
            buffer = mmap.mmap(-1, max(write.n_bytes, mmap.PAGESIZE))
            buffer.write(write.data())
            assert os.pwrite(fd, memoryview(buffer)[: write.n_bytes], write.offset) == write.n_bytes

    def go_on_meanwhile() -> None:
        while writing.is_set():
            meanwhile(fd)

    try:
        with ThreadPoolExecutor(N_THREADS + 1) as pool:
            other = pool.submit(go_on_meanwhile)
            try:
                list(pool.map(write_share, shares))
            finally:
                writing.clear()
            other.result()
        os.fsync(fd)
    finally:
        os.close(fd)


def shuffled(writes: list[Write]) -> list[Write]:
    """The writes in an order that is always the same."""
    random.Random(3).shuffle(writes)
    return writes


def flush_now_and_then(fd: int) -> None:
    """What another client does: fsync."""
    os.fsync(fd)
    time.sleep(0.02)


@pytest.mark.parametrize("start", STARTS, ids=lambda start: start.name)
def test_blocks_keep_their_own_data(tmp_path: Path, start: Start) -> None:
    """Each of many 4 KiB blocks that are written at once, with fsyncs between, holds its own number in the end."""
    image, model = prepare(tmp_path, start)
    before = bytes(model.data)
    numbers = random.Random(1).sample(range(SIZE // 4096), 1200)
    write_at_once(image, [Write(number * 4096, 4096, 1) for number in numbers], model)
    assert_holds(image, start, model)
    if start.snapshot:
        raw = tmp_path / "snapshot.raw"
        qemu.must_run("qemu-img", "convert", "-l", "s", "-O", "raw", image, raw)
        assert first_difference(raw.read_bytes(), before) == ""


@pytest.mark.parametrize("start", STARTS, ids=lambda start: start.name)
def test_neighbours_in_one_cluster_do_not_disturb_each_other(tmp_path: Path, start: Start) -> None:
    """Writes of 512 bytes to 1.5 KiB, side by side in the same new clusters, all survive the copying around them."""
    image, model = prepare(tmp_path, start)
    writes = []
    for group in range(0, SIZE, 1 << 20):
        offset = group + 512
        chooser = random.Random(group)
        while offset < group + (64 << 10):
            n_bytes = 512 * chooser.randint(1, 3)
            writes.append(Write(offset, n_bytes, 2))
            offset += n_bytes + 512 * chooser.randint(0, 2)
    write_at_once(image, writes, model)
    assert_holds(image, start, model)


@pytest.mark.parametrize(
    ("start", "tables"),
    [
        (BY_NAME["empty"], "0"),
        (BY_NAME["empty-512"], "4t"),
        (BY_NAME["overlay-512-on-qcow2"], "4t"),
        (BY_NAME["shared-with-a-snapshot-512"], "0"),
    ],
    ids=["empty", "empty-512", "overlay-512", "shared-with-a-snapshot-512"],
)
def test_blocks_keep_their_own_data_with_hardly_any_cache(tmp_path: Path, start: Start, tables: str) -> None:
    """When L2 tables are evicted all the time while many requests use them, every block holds its own data."""
    image, model = prepare(tmp_path, start)
    numbers = random.Random(2).sample(range(SIZE // 4096), 300)
    writes = [Write(number * 4096, 4096, 6) for number in numbers]
    write_at_once(image, writes, model, "--l2-cache-size", tables)
    assert_holds(image, start, model)


def write_at_once(image: Path, writes: list[Write], model: DiskModel, *options: str) -> None:
    """Make the writes through a loop device on an image whose accesses take long enough to overlap."""
    version_1 = "--backing-format=qcow2"  # which cannot name it; others do, and are not asked
    with served(image, "--debug-io-delay", "1ms", version_1, *options) as mount:
        with loops.loop_device(mount.file, direct_io=True) as device, DepthGauge(mount) as gauge:
            write_all(device, writes, model, meanwhile=flush_now_and_then)
    assert gauge.largest >= MIN_DEPTH


@pytest.mark.parametrize("options", ["", "cluster_size=4k", "extended_l2=on,cluster_size=128k", "cluster_size=2M"])
def test_large_blocks_keep_their_own_data(tmp_path: Path, options: str) -> None:
    """Each of many blocks of 512 KiB and more that are written at once, in place, holds its own number in the end,
    whatever is discarded and flushed beside them: threads write some of them, out of the memory of the requests."""
    start = Start("full", options=options, full=True)
    image, model = prepare(tmp_path, start, 64 << 20)
    chooser = random.Random(8)
    writes = [
        Write((area << 20) + chooser.randrange(256) * 512, (512 << 10) + chooser.randrange(512) * 512, number)
        for number in (1, 2)
        for area in range(60)
    ]
    discarded = iter(range(60 << 20, 64 << 20, 64 << 10))
    n_left = 64

    def discard_and_flush(fd: int) -> None:
        nonlocal n_left
        if n_left:
            n_left -= 1
            fcntl.ioctl(fd, BLKDISCARD, struct.pack("QQ", next(discarded), 64 << 10))
        os.fsync(fd)
        time.sleep(0.005)

    with served(image) as mount, loops.loop_device(mount.file, direct_io=True) as device:
        write_all(device, writes[:60], model, meanwhile=discard_and_flush)
        write_all(device, writes[60:], model, meanwhile=discard_and_flush)
    for position in range(60 << 20, (64 << 20) - n_left * (64 << 10), 64 << 10):
        model.write(position, bytes(64 << 10))
    assert_holds(image, start, model)


def test_readers_see_whole_sectors_while_clusters_move(tmp_path: Path) -> None:
    """A sector that is read while it is written, and its cluster copied, is the old one or the new one."""
    start = Start("overlay", backing="qcow2")
    image, model = prepare(tmp_path, start)
    before = bytes(model.data)
    writes = shuffled([Write(offset, 512, 4) for offset in range(0, SIZE, 8192)])
    torn: list[int] = []
    chooser = random.Random(9)

    def read_somewhere(fd: int) -> None:
        write = writes[chooser.randrange(len(writes))]
        buffer = mmap.mmap(-1, 4096)
        assert os.preadv(fd, [buffer], write.offset) == 4096
        sector = buffer[:512]
        if sector != write.data() and sector != before[write.offset : write.offset + 512]:
            torn.append(write.offset)
        if buffer[512:] != before[write.offset + 512 : write.offset + 4096]:
            torn.append(write.offset + 512)

    with served(image, "--debug-io-delay", "1ms") as mount:
        with loops.loop_device(mount.file, direct_io=True) as device:
            write_all(device, writes, model, meanwhile=read_somewhere)
    assert torn == []
    assert_holds(image, start, model)


@pytest.mark.parametrize(
    "start",
    [BY_NAME["empty"], BY_NAME["overlay-on-raw"], BY_NAME["overlay-512-on-qcow2"]],
    ids=lambda start: start.name,
)
def test_buffered_direct_and_mapped_writers_see_one_disk(tmp_path: Path, start: Start) -> None:
    """Pages written through the cache, past it and by mmap side by side read the same in each way, and in QEMU."""
    image, model = prepare(tmp_path, start)
    writes = shuffled([Write(offset, 4096, 5) for offset in range(0, SIZE, 8192)])
    for write in writes:
        model.write(write.offset, write.data())
    with served(image) as mount:
        cached, direct = os.open(mount.file, os.O_RDWR), os.open(mount.file, os.O_RDWR | os.O_DIRECT)
        mapped = mmap.mmap(cached, SIZE)

        def write_share(number: int) -> None:
            for write in writes[number::12]:
                if number % 3 == 0:
                    os.pwrite(cached, write.data(), write.offset)
                elif number % 3 == 1:
                    mapped[write.offset : write.offset + 4096] = write.data()
                else:
                    page = mmap.mmap(-1, 4096)
                    page.write(write.data())
                    os.pwrite(direct, page, write.offset)

        with ThreadPoolExecutor(12) as pool:
            list(pool.map(write_share, range(12)))
        mapped.flush()
        past_cache = mmap.mmap(-1, SIZE)
        assert os.preadv(direct, [past_cache], 0) == SIZE
        assert first_difference(past_cache[:], model.data) == ""
        assert first_difference(mapped[:], model.data) == ""
        assert first_difference(os.pread(cached, SIZE, 0), model.data) == ""
        mapped.close()
        os.close(cached)
        os.close(direct)
    assert_holds(image, start, model)


def run_fio(file: Path, folder: Path, *options: str) -> None:
    """fio that writes random blocks, then reads all of them and verifies their checksums."""
    qemu.must_run(
        "fio", "--name=job", f"--filename={file}", "--size=6M", "--offset_increment=6M", "--rw=randwrite",
        "--ioengine=libaio", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--allow_file_create=0",
        "--randrepeat=1", *options, cwd=folder,
    )  # fmt: skip


FIO_WORKLOADS = {
    "direct": ("--direct=1", "--iodepth=32", "--bs=4k", "--numjobs=2"),
    "direct-mixed-sizes": ("--direct=1", "--iodepth=32", "--bssplit=512/20:4k/40:12k/20:64k/20", "--numjobs=2"),
    "buffered": ("--direct=0", "--iodepth=32", "--bs=4k", "--numjobs=2", "--end_fsync=1", "--invalidate=1"),
}


@pytest.mark.parametrize(
    ("workload", "start", "through_loop"),
    [
        ("direct", BY_NAME["empty"], False),
        ("direct", BY_NAME["empty"], True),
        ("direct-mixed-sizes", BY_NAME["overlay-on-raw"], False),
        ("direct-mixed-sizes", BY_NAME["overlay-on-raw"], True),
        ("direct-mixed-sizes", BY_NAME["empty-512"], False),
        ("buffered", BY_NAME["empty-512"], False),
        ("buffered", BY_NAME["overlay-on-raw"], True),
    ],
)
def test_fio_verifies(tmp_path: Path, workload: str, start: Start, through_loop: bool) -> None:
    """fio reads back what it wrote with 32 requests in flight per job, on the file and on a loop device."""
    image, _ = prepare(tmp_path, start)
    with served(image) as mount:
        with DepthGauge(mount) as gauge:
            if through_loop:
                with loops.loop_device(mount.file, direct_io=True) as device:
                    run_fio(device, tmp_path, *FIO_WORKLOADS[workload])
            else:
                run_fio(mount.file, tmp_path, *FIO_WORKLOADS[workload])
        assert gauge.largest >= MIN_DEPTH or workload == "buffered"
        served_sum = loops.sha256_of(mount.file)
    if start.format_name == "qcow2":
        result = qemu.check(image)
        assert result.clean, result.text
    raw = tmp_path / "end.raw"
    qemu.convert(image, raw, "raw", source_format=start.format_name)
    assert loops.sha256_of(raw) == served_sum


def cpu_ticks(pid: int) -> int:
    """User and system time of a process in clock ticks."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(words[11]) + int(words[12])


def test_idle_daemon_uses_no_cpu_and_no_descriptors(tmp_path: Path) -> None:
    """After a thousand opens and closes the daemon has as many descriptors as before, and then it sleeps."""
    image, _ = prepare(tmp_path, Start("empty"))
    with served(image) as mount:
        descriptors = Path(f"/proc/{mount.pid}/fd")
        mount.file.read_bytes()
        n_before = len(list(descriptors.iterdir()))
        for number in range(1000):
            with open(mount.file, "r+b" if number % 2 else "rb", buffering=0) as stream:
                stream.write(b"x") if number % 2 else stream.read(1)
        time.sleep(0.2)
        assert len(list(descriptors.iterdir())) <= n_before
        ticks = cpu_ticks(mount.pid)
        time.sleep(2)
        assert cpu_ticks(mount.pid) - ticks <= 1
