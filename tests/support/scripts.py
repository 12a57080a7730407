"""Python in a process of its own, as tests want it: in the project's folder, to a good end, with what it printed."""

from __future__ import annotations

import subprocess
import sys

from .mounting import REPOSITORY


def run_python(*arguments: str) -> str:
    """What the interpreter prints with these arguments; AssertionError with its complaint where it fails."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
