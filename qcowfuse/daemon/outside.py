"""A process of our own outside of the mount, for every call that asks the file system which this program serves.

A thread of the daemon must not make such calls. Once the kernel has handed a request out, the thread that
waits for the answer cannot be killed. After a SIGKILL a thread of the daemon would wait for the daemon itself, and
keep /dev/fuse open for as long as it lives. The connection would never end, and all users of the disk would hang.

1. The process is forked before there are threads, an event loop, a lock on the image or an open /dev/fuse, and holds
   one end of a socket and nothing else of the daemon's. When the daemon dies, however it dies, the kernel closes the
   connection, every call outside ends with an error, and the process ends.
2. It keeps rights that the daemon gives up, so it trusts the daemon with little: a request is the name of one of the
   few methods of a :class:`~qcowfuse.daemon.mount_client.MountClient`, with numbers. Which mount that is about is
   settled before the daemon looks at an image.
3. Each call runs in a child of that process: one that hangs is in nobody's way. Only ``adopt``, which never waits and
   which the process has to remember, is called in the process itself.
4. Signals that stop the daemon mean nothing here: the daemon ends it, by closing the socket.
5. Should the process be gone, a call is made in a thread after all: a risk, but else the disk could not be given up.
   (In its sandbox the daemon can do little of it by itself.)
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Concatenate, Generic, NoReturn, ParamSpec, TypeVar

import trio

from ..errors import MountError
from ..system import privileges
from .mount_client import MountClient
from .mountpoint import MountBusyError

_MAX_MESSAGE = 1 << 17
_LEAVE_SESSION = "leave the session"
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)
_KEPT_CAPABILITIES = (
    privileges.CAP_SYS_ADMIN,  # to unmount, and to reach the mount without making it busy
    privileges.CAP_SYS_PTRACE,  # to say who uses it
    privileges.CAP_DAC_OVERRIDE,  # to tell the size of a file that belongs to another user
    privileges.CAP_DAC_READ_SEARCH,
)

C = TypeVar("C", bound=MountClient)
P = ParamSpec("P")
T = TypeVar("T")


class Outside(Generic[C]):
    """Make it before trio runs; a context manager, whose end ends the process."""

    def __init__(self, client: C) -> None:
        self._client = client
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            _serve(theirs.detach(), client)
        theirs.close()
        self._socket.setblocking(False)
        self._lock = trio.Lock()
        self._number = 0

    async def run(self, method: Callable[Concatenate[C, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A method of the client, called outside; its arguments are numbers.

        Raises what it raises. Cancellation does not stop the call, but the answer is then dropped.
        """
        assert not kwargs
        name = method.__name__
        async with self._lock:
            self._number += 1
            try:
                self._socket.send(json.dumps([self._number, name, args]).encode())
                while True:
                    await trio.lowlevel.wait_readable(self._socket)
                    answer = self._socket.recv(_MAX_MESSAGE)
                    if not answer:
                        raise ConnectionError
                    number, failure, result = json.loads(answer)
                    if number == self._number:
                        break
            except ConnectionError:
                call = getattr(self._client, name)
                return await trio.to_thread.run_sync(lambda: call(*args), abandon_on_cancel=True)
        if failure is not None:
            raise _exception(*failure)
        if name == MountClient.adopt.__name__:
            self._client.adopt()  # for rule 5
        return result  # type: ignore[no-any-return]

    def leave_session(self) -> None:
        """As the daemon: a session of its own. Not before the mount is made and seen to answer (automount)."""
        with suppress(OSError):
            self._socket.send(json.dumps([0, _LEAVE_SESSION, []]).encode())

    def __enter__(self) -> Outside[C]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()


def _serve(fd: int, client: MountClient) -> NoReturn:
    """The process: a child for each request, until the other end is closed."""
    code = 1
    try:
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        requests = socket.socket(fileno=_close_all_but(fd))
        if os.geteuid() == 0:  # other users unmount by a program that has a set-user-ID bit
            with suppress(OSError):
                privileges.forbid_new_privileges()
                privileges.keep_capabilities(*_KEPT_CAPABILITIES)
        while request := requests.recv(_MAX_MESSAGE):
            call = _parse(request, client.VERBS)
            if call is None:
                continue
            _, name, _ = call
            if name == _LEAVE_SESSION:
                os.setsid()
                os.chdir("/")
            elif name == MountClient.adopt.__name__:
                _answer(requests, client, *call)
            elif os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # for the children of subprocess
                try:
                    _answer(requests, client, *call)
                finally:
                    os._exit(0)
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


def _parse(request: bytes, verbs: frozenset[str]) -> tuple[int, str, list[int]] | None:
    """A request that is one (rule 2), else None."""
    try:
        number, name, args = json.loads(request)
        is_call = name in verbs or name == _LEAVE_SESSION
        if isinstance(number, int) and is_call and all(isinstance(value, int) for value in args):
            return number, name, list(args)
    except (ValueError, TypeError, RecursionError):
        pass
    return None


def _answer(requests: socket.socket, client: MountClient, number: int, name: str, args: list[int]) -> None:
    failure: list[Any] | None = None
    result: object = None
    try:
        result = getattr(client, name)(*args)
    except OSError as exc:
        failure = [
            "OSError",
            str(exc.strerror or exc),
            exc.errno,
            exc.filename if isinstance(exc.filename, str) else None,
        ]
    except Exception as exc:
        failure = [type(exc).__name__, str(exc), None, None]
    with suppress(OSError):  # the daemon is gone
        requests.send(json.dumps([number, failure, result]).encode())


def _exception(kind: str, message: str, number: int | None, file_name: str | None) -> Exception:
    if kind == "OSError":
        return OSError(number or errno.EIO, message, file_name)
    if kind == MountBusyError.__name__:
        return MountBusyError(message)
    if kind == MountError.__name__:
        return MountError(message)
    return MountError(f"unexpected failure outside of the mount: {kind}: {message}")
