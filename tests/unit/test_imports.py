"""The house rules that a machine can check: who imports whom, and that package docstrings name every module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sources import nodes, syntax_tree

PACKAGE = Path(__file__).parents[2] / "qcowfuse"
MODULES = sorted(PACKAGE.rglob("*.py"))
IMAGE = "errors buffer printable format system storage tables consistency"
ROOMS = {
    "errors": "",
    "buffer": "",
    "printable": "",
    "_version": "",
    "format": "errors buffer printable",
    "partitions": "errors",
    "system": "errors",
    "storage": "errors buffer system",
    "storage.measuring": "buffer storage",
    "tables": "errors format system storage printable",
    "consistency": "errors buffer printable format system storage tables",
    "driver": "errors buffer format partitions system storage printable storage.measuring",
    "driver.layers": f"{IMAGE} driver",
    "driver.reading": f"{IMAGE} driver driver.layers",
    "driver.writing": f"{IMAGE} driver driver.layers driver.reading",
    "driver.facade": f"{IMAGE} driver driver.layers driver.reading driver.writing",
    "tools": f"{IMAGE} driver driver.layers driver.writing driver.facade",
    "fuse": "errors buffer driver",
    "fuse.libfuse": "errors buffer driver fuse system",
    "daemon": "errors buffer printable driver fuse fuse.libfuse system",
    "cli": "errors partitions driver printable system tools driver.facade daemon",
    "cli.mount": "errors driver printable driver.facade tools daemon _version cli",
    "cli.img": "errors partitions driver printable system driver.facade consistency tools _version cli",
    "cli.verbs": "errors printable system daemon cli cli.mount",
    "cli.entry": "cli cli.mount cli.img cli.verbs",
    "__init__": "_version",
    "__main__": "cli.entry",
}
"""Each room and those it may import from, besides its own. ``qcowfuse/__init__.py`` draws them."""
WITHIN = {
    "assembly": "driver.facade",
    "opened_layers": "driver.facade",
    "chain": "driver.facade",
    "qcow_image": "driver.facade",
    "counters": "driver.facade",
    "entry": "cli.entry",
}
"""Modules of a package's root that are a room of their own, above its sub-packages."""
ONLY_IN = {
    "pyfuse3": {"fuse", "daemon"},
    "trio": {"system", "storage", "tables", "consistency", "driver", "tools", "fuse", "daemon", "cli"},
}
SANS_IO = {"format", "partitions"}
NOT_SANS_IO = {"os", "io", "pathlib", "mmap", "socket", "subprocess", "threading", "asyncio", "tempfile"}
MODULE_IDS = [str(path.relative_to(PACKAGE)) for path in MODULES]


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def room_of(dotted: str) -> str:
    """The room of a module, given by its name below ``qcowfuse``, or of something that a module holds."""
    parts = dotted.split(".")
    if len(parts) > 1 and f"{parts[0]}." in WITHIN.get(parts[1], ""):
        return WITHIN[parts[1]]
    return next(room for room in (".".join(parts[:2]), parts[0]) if room in ROOMS)


def imports_of(path: Path) -> Iterator[str]:
    """Every imported name in full: "trio", "qcowfuse.format.header" ..."""
    here = ("qcowfuse", *path.relative_to(PACKAGE).parts[:-1])
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (*here[: len(here) - node.level + 1],) if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=MODULE_IDS)
def test_imports_point_downwards(path: Path) -> None:
    """A module imports from its own layer or from those below it, and pyfuse3 and trio stay in their layers."""
    layer = layer_of(path)
    room = room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"))
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        if top == "qcowfuse":
            assert room_of(rest) in {room, *ROOMS[room].split()}, f"{room} imports {name}"
        assert layer in ONLY_IN.get(top, {layer}), f"{layer} imports {name}"
        assert layer not in SANS_IO or top not in NOT_SANS_IO, f"{layer} does no I/O, but imports {name}"


def test_rooms_stand_above_what_they_import() -> None:
    """The table has no circle: each room names only rooms that stand before it."""
    above = list(ROOMS)
    for room, others in ROOMS.items():
        assert all(above.index(other) < above.index(room) for other in others.split())


@pytest.mark.parametrize("path", MODULES, ids=MODULE_IDS)
def test_only_the_command_line_reads_the_environment(path: Path) -> None:
    """os.environ and os.getenv appear in cli and nowhere else."""
    attributes = {node.attr for node in nodes(path) if isinstance(node, ast.Attribute)}
    assert layer_of(path) == "cli" or not attributes & {"environ", "environb", "getenv"}


@pytest.mark.parametrize("path", MODULES, ids=MODULE_IDS)
def test_a_docstring_states_the_purpose(path: Path) -> None:
    """Every module says what it is for, and a package's docstring names every module in the package."""
    docstring = ast.get_docstring(syntax_tree(path))
    assert docstring
    if path.name == "__init__.py":
        inside = {module.stem for module in path.parent.glob("[!_]*.py")}
        inside |= {package.parent.name for package in path.parent.glob("*/__init__.py")}
        unnamed = {name for name in inside if not re.search(rf"\b{name}\b", docstring)}
        assert not unnamed, f"the docstring of {path.parent.name} does not name {sorted(unnamed)}"


@pytest.mark.parametrize("path", MODULES, ids=MODULE_IDS)
def test_a_module_can_be_read_at_one_go(path: Path) -> None:
    """What grows longer is split where it has a seam."""
    assert len(path.read_text().splitlines()) <= 450


def test_every_directory_of_modules_is_a_package() -> None:
    """No directory with modules lacks __init__.py: packaging would leave it out."""
    assert all((path.parent / "__init__.py").exists() for path in MODULES)
