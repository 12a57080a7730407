"""Cold reads from a real disk, and how many of them are in flight there.

1. Before each measurement the pages of the image, and those of the served file, are dropped, file by file, and
   counted: none may be left. Dropping the caches of the whole machine would slow it down for a while.
2. What lies below the disk (a host's cache, the disk's own) can't be dropped: only ratios within one run count.
3. "In flight" is what the kernel says of the whole disk: the time that its reads and writes took, divided by the
   time that passed.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from . import images
from .compare import Result
from .contenders import OURS, Contender, Served, serve_qcowfuse
from .report import print_table
from .row import Row, Settings
from .tools import fio, need, run, table

SIZE_MIB = 4096
QUICK_SIZE_MIB = 1024
DISK = "the disk itself"

_ROWS = (
    ("4 KiB random read, direct, depth 1", "IOPS", "randread", "4k", 1, True),
    ("4 KiB random read, direct, depth 16", "IOPS", "randread", "4k", 16, True),
    ("4 KiB random read, direct, depth 64", "IOPS", "randread", "4k", 64, True),
    ("1 MiB sequential read, direct, depth 1", "MiB/s", "read", "1M", 1, True),
    ("1 MiB sequential read, direct, depth 4", "MiB/s", "read", "1M", 4, True),
    ("128 KiB sequential read, buffered", "MiB/s", "read", "128k", 1, False),
)
_DELAY = "1ms"
_DELAYED_ROWS = (
    ("4 KiB random read, direct, depth 1", "randread", "4k", 1, True),
    ("4 KiB random read, direct, depth 16", "randread", "4k", 16, True),
    ("4 KiB sequential read, buffered", "read", "4k", 1, False),
    ("128 KiB sequential read, buffered", "read", "128k", 1, False),
)
_SLOW = "5ms"
_SLOW_SIZE_MIB = 256
_SLOW_ROWS = (
    ("4 KiB random read, direct, depth 1", "randread", "4k", 1, True),
    ("4 KiB random read, direct, depth 16", "randread", "4k", 16, True),
    ("4 KiB random read, direct, depth 64", "randread", "4k", 64, True),
    ("128 KiB sequential read, buffered", "read", "128k", 1, False),
)
_SETTLE_SECONDS = 60.0
_TICKS = os.sysconf("SC_CLK_TCK")


def drop_pages(file: Path) -> None:
    """Drop a file's clean pages from the page cache. Raises RuntimeError if some stay."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    left = run("fincore", "--bytes", "--noheadings", "--output", "RES", str(file)).strip()
    if left != "0":
        raise RuntimeError(f"{left} bytes of {file} stay in the page cache")


def _busy_ms(image: Path) -> int:
    """Milliseconds that all requests to the disk below ``image`` took, added up. Raises OSError without a disk."""
    device = image.stat().st_dev
    fields = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
    return int(fields[10])


def _wait_until_idle(image: Path) -> None:
    """Wait for what making the image has left to do, such as discarding what was deleted. Raises OSError."""
    os.sync()
    end = time.monotonic() + _SETTLE_SECONDS
    before = _busy_ms(image)
    while time.monotonic() < end:
        time.sleep(2)
        now = _busy_ms(image)
        if now - before < 20:
            return
        before = now


def _cpu_seconds(pids: tuple[int, ...]) -> float:
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(field_[11]) + int(field_[12]) for field_ in fields) / _TICKS


