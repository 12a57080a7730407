"""qcowfuse-img beside qemu-img: the time of whole commands on images at rest."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from . import images
from .compare import Result
from .contenders import OURS, Served
from .row import Row, Settings
from .tools import REPOSITORY, python, run

QEMU = "qemu-img"


@dataclass(frozen=True)
class _Command:
    """``arguments`` of both programs; {} is the image, {new} a name for another one."""

    name: str
    maker: images.Maker
    size_mib: int
    arguments: tuple[str, ...]


_COMMANDS = (
    _Command("check, 64 GiB disk, all mapped", images.mapped, 64 << 10, ("check", "{}")),
    _Command("check, every second cluster", images.half, 256, ("check", "{}")),
    _Command("map --output=json, every second cluster", images.half, 256, ("map", "--output=json", "{}")),
    _Command("info", images.full, 64, ("info", "{}")),
    _Command("create, 1 TiB", images.empty, 64, ("create", "-q", "-f", "qcow2", "{new}", "1T")),
    _Command(
        "create, 1 TiB, tables made",
        images.empty,
        64,
        ("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "{new}", "1T"),
    ),
    _Command("snapshot -c, 64 GiB disk, all mapped", images.mapped, 64 << 10, ("snapshot", "-c", "one", "{}")),
)


def _no_measure(served: Served, settings: Settings) -> float:
    raise AssertionError("nothing is served")


def bench_img(folder: Path, *, rounds: int) -> list[Result]:
    """Each command with both programs, in turn, each time on a copy of the image."""
    ours = (python(), "-c", "import sys; from qcowfuse.cli.entry import qcowfuse_img; sys.exit(qcowfuse_img())")
    programs = {OURS: ours, QEMU: (QEMU,)}
    results = []
    for number, command in enumerate(_COMMANDS):
        template = folder / f"template{number}"
        template.mkdir()
        command.maker(template, command.size_mib)
        result = Result(Row(command.name, "", "s", _no_measure), {name: [] for name in programs})
        for turn in range(rounds):
            for name in sorted(programs, reverse=bool(turn % 2)):
                copy = folder / "copy"
                image = images.copy(template, copy)
                words = {"{}": str(image), "{new}": str(copy / "new.qcow2")}
                arguments = [words.get(word, word) for word in command.arguments]
                if name == OURS:  # which makes nothing else
                    arguments = [word for word in arguments if word not in ("-f", "qcow2")]
                start = time.monotonic()
                run(*programs[name], *arguments, cwd=REPOSITORY)
                result.figures[name].append(time.monotonic() - start)
                shutil.rmtree(copy)
        results.append(result)
        shutil.rmtree(template)
    return results
