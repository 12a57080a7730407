"""``scripts/coverage``: what it says of a report, and when it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.measured import MEASURED, SWEEPS, is_measured
from tests.support.mounting import REPOSITORY

COVERAGE = REPOSITORY / "scripts" / "coverage"
PYTEST = """#!/bin/sh
for argument; do
    case $argument in
    -c) exit 0 ;;
    --cov-report=json:*) cp "{report}" "${{argument#--cov-report=json:}}" ;;
    esac
done
exit {code}
"""


def module(n_covered: int, n_branches: int, *missing: tuple[int, int]) -> dict[str, object]:
    """What a report says of one module."""
    summary = {"num_branches": n_branches, "covered_branches": n_covered}
    return {"summary": summary, "missing_branches": [list(branch) for branch in missing]}


def coverage(
    folder: Path, files: dict[str, dict[str, object]], *arguments: str, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run the script with a pytest that reports ``files`` and exits with ``code``."""
    report = folder / "report.json"
    report.write_text(json.dumps({"files": files}))
    (folder / "bin").mkdir(exist_ok=True)
    python = folder / "bin" / "python"
    python.write_text(PYTEST.format(report=report, code=code))
    python.chmod(0o755)
    return subprocess.run(
        [sys.executable, str(COVERAGE), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "QCOWFUSE_VENV": str(folder)},
    )


def test_a_room_below_its_part_fails_and_says_what_is_missing(tmp_path: Path) -> None:
    """The modules of a room count together, and each branch that no test takes is named."""
    files = {
        "qcowfuse/format/a.py": module(50, 50),
        "qcowfuse/format/b.py": module(44, 50, (7, 9), (12, -3)),
        "qcowfuse/driver/writing/c.py": module(95, 100, (4, 5)),
        "qcowfuse/tools/d.py": module(1, 100, (4, 5)),
    }
    done = coverage(tmp_path, files)
    assert done.returncode == 1
    assert "94.0 %    94 of  100  qcowfuse/format" in done.stdout
    assert "qcowfuse/format/b.py:7 to line 9" in done.stdout
    assert "qcowfuse/format/b.py:12 to the end" in done.stdout
    assert "c.py" not in done.stdout
    assert "d.py" not in done.stdout


def test_enough_is_enough(tmp_path: Path) -> None:
    """With 95 % of both rooms it succeeds, unless a test has failed."""
    files = {
        "qcowfuse/format/a.py": module(95, 100, (1, 2)),
        "qcowfuse/driver/writing/c.py": module(96, 100, (4, 5)),
    }
    assert coverage(tmp_path, files).returncode == 0
    assert coverage(tmp_path, files, code=1).returncode == 1


def test_some_tests_are_held_to_nothing(tmp_path: Path) -> None:
    """A few tests cover little: that is shown, and no failure."""
    done = coverage(tmp_path, {"qcowfuse/format/a.py": module(1, 100, (1, 2))}, "tests/unit/test_header.py")
    assert done.returncode == 0
    assert "1.0 %" in done.stdout


def collected(arguments: Sequence[str]) -> list[str]:
    """What pytest finds."""
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_a_full_run_runs_each_test_once() -> None:
    """What is measured and what is not are two parts of all tests, and scripts/test runs both."""
    places = ["tests/export/test_errnos.py", "tests/crash/test_bitmaps.py", "tests/crash/test_checker.py"]
    questions = [
        ["--part", "measured", *places],
        ["--part", "unmeasured", *places],
        [*places, *{function.partition("::")[0] for function in SWEEPS}],
    ]
    with ThreadPoolExecutor(len(questions)) as at_once:
        measured, unmeasured, everything = at_once.map(collected, questions)
    assert sorted(measured + unmeasured) == sorted(test for test in everything if test.startswith(tuple(places)))
    assert len({test.partition("::")[0] for test in measured}) == len({*places[:2]})
    script = (REPOSITORY / "scripts" / "test").read_text()
    assert "--part unmeasured --ignore tests/mount" in script
    assert "scripts/coverage ||" in script
    for function, cases in SWEEPS.items():
        there = {test for test in everything if test.partition("[")[0] == function}
        assert {test for test in there if is_measured(test)} == {f"{function}[{case}]" for case in cases}
        assert len(there) > len(cases), function
    assert all((REPOSITORY / path).exists() for path in MEASURED)


def test_without_an_environment_one_line_says_what_to_do(tmp_path: Path) -> None:
    """As of scripts/check."""
    done = subprocess.run(
        [sys.executable, str(COVERAGE)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "QCOWFUSE_VENV": str(tmp_path)},
    )
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "scripts/test" in done.stderr
