"""Which verb, with what: from a command line that begins with a verb to an exit code with at most one line.

1. Where the rest of the command line makes no sense for the verb, and a file of the verb's name exists, it is the
   image of a plain mount: ``qcowfuse list mnt`` serves an image that is called ``list``.
2. ``run`` hands all that stands before ``--`` to the mount's own parser.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from ...errors import QcowFuseError
from ...printable import print_error
from ..argument_parser import ArgumentParser
from ..exit_codes import ExitCode, exit_code_of
from ..near_misses import with_near_misses
from ..option_table import add_options
from ..verb_names import VERBS
from .options import DEFAULT_INTERVAL, DEFAULT_TIMEOUT, VERB_OPTIONS


class _UsageError(Exception):
    """The message says what is wrong."""


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(with_near_misses(message, self))


def main(argv: Sequence[str]) -> int:
    """Run with ``argv``, of which the first word is a verb; returns the exit code."""
    verb = argv[0]
    try:
        given = parse(argv)
    except _UsageError as exc:
        if _may_be_a_mount(argv):
            from ..mount.main import main as mount

            return mount(argv)
        return _fail(verb, ExitCode.USAGE, f"{exc} (qcowfuse {verb} --help says more)")
    except SystemExit:  # after the help
        return ExitCode.OK
    try:
        code = _RUN[verb](given)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 128 + 2
    except BrokenPipeError:  # of standard output: its reader has seen enough
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return ExitCode.OK
    except OSError as exc:
        from ..failures import describe_os_error

        return _fail(verb, exit_code_of(exc), describe_os_error(exc, given.get("target") or verb))
    except QcowFuseError as exc:
        return _fail(verb, exit_code_of(exc), str(exc))


def _may_be_a_mount(argv: Sequence[str]) -> bool:
    """Rule 1."""
    return len([word for word in argv if not word.startswith("-")]) > 1 and os.path.lexists(argv[0])


def build_parser(verb: str) -> argparse.ArgumentParser:
    """The parser of a verb's options and arguments."""
    described = VERB_OPTIONS[verb]
    options = "[OPTION]... " if described.options or verb == "run" else ""
    parser = _Parser(
        prog=f"qcowfuse {verb}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage=f"qcowfuse {verb} {options}{described.arguments}".rstrip(),
        description=described.description,
        epilog=f"example:\n{described.examples}",
    )
    if verb in ("status", "umount"):
        parser.add_argument("target", metavar=described.arguments, help="a mount, or an image that is mounted")
    if verb == "run":
        parser.add_argument("image", metavar="IMAGE", help="what to mount, behind options of a mount")
        parser.add_argument("command", metavar="COMMAND", help="what to run, and its arguments")
    add_options(parser, described.options)
    return parser


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """What is given to a verb, by name. Raises _UsageError, and SystemExit after the help."""
    verb, rest = argv[0], list(argv[1:])
    parser = build_parser(verb)
    if verb == "run":
        return _parse_run(parser, rest)
    given = vars(parser.parse_args(rest))
    for option in VERB_OPTIONS[verb].options:
        text = given[option.key]
        if option.metavar and text is not None:
            try:
                given[option.key] = option.convert(text)
            except ValueError as exc:
                raise _UsageError(f"{option.name}: {exc}") from None
    return given


def _parse_run(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, Any]:
    """Rule 2."""
    before, command = words, list[str]()
    if "--" in words:
        place = words.index("--")
        before, command = words[:place], words[place + 1 :]
    if not {"-h", "--help"}.isdisjoint(before):
        parser.parse_args(["--help"])
    if not before or not command:
        raise _UsageError("expected IMAGE -- COMMAND")
    return {"before": before, "command": command}


def _list(given: dict[str, Any]) -> int:
    from .listing import print_list

    print_list(as_json=given["output"] == "json")
    return ExitCode.OK


def _status(given: dict[str, Any]) -> int:
    from .mounts import find_mounts, matching
    from .status import print_status, watch_status

    as_json = given["output"] == "json"
    found = matching(given["target"], find_mounts())
    if not found:
        return _not_mounted("status", given["target"])
    if given["watch"]:
        if len(found) > 1:
            places = ", ".join(mount.point for mount in found)
            return _fail("status", ExitCode.USAGE, f"{given['target']} is mounted at {places}: which one?")
        return watch_status(found[0], given["interval"] or DEFAULT_INTERVAL, as_json=as_json)
    return max(print_status(mount, as_json=as_json) for mount in found)


def _umount(given: dict[str, Any]) -> int:
    from .mounts import find_mounts, matching
    from .unmounting import unmount

    found = matching(given["target"], find_mounts())
    if not found:
        return _not_mounted("umount", given["target"])
    timeout = DEFAULT_TIMEOUT if given["timeout"] is None else given["timeout"]
    return max(unmount(mount, timeout=timeout, force=given["force"]) for mount in found[::-1])


def _run(given: dict[str, Any]) -> int:
    from .running import run

    return run(given["before"], given["command"])


_RUN: dict[str, Callable[[dict[str, Any]], int]] = {"list": _list, "status": _status, "umount": _umount, "run": _run}


def _not_mounted(verb: str, target: str) -> int:
    text = f"{target}: not mounted by qcowfuse (qcowfuse list shows what is)"
    if os.path.isfile(verb) and os.path.exists(target):
        text += f"; to mount the image: qcowfuse ./{verb} {target}"
    return _fail(verb, ExitCode.MOUNT, text)


def _fail(verb: str, code: ExitCode, text: str) -> int:
    assert verb in VERBS
    print_error(f"qcowfuse {verb}: {text}")
    return code
