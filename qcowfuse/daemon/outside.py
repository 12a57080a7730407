"""Every call that asks the file system which this program serves, made by a process of our own outside of the mount.

A thread of the daemon must not make such calls. Once the kernel has handed a request out, the thread that
waits for the answer cannot be killed. After a SIGKILL a thread of the daemon would wait for the daemon itself, and
keep /dev/fuse open for as long as it lives. The connection would never end, and all users of the disk would hang.

1. The process is forked before there are threads, an event loop, a lock on the image or an open /dev/fuse, and holds
   one end of a socket and nothing else of the daemon's. When the daemon dies, however it dies, the kernel closes the
   connection, every call outside ends with an error, and the process ends. What it does is in
   :mod:`.outside_process`.
2. Should the process be gone, a call is made in a thread after all: a risk, but else the disk could not be given up.
   (In its sandbox the daemon can do little of it by itself.) What is not worth the risk fails
   (:attr:`MountClient.ONLY_OUTSIDE`).
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Concatenate, Generic, ParamSpec, TypeVar

import trio

from ..errors import MountError
from .mount_client import MountClient
from .mountpoint import MountBusyError
from .outside_process import LEAVE_SESSION, MAX_MESSAGE, OutsideProcess

C = TypeVar("C", bound=MountClient)
P = ParamSpec("P")
T = TypeVar("T")


class Outside(Generic[C]):
    """The calls, by way of ``process``; a context manager, whose end ends the process."""

    def __init__(self, process: OutsideProcess[C]) -> None:
        self._client = process.client
        self._socket = process.socket
        self._socket.setblocking(False)
        self._lock = trio.Lock()
        self._number = 0

    @property
    def is_busy(self) -> bool:
        """Whether a call is being made: the next one comes after it."""
        return self._lock.locked()

    async def run(self, method: Callable[Concatenate[C, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A method of the client, called outside; its arguments are numbers.

        Raises what it raises, and MountError by rule 2. Cancellation does not stop the call, but the answer is then
        dropped.
        """
        assert not kwargs
        name = method.__name__
        async with self._lock:
            self._number += 1
            try:
                self._socket.send(json.dumps([self._number, name, args]).encode())
                while True:
                    await trio.lowlevel.wait_readable(self._socket)
                    answer = self._socket.recv(MAX_MESSAGE)
                    if not answer:
                        raise ConnectionError
                    number, failure, result = json.loads(answer)
                    if number == self._number:
                        break
            except ConnectionError:
                if name in MountClient.ONLY_OUTSIDE:
                    raise MountError("the process outside of the mount is gone") from None
                call = getattr(self._client, name)
                return await trio.to_thread.run_sync(lambda: call(*args), abandon_on_cancel=True)
        if failure is not None:
            raise _exception(*failure)
        if name == MountClient.adopt.__name__:
            self._client.adopt()  # for rule 2
        return result  # type: ignore[no-any-return]

    def leave_session(self) -> None:
        """As the daemon: a session of its own. Not before the mount is made and seen to answer (automount)."""
        with suppress(OSError):
            self._socket.send(json.dumps([0, LEAVE_SESSION, []]).encode())

    def __enter__(self) -> Outside[C]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()


def _exception(kind: str, message: str, number: int | None, file_name: str | None) -> Exception:
    if kind == "OSError":
        return OSError(number or errno.EIO, message, file_name)
    if kind == MountBusyError.__name__:
        return MountBusyError(message)
    if kind == MountError.__name__:
        return MountError(message)
    return MountError(f"unexpected failure outside of the mount: {kind}: {message}")
