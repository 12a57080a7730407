"""The sdist, and the wheel made out of it, as ``python -m build`` makes them; in a new environment with a network."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .deb import REPOSITORY, BuildError


def build_wheel(output: Path) -> list[Path]:
    """The sdist and the wheel, in ``output``. Raises BuildError."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qcowfuse-wheel-") as folder:
        # setuptools writes beside its source: the tree itself is not written to.
        source = Path(folder) / "source"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
        shutil.copytree(REPOSITORY, source, ignore=ignored)
        _run(sys.executable, "-m", "venv", f"{folder}/venv")
        python = f"{folder}/venv/bin/python"
        _run(python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "build")
        _run(python, "-m", "build", "--outdir", f"{folder}/out", str(source))
        return [Path(shutil.copy(path, output)) for path in sorted(Path(folder, "out").iterdir())]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
