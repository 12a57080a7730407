"""The process outside of the mount: what it is asked, and answers. See :mod:`.outside` for why there is one.

1. It is started before anything is imported that serves: it needs none of that, and lives as long as the mount. So it
   takes half of the daemon's memory, more than half of it shared.
2. It keeps rights that the daemon gives up, so it trusts the daemon with little: a request is the name of one of the
   few methods of a :class:`~qcowfuse.daemon.mount_client.MountClient`, with numbers. Which mount that is about is
   settled before the daemon looks at an image.
3. Each call runs in a child of the process: one that hangs is in nobody's way. Only ``adopt``, which never waits and
   which the process has to remember, is called in the process itself.
4. Signals that stop the daemon mean nothing here: the daemon ends it, by closing the socket.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import suppress
from typing import Any, Generic, NoReturn, TypeVar

from ..system import privileges
from .mount_client import MountClient
from .process import collect_own_garbage

MAX_MESSAGE = 1 << 17
"""Bytes of a request or an answer."""
LEAVE_SESSION = "leave the session"
"""The request that is no call."""
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)
_KEPT_CAPABILITIES = (
    privileges.CAP_SYS_ADMIN,  # to unmount, and to reach the mount without making it busy
    privileges.CAP_SYS_PTRACE,  # to say who uses it
    privileges.CAP_DAC_OVERRIDE,  # to tell the size of a file that belongs to another user
    privileges.CAP_DAC_READ_SEARCH,
)

C = TypeVar("C", bound=MountClient)


class OutsideProcess(Generic[C]):
    """Started when it is made. ``socket`` is the daemon's end; once it is closed the process ends."""

    def __init__(self, client: C) -> None:
        self.client = client
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            _serve(theirs.detach(), client)
        theirs.close()


def _serve(fd: int, client: MountClient) -> NoReturn:
    """The process: a child for each request, until the other end is closed."""
    code = 1
    try:
        collect_own_garbage()
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        requests = socket.socket(fileno=_close_all_but(fd))
        if os.geteuid() == 0:  # other users unmount by a program that has a set-user-ID bit
            with suppress(OSError):
                privileges.forbid_new_privileges()
                privileges.keep_capabilities(*_KEPT_CAPABILITIES)
        while request := requests.recv(MAX_MESSAGE):
            call = parse_request(request, client.VERBS)
            if call is None:
                continue
            _, name, _ = call
            if name == LEAVE_SESSION:
                os.setsid()
                os.chdir("/")
            elif name == MountClient.adopt.__name__:
                answer(requests, client, *call)
            elif os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # for the children of subprocess
                try:
                    answer(requests, client, *call)
                finally:
                    os._exit(0)
        code = 0
    finally:  # also where the daemon left an answer unread, which resets the connection
        try:
            client.finish()
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


def parse_request(request: bytes, verbs: frozenset[str]) -> tuple[int, str, list[int]] | None:
    """A request, as number, name and arguments; None for what is none (rule 2)."""
    try:
        number, name, args = json.loads(request)
        is_call = name in verbs or name == LEAVE_SESSION
        if isinstance(number, int) and is_call and all(isinstance(value, int) for value in args):
            return number, name, list(args)
    except (ValueError, TypeError, RecursionError):
        pass
    return None


def answer(requests: socket.socket, client: MountClient, number: int, name: str, args: list[int]) -> None:
    """Call and send what comes of it: the number, what was raised, the result."""
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
