"""CHANGELOG.md: what is to come on top, then each version, the newest one being that of the package."""

from __future__ import annotations

import re

from qcowfuse import __version__
from tests.support.mounting import REPOSITORY

TEXT = (REPOSITORY / "CHANGELOG.md").read_text()


def test_versions_are_in_order() -> None:
    """Unreleased changes have a place, and the version of the package has its own."""
    headings = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    assert headings[0] == "Unreleased"
    versions = [tuple(map(int, heading.split(".")[:3])) for heading in headings[1:]]
    assert versions == sorted(versions, reverse=True)
    assert headings[1] == __version__


def test_a_change_is_one_line() -> None:
    """One entry, one line, once; nothing else but headings and a sentence for a version."""
    entries = re.findall(r"^- (.*)$", TEXT, re.MULTILINE)
    assert len(entries) > 50
    assert len(set(entries)) == len(entries)
    assert not re.search(r"^ +\S", TEXT, re.MULTILINE)
    assert all(entry.endswith((".", ")")) for entry in entries)
