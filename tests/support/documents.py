"""The commands of README.md and docs/*.md, as a test runs them.

1. A block of a page that is indented by four columns is a script. ``<!-- not run: REASON -->`` before it says that it
   is none, or why it can't be run here; ``<!-- after: COMMANDS -->`` says what comes before it, and ``<!-- each -->``
   that each of its lines is a block.
2. Each block begins with fresh images, and an empty folder ``mnt`` unless it makes that itself. What it leaves is
   undone. Where it begins with a disk that is mounted already, disk.qcow2 is.
3. Lines of fstab are mounted as such. Folders of the system (/mnt, /srv, /data, /var/lib/images, /etc/qcowfuse) are
   folders of the test.
4. In the table of README.md, each command of the right column is a block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_DIRECTIVE = re.compile(r"<!-- (not run|after|each):? ?(.*?) ?-->")
_FSTAB = re.compile(r"/\S+\s+/\S+\s+(fuse\.qcowfuse|qcowfuse|ext4)\s+\S+\s+0\s+0")
_OURS = re.compile(r"(?<![\w./-])/(mnt|srv|data|var/lib/images|etc/qcowfuse)(?=[/\s]|$)")

_MOUNTS = re.compile(r"\bqcowfuse (?!status|umount|list)[^\n]*\bmnt\b")
_NEEDS_A_MOUNT = re.compile(r"\bmnt/|\b(status|umount)\b[^\n#]* mnt\b")
SYSTEM = "system"
"""The folder of the test that stands for the system's own."""


class Block(NamedTuple):
    """``text`` is as on the page, without the indentation; ``why_not`` is empty where it is to be run."""

    page: str
    line: int
    text: str
    after: str
    why_not: str

    @property
    def name(self) -> str:
        """For a person."""
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """All blocks of a page, in their order."""
    lines = [*page.read_text().splitlines(), "end"]
    found: list[str] = []
    directive, start, is_fenced = ("", ""), 0, False
    for number, line in enumerate(lines, 1):
        is_fenced ^= line.startswith("```")
        if is_fenced:
            continue
        if line.startswith("    ") or (found and not line):
            start = start or number
            found.append(line[4:])
            continue
        if found:
            kind, words = directive
            text = "\n".join(found).strip("\n")
            for place, each in enumerate(text.splitlines() if kind == "each" else [text]):
                yield Block(page.name, start + place, each, words * (kind == "after"), words * (kind == "not run"))
            found, start, directive = [], 0, ("", "")
        if match := _DIRECTIVE.fullmatch(line):
            directive = (match[1], match[2])
        elif line:
            directive = ("", "")  # it is of the block right behind it
        if re.match(r"\| .* \| .*`.* \|$", line) and page.name == "README.md":
            for command in re.findall(r"`([^`]+)`", line.split(" | ")[1]):
                yield Block(page.name, number, command, "", "" if " " in command else "the name of a command")


def script_of(block: Block, folder: Path) -> str:
    """The bash script that a block is, in ``folder``."""
    text = block.text
    if all(_FSTAB.fullmatch(line) for line in text.splitlines()):
        points = " ".join(line.split()[1] for line in text.splitlines())
        text = f"cat >fstab <<'END'\n{text}\nEND\nmount -T $PWD/fstab -a\nfindmnt {points.split()[-1]}"
    before = block.after.replace("; ", "\n")
    if not before and _NEEDS_A_MOUNT.search(_MOUNTS.split(text)[0]):
        before = "qcowfuse disk.qcow2 mnt"
    folders = "" if "mkdir" in text else "mkdir -p mnt files"
    # The time that a key takes is for attackers.
    text = text.replace("encrypt.format=luks", "encrypt.format=luks,encrypt.iter-time=10")
    script = "\n".join((folders, before, text))
    return _OURS.sub(lambda match: f"{folder}/{SYSTEM}/{match[1]}", script)
