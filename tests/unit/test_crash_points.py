"""The numbered crash points of the driver and the tests that name them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qcowfuse.driver
from qcowfuse.consistency import repair
from tests.support.mounting import REPOSITORY


def named_in(text: str, letter: str) -> set[int]:
    """The numbers that a text names, "C1 to C6" being six of them."""
    numbers = {int(number) for number in re.findall(rf"\b{letter}(\d+)\b", text)}
    for first, last in re.findall(rf"\b{letter}(\d+) to {letter}(\d+)\b", text):
        numbers.update(range(int(first), int(last) + 1))
    return numbers


@pytest.mark.parametrize(("letter", "module"), [("C", qcowfuse.driver), ("P", repair)])
def test_each_crash_point_is_named_by_a_test(letter: str, module: object) -> None:
    """Points are numbered without gaps, each has a test that says so, and no test names one that does not exist."""
    points = sorted(int(number) for number in re.findall(rf"^    {letter}(\d+) ", str(module.__doc__), re.MULTILINE))
    assert points == list(range(1, len(points) + 1))
    assert len(points) >= 6
    named: set[int] = set()
    for folder in ("crash", "mount"):
        for file in Path(REPOSITORY / "tests" / folder).glob("*.py"):
            named |= named_in(file.read_text(), letter)
    assert named == set(points)
