"""The process around a mount: daemon, report to the starter, standard streams, and what the kernel is told of it.

1. The process forks before it has threads or an event loop. The child mounts and serves while it is still in the
   session and process group of its starter (automount identifies its helper by that), and leaves them only then.
2. The starter waits for the child's report, or for its death, and takes its exit code from it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from .settings import User

_PR_SET_IO_FLUSHER = 57
_UNEXPECTED = 1

_log = logging.getLogger(__name__)


class Starter:
    """The child's line to the process that started it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def report(self, exit_code: int, line: str = "") -> None:
        """Let the starter print ``line`` to standard error, unless empty, and exit. Only the first call counts."""
        if self._fd < 0:
            return
        with suppress(OSError):
            os.write(self._fd, f"{exit_code} {line}".encode("utf-8", "surrogateescape"))
        os.close(self._fd)
        self._fd = -1


def run_as_daemon(child: Callable[[Starter], int]) -> int:
    """Fork; run ``child`` in the new process, which exits with what it returns; wait for its report here."""
    sys.stdout.flush()
    sys.stderr.flush()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        code = _UNEXPECTED
        try:
            code = child(Starter(write_end))
        finally:
            logging.shutdown()
            os._exit(code)
    os.close(write_end)
    with _stop_signals_forwarded_to(pid):
        report = _read_all(read_end)
        os.close(read_end)
        if report:
            number, _, line = report.decode("utf-8", "surrogateescape").partition(" ")
            if line:
                _print_line(line)
            return int(number)
        return _died_silently(pid)


def _print_line(line: str) -> None:
    sys.stderr.flush()
    os.write(2, f"{line}\n".encode("utf-8", "surrogateescape"))


def _died_silently(pid: int) -> int:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with code {status}"
    _print_line(f"qcowfuse: the daemon was {how} before it served" if status < 0 else f"qcowfuse: the daemon {how}")
    return _UNEXPECTED


def _read_all(fd: int) -> bytes:
    data = b""
    while part := os.read(fd, 4096):
        data += part
    return data


@contextmanager
def _stop_signals_forwarded_to(pid: int) -> Iterator[None]:
    """While the starter waits, SIGTERM and SIGINT end the child, which reports that."""

    def forward(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    with stop_signals_handled(forward):
        yield


@contextmanager
def stop_signals_handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGTERM and SIGINT go to ``handler`` inside of the block, and where they went before after it."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def leave_session() -> None:
    """A session of its own, ``/`` as directory, and /dev/null for the standard streams."""
    with suppress(PermissionError):  # the leader of a process group can't, and needn't
        os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)


def become_user(user: User) -> None:
    """Be another user from now on, in every thread. Raises OSError; only root may."""
    os.setgroups(user.groups)
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)


def become_io_flusher() -> None:
    """Tell the kernel that this process serves block I/O, so that getting memory never waits for that very I/O."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        _log.debug("PR_SET_IO_FLUSHER: %s", os.strerror(ctypes.get_errno()))


@contextmanager
def captured_stderr() -> Iterator[Callable[[], str]]:
    """Catch what C code and child processes print to standard error; what is yielded gives the text so far."""
    sys.stderr.flush()
    saved = os.dup(2)
    catcher = os.memfd_create("qcowfuse-stderr", os.MFD_CLOEXEC)

    def text() -> str:
        return os.pread(catcher, 1 << 16, 0).decode("utf-8", "replace")

    os.dup2(catcher, 2)
    try:
        yield text
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        os.close(catcher)
