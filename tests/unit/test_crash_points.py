"""The crash points that docstrings define, each by a name, and the tests that say of which ones they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qcowfuse.driver
from qcowfuse.consistency import repair
from tests.support.mounting import REPOSITORY

DEFINITION = re.compile(r"^    ([a-z][a-z0-9-]+)\n        \S", re.MULTILINE)
"""A name alone on its line, and what it means below it, further in."""
MENTION = re.compile(r"Crash points?:\s+((?:[a-z0-9-]+,\s+)*[a-z0-9-]+)\.\n")
"""What a test says of itself in its docstring, or a file of tests in its own."""


def defined_in(module: object) -> list[str]:
    """The names that a module's docstring defines."""
    return DEFINITION.findall(str(module.__doc__))


def mentioned() -> dict[str, set[str]]:
    """The names that the tests of power cuts, failures and kills mention; for each the files that do."""
    names: dict[str, set[str]] = {}
    for folder in ("crash", "mount"):
        for file in Path(REPOSITORY / "tests" / folder).glob("*.py"):
            for found in MENTION.findall(file.read_text()):
                for name in re.split(r",\s+", found):
                    names.setdefault(name, set()).add(file.name)
    return names


@pytest.mark.parametrize(("module", "least"), [(qcowfuse.driver, 22), (repair, 6)], ids=["driver", "repair"])
def test_each_crash_point_is_mentioned_by_a_test(module: object, least: int) -> None:
    """Names are defined once, and a test says of each that it covers it."""
    points = defined_in(module)
    assert len(points) >= least
    assert len(set(points)) == len(points)
    assert not set(points) - set(mentioned())


def test_no_test_mentions_a_crash_point_that_does_not_exist() -> None:
    """What a test says it covers is defined in one of the docstrings, and no name is defined in both."""
    driver, repairs = defined_in(qcowfuse.driver), defined_in(repair)
    assert not set(driver) & set(repairs)
    assert not set(mentioned()) - {*driver, *repairs}


def test_crash_points_have_no_numbers() -> None:
    """Numbers would have to be kept in order, and say nothing to a reader: no text mentions one."""
    files = [*(REPOSITORY / "qcowfuse").rglob("*.py"), *(REPOSITORY / "tests" / "crash").glob("*.py")]
    numbered = [str(file) for file in files if re.search(r"\((C|P)\d+\b|\b[CP]\d+ to [CP]\d+\b", file.read_text())]
    assert not numbered
