"""``qcowfuse run``: the disk of an image for the time of a command.

1. The process that the user started waits for the command; the daemon is its child, as is the command. While the
   command runs, signals are passed on to it, but for those that come from the terminal's keys: the terminal sends
   these to the command as well.
2. When the command has ended the daemon is told to stop: it unmounts, and closes the image. What the command has left
   that uses the disk (a process in the background, a loop device) keeps it; a signal then cuts it off, after a flush.
3. Nothing stays behind. If this process is killed, the daemon sees that and stops as soon as the command lets it; if
   the daemon is killed, the process outside of its mount removes the dead mount and the folder.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress

from ...daemon import mountpoint
from ...daemon.process import start_daemon
from ...errors import MountError
from ...printable import flush_output, print_error
from .. import logs
from ..exit_codes import ExitCode
from ..mount.arguments import Arguments, parse_arguments
from ..mount.main import run as serve
from ..passphrase import KeySource
from .mounts import waits

VARIABLE = "QCOWFUSE_DISK"
PLACEHOLDER = "{}"
_NOT_FOUND, _NOT_EXECUTABLE, _BY_SIGNAL = 127, 126, 128
_PASSED_ON = frozenset(
    (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)
)
_IGNORED_BY_PYTHON = frozenset((signal.SIGPIPE, signal.SIGXFSZ))
_CUTS_OFF = frozenset((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
_SI_KERNEL = 0x80
_TELL_SECONDS = 2.0
_SIGNAL_SECONDS = 1.0
_FOLDER_SECONDS = 5.0


def run(before: Sequence[str], command: Sequence[str]) -> int:
    """Run ``command`` with the disk that ``before`` (options and an image) gives; the exit code for the shell.

    Raises ImageUsageError, and OSError where there is no place for the folder.
    """
    logs.log_to_stderr(debug=False)
    try:
        arguments = parse_arguments(before, mount_point="/")
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else ExitCode.USAGE
    if arguments.idle_timeout is not None:
        _say("--idle-timeout has no meaning here: the disk is there for as long as the command runs")
        return ExitCode.USAGE
    logs.log_to_stderr(debug=arguments.debug)
    if not arguments.debug:
        logging.getLogger().setLevel(logging.WARNING)
    key = KeySource(arguments.key_file, os.environ)
    folder = os.path.realpath(tempfile.mkdtemp(prefix="qcowfuse-"))
    try:
        for image, options in arguments.images_with_keys:
            key.prepare(image, options)
        code = _with_mount(arguments._replace(mount_point=folder), key, command)
    finally:
        key.close()
        _remove(folder)
    flush_output()
    return code


def _with_mount(arguments: Arguments, key: KeySource, command: Sequence[str]) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = functools.partial(serve, arguments, key)
    code, daemon, lifeline = start_daemon(child, key.descriptors, arguments.descriptors, stays=True)
    try:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON | {signal.SIGCHLD})
        try:
            if code:
                return code
            return _Attendant(daemon, arguments, mask).run(command)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    finally:
        os.close(lifeline)


class _Attendant:
    """Waits for the command and the daemon, with all signals blocked; ``mask`` is what the command begins with."""

    def __init__(self, daemon: int, arguments: Arguments, mask: set[int]) -> None:
        self._daemon = daemon
        self._folder = arguments.mount_point
        self._file = os.path.join(arguments.mount_point, arguments.file_name)
        self._mask = mask
        self._ended: dict[int, int] = {}

    def run(self, command: Sequence[str]) -> int:
        """The exit code of the command, or of the daemon where only that has failed."""
        words = [word.replace(PLACEHOLDER, self._file) for word in command]
        environment = {**os.environ, VARIABLE: self._file}
        try:
            pid = os.posix_spawnp(words[0], words, environment, setsigmask=self._mask, setsigdef=_IGNORED_BY_PYTHON)
        except OSError as exc:
            _say(f"{words[0]}: {exc.strerror}")
            code = _NOT_FOUND if isinstance(exc, FileNotFoundError) else _NOT_EXECUTABLE
        else:
            code = self._attend(pid)
        ended = self._end()
        if ended > _BY_SIGNAL:
            name = signal.Signals(ended - _BY_SIGNAL).name
            _say(f"the daemon was ended by {name}: what was not synced may not be in the image")
        return code or ended

    def _attend(self, pid: int) -> int:
        """Rule 1."""
        while pid not in self._ended:
            info = signal.sigwaitinfo(_PASSED_ON | {signal.SIGCHLD})
            if info.si_signo == signal.SIGCHLD:
                self._reap()
            elif info.si_code != _SI_KERNEL:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, info.si_signo)
        return self._ended[pid]

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                code = os.waitstatus_to_exitcode(status)
                self._ended[pid] = _BY_SIGNAL - code if code < 0 else code

    def _end(self) -> int:
        """Rule 2; gives the daemon's exit code."""
        began, is_told, cuts_off, last_signal = time.monotonic(), False, False, -_SIGNAL_SECONDS
        self._reap()
        while self._daemon not in self._ended:
            waited = time.monotonic() - began
            if last_signal < 0 or (cuts_off and waited - last_signal >= _SIGNAL_SECONDS):
                os.kill(self._daemon, signal.SIGTERM)
                last_signal = waited
            if waited >= _TELL_SECONDS and not is_told:
                _say("the disk is still in use, waiting (SIGINT or SIGTERM cuts its users off, after a flush)")
                is_told = True
            info = signal.sigtimedwait(_CUTS_OFF | {signal.SIGCHLD}, 0.2)
            if info is not None and info.si_signo in _CUTS_OFF:
                cuts_off = True
                with suppress(MountError, OSError):
                    mountpoint.unmount_path(self._folder, is_lazy=True)
            self._reap()
        return self._ended[self._daemon]


def _remove(folder: str) -> None:
    """See that the folder is gone. The process outside of the mount removes it too, and a dead mount on it."""
    for _ in waits(_FOLDER_SECONDS, 0.01):
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            return
        except OSError:
            continue
        return
    with suppress(MountError, OSError):
        mountpoint.unmount_path(folder, is_lazy=True)
    with suppress(OSError):
        os.rmdir(folder)


def _say(text: str) -> None:
    print_error(f"qcowfuse run: {text}")
