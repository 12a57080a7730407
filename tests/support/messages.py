"""Every message that a user can cause, read from the source: for documents that have to explain each.

1. A message is the text of an error class of :data:`TEXT_AT`, of a call of a function there, or of a warning or error
   that is logged or printed to standard error. Parts that are put in are ``{}``. What stands before it, the program's
   name and the image or the place, is left out.
2. Of bytes that are wrong in an image (FormatError), what counts is the structure, which the message begins with.
3. A text that comes from a variable is looked for in the assignments to it, and one that comes from a function in
   what that function returns.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

from .sources import syntax_tree

TEXT_AT = {
    "BackingChainError": 1,
    "CreateError": 0,
    "ImageLockedError": 1,
    "ImageUsageError": 0,
    "MountBusyError": 0,
    "MountError": 0,
    "MountOptionError": 0,
    "OutsideError": 0,
    "ReadOnlyImageError": 0,
    "StoppedEarlyError": 0,
    "UnfitFileError": 0,
    "UnsupportedFeatureError": 0,
    "WrongKeyError": 0,
    "_fail": 2,
    "_refuse": 0,
    "_say": 0,
    "_tell": 1,
    "error": 0,  # of an argument parser, and of a log
    "warning": 0,
}
"""What makes a message, and which of its arguments is the text."""
STRUCTURE_AT = {"FormatError": 0, "CorruptImageError": 0}
VALUES = {"ValueError": 0}
"""Values of options, in cli and :data:`READS_OPTIONS`; elsewhere they are for the caller of a function."""
READS_OPTIONS = ("cli/", "storage/measuring/delay_model.py")
CONDITIONS = {"_require": 1}
"""Functions that raise CreateError where their first argument is false."""


class Message(NamedTuple):
    """``module`` is below the package; ``text`` as above."""

    module: str
    text: str


@cache
def messages(package: Path) -> list[Message]:
    """All of them, in the order of the modules, each once."""
    found: dict[Message, None] = {}
    for path in sorted(package.rglob("*.py")):
        module = str(path.relative_to(package))
        for text in _reader(path, module).texts():
            found.setdefault(Message(module, text))
    return list(found)


@cache
def structures(package: Path) -> set[str]:
    """The structures of an image that can be found to be wrong."""
    found: set[str] = set()
    for path in package.rglob("*.py"):
        reader = _reader(path, str(path.relative_to(package)))
        for call, function in reader.calls:
            if _name(call) in STRUCTURE_AT and call.args:
                found |= set(reader.values(call.args[0], function))
    return {text for text in found if not re.fullmatch(r"[{} ]*", text)}


def plain(text: str) -> str:
    """A message without its leading place, for comparison."""
    return re.sub(r"^(qcowfuse[a-z -]*: )?(\{\}: )?", "", text)


@cache
def _reader(path: Path, module: str) -> _Reader:
    return _Reader(syntax_tree(path), module)


class _Reader:
    def __init__(self, tree: ast.Module, module: str) -> None:
        self._tree = tree
        self._module = module
        self._functions = {
            node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        self.calls = list(self._find_calls())
        """Each call, with the innermost function that it stands in (or the module)."""

    def _find_calls(self) -> Iterator[tuple[ast.Call, ast.AST]]:
        to_visit: list[tuple[ast.AST, ast.AST]] = [(self._tree, self._tree)]
        while to_visit:
            node, function = to_visit.pop()
            if isinstance(node, ast.Call):
                yield node, function
            inner = node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
            to_visit += ((child, inner) for child in ast.iter_child_nodes(node))

    def texts(self) -> Iterator[str]:
        """The messages of the module."""
        places = TEXT_AT | (VALUES if self._module.startswith(READS_OPTIONS) else {})
        if self._module in ("tools/create.py", "cli/img/create_options.py"):
            places = places | CONDITIONS
        for call, function in self.calls:
            at = places.get(_name(call))
            if _name(call) == "print" and any(
                each.arg == "file" and ast.unparse(each.value) == "sys.stderr" for each in call.keywords
            ):
                at = 0
            if _name(call) == "print_error" and self._module.startswith("cli/img/"):
                at = 0  # elsewhere it prints what functions of TEXT_AT got
            if at is None or len(call.args) <= at:
                continue
            for text in self.values(call.args[at], function):
                if isinstance(call.func, ast.Attribute):  # a log puts in what follows
                    text = re.sub(r"%[-#0-9.]*[a-z]", "{}", text)
                text = plain(text)
                if re.search(r"[a-z]{2}", text):
                    yield text

    def values(self, node: ast.expr, function: ast.AST, depth: int = 0) -> list[str]:
        """The texts that an expression may have."""
        if depth > 4:
            return ["{}"]
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return _joined([self._part(part, function, depth) for part in parts])
            case ast.IfExp(body=first, orelse=second):
                return self.values(first, function, depth + 1) + self.values(second, function, depth + 1)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return _joined([self.values(left, function, depth + 1), self.values(right, function, depth + 1)])
            case ast.BoolOp(values=parts):
                return [text for part in parts for text in self.values(part, function, depth + 1)]
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return [text for part in parts for text in self.values(part, function, depth + 1)]
            case ast.Call(func=ast.Name(id="printable"), args=[inner]):
                return self.values(inner, function, depth)
            case ast.Name(id=name):
                return self._assigned(name, function, depth)
            case ast.Call(func=ast.Name(id=name)) if name in self._functions:
                return self._returned(name, depth)
        return ["{}"]

    def _part(self, part: ast.expr, function: ast.AST, depth: int) -> list[str]:
        if isinstance(part, ast.Constant):
            return [str(part.value)]
        # Only what is chosen on the spot or comes from a function is looked into: names are values of the user's.
        inner = part.value if isinstance(part, ast.FormattedValue) else part
        if isinstance(inner, ast.IfExp):
            return self.values(inner, function, depth + 1)
        return ["{}"]

    def _assigned(self, name: str, function: ast.AST, depth: int) -> list[str]:
        found: list[str] = []
        for scope in (function, self._tree):
            for node in ast.walk(scope):
                targets = node.targets if isinstance(node, ast.Assign) else []
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    assert isinstance(node, ast.Assign)
                    found += self.values(node.value, function, depth + 1)
            if found:
                break
        return found or ["{}"]

    def _returned(self, name: str, depth: int) -> list[str]:
        function = self._functions[name]
        return [
            text
            for node in ast.walk(function)
            if isinstance(node, ast.Return) and node.value is not None
            for text in self.values(node.value, function, depth + 1)
        ] or ["{}"]


def _name(call: ast.Call) -> str:
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _joined(parts: list[list[str]]) -> list[str]:
    return ["".join(words) for words in product(*parts)]
