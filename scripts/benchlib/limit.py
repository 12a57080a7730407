"""How far qcowfuse is from what FUSE can do: beside the least daemon that there can be, written in C.

1. The other daemon answers each request with one pread or pwrite of a raw file with the same contents. It has the
   loops of libfuse: with one thread, and with several.
2. A goal is the part of the better one of them that qcowfuse is meant to reach.
3. One request at a time is decided by where the kernel has client and daemon run. So that is measured three times: as
   it comes, and with the two held on one processor and on two.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from .compare import Result
from .contenders import OURS, Contender, Served, serve_qcowfuse
from .row import Row, Settings
from .rows import ROWS
from .tools import need, run, table, until, wait_ended

GOALS = {
    "4 KiB random read, direct, depth 1": 0.85,
    "4 KiB random write, direct, depth 1": 0.85,
    "4 KiB random read, direct, depth 16": 0.65,
    "4 KiB random write, direct, depth 16": 0.65,
    "1 MiB sequential read, direct, depth 1": 0.9,
    "1 MiB sequential write, direct, depth 1": 0.9,
    "1 MiB sequential read, direct, depth 4": 0.9,
    "1 MiB sequential write, direct, depth 4": 0.9,
    "128 KiB sequential read, buffered": 0.95,
}
"""By the name of the row."""
_SOURCE = Path(__file__).with_name("passthrough.c")


def limit_contenders(folder: Path) -> list[Contender]:
    """qcowfuse, and what it is measured against, which is compiled into ``folder``."""
    need("gcc", "pkg-config")
    flags = run("pkg-config", "--cflags", "--libs", "fuse3").split()
    program = str(folder / "passthrough")
    run("gcc", "-O2", "-o", program, str(_SOURCE), *flags)
    version = f"libfuse {run('pkg-config', '--modversion', 'fuse3').strip()}"
    return [
        Contender(OURS, serve_qcowfuse, True, "this checkout"),
        Contender("pass-through, 1 thread", partial(_serve_passthrough, program, "0"), True, version),
        Contender("pass-through, threads", partial(_serve_passthrough, program, "1"), True, version),
    ]


@contextmanager
def _serve_passthrough(program: str, threads: str, image: Path, folder: Path) -> Iterator[Served]:
    raw = image.with_suffix(".raw")
    run("qemu-img", "convert", "-O", "raw", str(image), str(raw))
    mount_point = Path(tempfile.mkdtemp(dir=folder, prefix="limit"))
    file = mount_point / "disk.raw"
    started = time.monotonic()
    process = subprocess.Popen([program, str(raw), str(mount_point), threads])
    try:
        until(file.exists, process)
        yield Served(file, (process.pid,), started)
    finally:
        process.send_signal(signal.SIGTERM)
        wait_ended(process)
        mount_point.rmdir()
        raw.unlink()


def _measure_held(served: Served, settings: Settings, *, row: Row, daemon: int, client: int) -> float:
    """``row`` with the daemon on one processor, and on one the program that asks."""
    allowed = os.sched_getaffinity(0)
    try:
        _hold(served, {daemon})
        os.sched_setaffinity(0, {client})
        return row.measure(served, settings)
    finally:
        os.sched_setaffinity(0, allowed)
        _hold(served, allowed)


def _hold(served: Served, processors: set[int]) -> None:
    for pid in served.pids:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(ProcessLookupError):  # one that has ended meanwhile
                os.sched_setaffinity(int(thread), processors)


def _limit_rows() -> list[Row]:
    processors = sorted(os.sched_getaffinity(0))
    rows = []
    for row in ROWS:
        if row.name not in GOALS:
            continue
        rows.append(row)
        if not row.name.endswith("direct, depth 1") or len(processors) < 2:
            continue
        for what, client in (("one processor", processors[0]), ("two processors", processors[1])):
            measure = partial(_measure_held, row=row, daemon=processors[0], client=client)
            rows.append(replace(row, name=f"{row.name}, {what}", measure=measure))
            GOALS[rows[-1].name] = GOALS[row.name]
    return rows


LIMIT_ROWS = _limit_rows()


def print_limits(results: list[Result], contenders: list[Contender]) -> None:
    """Medians, and what part of the better other one we reach, beside the goal."""
    rows = []
    for result in results:
        medians = [f"{result.median(contender.name):,.0f}" for contender in contenders]
        reached = result.ratio_to_best() or 0.0
        goal = GOALS[result.row.name]
        said = "reached" if reached >= goal else "below"
        rows.append([result.row.name, result.row.unit, *medians, f"{reached:.2f}", f"{goal:.2f}", said])
    table(["", "unit", *(contender.name for contender in contenders), "of it", "goal", ""], rows)
