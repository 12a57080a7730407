"""Which option, verb or command may have been meant by one that does not exist."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from .verb_names import VERBS

if TYPE_CHECKING:
    import argparse

IMG_COMMANDS = ("info", "map", "check", "create", "resize", "snapshot", "partitions")
"""Of qcowfuse-img (a test compares)."""
QEMU_IMG_COMMANDS = str.split("amend bench bitmap commit compare convert dd measure rebase")
"""Of qemu-img 10 alone."""


_NO_DAEMON = "it goes into the background by itself, and -f keeps it"
_BY_ITSELF = "the format is found without it"
_ON_LOOP = "losetup --offset of the served file, or --partition NUMBER"
OF_OTHERS = {
    "-c": "qcowfuse IMAGE MOUNTPOINT, then losetup -fP --show MOUNTPOINT/disk.raw",
    "-q": "nothing is printed but failures",
    "-s": "-x, --ephemeral",
    "-u": "qcowfuse umount MOUNTPOINT",
    "-v": "-d, --debug",
    "--connect": "qcowfuse IMAGE MOUNTPOINT, then losetup -fP --show MOUNTPOINT/disk.raw",
    "--daemon": _NO_DAEMON,
    "--daemonize": _NO_DAEMON,
    "--fork": _NO_DAEMON,
    "--disconnect": "qcowfuse umount MOUNTPOINT",
    "--format": _BY_ITSELF,
    "--gid": "-o gid=GROUP",
    "--nonempty": "-o nonempty",
    "--object": "--key-file PATH",
    "--offset": _ON_LOOP,
    "--passphrase": "--key-file PATH",
    "--password": "--key-file PATH",
    "--pid-file": "qcowfuse status --output=json MOUNTPOINT",
    "--pidfile": "qcowfuse status --output=json MOUNTPOINT",
    "--quiet": "nothing is printed but failures",
    "--ro": "-r, --read-only",
    "--rw": "the disk can be written without an option",
    "--sizelimit": _ON_LOOP,
    "--uid": "-o uid=USER",
    "--umask": "-o umask=OCTAL",
    "--unmount": "qcowfuse umount MOUNTPOINT",
    "--verbose": "-d, --debug",
}
"""Options of qemu-nbd, guestmount, losetup, sshfs and others, and what there is in their place."""
_OF_QEMU_IMG = {
    "-f": _BY_ITSELF,
    "-p": "progress is shown on a terminal without it",
    "--object": "--key-file PATH",
    "--shrink": "a disk is never made smaller (qemu-img resize --shrink can)",
}


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
    if word in ("help", "version"):
        return f" (did you mean --{word}?)"
    if word in IMG_COMMANDS:
        return f" (did you mean qcowfuse-img {word}?)"
    return did_you_mean(word, VERBS)


def without_mount_point(words: Sequence[str]) -> str:
    """What may have been meant by a command line with one name in it, or nothing."""
    for word in words:
        if word in OF_OTHERS:
            return f" ({word} here: {OF_OTHERS[word]})"
    names = [word for word in words if not word.startswith("-")]
    return verb_meant(names[0]) if names and not os.path.lexists(names[0]) else ""


def with_near_misses(message: str, parser: argparse.ArgumentParser) -> str:
    """argparse's message about what it does not know, with the options or the command that may have been meant."""
    command = re.match(r"argument COMMAND: invalid choice: '([^']*)'", message)
    if command is not None:
        return _no_command(command[1])
    valued = re.match(r"argument (-\w)(?:/(--[a-z-]+))?: ignored explicit argument '=?(.*)'$", message)
    if valued is not None:
        is_optional = valued[2] == "--ephemeral"
        return f"option {valued[1]} takes no value{f': {valued[2]}={valued[3]} does' if is_optional else ''}"
    _, separator, words = message.partition("unrecognized arguments: ")
    if not separator:
        return message
    unknown = [word.split("=")[0] for word in words.split() if word.startswith("-")]
    if unknown:
        instead = (_OF_QEMU_IMG if parser.prog.startswith("qcowfuse-img") else OF_OTHERS).get(unknown[0])
        hint = did_you_mean(unknown[0], _long_options(parser)) if instead is None else f" (here: {instead})"
        return f"unknown option {unknown[0]}{hint}"
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
