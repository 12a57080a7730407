"""The program: from arguments to a mount that serves, and an exit code with at most one line.

With the debug option, tracebacks too.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import sdnotify
import trio

from ..driver.chain import open_image
from ..errors import ImageUsageError, QcowFuseError
from ..export.mount import Notices, serve
from ..export.outside import Outside
from ..export.process import Starter, leave_session, run_as_daemon
from . import logs
from .arguments import Arguments, parse_arguments
from .exit_codes import ExitCode, exit_code_of
from .passphrase import KeySource

_log = logging.getLogger("qcowfuse")


def main(argv: Sequence[str] | None = None) -> int:
    """Run with ``argv`` (without the program's name; by default the process's own); returns the exit code."""
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else ExitCode.USAGE
    logs.log_to_stderr(debug=arguments.debug)
    key = KeySource(arguments.key_file, os.environ)
    try:
        key.prepare(arguments.image, arguments.open_options)
        if arguments.foreground:
            return _run(arguments, key, None)
        return run_as_daemon(functools.partial(_run, arguments, key))
    except ImageUsageError as exc:
        print(f"qcowfuse: {_describe(exc, arguments)}", file=sys.stderr)
        return exit_code_of(exc)
    except KeyboardInterrupt:
        return 128 + 2
    finally:
        key.wipe()


def _run(arguments: Arguments, key: KeySource, starter: Starter | None) -> int:
    notifier = sdnotify.SystemdNotifier()
    is_ready = False

    def on_ready(description: str) -> None:
        nonlocal is_ready
        is_ready = True
        if starter is not None:
            leave_session()
            outside.leave_session()
            if arguments.log_file is None:
                logs.log_to_syslog()
            starter.report(ExitCode.OK)
        notifier.notify(f"READY=1\nSTATUS={_printable(description)}")

    def on_stopping(text: str) -> None:
        notifier.notify(f"STOPPING=1\nSTATUS={_printable(text)}")

    try:
        if arguments.log_file is not None:
            logs.log_to_file(arguments.log_file)
        opener = functools.partial(open_image, arguments.image, replace(arguments.open_options, passphrase=key))
        with Outside() as outside:
            trio.run(serve, opener, arguments.mount, outside, Notices(on_ready, on_stopping))
    except BaseException as exc:
        code, line = exit_code_of(exc), _describe(exc, arguments)
        if is_ready or arguments.log_file is not None:
            _log.error("%s", line, exc_info=arguments.debug or code is ExitCode.UNEXPECTED)
        elif arguments.debug:
            _log.debug("traceback of the failure", exc_info=True)
        if is_ready:
            return code
        if starter is not None:
            starter.report(code, f"qcowfuse: {line}")
        else:
            print(f"qcowfuse: {line}", file=sys.stderr)
        return code
    return ExitCode.OK


def _describe(exc: BaseException, arguments: Arguments) -> str:
    """One line for a person."""
    if isinstance(exc, OSError):
        path = arguments.image if exc.filename is None else os.fsdecode(exc.filename)
        text = f"{path}: {exc.strerror or exc}"
        if exc.errno == errno.EROFS and not arguments.open_options.read_only:
            text += " (-r serves the image read-only)"
    elif isinstance(exc, QcowFuseError):
        text = str(exc)
        if arguments.image not in text and not text.startswith(arguments.mount.mount_point):
            text = f"{arguments.image}: {text}"
    else:
        text = f"unexpected failure, please report it: {type(exc).__name__}: {exc} (--debug shows more)"
    return _printable(" ".join(text.split("\n")))


def _printable(text: str) -> str:
    """Without control characters: file names may hold anything."""
    return "".join(c if c.isprintable() or 0xDC80 <= ord(c) <= 0xDCFF else "?" for c in text)
