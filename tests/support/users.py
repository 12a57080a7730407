"""Running qcowfuse as a user who is not root, in tests that root runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.mounting import REPOSITORY

NOBODY = 65534
AS_NOBODY = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
"""Arguments of setpriv(1)."""


def as_user(script: str, folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script as nobody; ``$qcowfuse`` is the command.

    This nobody may read everything, because interpreter and source may lie in a home directory of root.
    """
    privileges = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return subprocess.run(
        ["setpriv", *AS_NOBODY, *privileges, "sh", "-eu", "-c", script, "sh", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "qcowfuse": f"{sys.executable} -m qcowfuse"},
    )
