"""Cases by the number, and what is wrong with one: a line, or nothing."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import select
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ..bounded_storage import STORAGE_LIMIT
from ..shrink import shrink
from .cases import Case, changed, random_changes, random_steps
from .differential import run_qemu
from .parsers import PARSERS
from .subjects import ENCRYPTED, IMAGES, SIZE, subject
from .whole import run_whole

WHOLE, QEMU = "whole", "qemu"
TARGETS = (*PARSERS, WHOLE, QEMU)
MEMORY = (64 << 20) + 3 * STORAGE_LIMIT
"""Bytes of data that a case may add to its process: what an image may make us take, beside the copies of it that are
held here, one of them as the file."""
CPU_SECONDS = 30.0
"""Of processor time that a case may take: other work on the machine doesn't make it one that hangs."""
WALL_SECONDS = 180.0
"""After which a case is ended from outside."""


class Hang(BaseException):
    """A case took more processor time than it may."""


def case_of(seed: int, target: str, number: int) -> Case:
    """The case of a number."""
    chooser = random.Random(f"{seed} {target} {number}")
    if target in PARSERS:
        name = chooser.choice(PARSERS[target][1])
        raw = 0.7 if not subject(name).fields or target in ("deflate", "zstd") else 0.1
        return Case(target, name, random_changes(chooser, name, raw=raw))
    names = (*IMAGES, *ENCRYPTED) if target == WHOLE else tuple(IMAGES)
    name = chooser.choice(names)
    intact = chooser.random() < (0.15 if target == WHOLE else 0.05)
    size = 4 * SIZE if "extended" in name else SIZE
    steps = random_steps(chooser, size) if target == WHOLE or chooser.random() < 0.3 else ()
    return Case(target, name, () if intact else random_changes(chooser, name), steps, chooser.random() < 0.3)


def run_case(case: Case) -> None:
    """Run it, whatever it is. Raises what is wrong."""
    if case.target in PARSERS:
        PARSERS[case.target][0](changed(case))
    elif case.target == WHOLE:
        run_whole(case)
    elif case.target == QEMU:
        run_qemu(case)
    else:
        raise ValueError(f"there is no target {case.target!r}")


def judge(case: Case) -> str | None:
    """What is wrong, as one line. Only the interrupt of a user gets out."""
    try:
        run_case(case)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        while not isinstance(error, Hang) and isinstance(error.__cause__ or error.__context__, Hang):
            error = error.__cause__ or error.__context__ or error
        frames = [
            frame for frame in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in frame.filename
        ]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return f"{type(error).__name__} at {where}: {error}".replace("\n", " ")
    return None


def kind_of(text: str) -> str:
    """What two findings have in common that are one: the line without its numbers."""
    return re.sub(r"0x[0-9a-f]+|\b\d+\b|'[^']*'", "#", text.split("\n")[0])[:120]


def limit(*, memory: bool) -> None:
    """Start the clock of a case, and bound its memory (not with ``memory`` False: QEMU's tools inherit that)."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    soft = _data_bytes() + MEMORY if memory else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_DATA, (soft, resource.RLIM_INFINITY))


def unlimit() -> None:
    """The end of a case."""
    signal.setitimer(signal.ITIMER_PROF, 0)


def _data_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))


def on_clock(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Handler of SIGPROF."""
    raise Hang(f"more than {CPU_SECONDS:g} s of processor time")


def judge_limited(case: Case) -> str | None:
    """:func:`judge` within the limits of memory and time; in a process that is there for it."""
    signal.signal(signal.SIGPROF, on_clock)
    limit(memory=case.target != QEMU)
    try:
        return judge(case)
    except Hang as error:  # it came between two lines of the judge itself
        return f"Hang: {error}"
    finally:
        unlimit()


def judge_apart(case: Case) -> str | None:
    """:func:`judge_limited` in a process of its own, which may die or hang."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        text = "MemoryError"
        with suppress(BaseException):
            text = json.dumps(judge_limited(case))
        with suppress(OSError):
            os.write(writable, text.encode()[:60_000])
        os._exit(0)
    os.close(writable)
    try:
        if not select.select([readable], [], [], WALL_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
            return f"Hang: more than {WALL_SECONDS:g} s"
        raw = os.read(readable, 1 << 16)
    finally:
        os.close(readable)
        _, status = os.waitpid(child, 0)
    if not raw:
        return f"Died: status {status}"
    found: str | None = json.loads(raw)
    return found


def shrink_case(case: Case, text: str, judged: Callable[[Case], str | None] = judge_apart) -> Case:
    """The same finding with as few changes and steps as it takes."""
    wanted = kind_of(text)

    def fails(other: Case) -> bool:
        said = judged(other)
        return said is not None and kind_of(said) == wanted

    if not fails(case):
        return case  # depends on what ran before it in the same process
    if case.suspend and fails(case._replace(suspend=False)):
        case = case._replace(suspend=False)
    for _ in range(2):
        if case.steps:
            if fails(case._replace(steps=())):
                case = case._replace(steps=())
            else:
                steps = shrink(case.steps, lambda steps: fails(case._replace(steps=tuple(steps))))  # noqa: B023
                case = case._replace(steps=tuple(steps))
        if case.changes:
            if fails(case._replace(changes=())):
                case = case._replace(changes=())
            else:
                changes = shrink(case.changes, lambda changes: fails(case._replace(changes=tuple(changes))))  # noqa: B023
                case = case._replace(changes=tuple(changes))
    return case
