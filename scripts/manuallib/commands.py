"""What the programs accept, as values: read from their parsers and their table of options.

1. Nothing about an option is written down a second time: names, values and help come from the parsers.
2. What completes a value follows from its metavar; :data:`KINDS` and :data:`USERS` are all that is added.
"""

from __future__ import annotations

import argparse
import re
from typing import NamedTuple

from qcowfuse.cli.img.create_options import known_options
from qcowfuse.cli.img.parser import build_parser as build_img_parser
from qcowfuse.cli.mount.mount_options import LIST_NAMES, list_words
from qcowfuse.cli.mount.options import OPTIONS
from qcowfuse.cli.mount.parser import build_parser
from qcowfuse.cli.verb_names import VERBS
from qcowfuse.cli.verbs.main import build_parser as build_verb_parser

KINDS = {
    "PATH": "file",
    "FILE": "file",
    "IMAGE": "file",
    "MOUNTPOINT": "file",
    "MOUNTPOINT|IMAGE": "file",
    "DIR": "directory",
    "OPT,OPT...": "list",
    "NAME=VALUE,...": "list",
}
"""By metavar: what completes a value; nothing does where it is not here."""
USERS = frozenset({"--user"})
"""Options whose value is the name of a user."""


class Flag(NamedTuple):
    """An option: ``names`` with their dashes, the short one first; ``metavar`` is empty where it takes no value.

    ``kind`` is what completes the value: file, directory, list, user, words or nothing; ``words`` are those.
    """

    names: tuple[str, ...]
    metavar: str
    help: str
    group: str
    kind: str
    words: tuple[str, ...]


class Command(NamedTuple):
    """A program, or a command of one. ``arguments`` are (metavar, help); ``synopsis`` is behind the name."""

    name: str
    summary: str
    description: str
    synopsis: str
    flags: tuple[Flag, ...]
    arguments: tuple[tuple[str, str], ...]
    commands: tuple[Command, ...] = ()

    @property
    def by_words(self) -> str:
        """What completes the words that are no options."""
        return "file" if any(KINDS.get(metavar) == "file" for metavar, _ in self.arguments) else ""


def qcowfuse() -> Command:
    """The program that mounts, with its verbs as commands."""
    program = _command(build_parser(), "qcowfuse", "", list_words())
    verbs = {verb: _command(build_verb_parser(verb), verb, text, ()) for verb, text in VERBS.items()}
    verbs["run"] = verbs["run"]._replace(flags=program.flags)  # it takes what a mount takes
    return program._replace(commands=tuple(verbs.values()))


def qcowfuse_img() -> Command:
    """The program for images at rest."""
    return _command(build_img_parser(), "qcowfuse-img", "", known_options("qcow2"))


def list_options() -> list[Flag]:
    """The options that may only stand in the list behind ``-o`` of a mount."""
    flags = [
        Flag((option.name,), option.metavar, option.help, "", "", ())
        for option in OPTIONS
        if not option.on_command_line
    ]
    return flags + [Flag((name,), "", text, "", "", ()) for name, text in LIST_NAMES.items()]


def _command(parser: argparse.ArgumentParser, name: str, summary: str, in_list: tuple[str, ...]) -> Command:
    flags: list[Flag] = []
    arguments: list[tuple[str, str]] = []
    commands: list[Command] = []
    for group in parser._action_groups:
        for action in group._group_actions:
            if isinstance(action, argparse._SubParsersAction):
                texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
                commands += [_command(each, word, texts[word], in_list) for word, each in action.choices.items()]
            elif action.option_strings:
                flags.append(_flag(action, group.title or "", in_list))
            else:
                arguments.append((str(action.metavar or action.dest.upper()), action.help or ""))
    usage = " ".join(parser.format_usage().split())
    synopsis = usage.removeprefix("usage:").strip().removeprefix(parser.prog).strip()
    return Command(name, summary, parser.description or "", synopsis, tuple(flags), tuple(arguments), tuple(commands))


def _flag(action: argparse.Action, group: str, in_list: tuple[str, ...]) -> Flag:
    names = tuple(sorted(action.option_strings, key=len))
    if action.nargs == 0:
        return Flag(names, "", action.help or "", group, "", ())
    words = tuple(map(str, action.choices or ()))
    metavar = str(action.metavar or "|".join(words))
    if not words and re.fullmatch(r"[a-z0-9_]+(\|[a-z0-9_]+)+", metavar):
        words = tuple(metavar.split("|"))
    kind = "words" if words else "user" if USERS & set(names) else KINDS.get(metavar, "")
    return Flag(names, metavar, action.help or "", group, kind, in_list if kind == "list" else words)
