"""docs/file-systems.md says what scripts/file-system measures, on the file systems that are at hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import qemu
from tests.support.loops import EXT4, loop_device, mounted_file_system
from tests.support.mounting import REPOSITORY, environment

pytestmark = [pytest.mark.mount, pytest.mark.root]
ROWS = {
    line.split(" | ")[0].removeprefix("| "): line.split(" | ")
    for line in (REPOSITORY / "docs/file-systems.md").read_text().splitlines()
    if line.startswith("| ")
}
WORDS = {
    "seen": "yes", "space back": "yes", "found": "yes", "file and folder": "yes", "not seen": "no",
    "no (ENOTSUP)": "no",
}  # fmt: skip


def measured(*folders: Path) -> list[str]:
    """The cells of the row, by the words of the document."""
    words: list[str | Path] = [sys.executable, REPOSITORY / "scripts/file-system", *folders]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment())
    return [WORDS.get(cell, cell) for cell in done.stdout.strip().strip("| ").split(" | ")]


def must_agree(name: str, found: list[str]) -> None:
    """Locks, holes, SEEK_HOLE, space, files without a name and fsync are those of the row."""
    for documented, cell in zip(ROWS[name][1:7], found[1:7], strict=True):
        assert documented.startswith((cell, "they succeed" if cell == "yes" else cell)), (name, documented, cell)


def test_what_the_table_says(tmp_path: Path) -> None:
    """On ext4, an overlay over it, tmpfs and ramfs; and a lock is not seen from below an overlay."""
    disk, host, point = tmp_path / "disk", tmp_path / "host", tmp_path / "point"
    point.mkdir()
    disk.write_bytes(b"")
    disk.open("r+b").truncate(64 << 20)
    qemu.must_run(*EXT4.make, disk)
    with loop_device(disk) as device, mounted_file_system(device, host):
        must_agree("ext4", measured(host))
        for name in ("lower", "upper", "work"):
            (host / name).mkdir()
        folders = f"lowerdir={host}/lower,upperdir={host}/upper,workdir={host}/work"
        qemu.must_run("mount", "-t", "overlay", "-o", folders, "overlay", point)
        try:
            must_agree("overlayfs on ext4", measured(point))
            assert measured(point, host / "upper")[1] == "no"
        finally:
            qemu.must_run("umount", point)
    for kind in ("tmpfs", "ramfs"):
        qemu.must_run("mount", "-t", kind, kind, point)
        try:
            must_agree(kind, measured(point))
        finally:
            qemu.must_run("umount", point)
