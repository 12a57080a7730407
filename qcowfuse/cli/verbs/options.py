"""The options of each verb, a row each, and its arguments: parser and help are made of these tables."""

from __future__ import annotations

from typing import NamedTuple

from ..durations import seconds
from ..option_table import Option

DEFAULT_TIMEOUT = 5.0
"""Seconds that ``umount`` waits for users: whoever probes a new device (udev) is gone by then."""
DEFAULT_INTERVAL = 1.0


class Verb(NamedTuple):
    """``arguments`` are those behind the options, as the help shows them; ``examples`` end the help."""

    arguments: str
    description: str
    options: tuple[Option, ...]
    examples: str


def interval(text: str) -> float:
    """0.1 to 604,800. Raises ValueError."""
    if seconds(text) < 0.1:
        raise ValueError(f"bad interval {text!r}: expected seconds, 0.1 or more")
    return seconds(text)


def output_format(text: str) -> str:
    """``json`` or ``human``, as qemu-img has them. Raises ValueError."""
    if text not in ("human", "json"):
        raise ValueError(f"{text!r} is neither human nor json")
    return text


_OUTPUT = Option("output", "how to print it (human)", metavar="human|json", convert=output_format)

VERB_OPTIONS = {
    "list": Verb(
        "",
        "List what qcowfuse has mounted: mounts of this mount namespace, and daemons that hold an image\n"
        "without one. Of other users' mounts only root sees who serves them.",
        (_OUTPUT,),
        "  qcowfuse list --output=json",
    ),
    "status": Verb(
        "MOUNTPOINT|IMAGE",
        "Print what a mount says of itself: sizes, users, caches, accesses to the image.",
        (
            _OUTPUT,
            Option("watch", "go on, with a line of rates for each interval; JSON: an object a line"),
            Option(
                "interval",
                f"seconds between two lines of rates ({DEFAULT_INTERVAL:g})",
                metavar="SECONDS",
                convert=interval,
            ),
        ),
        "  qcowfuse status --watch /mnt/x",
    ),
    "umount": Verb(
        "MOUNTPOINT|IMAGE",
        "Unmount, and return when everything is in the image and the image is closed. By the name of an\n"
        "image: every mount of it. What uses the disk is named, and keeps it.",
        (
            Option(
                "timeout",
                f"how long to wait while something uses the disk ({DEFAULT_TIMEOUT:g})",
                metavar="SECONDS",
                convert=seconds,
            ),
            Option(
                "force",
                "after that time, cut off whatever still uses the disk; what it had written is flushed before",
            ),
        ),
        "  qcowfuse umount /mnt/x\n  qcowfuse umount --timeout 60 --force disk.qcow2",
    ),
    "run": Verb(
        "IMAGE -- COMMAND [ARGUMENT]...",
        "Mount in a new, private folder, run the command with the path of the disk in $QCOWFUSE_DISK and in\n"
        "place of each {}, and unmount when the command has ended. All options of a mount may stand before\n"
        "IMAGE. The exit code is that of the command; 128 + N if signal N ended it, 127 if there is no such\n"
        "command, 126 if it can't be run, and that of the mount if the disk can't be mounted or closed.\n"
        "Signals are passed on to the command.",
        (),
        "  qcowfuse run -r disk.qcow2 -- sha256sum {}\n  qcowfuse run disk.qcow2 -- mkfs.ext4 -F {}",
    ),
}
