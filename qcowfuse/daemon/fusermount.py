"""fusermount3, by which users who are not root unmount. Root needs no program for it: see :mod:`.mountpoint`."""

from __future__ import annotations

import shutil
import subprocess

from ..errors import MountError

_PROGRAM = "fusermount3"


def check() -> None:
    """Raise MountError where there is no such program."""
    if shutil.which(_PROGRAM) is None:
        raise MountError("fusermount3 is missing, only root can mount without it (install the package fuse3)")


def unmount(path: str, *, is_lazy: bool) -> str:
    """Unmount ``path``; gives what the program complains of, which is empty when it is done. Raises MountError."""
    try:
        done = subprocess.run(
            [_PROGRAM, "-u", *["-z"] * is_lazy, "--", path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as exc:
        raise MountError(f"fusermount3 cannot be run: {exc.strerror}") from exc
    return (" ".join(done.stderr.split()) or f"{path}: fusermount3 failed") if done.returncode else ""
