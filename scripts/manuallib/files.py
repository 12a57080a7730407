"""Which files are made, and of what."""

from __future__ import annotations

from pathlib import Path

from qcowfuse.cli import exit_codes
from qcowfuse.cli.img import exit_codes as img_exit_codes

from . import completions, roff
from .commands import list_options, qcowfuse, qcowfuse_img

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "docs" / "man"
DATA = REPOSITORY / "qcowfuse" / "data"


def generated() -> dict[Path, str]:
    """Every file with its text."""
    programs = (qcowfuse(), qcowfuse_img())
    parts = {
        "options of qcowfuse": roff.flags(programs[0].flags),
        "options of the list": roff.flags(list_options(), groups=False),
        "exit codes of qcowfuse": roff.codes(dict(exit_codes.EXPLANATIONS)),
        "commands of qcowfuse": roff.commands(programs[0]),
        "commands of qcowfuse-img": roff.commands(programs[1]),
        "exit codes of qcowfuse-img": roff.codes(dict(img_exit_codes.EXPLANATIONS)),
    }
    found = {DATA / "completions/zsh/_qcowfuse": completions.zsh(programs)}
    for program in programs:
        found[DATA / "completions/bash" / program.name] = completions.bash(program)
        found[DATA / "completions/fish" / f"{program.name}.fish"] = completions.fish(program)
    for source in sorted(SOURCES.glob("*.md")):
        name, _, section = source.stem.rpartition(".")
        found[DATA / "man" / source.stem] = roff.page(source.read_text(), name, int(section), parts)
    return found
