"""``scripts/check``, and that a commit and a full test run check the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mounting import REPOSITORY

CHECK = REPOSITORY / "scripts" / "check"


def environment_with(folder: Path, *, failing: str = "") -> Path:
    """An environment whose ruff and mypy note their arguments in ``folder/calls`` and fail where told."""
    (folder / "bin").mkdir()
    for tool in ("ruff", "mypy"):
        script = folder / "bin" / tool
        script.write_text(f'#!/bin/sh\necho "{tool} $*" >>"{folder}/calls"\n[ "$1" != "{failing}" ]\n')
        script.chmod(0o755)
    return folder


def check(environment: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """Run ``scripts/check`` with an environment."""
    return subprocess.run(
        [str(CHECK), *names],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "QCOWFUSE_VENV": str(environment)},
    )


def test_without_an_environment_one_line_says_what_to_do(tmp_path: Path) -> None:
    """Nothing is installed; the line names the command that does."""
    done = check(tmp_path)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "scripts/test" in done.stderr
    assert not list(tmp_path.iterdir())


def test_it_lints_and_types_and_changes_nothing(tmp_path: Path) -> None:
    """All three checks run, none of them in a mode that writes to the sources."""
    done = check(environment_with(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[:2] for call in calls] == [
        ["ruff", "check"],
        ["ruff", "format"],
        ["mypy", "--no-error-summary"],
    ]
    assert "--check" in calls[1]
    assert not any("--fix" in call for call in calls)


def test_all_checks_run_though_the_first_one_fails(tmp_path: Path) -> None:
    """One run tells of everything that is wrong."""
    done = check(environment_with(tmp_path, failing="check"))
    assert done.returncode == 1
    assert done.stderr == "check: failed: lint\n"
    assert len((tmp_path / "calls").read_text().splitlines()) == 3


def test_some_of_the_checks(tmp_path: Path) -> None:
    """By name; a name that there is not is refused."""
    assert check(environment_with(tmp_path), "types").returncode == 0
    assert (tmp_path / "calls").read_text().startswith("mypy")
    done = check(tmp_path, "typos")
    assert done.returncode == 2
    assert "lint, format and types" in done.stderr


def test_a_commit_and_a_full_run_check_the_same() -> None:
    """The pre-commit hooks run every check of the script with the project's own versions, scripts/test runs all."""
    names = re.findall(r"^    (\w+)\) ", CHECK.read_text(), re.MULTILINE)
    assert len(names) == 3
    config = (REPOSITORY / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"^        entry: scripts/check (\w+)$", config, re.MULTILINE) == names
    assert set(re.findall(r"^        language: (\w+)$", config, re.MULTILINE)) == {"system"}
    assert re.findall(r"^  - repo: (.*)$", config, re.MULTILINE) == ["local"]
    assert re.search(r"^nice scripts/check \|\|", (REPOSITORY / "scripts" / "test").read_text(), re.MULTILINE)


@pytest.mark.parametrize("mistake", ["lint", "format", "types"])
def test_mistakes_are_found(tmp_path: Path, mistake: str) -> None:
    """With the real tools: a file with one mistake of each kind, and the check whose business it is."""
    text = {"lint": "import os\n", "format": "answer = (42 )\n", "types": 'answer: int = "42"\n'}[mistake]
    bin_folder = Path(sys.executable).parent
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    (project / "scripts" / "check").write_bytes(CHECK.read_bytes())
    for name in ("qcowfuse", "tests", "scripts/benchlib"):
        (project / name).mkdir()
        (project / name / "__init__.py").write_text('"""A package."""\n')
    (project / "pyproject.toml").write_bytes((REPOSITORY / "pyproject.toml").read_bytes())
    (project / "qcowfuse" / "wrong.py").write_text(f'"""A module."""\n\n{text}')
    done = subprocess.run(
        ["bash", "scripts/check"],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "QCOWFUSE_VENV": str(bin_folder.parent)},
    )
    assert done.returncode == 1
    assert f"failed: {mistake}" in done.stderr
    assert "wrong.py" in done.stdout or mistake == "format"
