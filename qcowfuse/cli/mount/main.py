"""The program: from arguments to a mount that serves, and an exit code with at most one line.

With the debug option, tracebacks too.

1. What serves (trio, pyfuse3, the driver: half of the time that a start takes) is imported by the process that is
   going to serve, after the fork. The one that waits for it stays small, and is gone the moment that it may go.
   So does the process outside of the mount, which stays: it is forked before these imports.
2. A stop signal in that time is a failure to start like any other: it waits until there is an event loop to hear it.
3. Before the fork there is nothing that would have to be undone: a stop signal just ends the program.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...daemon.process import Starter, collect_own_garbage, run_as_daemon, stop_signals_held_back
from ...errors import ImageUsageError
from ...printable import flush_output, print_error
from .. import logs
from ..exit_codes import ExitCode, exit_code_of
from ..failures import is_interrupt
from ..passphrase import KeySource
from ..trimmed_trio import import_pyfuse3
from .arguments import Arguments, parse_arguments
from .failures import describe

if TYPE_CHECKING:
    from ...daemon.metrics_process import MetricsProcess
    from ...daemon.mount_client import MountClient
    from ...daemon.mountpoint import MountPoint
    from ...daemon.outside_process import OutsideProcess
    from ...daemon.settings import MountSettings

_log = logging.getLogger("qcowfuse")


def main(argv: Sequence[str] | None = None) -> int:
    """Run with ``argv`` (without the program's name; by default the process's own); returns the exit code."""
    logs.log_to_stderr(debug=False)  # parsing reads a file, and may have to warn
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else ExitCode.USAGE
    logs.log_to_stderr(debug=arguments.debug)
    key = KeySource(arguments.key_file, os.environ)
    try:
        for image, options in arguments.images_with_keys:
            key.prepare(image, options)
        if arguments.foreground:
            with stop_signals_held_back():
                return run(arguments, key, None)
        code = run_as_daemon(functools.partial(run, arguments, key), key.descriptors, arguments.descriptors)
    except ImageUsageError as exc:
        print_error(f"qcowfuse: {describe(exc, arguments)}")
        return exit_code_of(exc)
    except BaseException as exc:
        if is_interrupt(exc):
            return 128 + 2
        raise
    finally:
        key.close()
    # The interpreter's own way out takes a few milliseconds, and the shell waits for them.
    flush_output()
    os._exit(code)


def run(arguments: Arguments, key: KeySource, starter: Starter | None) -> int:
    """Serve to the end; gives the exit code, after at most one line to ``starter``, standard error or the log."""
    is_ready = has_log_file = False

    def on_ready() -> None:
        nonlocal is_ready
        is_ready = True

    gc.disable()  # as the entry does, for those that come from elsewhere
    try:
        if arguments.log_file is not None:
            logs.log_to_file(arguments.log_file)
            has_log_file = True
        settings = arguments.mount_settings()
        if starter is not None and starter.lifeline is not None:
            settings = settings._replace(lifeline=starter.lifeline, removes_mount_point=True)
        place, process = _start_outside(settings)
        metrics = _start_metrics(arguments) if arguments.has_metrics else None
        import_pyfuse3()
        from .serving import serve_image

        collect_own_garbage()
        with key.explained():
            serve_image(
                arguments, key, starter, on_ready, settings=settings, place=place, process=process, metrics=metrics
            )
    except BaseException as exc:
        code, line = exit_code_of(exc), describe(exc, arguments, has_served=is_ready)
        if is_ready or has_log_file:
            _log.error("%s", line, exc_info=arguments.debug or code is ExitCode.UNEXPECTED)
        elif arguments.debug:
            _log.debug("traceback of the failure", exc_info=True)
        if is_ready:
            return code
        if starter is not None:
            starter.report(code, f"qcowfuse: {line}")
        else:
            print_error(f"qcowfuse: {line}")
        return code
    finally:
        gc.enable()
    return ExitCode.OK


def _start_outside(settings: MountSettings) -> tuple[MountPoint, OutsideProcess[MountClient]]:
    """Look at the mount point, and have the process that asks the mount, before anything is imported that serves.
    Raises MountError."""
    from ...daemon.mount_client import MountClient
    from ...daemon.mountpoint import check_fuse, open_mount_point
    from ...daemon.outside_process import OutsideProcess

    check_fuse()
    place = open_mount_point(settings.mount_point, allow_non_empty=settings.allow_non_empty)
    return place, OutsideProcess(MountClient(place, settings.file_name, removes_place=settings.removes_mount_point))


def _start_metrics(arguments: Arguments) -> MetricsProcess:
    """The process that answers Prometheus, with a socket that is open already. Raises OSError, MountError."""
    from ...daemon.metrics_process import MetricsProcess
    from .listening import listen_at, passed_socket

    listener = passed_socket() if arguments.metrics is None else listen_at(*arguments.metrics)
    return MetricsProcess(listener, arguments.user)
