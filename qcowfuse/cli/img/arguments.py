"""What a command was given: of a plain command line without argparse, which takes a third of the time of a short one.

1. Plain are a command, its arguments and the switches of :data:`_SWITCHES`. Any other command line, and any mistake,
   is argparse's.
2. The result is the same either way (a test compares).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

Given = SimpleNamespace
"""The values of a command line, by the names that :mod:`.parser` gives them, and ``command``."""

_SWITCHES: dict[str, tuple[str, Any]] = {
    "--force": ("force", True),
    "--output=human": ("output", "human"),
    "--output=json": ("output", "json"),
    "-U": ("force_share", True),
    "-l": ("list", True),
    "-q": ("quiet", True),
}
_LOOK: dict[str, Any] = {"output": "human", "force_share": False}
_NAMES: dict[str, Any] = {"backing_file": None, "data_file": None, "backing_format": None, "no_backing": False}
_UNCHANGED: dict[str, Any] = {"create": None, "apply": None, "delete": None}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "info": _LOOK,
    "map": {**_LOOK, **_NAMES, "snapshot": None},
    "check": {**_LOOK, "ignore_locks": False, "quiet": False, "repair": None},
    "snapshot": {**_LOOK, **_UNCHANGED, "ignore_locks": False, "quiet": False, "list": False},
    "create": {
        "format": "qcow2",
        "backing": None,
        "backing_format": None,
        "key_file": None,
        "quiet": False,
        "force": False,
    },
}
"""By command, what is not given. Lists, of which each command line has one of its own, are :data:`_REPEATED`."""
_REPEATED = {"map": "allow_dir", "create": "options"}


def parse(words: Sequence[str]) -> Given:
    """What the command line says. Raises SystemExit after the help, and after one line to standard error."""
    given = _plain(words)
    if given is not None:
        return given
    from .parser import build_parser

    parser = build_parser()
    if words and words[0] == "resize":
        words = [_not_an_option(word) for word in words]
    if words and words[0].startswith("-") and words[0] not in parser._option_string_actions:
        parser.error("the command comes first: qcowfuse-img COMMAND [OPTION]...")
    return parser.parse_args(words, Given())


def _not_an_option(word: str) -> str:
    """``-10M``, which takes something away, as it does for qemu-img."""
    return f"+{word}" if word[:1] == "-" and word[1:2].isdecimal() else word


def _plain(words: Sequence[str]) -> Given | None:
    """Rule 1; None for any other command line."""
    command = words[0] if words else ""
    if command not in _DEFAULTS:
        return None
    given = Given(**_DEFAULTS[command], command=command)
    if command in _REPEATED:
        setattr(given, _REPEATED[command], [])
    names: list[str] = []
    for word in words[1:]:
        if not word.startswith("-"):
            names.append(word)
            continue
        key, value = _SWITCHES.get(word, ("", None))
        if not hasattr(given, key):
            return None
        setattr(given, key, value)
    if command == "create":
        if not 1 <= len(names) <= 2:
            return None
        given.image, given.size = names[0], names[1] if len(names) == 2 else None
    elif len(names) == 1:
        given.image = names[0]
    else:
        return None
    return given
