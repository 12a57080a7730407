"""Imports that wait until something of the module is used.

A library may import what its caller never uses. trio imports ``ssl``, ``hmac`` and ``idna``: with their shared
libraries that is a tenth of the time that a daemon takes to start, and 2 MiB of its memory.

1. A module that is imported already is left alone.
2. Who imports the module afterwards gets the module itself, not its stand-in.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

FOR_TRIO = ("ssl", "hmac", "idna")
"""What trio imports and this program never uses: TLS, DTLS, and names of hosts."""


class _StandIn(ModuleType):
    """Imports the module when an attribute is asked for. Raises what the import raises, or AttributeError."""

    def __getattr__(self, name: str) -> object:
        _remove(self)
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def imported_late(*names: str) -> Iterator[None]:
    """Inside of the block, an import of one of these top-level modules gives a stand-in that imports it when it is
    used."""
    stand_ins = [_StandIn(name) for name in names if name not in sys.modules]
    for stand_in in stand_ins:
        sys.modules[stand_in.__name__] = stand_in
    try:
        yield
    finally:
        for stand_in in stand_ins:
            _remove(stand_in)


def _remove(stand_in: _StandIn) -> None:
    if sys.modules.get(stand_in.__name__) is stand_in:
        del sys.modules[stand_in.__name__]
