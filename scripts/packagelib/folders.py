"""Folders in /var/tmp for the time of a script, which are large, and which not even a kill leaves behind for long."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PLACE = Path("/var/tmp")


@contextmanager
def own_folder(prefix: str, place: Path = PLACE) -> Iterator[Path]:
    """A folder of that prefix, removed at the end; first, those of runs that were killed are removed.

    A folder in use is locked: the kernel gives up the lock when its holder ends, however that comes.
    """
    _remove_left(prefix, place)
    folder, lock = _locked_folder(prefix, place)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        os.close(lock)


def _locked_folder(prefix: str, place: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        with suppress(FileNotFoundError):  # another run may have found it before it was locked, and removed it
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _remove_left(prefix: str, place: Path) -> None:
    mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
    for folder in place.glob(f"{prefix}*"):
        if f" {folder}/" in mounts or folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            continue
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)
