"""Running programs, and what every benchmark needs: fio, tables, waiting for a daemon."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
READY_SECONDS = 30.0


def python() -> str:
    """The interpreter that has qcowfuse's dependencies."""
    ours = REPOSITORY / ".venv/bin/python"
    return str(ours) if ours.exists() else sys.executable


def run(*command: str, check: bool = True, cwd: Path | None = None) -> str:
    """Run a command and give its output."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd)
    if check and done.returncode:
        sys.exit(f"bench: {' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def need(*programs: str) -> None:
    """End with one line when a program is missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        sys.exit(f"bench: needs {', '.join(missing)}; scripts/test installs everything that is needed")


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until a contender serves."""
    end = time.monotonic() + READY_SECONDS
    while not condition():
        if process.poll() not in (None, 0) or time.monotonic() > end:
            raise RuntimeError(f"{process.args[0]!r} did not start to serve")  # type: ignore[index]
        time.sleep(0.002)


def wait_ended(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that was asked to end."""
    try:
        process.wait(READY_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def fio(
    file: Path,
    mode: str,
    block: str,
    *,
    depth: int = 1,
    direct: bool = True,
    seconds: float = 0,
    n_ops: int = 0,
    options: tuple[str, ...] = (),
) -> dict[str, float]:
    """One fio job; gives operations, seconds, operations and bytes per second (of reads and writes together)."""
    command = [
        *("fio", "--name=j", f"--filename={file}", f"--rw={mode}", f"--bs={block}", f"--iodepth={depth}"),
        *(f"--direct={int(direct)}", "--output-format=json", "--randrepeat=1", "--allow_file_create=0"),
        *("--norandommap", "--random_generator=tausworthe64", "--ioengine=" + ("psync" if depth == 1 else "libaio")),
        *options,
    ]
    if n_ops:
        command += [f"--number_ios={n_ops}"]
    if seconds:
        command += ["--time_based", f"--runtime={round(seconds * 1000)}ms"]
    output = run(*command)
    job = json.loads(output[output.index("{") :])["jobs"][0]
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    n_done = sum(side["total_ios"] for side in sides)
    elapsed = max(job["job_runtime"] / 1000, 0.001)
    n_bytes = sum(side["io_bytes"] for side in sides)
    return {"ops": n_done, "seconds": elapsed, "iops": n_done / elapsed, "bytes_per_second": n_bytes / elapsed}


def table(header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
