"""The process around a mount: daemon, report to the starter, standard streams, and what the kernel is told of it.

1. The process forks before it has threads or an event loop. The child mounts and serves while it is still in the
   session and process group of its starter (automount identifies its helper by that), and leaves them only then.
2. The starter waits for the child's report, or for its death, and takes its exit code from it.
3. A stop signal never meets a process that is not ready for it. It is held back from before the fork until, in the
   starter, it is passed on, and in the child the event loop hears of it. So none leaves a mount behind of which the
   starter knows nothing, and none shows a traceback.
4. A starter that stays for as long as the child serves is followed: when it dies, however, the kernel closes its end
   of a pipe, and the child stops. Its log stays on standard error.
5. The child keeps no descriptor that its starter had from others: a reader of a pipe would wait for its end as long
   as the daemon lives.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ..printable import flush_output
from .settings import User

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})
_PR_SET_IO_FLUSHER = 57
_UNEXPECTED = 1

_log = logging.getLogger(__name__)


class Starter:
    """The child's line to the process that started it. ``kept``: inherited descriptors that a start may need.

    ``lifeline``: a descriptor that is at its end when the starter is gone; None where the starter does not stay.
    """

    def __init__(self, fd: int, kept: frozenset[int] = frozenset(), lifeline: int | None = None) -> None:
        self._fd = fd
        self._kept = kept
        self.lifeline = lifeline

    def report(self, exit_code: int, line: str = "") -> None:
        """Let the starter print ``line`` to standard error, unless empty, and exit. Only the first call counts."""
        if self._fd < 0:
            return
        with suppress(OSError):
            os.write(self._fd, f"{exit_code} {line}".encode("utf-8", "surrogateescape"))
        os.close(self._fd)
        self._fd = -1
        for fd in self._kept:
            os.close(fd)


def run_as_daemon(
    child: Callable[[Starter], int], needed: frozenset[int] = frozenset(), kept: frozenset[int] = frozenset()
) -> int:
    """:func:`start_daemon`, where the starter does not stay; gives the exit code."""
    return start_daemon(child, needed, kept)[0]


def start_daemon(
    child: Callable[[Starter], int],
    needed: frozenset[int] = frozenset(),
    kept: frozenset[int] = frozenset(),
    *,
    stays: bool = False,
) -> tuple[int, int, int]:
    """Fork; run ``child`` in the new process, which exits with what it returns; wait for its report here.

    Gives the exit code (0: it serves), the child's process, and with ``stays`` a descriptor that is to be open for as
    long as it shall serve, else -1. Of the descriptors above standard error the child has ``needed``, which it closes
    itself, and ``kept``, which are closed when it has reported. Stop signals are held back from the child; here they
    are passed on to it, still so after this function has returned.
    """
    flush_output()
    read_end, write_end = os.pipe()
    lifeline, held = os.pipe() if stays else (None, -1)
    with stop_signals_held_back():
        pid = os.fork()
        if pid == 0:
            code = _UNEXPECTED
            try:
                own = needed | {write_end} | ({lifeline} if lifeline is not None else set())
                code = child(Starter(write_end, _close_inherited(own, kept), lifeline))
            except OSError as exc:  # not of the child, which reports its own
                Starter(write_end).report(code, f"qcowfuse: {exc.filename}: {exc.strerror}")
            finally:
                logging.shutdown()
                os._exit(code)
        os.close(write_end)
        if lifeline is not None:
            os.close(lifeline)
        _forward_stop_signals(pid)
        with stop_signals_let_through():
            report = _read_all(read_end)
    os.close(read_end)
    if report:
        number, _, line = report.decode("utf-8", "surrogateescape").partition(" ")
        if line:
            _print_line(line)
        return int(number), pid, held
    return _died_silently(pid), pid, held


def _close_inherited(needed: frozenset[int], kept: frozenset[int]) -> frozenset[int]:
    """Close all above standard error but ``needed`` and ``kept``; gives those of ``kept`` that there are."""
    found = frozenset(int(number) for number in os.listdir("/proc/self/fd")) - {0, 1, 2} - needed
    for fd in found - kept:
        with suppress(OSError):  # the one that listdir had open
            os.close(fd)
    return found & kept


def _print_line(line: str) -> None:
    flush_output()
    with suppress(OSError):  # where it can't be written, the exit code has to do
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


def _forward_stop_signals(pid: int) -> None:
    def forward(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in STOP_SIGNALS:
        signal.signal(number, forward)


@contextmanager
def stop_signals_held_back() -> Iterator[None]:
    """Inside of the block, and in processes forked there, SIGTERM and SIGINT wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def stop_signals_let_through() -> Iterator[None]:
    """Inside of the block SIGTERM and SIGINT come through, those that waited first."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_session(*, keeps_stderr: bool = False) -> None:
    """A session of its own, ``/`` as directory, and /dev/null for the standard streams, or for all but the last."""
    with suppress(PermissionError):  # the leader of a process group can't, and needn't
        os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(2 if keeps_stderr else 3):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)


def collect_own_garbage() -> None:
    """Collect garbage from now on, but none of what is there: that stays, and its memory is shared with processes
    that were forked, until it is written to."""
    gc.freeze()
    gc.enable()


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
    flush_output()
    saved = os.dup(2)
    catcher = os.memfd_create("qcowfuse-stderr", os.MFD_CLOEXEC)

    def text() -> str:
        return os.pread(catcher, 1 << 16, 0).decode("utf-8", "replace")

    os.dup2(catcher, 2)
    try:
        yield text
    finally:
        flush_output()
        os.dup2(saved, 2)
        os.close(saved)
        os.close(catcher)
