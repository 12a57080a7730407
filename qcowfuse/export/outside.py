"""A process of our own outside of the mount, for every call that asks the file system which this program serves.

A thread of the daemon must not make such calls. Once the kernel has handed a request out, whoever waits for the
answer cannot be killed: after a SIGKILL that thread would wait for the daemon that it belongs to, and by living on it
would keep /dev/fuse open. The connection would never end, and all who use the disk would hang with it.

1. The process is forked before there are threads, an event loop, a lock on the image or an open /dev/fuse, and holds
   one end of a socket and nothing else of the daemon's. When the daemon dies, however it dies, the kernel closes the
   connection, every call outside ends with an error, and the process ends.
2. Each call runs in a child of that process: one that hangs is in nobody's way.
3. Signals that stop the daemon mean nothing here: the daemon ends it, by closing the socket.
4. Should the process be gone, a call is made in a thread after all: a risk, but else the disk could not be given up.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import NoReturn, TypeVar

import trio

_MAX_MESSAGE = 1 << 17
_LEAVE_SESSION = b"leave the session"
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)

T = TypeVar("T")


class Outside:
    """Make it before trio runs; a context manager, whose end ends the process."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            _serve(theirs.detach())
        theirs.close()
        self._socket.setblocking(False)
        self._lock = trio.Lock()
        self._number = 0

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """``function(*args)``, called outside. Both must be picklable, and the function one of a module.

        Raises what it raises. Cancellation does not stop the call, but the answer is then dropped.
        """
        async with self._lock:
            self._number += 1
            request = pickle.dumps((self._number, function, args))
            try:
                self._socket.send(request)
                while True:
                    await trio.lowlevel.wait_readable(self._socket)
                    answer = self._socket.recv(_MAX_MESSAGE)
                    if not answer:
                        raise ConnectionError
                    number, failure, result = pickle.loads(answer)
                    if number == self._number:
                        break
            except ConnectionError:
                return await trio.to_thread.run_sync(lambda: function(*args), abandon_on_cancel=True)
        if failure is not None:
            raise failure
        return result  # type: ignore[no-any-return]

    def leave_session(self) -> None:
        """As the daemon: a session of its own. Not before the mount is made and seen to answer (automount)."""
        with suppress(OSError):
            self._socket.send(_LEAVE_SESSION)

    def __enter__(self) -> Outside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()


def _serve(fd: int) -> NoReturn:
    """The process: a child for each request, until the other end is closed."""
    code = 1
    try:
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        requests = socket.socket(fileno=_close_all_but(fd))
        while request := requests.recv(_MAX_MESSAGE):
            if request == _LEAVE_SESSION:
                os.setsid()
                os.chdir("/")
            elif os.fork() == 0:
                _answer(requests, request)
        code = 0
    finally:
        os._exit(code)


def _close_all_but(fd: int) -> int:
    """Close what was inherited, standard streams included; gives the descriptor that is left."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        if stream != fd:
            os.dup2(null, stream)
    os.closerange(3, fd)
    os.closerange(max(fd + 1, 3), os.sysconf("SC_OPEN_MAX"))
    return fd


def _answer(requests: socket.socket, request: bytes) -> NoReturn:
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # for the children of subprocess
        number, function, args = pickle.loads(request)
        answer: tuple[int, Exception | None, object]
        try:
            answer = (number, None, function(*args))
        except Exception as exc:
            answer = (number, exc, None)
        with suppress(OSError):  # the daemon is gone
            requests.send(pickle.dumps(answer))
    finally:
        os._exit(0)