@dataclass
class _Costs:
    """Of one contender in one row: reads in flight at the disk, and processor time in us for each read."""

    in_flight: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def bench_cold(contenders: list[Contender], folder: Path, *, rounds: int, seconds: float, quick: bool) -> None:
    """All rows, the contenders in turn; then what is in flight; then ours alone with a known delay."""
    need("fincore")
    settings = Settings(folder, QUICK_SIZE_MIB if quick else SIZE_MIB, 0, seconds, quick)
    images.full(folder, settings.size_mib)
    image = folder / images.IMAGE
    try:
        drop_pages(image)
        _wait_until_idle(image)
    except (OSError, RuntimeError) as error:
        sys.exit(f"bench: {folder} is not on a disk: {error} (--dir says where to measure)")
    results: list[Result] = []
    costs: dict[tuple[str, str], _Costs] = {}
    for name, unit, mode, block, depth, direct in _ROWS:
        row = Row(name, "cold", unit, _unused)
        result = Result(row, {contender.name: [] for contender in contenders})
        for number in range(rounds):
            shift = number % len(contenders)
            seed = random.randrange(1 << 31)
            for contender in contenders[shift:] + contenders[:shift]:
                cost = costs.setdefault((name, contender.name), _Costs())

                def job(file: Path) -> dict[str, float]:
                    return _fio(file, mode, block, depth, direct, seconds, seed)  # noqa: B023

                done = _measure(contender, image, folder, job, cost)
                result.figures[contender.name].append(
                    done["iops"] if unit == "IOPS" else done["bytes_per_second"] / images.MIB
                )
            if direct:
                cost = costs.setdefault((name, DISK), _Costs())
                result.figures.setdefault(DISK, []).append(
                    _measure_disk(image, mode, block, depth, seconds, cost, unit)
                )
        results.append(result)
        print(f"{name}: {result.median(OURS):,.4g} {unit}", file=sys.stderr)
    _print(results, costs, contenders, settings, rounds)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="qcowfuse-bench-") as name:
        memory = Path(name)
        images.full(memory, _SLOW_SIZE_MIB)
        _bench_delayed(memory, seconds)
        if os.geteuid() or shutil.which("losetup") is None or shutil.which("mkfs.ext4") is None:
            print("\na slow disk: left out (needs root, losetup and mkfs.ext4)")
        else:
            _bench_slow_disk(contenders, memory, rounds=min(rounds, 3), seconds=seconds)


def _fio(
    file: Path, mode: str, block: str, depth: int, direct: bool, seconds: float, seed: int = 1
) -> dict[str, float]:
    """A job of some seconds; sequential ones end with the file, since what they have read once is cold no more."""
    options = (f"--randseed={seed}", f"--runtime={round(seconds * 1000)}ms")
    return fio(
        file, mode, block, depth=depth, direct=direct, seconds=seconds if mode == "randread" else 0, options=options
    )


def _unused(served: Served, settings: Settings) -> float:
    raise AssertionError("measured by bench_cold")


def _measure(
    contender: Contender, image: Path, folder: Path, job: Callable[[Path], dict[str, float]], cost: _Costs
) -> dict[str, float]:
    """A daemon of its own, which knows nothing yet, on an image of which nothing is in memory."""
    with contender.serve(image, folder) as served:
        with served.file.open("rb") as file:
            file.read(4096)
        time.sleep(0.3)  # what reads the tables in the background shall be done
        drop_pages(served.file)
        drop_pages(image)
        busy, cpu, start = _busy_ms(image), _cpu_seconds(served.pids), time.monotonic()
        done = job(served.file)
        elapsed = done["seconds"]
        assert time.monotonic() - start >= elapsed
        cost.in_flight.append((_busy_ms(image) - busy) / 1000 / elapsed)
        cost.cpu.append((_cpu_seconds(served.pids) - cpu) * 1e6 / done["ops"])
    return done


def _measure_disk(image: Path, mode: str, block: str, depth: int, seconds: float, cost: _Costs, unit: str) -> float:
    """The same of the image file itself, past the page cache: what the disk can do for whoever asks so."""
    busy = _busy_ms(image)
    done = _fio(image, mode, block, depth, True, seconds, random.randrange(1 << 31))
    cost.in_flight.append((_busy_ms(image) - busy) / 1000 / done["seconds"])
    return done["iops"] if unit == "IOPS" else done["bytes_per_second"] / images.MIB


