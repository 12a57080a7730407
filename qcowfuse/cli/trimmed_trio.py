"""The import of trio and pyfuse3, without what this program never uses of them: half of the time, and 4 MiB less.

1. Left out are TLS, sockets, processes, files and channels of trio; attrs (see :mod:`.plain_attrs`); and what reads
   the metadata of packages. A part of trio that something asks for nevertheless is imported then.
2. Anything unexpected is a doubt: then trio is imported as it is, as if none of this were here. That another version
   of trio has other modules inside is nothing unexpected, unless they need what is left out.
"""

from __future__ import annotations

import _pickle
import ctypes
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from types import AsyncGeneratorType, CoroutineType, FunctionType, ModuleType
from typing import Any, cast

from .late_imports import LateModule, real_module, standing_in
from .plain_attrs import attr_module, attrs_module

_UNUSED_PARTS = (
    *("_channel", "_dtls", "_file_io", "_path", "_socket", "_ssl", "_subprocess", "_unix_pipes", "socket"),
    *("_highlevel_generic", "_highlevel_socket", "_highlevel_ssl_helpers", "_highlevel_serve_listeners"),
    *("_highlevel_open_tcp_listeners", "_highlevel_open_tcp_stream", "_highlevel_open_unix_stream"),
)
_UNUSED_LIBRARIES = ("ssl", "hmac", "idna")
_HOMES = ("trio", "trio.lowlevel")
"""Modules that only pass on what is left out."""
_TRIAL = ("trio", "outcome", "attr", "attrs")
"""What is imported anew when it could not be imported in this way."""

_log = logging.getLogger(__name__)


class _UnsuitableError(Exception):
    """The parts of this version of trio need what would be left out."""


class _Part:
    """Stands for something of a module of trio that is left out. It can be passed on, and nothing else."""

    __slots__ = ("origin",)

    def __init__(self, module: str, name: str) -> None:
        self.origin = module, name


class _LeftOut(ModuleType):
    """Stands in for a module of trio."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Part(self.__name__, name)


def import_pyfuse3() -> None:
    """Import trio as :func:`import_trio` does, and pyfuse3. Raises what the imports raise."""
    import_trio()
    if "pyfuse3" in sys.modules:
        return
    # Python looks for a path whenever it imports something from a module.
    metadata = {"version": _version, "PackageNotFoundError": ModuleNotFoundError, "__path__": ()}
    pickling = {"PicklingError": _pickle.PicklingError, "__path__": ()}
    with standing_in(LateModule("importlib.metadata", **metadata), LateModule("pickle", **pickling)):
        importlib.import_module("pyfuse3")


def import_trio() -> None:
    """Import trio, unless it has been imported. Raises what the import raises."""
    if "trio" in sys.modules:
        return
    before = set(sys.modules)
    left_out = [_LeftOut(f"trio.{name}") for name in _UNUSED_PARTS]
    others = [LateModule(name) for name in _UNUSED_LIBRARIES]
    others += [LateModule("ctypes.util", find_library=_find_library), _inspect()]
    try:
        with standing_in(*left_out, *others, attrs_module(), attr_module()):
            importlib.import_module("trio")
            _pass_on_late()
    except Exception as exc:
        _log.debug("trio is imported as a whole: %s: %s", type(exc).__name__, exc)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in _TRIAL:
                del sys.modules[name]
        importlib.import_module("trio")


def _pass_on_late() -> None:
    """What was left out is imported when somebody asks a module of trio for it. Raises _UnsuitableError."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "trio" or isinstance(module, _LeftOut):
            continue
        parts = {key: value for key, value in vars(module).items() if isinstance(value, (_Part, _LeftOut))}
        if parts and (name not in _HOMES or any(map(parts.keys().__and__, _names_used_in(module)))):
            raise _UnsuitableError(f"{name} uses {', '.join(parts)}")
        for key in parts:
            delattr(module, key)
        if parts:
            vars(module)["__getattr__"] = _getter(module, parts, vars(module).get("__getattr__"))


def _names_used_in(module: ModuleType) -> Iterator[set[str]]:
    """The global names that each function of a module refers to."""
    for value in vars(module).values():
        if isinstance(value, FunctionType) and value.__globals__ is vars(module):
            yield set(value.__code__.co_names)


def _getter(
    module: ModuleType, parts: dict[str, _Part | _LeftOut], otherwise: Callable[[str], object] | None
) -> Callable[[str], object]:
    """``__getattr__`` of a module that passes on ``parts``."""

    def get(name: str) -> object:
        part = parts.get(name)
        if isinstance(part, _Part):
            home, key = part.origin
            found = getattr(importlib.import_module(home), key)
        elif part is not None:
            found = importlib.import_module(part.__name__)
        elif otherwise is not None:
            return otherwise(name)
        else:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        setattr(module, name, found)
        return found

    return get


def _inspect() -> LateModule:
    """A stand-in for ``inspect`` with what trio asks when a lock is taken and when a function of a thread is done:
    the module loads the parser and the disassembler."""
    states = {f"CORO_{name}": f"CORO_{name}" for name in ("CREATED", "RUNNING", "SUSPENDED", "CLOSED")}

    def state_of(coroutine: Any) -> str:
        if coroutine.cr_running:
            return "CORO_RUNNING"
        if coroutine.cr_suspended:
            return "CORO_SUSPENDED"
        return "CORO_CLOSED" if coroutine.cr_frame is None else "CORO_CREATED"

    return LateModule(
        "inspect",
        getcoroutinestate=state_of,
        iscoroutine=lambda value: isinstance(value, CoroutineType),
        isasyncgen=lambda value: isinstance(value, AsyncGeneratorType),
        **states,
    )


def _find_library(name: str) -> str | None:
    """Like that of ``ctypes.util``, which starts ``ldconfig`` to find it: trio names its threads by libpthread."""
    try:
        ctypes.CDLL(found := f"lib{name}.so.0")
    except OSError:
        return cast("str | None", real_module("ctypes.util").find_library(name))
    return found


def _version(package: str) -> str:
    """Like that of ``importlib.metadata``, by the names of folders alone."""
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue
        for name in names:
            if name.startswith(f"{package}-") and name.endswith((".dist-info", ".egg-info")):
                return name.removeprefix(f"{package}-").rpartition(".")[0].partition("-")[0]
    return cast(str, real_module("importlib.metadata").version(package))
