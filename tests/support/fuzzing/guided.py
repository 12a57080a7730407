"""Cases that coverage chooses, where atheris is installed.

The bytes that atheris makes up choose the subject, the fields and their values, so that a finding is a case like any
other. One process (``guided_worker``) does one target, since atheris never comes back; what it finds is
written to a pipe at once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .cases import Case, Change, groups
from .parsers import PARSERS
from .subjects import IMAGES, subject
from .workers import Finding

_MAX_LENGTH = 128


def has_atheris() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("atheris") is not None


def case_from(target: str, data: bytes) -> Case:
    """The case that bytes stand for: subject, then kind, place and value of each change."""
    names = PARSERS[target][1] if target in PARSERS else tuple(IMAGES)
    data = data or b"\0"
    name = names[data[0] % len(names)]
    start, changes = subject(name), list[Change]()
    for at in range(1, len(data) - 3, 12):
        kind, place, value = data[at] % 8, int.from_bytes(data[at + 1 : at + 4], "big"), data[at + 4 : at + 12]
        number = int.from_bytes(value, "big")
        if kind == 0 and place % 4 == 0:
            changes.append(("cut", number % (len(start.data) + 1)))
        elif kind <= 1 or not start.fields:
            changes.append((f"@{place % len(start.data)}", number & 0xFF))
        else:
            alike = groups(name)[place % len(groups(name))]
            field = alike[(place >> 8) % len(alike)]
            changes.append((field, number & (1 << 8 * start.fields[field][1]) - 1))
    return Case(target, name, tuple(changes))


def guided(targets: Sequence[str], seed: int, seconds: float) -> Iterator[Finding | tuple[str, int]]:
    """The first finding of each kind, and how many more cases a target has had; one target after the other."""
    for target in targets:
        readable, writable = os.pipe()
        words = [
            "-m",
            f"{__package__}.guided_worker",
            target,
            str(max(1, round(seconds / len(targets)))),
            str(seed),
            str(writable),
        ]
        root = Path(__file__).resolve().parents[3]
        process = subprocess.Popen(
            [sys.executable, *words],
            pass_fds=[writable],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=root,
            text=True,
        )
        os.close(writable)
        with open(readable, encoding="utf-8") as lines:
            for line in lines:
                said = json.loads(line)
                if isinstance(said, int):
                    yield target, said
                else:
                    yield Finding(case_from(target, bytes.fromhex(said[0])), said[1])
        _, errors = process.communicate()
        if process.returncode:
            yield Finding(Case(target, "?"), f"Died: atheris ended with {process.returncode}: {errors[-300:]}")