def _print(
    results: list[Result],
    costs: dict[tuple[str, str], _Costs],
    contenders: list[Contender],
    settings: Settings,
    rounds: int,
) -> None:
    for contender in contenders:
        print(f"{contender.name}: {contender.version}")
    print(f"\ncold, {settings.size_mib} MiB full image on a disk; medians of {rounds} rounds\n")
    for result in results:
        result.figures, disk = {c.name: result.figures[c.name] for c in contenders}, result.figures.get(DISK)
        if disk:
            ours = statistics.median(a / b for a, b in zip(result.figures[OURS], disk, strict=True))
            print(
                f"{result.row.name}: {DISK} {statistics.median(disk):,.0f} {result.row.unit}, ours {ours:.2f} of it"
            )
    print()
    print_table(results, [contender.name for contender in contenders[1:]])
    print("\nin flight at the disk on average (processor time of the daemon, in us for each read)\n")
    names = [contender.name for contender in contenders]
    rows = []
    for result in results:
        cells = [costs[result.row.name, name] for name in names]
        disk_cost = costs.get((result.row.name, DISK))
        rows.append(
            [
                result.row.name,
                *(f"{statistics.median(c.in_flight):.1f} ({statistics.median(c.cpu):.0f})" for c in cells),
                f"{statistics.median(disk_cost.in_flight):.1f}" if disk_cost else "",
            ]
        )
    table(["", *names, DISK], rows)


def _bench_delayed(folder: Path, seconds: float) -> None:
    """With each access delayed by the same time, rates tell how many are under way at once."""
    rows = []
    one_at_a_time = 0.0
    image = folder / images.IMAGE
    with serve_qcowfuse(image, folder, "-r", "--debug-io-delay", _DELAY) as served:
        for name, mode, block, depth, direct in _DELAYED_ROWS:
            drop_pages(served.file)
            before = served.counters()["backend.reads"]
            done = _fio(served.file, mode, block, depth, direct, seconds)
            rate = (served.counters()["backend.reads"] - before) / done["seconds"]
            one_at_a_time = one_at_a_time or rate
            mib = done["bytes_per_second"] / images.MIB
            rows.append([name, f"{done['iops']:,.0f}", f"{mib:,.0f}", f"{rate:,.0f}", f"{rate / one_at_a_time:.1f}"])
    print(f"\nours with --debug-io-delay {_DELAY}\n")
    table(["", "IOPS", "MiB/s", "reads of the image/s", "in flight"], rows)


@contextmanager
def _slow_disk(folder: Path) -> Iterator[Path]:
    """A folder on a disk of which every access takes ``_SLOW``: ext4 on a loop device on a qcowfuse of its own."""
    disk = folder / "slow"
    disk.mkdir()
    images.empty(disk, 4 * _SLOW_SIZE_MIB)
    tree = folder / "tree"
    tree.mkdir()

    @contextmanager
    def mounted(*options: str) -> Iterator[None]:
        with serve_qcowfuse(disk / images.IMAGE, folder, *options) as served:
            loop = run("losetup", "-f", "--show", "--direct-io=on", str(served.file)).strip()
            try:
                if not options:
                    run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", loop)
                run("mount", "-o", "noatime", loop, str(tree))
                try:
                    yield
                finally:
                    run("umount", str(tree))
            finally:
                run("losetup", "-d", loop)

    with mounted():
        images.full(tree, _SLOW_SIZE_MIB)
    with mounted("--debug-io-delay", _SLOW):
        yield tree


def _bench_slow_disk(contenders: list[Contender], folder: Path, *, rounds: int, seconds: float) -> None:
    """On a slow disk, what counts is how many reads are there at the same time."""
    rows = []
    with _slow_disk(folder) as tree:
        for name, mode, block, depth, direct in _SLOW_ROWS:
            cells = []
            for contender in contenders:
                cost = _Costs()

                def job(file: Path) -> dict[str, float]:
                    return _fio(file, mode, block, depth, direct, seconds)  # noqa: B023

                rates = [_measure(contender, tree / images.IMAGE, folder, job, cost)["iops"] for _ in range(rounds)]
                cells.append(f"{statistics.median(rates):,.0f} ({statistics.median(cost.in_flight):.1f})")
            rows.append([name, *cells])
    print(f"\non a disk of which every access takes {_SLOW}: IOPS (in flight at that disk on average)\n")
    table(["", *(contender.name for contender in contenders)], rows)


def default_folder() -> str:
    """A folder on a disk, most likely."""
    return "/var/tmp" if Path("/var/tmp").is_dir() else tempfile.gettempdir()
