"""``docs/architecture.md`` says what is true: its rooms, its ways of a request, its steps of a flush, its glossary.

Ways are trees: a line names a function and its module, the lines further in name what that function calls.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import qcowfuse.driver
from qcowfuse.consistency import repair
from qcowfuse.driver.writing import write_back
from tests.support.mounting import REPOSITORY
from tests.support.sources import syntax_tree
from tests.unit.test_crash_points import defined_in
from tests.unit.test_imports import ROOMS, WITHIN

PACKAGE = REPOSITORY / "qcowfuse"
DOCUMENT = REPOSITORY / "docs" / "architecture.md"
TEXT = DOCUMENT.read_text()
NOT_DRAWN = {"_version", "__init__", "__main__"}
TREE_LINE = re.compile(
    r"(?P<indent>(?:│  |   )*(?:├─ |└─ )?)(?P<name>[\w.]+) +(?P<path>[\w/]+\.py)(?:, called (?P<called>\w+))?"
)
WAYS = [
    "a read from what is cached",
    "a read that waits",
    "a write in place or to new clusters",
    "a write that waits",
    "a flush",
]


class Call(NamedTuple):
    """One line of a tree."""

    depth: int
    name: str
    path: str
    called: str


def section(title: str) -> str:
    """The text below a heading of any level, up to the next heading."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", TEXT, re.MULTILINE | re.DOTALL | re.IGNORECASE)
    assert found, f"{DOCUMENT.name} has no section {title!r}"
    return found[1]


def rows(title: str) -> list[list[str]]:
    """The table in a section, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def first_sentence(path: Path) -> str:
    """Of a module's docstring, in Markdown, without the list of modules that may be its end."""
    docstring = ast.get_docstring(syntax_tree(path)) or ""
    sentence = re.split(r"(?<=[.])(?:\s|$)|: ``|\n\n", docstring)[0]
    return " ".join(sentence.split()).replace("``", "`").removesuffix(".")


def file_of(room: str) -> Path:
    """The package or the module that a room is."""
    folder = PACKAGE / room.replace(".", "/")
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def calls_in(title: str) -> list[Call]:
    """The lines of the trees in a section."""
    calls = []
    for block in re.findall(r"^```text\n(.*?)^```", section(title), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if not line.strip():
                continue
            found = TREE_LINE.fullmatch(line.rstrip())
            assert found, f"not a line of a tree: {line!r}"
            name = found["name"]
            depth = len(found["indent"]) // 3
            calls.append(Call(depth, name, found["path"], found["called"] or name.rsplit(".", 1)[-1]))
    return calls


@cache
def functions_of(path: str) -> dict[str, str]:
    """Each function of a module and each method of its classes, with its source."""
    text = (PACKAGE / path).read_text()
    found = {}
    for node in ast.parse(text).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for item in inside:
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                found[prefix + item.name] = ast.get_source_segment(text, item) or ""
    return found


def test_the_rooms_are_those_that_the_import_test_knows() -> None:
    """Every room stands in the table, in the same order, with those it imports from."""
    drawn = {room.strip("`"): set(re.findall(r"`([\w.]+)`", imports)) for room, _, imports in rows("The rooms")}
    known = {room: set(others.split()) - NOT_DRAWN for room, others in ROOMS.items() if room not in NOT_DRAWN}
    assert drawn == known
    assert list(drawn) == list(known)


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in NOT_DRAWN and room not in WITHIN.values()])
def test_a_room_is_for_what_its_docstring_says(room: str) -> None:
    """The purpose in the table is the first sentence of the docstring."""
    purposes = {name.strip("`"): purpose for name, purpose, _ in rows("The rooms")}
    assert purposes[room] == first_sentence(file_of(room))


