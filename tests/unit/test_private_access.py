"""Tests use what the package offers to everybody: how often they look inside is counted here, and may only fall.

A test that depends on private names fails when code is merely put in order, and says nothing of what a user sees.
Where there is no other way to see a thing, an inspection method of the package is better than a private attribute.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.mounting import REPOSITORY
from tests.support.sources import nodes

TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))
ALLOWED: dict[str, int] = {
    "tests/crash/test_growing_cuts.py": 2,
    "tests/crash/test_power_cuts.py": 7,
    "tests/crash/test_rules.py": 13,
    "tests/crash/test_scenarios.py": 1,
    "tests/driver/test_unguarded.py": 1,
    "tests/export/test_at_once.py": 9,
    "tests/export/test_outside.py": 1,
    "tests/export/test_seeking.py": 2,
    "tests/fuzz/test_fuzz_program.py": 3,
    "tests/support/fuzzing/outer_parsers.py": 1,
    "tests/unit/test_luks.py": 1,
}
"""Accesses in each file that has any. Lower a number when you have made it lower; never raise one."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


@cache
def names_of_the_package() -> frozenset[str]:
    """Private names that the package defines: functions, classes, attributes, constants."""
    names: set[str] = set()
    for path in (REPOSITORY / "qcowfuse").rglob("*.py"):
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return frozenset(name for name in names if is_private(name))


def accesses(text: str) -> Iterator[tuple[int, str]]:
    """Line and name of each access: an attribute that the test does not define itself, an import, and a name that is
    given to a call as a string, as monkeypatch takes it. ``_replace`` of named tuples is public."""
    tree = ast.parse(text)
    own = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_self(node.value)}
    foreign = names_of_the_package() - own
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in foreign:
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qcowfuse"):
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Call):
            words = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            names = {str(word).rsplit(".", 1)[-1] for word in words} & names_of_the_package()
            yield from ((node.lineno, name) for name in names)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_more_private_accesses(path: Path) -> None:
    """Not one more than the list allows, and none less: then the list has to say so."""
    found = sorted(accesses(path.read_text()))
    allowed = ALLOWED.get(str(path.relative_to(REPOSITORY)), 0)
    assert len(found) <= allowed, f"uses private names of the package: {found}"
    assert len(found) == allowed, f"fewer accesses than allowed: write {len(found)} into the list"


def test_the_list_names_files_that_exist() -> None:
    """A file that is gone, or has no access left, is not on the list."""
    assert set(ALLOWED) <= {str(path.relative_to(REPOSITORY)) for path in TESTS}
    assert all(ALLOWED.values())


def test_each_kind_of_access_is_seen() -> None:
    """Attributes, imports and names for monkeypatch count; a test's own do not."""
    name = "_start_read"
    assert name in names_of_the_package()
    assert len(list(accesses(f"image.{name}()"))) == 1
    assert len(list(accesses("from qcowfuse.fuse.operations import _Times"))) == 1
    assert len(list(accesses(f'monkeypatch.setattr(image, "{name}", None)'))) == 1
    assert not list(accesses(f"class Mine:\n    def {name}(self): return self.{name}()\n"))
    assert not list(accesses("image.start_read(); image.__class__"))
