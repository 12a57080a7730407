"""The kernel's table of mounts, proc_pid_mountinfo(5)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple


class MountEntry(NamedTuple):
    """A line of the kernel's table of mounts; ``parent_id`` is the ``mount_id`` of the mount below. ``options`` are
    those of the mount, then those of the file system."""

    mount_id: int
    parent_id: int
    device: int
    path: str
    file_system: str
    source: str
    options: tuple[str, ...]


def mount_table(process: str = "self") -> Iterator[MountEntry]:
    """The mounts of a process's namespace (by default of this process), in the kernel's order. Raises OSError."""
    # The kernel escapes a newline, but no carriage return: only the former ends a line.
    with open(f"/proc/{process}/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        for line in lines:
            left, _, right = line.rstrip("\n").partition(" - ")
            fields, kind = left.split(" "), right.split(" ")
            major, minor = fields[2].split(":")
            yield MountEntry(
                mount_id=int(fields[0]),
                parent_id=int(fields[1]),
                device=os.makedev(int(major), int(minor)),
                path=_unescape(fields[4]),
                file_system=kind[0],
                source=_unescape(kind[1]),
                options=(*fields[5].split(","), *kind[2].split(",")),
            )


def _unescape(text: str) -> str:
    if "\\" not in text:  # nearly always
        return text
    for octal in ("040", "011", "012", "043", "134"):
        text = text.replace(f"\\{octal}", chr(int(octal, 8)))
    return text
