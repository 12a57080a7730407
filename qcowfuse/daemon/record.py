"""What a daemon says of itself where its mount can't be asked: a text in memory, which others read below /proc.

1. It is a memfd: nothing of it stays anywhere when the daemon is gone, however that ended. Users who may
   look at the daemon's descriptors may read it: root, and the daemon's user unless the image is encrypted.
2. A reader that has it open reads on after the daemon has ended: the last state says whether the image was closed.
3. A reader distrusts it. Any process can have such a text, so it counts only where the kernel says that this process
   may be the server of that mount: see :func:`find_records`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum
from typing import NamedTuple

_NAME = "qcowfuse-record"
_LINK = f"/memfd:{_NAME} (deleted)"
_MAX_BYTES = 1 << 16
_CONNECTION = re.compile(rb"^fuse_connection:\s*(\d+)", re.MULTILINE)


class State(StrEnum):
    """What a daemon is at. ``WAITING``: it is unmounted, but others still use the disk."""

    SERVING = "serving"
    WAITING = "waiting"
    STOPPING = "stopping"
    CLOSING = "closing"
    CLOSED = "closed"
    FAILED = "failed"


class Record(NamedTuple):
    """What is said. ``device`` is the number of the mount's file system, ``since`` seconds since the epoch,
    ``detail`` a line for a person."""

    image: str
    mount_point: str
    file: str
    device: int
    since: int
    state: State = State.SERVING
    detail: str = ""


class RecordWriter:
    """The daemon's side. Writing raises nothing: a daemon goes on without."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._fd = -1
        with suppress(OSError):
            self._fd = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        self.note(record.state)

    def note(self, state: State, detail: str = "") -> None:
        """Say this from now on. The first failure stays."""
        if self._record.state is State.FAILED:
            return
        self._record = self._record._replace(state=state, detail=detail)
        if self._fd >= 0:
            with suppress(OSError):
                # What is left of a longer text comes after the newline.
                os.pwrite(self._fd, json.dumps(self._record).encode() + b"\n", 0)


class FoundRecord(NamedTuple):
    """A record, its process, and the user whose process it is. ``path`` can be opened while it lives.
    ``has_no_image``: the image has been deleted, and is gone when the process ends."""

    record: Record
    pid: int
    uid: int
    path: str
    has_no_image: bool = False


def find_records() -> Iterator[FoundRecord]:
    """The records of all daemons that this process may look at.

    Rule 3: the process has /dev/fuse open, and where the kernel says for which connection (newer ones do), it is that
    of the mount.
    """
    for pid in sorted(int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
        with suppress(OSError, ValueError):
            found = _record_of(pid)
            if found is not None:
                yield found


def read_record(descriptor: int) -> Record | None:
    """The text behind a descriptor; None where it is not one."""
    try:
        text = os.pread(descriptor, _MAX_BYTES, 0).partition(b"\n")[0]
        image, mount_point, file, device, since, state, detail = json.loads(text)
        record = Record(str(image), str(mount_point), str(file), int(device), int(since), State(state), str(detail))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return record


def _record_of(pid: int) -> FoundRecord | None:
    folder = f"/proc/{pid}/fd"
    path, connections, links = "", list[int | None](), set[str]()
    for number in os.listdir(folder):
        with suppress(OSError):
            link = os.readlink(f"{folder}/{number}")
            links.add(link)
            if link == _LINK:
                path = f"{folder}/{number}"
            elif link == "/dev/fuse":
                connections.append(_connection_of(f"/proc/{pid}/fdinfo/{number}"))
    if not path:
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        record = read_record(descriptor)
    finally:
        os.close(descriptor)
    if record is None or not {None, os.minor(record.device)} & set(connections):
        return None
    is_deleted = f"{os.path.realpath(record.image)} (deleted)" in links
    return FoundRecord(record, pid, user_of(pid), path, is_deleted)


def _connection_of(path: str) -> int | None:
    with open(path, "rb") as info:
        found = _CONNECTION.search(info.read())
    return int(found[1]) if found else None


def user_of(pid: int) -> int:
    """The real user of a process. Raises OSError, ValueError."""
    # A process chooses its name, and may put a carriage return and a line like the one looked for into it.
    with open(f"/proc/{pid}/status", errors="replace", newline="\n") as status:
        for line in status:
            if line.startswith("Uid:"):
                return int(line.split()[1])
    raise ValueError(f"process {pid} has no user")
