"""What tests with real mounts share."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.users import NOBODY


@pytest.fixture
def users_folder() -> Iterator[Path]:
    """A folder that belongs to nobody, and a /dev/fuse that a user may open."""
    mode = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    folder = Path(f"/dev/shm/qcowfuse-user-{os.getpid()}")
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    os.chmod("/dev/fuse", 0o666)
    try:
        yield folder
    finally:
        os.chmod("/dev/fuse", mode)
        _unmount_all_below(folder)  # what a test that failed has left
        shutil.rmtree(folder)


def _unmount_all_below(folder: Path) -> None:
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in reversed(points):
        if point.startswith(f"{folder}/"):
            subprocess.run(["umount", "-l", point], check=True)
