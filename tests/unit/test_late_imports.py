"""Stand-ins for modules: nothing is imported until something is used, and afterwards the real one is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfuse.cli.late_imports import LateModule, standing_in

NAME = "qcowfuse_test_late"


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that can be imported, and is not."""
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "__init__.py").write_text("value = 5\n")
    (tmp_path / NAME / "part.py").write_text("other = 6\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in (NAME, f"{NAME}.part"):
        sys.modules.pop(name, None)


def test_nothing_is_imported_until_it_is_used() -> None:
    """Not by the import, not by the end of the block."""
    with standing_in(LateModule(NAME)):
        import qcowfuse_test_late as late  # type: ignore[import-not-found]
    assert NAME not in sys.modules
    assert late.value == 5
    assert sys.modules[NAME].value == 5
    assert sys.modules[NAME] is not late
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = late.missing


def test_what_is_used_in_the_block_is_there() -> None:
    """Also a part of a package, and a name that is taken from it."""
    with standing_in(LateModule(NAME)):
        from qcowfuse_test_late.part import other  # type: ignore[import-not-found]

        assert other == 6
    assert sys.modules[NAME].part.other == 6


def test_a_module_that_is_there_stays() -> None:
    """It is the same module all the time."""
    import qcowfuse_test_late as real

    with standing_in(LateModule(NAME)):
        import qcowfuse_test_late as late

        assert late is real
    assert sys.modules[NAME] is real


def test_a_module_that_does_not_exist() -> None:
    """The error comes when something of it is used."""
    with standing_in(LateModule("qcowfuse_test_nowhere")):
        import qcowfuse_test_nowhere as late  # type: ignore[import-not-found]
    with pytest.raises(ImportError, match="qcowfuse_test_nowhere"):
        _ = late.value
