"""Which option, verb or command may have been meant by one that does not exist."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from .verb_names import VERBS

if TYPE_CHECKING:
    import argparse

IMG_COMMANDS = ("info", "map", "check", "create", "resize", "snapshot", "partitions")
"""Of qcowfuse-img (a test compares)."""
QEMU_IMG_COMMANDS = str.split("amend bench bitmap commit compare convert dd measure rebase")
"""Of qemu-img 10 alone."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)``, or nothing where nothing is near."""
    from difflib import get_close_matches

    plain = {_plain(name): name for name in known}
    near = get_close_matches(_plain(word), plain, n=1, cutoff=0.7)
    return f" (did you mean {plain[near[0]]}?)" if near else ""


def _plain(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "")


def verb_meant(word: str) -> str:
    """What to use in place of a first word that is neither a verb nor a file, or nothing."""
    if "/" in word or "." in word:
        return ""  # the name of a file
    if word == "mount":
        return " (a mount has no verb: qcowfuse IMAGE MOUNTPOINT)"
    if word in IMG_COMMANDS:
        return f" (did you mean qcowfuse-img {word}?)"
    return did_you_mean(word, VERBS)


def with_near_misses(message: str, parser: argparse.ArgumentParser) -> str:
    """argparse's message about what it does not know, with the options or the command that may have been meant."""
    command = re.match(r"argument COMMAND: invalid choice: '([^']*)'", message)
    if command is not None:
        return _no_command(command[1])
    _, separator, words = message.partition("unrecognized arguments: ")
    if not separator:
        return message
    unknown = [word.split("=")[0] for word in words.split() if word.startswith("-")]
    if unknown:
        return f"unknown option {unknown[0]}{did_you_mean(unknown[0], _long_options(parser))}"
    return f"too many arguments: {words}"


def _no_command(word: str) -> str:
    if word not in QEMU_IMG_COMMANDS:
        near = did_you_mean(word, IMG_COMMANDS) or f" (there are {', '.join(IMG_COMMANDS)})"
        return f"unknown command {word}{near}"
    also = ", or copy the file of a mount" if word in ("convert", "dd") else ""
    return f"has no command {word}: use qemu-img {word}, while the image is not mounted{also}"


def _long_options(parser: argparse.ArgumentParser) -> Iterator[str]:
    import argparse

    for action in parser._actions:
        yield from (name for name in action.option_strings if name.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _long_options(command)
