"""What qcowfuse has mounted, and who serves it: from the kernel's table, and from what daemons say of themselves.

1. Nothing here asks a mount, which could be dead or hang.
2. A record counts for a mount only if its process is of the user whose mount it is. Of a mount of root's the daemon
   may have become another user (``--user``); there the kernel's word on the connection has to do.
3. A daemon without a mount in this namespace is listed too: it holds an image.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from ...daemon.mountpoint import FILE_SYSTEM_TYPE
from ...daemon.record import FoundRecord, Record, State, find_records, read_record, user_of
from ...system.mountinfo import MountEntry, mount_table


class Mount(NamedTuple):
    """A mount, or a daemon that has none here (``is_here`` False; ``point`` is where it was, or is elsewhere).

    ``uid`` and ``gid`` are those of the user who mounted. ``found``: what its daemon says, if that can be seen.
    """

    point: str
    image: str
    device: int
    uid: int
    gid: int
    read_only: bool
    is_here: bool
    found: FoundRecord | None

    @property
    def is_elsewhere(self) -> bool:
        """Whether the daemon's own mount namespace, which is not this one, has the mount."""
        if self.is_here or self.found is None:
            return False
        with suppress(OSError):
            return any(entry.device == self.device for entry in mount_table(str(self.found.pid)))
        return False


def find_mounts() -> list[Mount]:
    """All that this process can see: mounts in the kernel's order, then daemons without one."""
    by_device: dict[int, list[FoundRecord]] = {}
    for found in find_records():
        by_device.setdefault(found.record.device, []).append(found)
    mounts = []
    for entry in mount_table():
        if entry.file_system == FILE_SYSTEM_TYPE:
            uid, gid = _owner_of(entry)
            servers = [found for found in by_device.get(entry.device, ()) if uid in (0, found.uid)]
            mounts.append(
                Mount(
                    point=entry.path,
                    image=servers[0].record.image if servers else entry.source,
                    device=entry.device,
                    uid=uid,
                    gid=gid,
                    read_only="ro" in entry.options,
                    is_here=True,
                    found=servers[0] if servers else None,
                )
            )
    here = {mount.device for mount in mounts}
    for device, servers in by_device.items():
        if device not in here:
            record, uid = servers[0].record, servers[0].uid
            mounts.append(
                Mount(record.mount_point, record.image, device, uid, uid, False, is_here=False, found=servers[0])
            )
    return mounts


def matching(target: str, mounts: Iterable[Mount]) -> list[Mount]:
    """Those of ``mounts`` that ``target`` names: by mount point or file the newest one, by image all.

    A mount point is compared as a text first: it is not to be asked, where that can be avoided.
    """
    mounts = list(mounts)
    for path in _paths_of(target):
        here = [mount for mount in mounts if mount.is_here and _is_place(mount, path)]
        if here:
            return here[-1:]
        of_image = [mount for mount in mounts if _is_image(mount, path)]
        if of_image:
            return of_image
    return []


def _paths_of(target: str) -> Iterator[str]:
    path = os.path.abspath(target)
    yield path
    folder, name = os.path.split(path)
    yield os.path.join(os.path.realpath(folder), name)
    yield os.path.realpath(path)


def _is_place(mount: Mount, path: str) -> bool:
    return path == mount.point or (mount.found is not None and path == mount.found.record.file)


def _is_image(mount: Mount, path: str) -> bool:
    return path in (mount.image, os.path.realpath(mount.image))


def _owner_of(entry: MountEntry) -> tuple[int, int]:
    """The user and group of a FUSE mount, by the kernel's word."""
    said = dict(option.partition("=")[::2] for option in entry.options)
    return int(said.get("user_id", -1)), int(said.get("group_id", -1))


def server_of(mount: Mount, said_pid: int | None) -> Server | None:
    """The daemon of a mount, by its record, else as the process that the mount names. None where there is none that
    can be seen to be it: a process gets a signal only if the kernel says that it is of the mount's user."""
    with suppress(OSError, ValueError):
        if mount.found is not None:
            return Server(mount.found.pid, mount.found.path, mount.device)
        if said_pid is not None and user_of(said_pid) == mount.uid:
            return Server(said_pid, None, mount.device)
    return None


class Server:
    """A daemon that is watched: its end, and its last words. A context manager."""

    def __init__(self, pid: int, record_path: str | None, device: int) -> None:
        """``record_path`` None: there is no record that could be read. Raises OSError where it is gone by now."""
        self.pid = pid
        self._process = os.pidfd_open(pid)
        self._record = -1
        try:
            if record_path is not None:
                # After the process is held: what is read now is of that process.
                self._record = os.open(record_path, os.O_RDONLY | os.O_CLOEXEC)
                record = self.record
                if record is None or record.device != device:
                    raise ProcessLookupError
        except BaseException:
            self.close()
            raise

    @property
    def record(self) -> Record | None:
        """What it says, or has said last."""
        return None if self._record < 0 else read_record(self._record)

    @property
    def state(self) -> State | None:
        """The state in that."""
        record = self.record
        return None if record is None else record.state

    def has_ended(self, timeout: float = 0) -> bool:
        """Whether it has ended; wait for that up to ``timeout`` seconds."""
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        return bool(poll.poll(max(timeout, 0) * 1000))

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it is there to get it. Raises PermissionError."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, number)

    def close(self) -> None:
        """Let go of it."""
        for descriptor in (self._process, self._record):
            if descriptor >= 0:
                os.close(descriptor)
        self._process = self._record = -1

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def waits(seconds: float, step: float = 0.1) -> Iterator[float]:
    """What is left of ``seconds``, at once and after each ``step``; the last one is 0 or less."""
    end = time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        yield left
        if left <= 0:
            return
        time.sleep(min(step, left))
