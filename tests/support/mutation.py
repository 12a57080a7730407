"""Breaks one line of a function on purpose, to see that a test notices."""

from __future__ import annotations

import inspect
import textwrap
from types import FunctionType, ModuleType
from typing import Any

import pytest


def break_line(
    monkeypatch: pytest.MonkeyPatch, owner: type | ModuleType, name: str, old: str, new: str, *, count: int = 1
) -> None:
    """Replace ``old`` in the source of ``owner.name`` by ``new`` until the end of the test.

    Both are compared and put in without regard to their indentation as a block. AssertionError when ``old`` is not
    there ``count`` times: then the function has changed, and the mutation has to follow it.
    """
    function = getattr(owner, name)
    assert isinstance(function, FunctionType)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == count, f"{name} has no longer what is to be broken: {old!r}"
    namespace: dict[str, Any] = {}
    code = "from __future__ import annotations\n" + source.replace(old, new)
    exec(compile(code, f"<{name}, broken>", "exec"), function.__globals__, namespace)
    monkeypatch.setattr(owner, name, namespace[name])
