"""What a container or a chroot may lack: there a reason to skip, on a machine of its own a failure."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

LACKS = "this container lacks"
"""How the reasons begin; skips for them are declared."""

_MARKS = ("/run/systemd/container", "/run/host/container-manager", "/.dockerenv", "/run/.containerenv")


def is_contained() -> bool:
    """Whether this is a container, or a root directory that is not the machine's."""
    if "container" in os.environ or any(map(os.path.exists, _MARKS)):
        return True
    try:
        return not os.path.samefile("/proc/1/root", "/")
    except OSError:
        return False


def lacks(what: str) -> NoReturn:
    """Skip the test in a container, fail it elsewhere."""
    if is_contained():
        pytest.skip(f"{LACKS} {what}")
    pytest.fail(f"this machine lacks {what}")


def need_loop_devices() -> None:
    """Skip in a container without them."""
    if not os.access("/dev/loop-control", os.R_OK | os.W_OK):
        lacks("loop devices (/dev/loop-control and /dev/loop*)")


def is_in_memory(folder: Path) -> bool:
    """Whether the folder's file system is a tmpfs, which has no pages that could be dropped."""
    done = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True)
    return done.stdout.strip() in ("tmpfs", "ramfs")
