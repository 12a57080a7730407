"""The house rules that a machine can check: who imports whom, and that package docstrings name every module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "qcowfuse"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAY_IMPORT = {
    "errors": set(),
    "printable": set(),
    "_version": set(),
    "format": {"errors", "printable"},
    "system": {"errors"},
    "storage": {"errors", "system"},
    "driver": {"errors", "format", "storage", "printable"},
    "export": {"errors", "driver", "system"},
    "cli": {"errors", "system", "driver", "export", "_version", "printable"},
    "__init__": {"_version"},
    "__main__": {"cli"},
}
ONLY_IN = {"pyfuse3": {"export"}, "trio": {"system", "storage", "driver", "export", "cli"}}
NOT_SANS_IO = {"os", "io", "pathlib", "mmap", "socket", "subprocess", "threading", "asyncio", "tempfile"}
MODULE_IDS = [str(path.relative_to(PACKAGE)) for path in MODULES]


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    """Every imported name in full: "trio", "qcowfuse.format.header" ..."""
    here = ("qcowfuse", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
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
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        if top == "qcowfuse":
            target = rest.split(".")[0]
            assert target == layer or target in MAY_IMPORT[layer], f"{layer} imports {name}"
        assert layer in ONLY_IN.get(top, {layer}), f"{layer} imports {name}"
        assert layer != "format" or top not in NOT_SANS_IO, f"format does no I/O, but imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=MODULE_IDS)
def test_only_the_command_line_reads_the_environment(path: Path) -> None:
    """os.environ and os.getenv appear in cli and nowhere else."""
    attributes = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert layer_of(path) == "cli" or not attributes & {"environ", "environb", "getenv"}


@pytest.mark.parametrize("path", MODULES, ids=MODULE_IDS)
def test_a_docstring_states_the_purpose(path: Path) -> None:
    """Every module says what it is for, and a package's docstring names every module in the package."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    if path.name == "__init__.py":
        inside = {module.stem for module in path.parent.glob("[!_]*.py")}
        inside |= {package.parent.name for package in path.parent.glob("*/__init__.py")}
        unnamed = {name for name in inside if not re.search(rf"\b{name}\b", docstring)}
        assert not unnamed, f"the docstring of {path.parent.name} does not name {sorted(unnamed)}"


def test_every_directory_of_modules_is_a_package() -> None:
    """No directory with modules lacks __init__.py: packaging would leave it out."""
    assert all((path.parent / "__init__.py").exists() for path in MODULES)
