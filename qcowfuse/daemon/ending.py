"""How a service comes to its end: told to stop, unmounted by hand, or cut off from the processes that still use it.

1. A stop signal unmounts. While the mount is in use that fails, and nothing is taken away: what the kernel holds back
   is written and flushed, the log says who uses the file, and each second it is tried again. If the daemon is killed
   meanwhile, all but the last second or so of what had reached the served file is durable.
2. An unmount leaves the file system alive for as long as another mount namespace (a container, ``unshare -m``) has
   it, or somebody holds the file open after ``umount -l``. The image stays open as long, so the log and the status
   say who that is.
3. Only then can a stop signal cut them off, and only one that comes after a first one and after the log has said what
   another one does. Before that, what the kernel holds back is written and flushed. They see ENOTCONN.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import trio

from ..errors import MountError
from .mount_client import MountClient
from .mountpoint import MountBusyError
from .outside import Outside
from .session import MountSession

_BUSY_RETRY_SECONDS = 1.0
_BUSY_LOG_SECONDS = 60.0
_LAST_SYNC_SECONDS = 60.0

_log = logging.getLogger(__name__)


def _no_notice(_: str) -> None:
    return None


class Notices(NamedTuple):
    """What the surroundings want to hear, some with a line for a person. They are called in the trio thread.

    ``served``: the mount answers, and the daemon can still do what it likes. ``ready``: it has settled as well.
    ``waiting``: for users that nobody has told to go; said again each minute.
    """

    served: Callable[[], None] = lambda: None
    ready: Callable[[str], None] = _no_notice
    waiting: Callable[[str], None] = _no_notice
    stopping: Callable[[str], None] = _no_notice


class Stop:
    """What the signals have asked for."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.n_requests = 0
        self.wake = trio.Event()
        self.early = trio.CancelScope()

    def request(self, reason: str) -> None:
        """A signal with the name ``reason`` has come."""
        self.reason = reason
        self.n_requests += 1
        self.wake.set()
        self.early.cancel()

    def nudge(self) -> None:
        """Have another look at once, if a stop is under way."""
        if self.reason is not None:
            self.wake.set()


class Ending:
    """Waits for the end of a mount that serves, and brings it about when it is told to."""

    def __init__(self, mount: MountSession, outside: Outside[MountClient], notices: Notices, stop: Stop) -> None:
        self._mount = mount
        self._outside = outside
        self._notices = notices
        self._stop = stop

    async def run(self) -> None:
        """Return when the processes that still use the mount shall be cut off; cancelled when the kernel ends the
        connection."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_who_is_left)
            await self._stop_when_told()
            nursery.cancel_scope.cancel()

    async def _tell_who_is_left(self) -> None:
        mount = self._mount
        await mount.until_unmounted()
        if mount.n_open == 0:
            # Before the unmount returns, if possible: a start of the service right behind it must find it
            # on its way out.
            self._notices.stopping("unmounted, closing the image")
        await trio.sleep(_BUSY_RETRY_SECONDS)  # cancelled, where nobody is
        told = ""
        while self._stop.reason is None:
            users = await mount.users()
            if users != told:
                _log.warning(
                    "%s: unmounted, but still in use by %s; the image stays open until they are gone "
                    "(SIGTERM to pid %d, twice, cuts them off)",
                    *(mount.path, users, os.getpid()),
                )
                told = users
            self._notices.waiting(f"unmounted, but still in use by {users}")
            await trio.sleep(_BUSY_LOG_SECONDS)

    async def _stop_when_told(self) -> None:
        mount, stop = self._mount, self._stop
        await stop.wake.wait()
        mount.is_stopping = True
        self._notices.stopping(f"stopping ({stop.reason})")
        _log.info("%s: stopping (%s)", mount.path, stop.reason)
        last_notice, noticed = -math.inf, ""
        n_when_told: int | None = None
        while True:
            stop.wake = trio.Event()
            users = await self._unmount()
            await mount.sync()
            now = trio.current_time()
            is_left_over = not mount.is_mounted()
            if is_left_over and n_when_told is None:
                n_when_told, last_notice = stop.n_requests, -math.inf
            if users != noticed or now - last_notice >= _BUSY_LOG_SECONDS:
                way_out = "another SIGTERM cuts them off" if is_left_over else "it ends when it is free"
                _log.warning("%s: still in use by %s; %s", mount.path, users, way_out)
                self._notices.stopping(f"stopping, still in use by {users}")
                last_notice, noticed = now, users
            with trio.move_on_after(_BUSY_RETRY_SECONDS):
                await stop.wake.wait()
            if n_when_told is not None and stop.n_requests > n_when_told and not mount.is_mounted():
                break
        with trio.move_on_after(_LAST_SYNC_SECONDS):
            await mount.sync_by_any_means()
        _log.warning("%s: cut off (%s), though in use by %s", mount.path, stop.reason, users)

    async def _unmount(self) -> str:
        """Try it, and say which users stand in the way; cancelled, where none does."""
        try:
            await self._outside.run(MountClient.unmount)
            await trio.sleep(_BUSY_RETRY_SECONDS)
        except MountBusyError:
            pass
        except MountError as exc:
            return str(exc)
        return await self._mount.users()
