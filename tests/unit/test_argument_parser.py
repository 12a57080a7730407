"""Options whose value is ``--``, which argparse loses."""

from __future__ import annotations

import pytest

from qcowfuse.cli.argument_parser import ArgumentParser


def parser() -> ArgumentParser:
    made = ArgumentParser(prog="test")
    made.add_argument("--name")
    made.add_argument("-o", action="append", default=[])
    made.add_argument("image", nargs="?")
    return made


@pytest.mark.parametrize("word", ["--name=--", "-o=--", "-o--"])
def test_two_dashes_are_no_value(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says so, where argparse hands over a list of none. A Python that keeps them has them as a text."""
    try:
        found = parser().parse_args([word])
    except SystemExit:
        assert "expected one argument, not --" in capsys.readouterr().err
    else:
        assert "--" in (found.name, *found.o)


def test_other_values_are_as_ever() -> None:
    """Once, several times, and not at all; the default is not added to."""
    for _ in range(2):
        found = parser().parse_args(["-o", "a", "--name", "x", "-o=b", "image"])
        assert (found.name, found.o, found.image) == ("x", ["a", "b"], "image")
    assert vars(parser().parse_args([])) == {"name": None, "o": [], "image": None}
