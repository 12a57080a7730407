"""Docstrings, comments and documents name what exists: modules, functions, classes, rules, files.

A name that looks like one of this project's has to be one: a reference (``:func:`` and its kind), and a word in
double backquotes that is written like an identifier of several words. Names of other projects are listed here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

import pytest

from tests.support.mounting import REPOSITORY
from tests.support.sources import syntax_tree

FOREIGN = frozenset(
    str.split(
        "cifs_find_fid_lock_conflict fuse_flush_times fuse_session_new fuse_session_receive_buf fuse_setattr_in "
        "local_lock"
    )
)
"""Of the kernel and of libfuse."""
REFERENCE = re.compile(r":(?:mod|class|func|meth|attr|data|exc):`~?([\w.]+)(?:\(\))?`")
QUOTED = re.compile(r"``(~?[A-Za-z_][\w.]*)(?:\(\))?``")
SEVERAL_WORDS = re.compile(r"[a-z]\w*_\w*[a-z0-9]|(?:[A-Z][a-z0-9]+){2,}")
RULE_OF = re.compile(r"[Rr]ules? (\d+)(?:,? (?:and|or|to) (\d+))? of :mod:`~?([^`]+)`")
PATH = re.compile(r"(?<![\w/.-])(?:(?:tests|qcowfuse|docs)/[\w./-]*\.(?:py|md)|scripts/[\w-]+|tests/[\w/]+\b(?!\.))")
SOURCES = sorted(path for folder in ("qcowfuse", "scripts", "tests") for path in (REPOSITORY / folder).rglob("*.py"))
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])


@cache
def names_in(path: Path) -> frozenset[str]:
    """Every name that the code of a module has: defined, imported, or used; and the strings that are one word."""
    found: set[str] = set()
    things: list[object] = [SourceFileLoader(path.stem, str(path)).get_code(path.stem)]
    while things:
        thing = things.pop()
        if isinstance(thing, CodeType):
            found.update((thing.co_name, *thing.co_varnames, *thing.co_cellvars))
            things += (*thing.co_names, *thing.co_consts)
        elif isinstance(thing, tuple | frozenset):
            things += thing
        elif isinstance(thing, str):
            found.update(part for part in thing.split(".") if part.isidentifier())
    return frozenset(found)


@cache
def all_names() -> frozenset[str]:
    """Those of all sources, and of the modules themselves."""
    modules = {part.removesuffix(".py") for path in SOURCES for part in path.relative_to(REPOSITORY).parts}
    return frozenset(modules.union(*map(names_in, SOURCES)))


def module_at(path: Path) -> Path | None:
    """The file of the module or package with the path of ``path``."""
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def module_and_rest(source: Path, name: str) -> tuple[Path | None, list[str]]:
    """The module that a dotted name begins with, as seen from ``source``, and what is left of the name."""
    folder, parts = REPOSITORY, name.split(".")
    if name.startswith("."):
        n_dots = len(name) - len(name.lstrip("."))
        folder, parts = source.parents[n_dots - 1], name[n_dots:].split(".")
    elif parts[0] not in ("qcowfuse", "tests"):
        return None, parts
    module = None
    while parts and (found := module_at(folder / parts[0])) is not None:
        module, folder, parts = found, folder / parts[0], parts[1:]
    return module, parts


def lines_with(pattern: re.Pattern[str], path: Path) -> Iterator[tuple[int, re.Match[str]]]:
    """Each match, and the number of its line."""
    text = path.read_text()
    for match in pattern.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, match


@pytest.mark.parametrize("folder", ["qcowfuse", "scripts", "tests"])
def test_references_lead_somewhere(folder: str) -> None:
    """To a module, seen from the one that has the reference, and to something in it."""
    lost = []
    for path in SOURCES:
        if path.relative_to(REPOSITORY).parts[0] != folder:
            continue
        for line, match in lines_with(REFERENCE, path):
            module, rest = module_and_rest(path, match[1])
            known = names_in(module) if module else () if match[1].startswith(".") else all_names()
            if not all(part in known for part in rest):
                lost.append(f"{path.relative_to(REPOSITORY)}:{line}: {match[1]}")
    assert lost == []


def test_quoted_names_exist() -> None:
    """Words in double backquotes that are written like names of this project."""
    lost = [
        f"{path.relative_to(REPOSITORY)}:{line}: {part}"
        for path in SOURCES
        for line, match in lines_with(QUOTED, path)
        for part in match[1].split(".")
        if SEVERAL_WORDS.fullmatch(part) and part not in all_names() | FOREIGN
    ]
    assert lost == []


def test_rules_of_other_modules_exist() -> None:
    """A rule is named by its number in the docstring of the module."""
    lost = []
    for path in SOURCES:
        for line, match in lines_with(RULE_OF, path):
            module, rest = module_and_rest(path, match[3])
            docstring = ast.get_docstring(syntax_tree(module)) if module else None
            numbers = re.findall(r"^(\d+)\. ", docstring or "", re.MULTILINE)
            if rest or not {match[1], match[2] or match[1]} <= set(numbers):
                lost.append(f"{path.relative_to(REPOSITORY)}:{line}: {match[0]}")
    assert lost == []


def test_files_that_documents_name_exist() -> None:
    """Sources, tests, scripts and other documents."""
    lost = [
        f"{path.relative_to(REPOSITORY)}:{line}: {match[0]}"
        for path in DOCUMENTS
        for line, match in lines_with(PATH, path)
        if not (REPOSITORY / match[0]).exists()
    ]
    assert lost == []
