"""Typed wrappers around qemu-img and qemu-io: they are the judge, so a missing tool is an error and never a skip.

Ubuntu 24.04 has QEMU 8.2; Debian 13, and Debian 12 with its backports, have 10.0. What only the newer one has is
compared where it is there (:func:`need`).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TIMEOUT = 120.0
"""Seconds that any one tool may take."""


LACKS = "this QEMU lacks"
"""How the reasons of skips begin that :func:`need` makes; they are declared."""
_MEASURED_NOTHING = "Unable to get accurate CPU usage"
"""What some versions before 10.0 say now and then of a new LUKS image: it was made too fast to be measured."""
_N_TRIES = 20


class QemuError(AssertionError):
    """A tool failed that should not have; the text is its command line and what it said."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A tool that has run: its exit code and what it said."""

    command: tuple[str, ...]
    code: int
    stdout: str
    stderr: str


def run(*command: str | Path, cwd: Path | None = None) -> Finished:
    """Run a tool to its end, whatever its exit code."""
    words = tuple(str(word) for word in command)
    for _ in range(_N_TRIES):
        done = subprocess.run(
            words, capture_output=True, text=True, errors="surrogateescape", timeout=TIMEOUT, cwd=cwd, check=False
        )
        if not done.returncode or _MEASURED_NOTHING not in done.stderr:
            break
    return Finished(words, done.returncode, done.stdout, done.stderr)


def must_run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a tool that must succeed and give its output. Raises QemuError."""
    done = run(*command, cwd=cwd)
    if done.code:
        raise QemuError(f"{' '.join(done.command)}: exit code {done.code}\n{done.stdout}{done.stderr}")
    return done.stdout


def version() -> tuple[int, int]:
    """Of qemu-img: (10, 0)."""
    found = re.search(r"version (\d+)\.(\d+)", must_run("qemu-img", "--version"))
    assert found is not None
    return int(found[1]), int(found[2])


def need(since: tuple[int, int], what: str) -> None:
    """Skip the test where QEMU is older than the version that has it.

    Not from an async test: pytest-trio drops the reason.
    """
    if version() < since:
        pytest.skip(f"{LACKS} {what}, which came with {since[0]}.{since[1]}")


def create(
    path: Path,
    format_name: str,
    size: int | str | None = None,
    *,
    options: str = "",
    backing: str | None = None,
    backing_format: str | None = None,
) -> None:
    """``qemu-img create``; ``backing`` is stored as given and found relative to the new image's folder."""
    words: list[str | Path] = ["qemu-img", "create", "-q", "-f", format_name]
    if options:
        words += ["-o", options]
    if backing is not None:
        words += ["-b", backing]
    if backing_format is not None:
        words += ["-F", backing_format]
    words.append(path)
    if size is not None:
        words.append(str(size))
    must_run(*words)


def convert(
    source: Path,
    target: Path,
    target_format: str,
    *,
    source_format: str | None = None,
    options: str = "",
    compressed: bool = False,
) -> None:
    """``qemu-img convert``, with ``-c`` for ``compressed``."""
    words: list[str | Path] = ["qemu-img", "convert", "-O", target_format]
    if source_format is not None:
        words += ["-f", source_format]
    if options:
        words += ["-o", options]
    if compressed:
        words.append("-c")
    must_run(*words, source, target)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What ``qemu-img check`` says: exit code 0 clean, 2 corruptions, 3 leaks only."""

    code: int
    leaks: int
    corruptions: int
    text: str

    @property
    def clean(self) -> bool:
        """Neither leaks nor corruptions."""
        return self.code == 0 and self.leaks == 0 and self.corruptions == 0


def check(path: Path, format_name: str = "qcow2") -> CheckResult:
    """``qemu-img check``. Raises QemuError where the image cannot be checked at all."""
    done = run("qemu-img", "check", "-f", format_name, "--output=json", path)
    if done.code not in (0, 2, 3):
        raise QemuError(f"{' '.join(done.command)}: exit code {done.code}\n{done.stdout}{done.stderr}")
    found = json.loads(done.stdout)
    return CheckResult(
        code=done.code,
        leaks=int(found.get("leaks", 0)),
        corruptions=int(found.get("corruptions", 0)) + int(found.get("check-errors", 0)),
        text=done.stdout + done.stderr,
    )


def is_same(first: Path, second: Path, first_format: str, second_format: str) -> bool:
    """Whether ``qemu-img compare`` finds the same bytes and the same size."""
    # Not -s: that compares what is allocated as well.
    done = run("qemu-img", "compare", "-f", first_format, "-F", second_format, first, second)
    if done.code not in (0, 1):
        raise QemuError(f"{' '.join(done.command)}: exit code {done.code}\n{done.stdout}{done.stderr}")
    return done.code == 0 and "size mismatch" not in done.stdout


def info(path: Path, format_name: str | None = None) -> dict[str, Any]:
    """``qemu-img info`` as JSON."""
    words: list[str | Path] = ["qemu-img", "info", "--output=json", "-U"]
    if format_name is not None:
        words += ["-f", format_name]
    parsed: dict[str, Any] = json.loads(must_run(*words, path))
    return parsed


def map_extents(path: Path, format_name: str = "qcow2") -> list[dict[str, Any]]:
    """``qemu-img map`` as JSON: start, length, depth, zero, data, offset."""
    parsed: list[dict[str, Any]] = json.loads(must_run("qemu-img", "map", "-f", format_name, "--output=json", path))
    return parsed


def io(path: Path, commands: Sequence[str], format_name: str = "qcow2", *, options: str = "") -> str:
    """``qemu-io``: all ``commands`` in one run. Raises QemuError when one fails or a pattern differs."""
    words: list[str | Path] = ["qemu-io", "-t", "unsafe", "-f", format_name]
    for command in commands:
        words += ["-c", command]
    said = must_run(*words, path)
    if "verification failed" in said or "failed:" in said:
        raise QemuError(f"qemu-io {path} {list(commands)}:\n{said}")
    return said
