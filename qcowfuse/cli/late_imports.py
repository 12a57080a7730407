"""Imports that wait until something of the module is used.

A library may import what its caller never uses: with their shared libraries that can be a tenth of the time that a
daemon takes to start, and some MiB of its memory.

1. A module that is imported already is left alone.
2. An import after the block gives the module itself, not its stand-in.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType


class LateModule(ModuleType):
    """Stands in for a module until an attribute is asked for that is not among ``given``, and imports it then.

    Raises what the import raises, or AttributeError.
    """

    def __init__(self, name: str, **given: object) -> None:
        super().__init__(name)
        vars(self).update(given)

    def __getattr__(self, name: str) -> object:
        return getattr(real_module(self.__name__), name)


def real_module(name: str) -> ModuleType:
    """The module itself, imported if only a stand-in is there. Raises what the import raises."""
    module = sys.modules.get(name)
    if isinstance(module, LateModule):
        _remove(module)
    return importlib.import_module(name)


@contextmanager
def standing_in(*modules: ModuleType) -> Iterator[None]:
    """Inside of the block, an import of a module with one of these names gives the one that is passed here."""
    stand_ins = [module for module in modules if module.__name__ not in sys.modules]
    for stand_in in stand_ins:
        package, _, part = stand_in.__name__.rpartition(".")
        sys.modules[stand_in.__name__] = stand_in
        if package in sys.modules:
            setattr(sys.modules[package], part, stand_in)  # ``import package.part`` doesn't
    try:
        yield
    finally:
        for stand_in in stand_ins:
            _remove(stand_in)


def _remove(stand_in: ModuleType) -> None:
    package, _, part = stand_in.__name__.rpartition(".")
    if sys.modules.get(stand_in.__name__) is stand_in:
        del sys.modules[stand_in.__name__]
    if package in sys.modules and vars(sys.modules[package]).get(part) is stand_in:
        with suppress(AttributeError):
            delattr(sys.modules[package], part)
