"""``qcowfuse list``: a line for each mount, and for each daemon that holds an image without one."""

from __future__ import annotations

from typing import Any

from ..size_text import size_text
from .layout import print_json, print_table, time_text
from .look import look_at, summary
from .mounts import find_mounts

_HEADINGS = ("MOUNT POINT", "IMAGE", "SIZE", "USED", "MODE", "USER", "PID", "SINCE", "STATE")
_TO_THE_RIGHT = frozenset((2, 3, 6))


def print_list(*, as_json: bool) -> None:
    """Print it; without any mount, nothing (JSON: an empty list)."""
    mounts = find_mounts()
    found = [summary(mount, look) for mount, look in zip(mounts, look_at(mounts), strict=True)]
    if as_json:
        print_json(found)
    elif found:
        print_table(_HEADINGS, [_row(mount) for mount in found], _TO_THE_RIGHT)


def _row(mount: dict[str, Any]) -> tuple[str, ...]:
    def size(name: str) -> str:
        return "-" if mount[name] is None else size_text(mount[name])

    mode = {None: "-", True: "ro", False: "rw"}[mount["read-only"]]
    pid, since = mount["pid"], mount["since"]
    return (
        *(mount["mount-point"], mount["image"], size("virtual-size"), size("actual-size"), mode, mount["user"]),
        "-" if pid is None else str(pid),
        "-" if since is None else time_text(since),
        mount["state"],
    )