def test_the_picture_of_the_packages_leaves_out_only_what_follows() -> None:
    """An arrow for each pair of packages that import each other, but for those that other arrows lead to already."""
    arrows = set(re.findall(r"^ *(\w+) --> (\w+)$", section("The plan"), re.MULTILINE))
    packages = {room for room in ROOMS if (PACKAGE / room).is_dir()}
    imports: dict[str, set[str]] = {top: set() for top in packages}
    for room, others in ROOMS.items():
        top = room.split(".")[0]
        if top in packages:
            imports[top] |= {other.split(".")[0] for other in others.split()} & packages - {top}

    def below(top: str) -> set[str]:
        return {deeper for other in imports[top] for deeper in (other, *below(other))}

    pairs = {(top, other) for top in packages for other in imports[top]}
    assert arrows == {
        (top, other) for top, other in pairs if not any(other in below(third) for third in imports[top])
    }


@pytest.mark.parametrize("title", WAYS)
def test_a_way_is_the_way_that_is_taken(title: str) -> None:
    """Each function exists where the tree says, and the source of the one above it calls it."""
    calls = calls_in(title)
    assert len(calls) >= 3
    above: list[Call] = []
    for call in calls:
        functions = functions_of(call.path)
        assert call.name in functions, f"{call.path} has no {call.name}"
        del above[call.depth :]
        assert len(above) == call.depth, f"{call.name} stands too far in"
        if above:
            caller = above[-1]
            source = functions_of(caller.path)[caller.name]
            assert re.search(rf"\b_?{call.called}\b", source), f"{caller.name} does not call {call.called}"
        above.append(call)


def test_the_rules_are_those_of_write_back() -> None:
    """R1 to R5, word for word."""
    docstring = str(write_back.__doc__)
    stated = re.findall(r"^(R\d)  (.*?)(?=^R\d|^$)", docstring, re.MULTILINE | re.DOTALL)
    assert [(rule, text) for rule, text in rows("The rules of order")] == [
        (rule, " ".join(text.split())) for rule, text in stated
    ]


def test_the_steps_of_a_round_are_those_of_write_back() -> None:
    """The same steps, each with the rules that it serves."""
    steps = re.findall(r"^    (\d)  (.*?)(?=^    \d|^$)", str(write_back.__doc__), re.MULTILINE | re.DOTALL)
    stated = {number: set(re.findall(r"R\d", text)) for number, text in steps}
    assert {row[0]: set(re.findall(r"R\d", row[2])) for row in rows("One round of write-back")} == stated


def test_every_crash_point_has_its_place() -> None:
    """All that the driver defines are in the document, and none that nothing defines."""
    points = {*defined_in(qcowfuse.driver), *defined_in(repair)}
    cells = [row[-1] for row in (*rows("One round of write-back"), *rows("Crash points elsewhere"))]
    named = {name for cell in cells for name in re.findall(r"`([a-z0-9-]+)`", cell)}
    assert named == points


def test_the_glossary_points_at_what_exists() -> None:
    """Terms in alphabetical order; a place is a module, or something that a module defines."""
    terms = rows("Glossary")
    assert len(terms) > 20
    names = [row[0].lower() for row in terms]
    assert names == sorted(names)
    for term, _, place in terms:
        for path, name in re.findall(r"`([\w/]+\.py)`(?: (\w+))?", place) or [("", "")]:
            assert path, f"{term} has no place"
            text = (PACKAGE / path).read_text()
            assert not name or re.search(rf"^(?:class|def|async def) {name}\b|^{name}\b", text, re.MULTILINE), (
                path,
                name,
            )


@pytest.mark.parametrize("document", [DOCUMENT, REPOSITORY / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(document: Path) -> None:
    """What a document for contributors links to, and the scripts, tests and folders that it names, exist."""
    text = document.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (document.parent / target).exists(), f"a link to {target}"
    named = set(re.findall(r"(?<![\w/.])(?:scripts|tests|docs|qcowfuse)/[\w/.-]*\w", text))
    assert named
    for path in named:
        assert (REPOSITORY / path).exists(), f"{document.name} names {path}"
