"""The sources of this project, parsed once for all tests that look at them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path


@cache
def syntax_tree(path: Path) -> ast.Module:
    """The module at ``path``. It is shared: not to be changed."""
    return ast.parse(path.read_text())


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Every node of the module at ``path``, as :func:`ast.walk` yields them."""
    return list(ast.walk(syntax_tree(path)))
