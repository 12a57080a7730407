"""What mounts say of themselves: attributes of the file, and counters. It is asked by processes that may hang.

1. A process that asks a mount whose daemon stands still may wait for ever, and can't be killed. So each mount is
   asked by a process of its own; one that has not answered in time is left behind, and ends with what it waits for.
2. A look goes through a clone of the mount where that can be had, so that it keeps nobody from unmounting.
3. Root may not look into another user's mount, so the process becomes that user.
4. Any user's file system may call itself one of qcowfuse: names and numbers are bounded.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from ...daemon.served_file import root_of
from .mounts import Mount

PATIENCE_SECONDS = 2.0
_PREFIX = "user.qcowfuse."
_MAX_NAMES = 1000
_MAX_ANSWER = 1 << 18
_MAX_COUNTER = 1 << 63


class Look(NamedTuple):
    """The answer: ``problem`` is empty if there was one. Sizes in bytes; ``counters`` without their prefix."""

    file: str = ""
    size: int = 0
    allocated: int = 0
    counters: dict[str, int] = {}  # noqa: RUF012
    problem: str = ""


_PROBLEMS = {
    errno.ENOTCONN: "dead",
    errno.ECONNABORTED: "dead",
    errno.EACCES: "not accessible",
    errno.EPERM: "not accessible",
    errno.ESTALE: "hidden",
}


def look_at(mounts: Sequence[Mount], patience: float = PATIENCE_SECONDS) -> list[Look]:
    """Ask all of them at the same time; those that are not in this namespace are not asked."""
    with suppress(ChildProcessError):  # those that hung at an earlier look
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    asked = [_start(mount) if mount.is_here else None for mount in mounts]
    end = time.monotonic() + patience
    return [Look() if child is None else _answer(*child, end) for child in asked]


def _start(mount: Mount) -> tuple[int, int]:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ours)
            answer = json.dumps(_ask(mount))
            with open(theirs, "w") as pipe:
                pipe.write(answer)
        finally:
            os._exit(0)
    os.close(theirs)
    return pid, ours


def _answer(pid: int, pipe: int, end: float) -> Look:
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    data, is_whole = b"", False
    with open(pipe, "rb", buffering=0) as file:
        while len(data) < _MAX_ANSWER and poll.poll(max(end - time.monotonic(), 0) * 1000):
            part = file.read(_MAX_ANSWER)
            if not part:
                is_whole = True
                break
            data += part
    if not is_whole:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0 if is_whole else os.WNOHANG)
    try:
        look = Look(*json.loads(data))
    except (ValueError, TypeError):
        look = Look(problem="no answer")
    return look


def _ask(mount: Mount) -> Look:
    try:
        return _see(mount)
    except OSError as exc:
        if exc.errno != errno.EACCES or os.geteuid() != 0 or mount.uid == 0:
            return Look(problem=_problem(exc))
    try:
        os.setgroups([])
        os.setresgid(mount.gid, mount.gid, mount.gid)
        os.setresuid(mount.uid, mount.uid, mount.uid)
        return _see(mount)
    except OSError as exc:
        return Look(problem=_problem(exc))


def _problem(exc: OSError) -> str:
    return _PROBLEMS.get(exc.errno or 0) or f"no answer: {exc.strerror}"


def _see(mount: Mount) -> Look:
    with root_of(mount.point, mount.device) as (root, _):
        if not stat.S_ISDIR(os.fstat(root).st_mode):
            return _see_file(root, mount.point)
        name = _name_in(root)
        file = os.open(name, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=root)
        try:
            return _see_file(file, os.path.join(mount.point, name))
        finally:
            os.close(file)


def _name_in(root: int) -> str:
    """The name of the disk's file: partitions beside it have longer ones."""
    folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry, _ in zip(entries, range(_MAX_NAMES), strict=False)]
    finally:
        os.close(folder)
    if not names:
        raise OSError(errno.ENOENT, "no file in it")
    return min(names, key=len)


def _see_file(file: int, path: str) -> Look:
    status = os.fstat(file)
    link = f"/proc/self/fd/{file}"
    counters: dict[str, int] = {}
    for name in os.listxattr(link)[:_MAX_NAMES]:
        if name.startswith(_PREFIX):
            with suppress(OSError, ValueError):
                value = int(os.getxattr(link, name)[:20])
                if abs(value) < _MAX_COUNTER:
                    counters[name.removeprefix(_PREFIX)] = value
    return Look(path, status.st_size, status.st_blocks * 512, counters)


def summary(mount: Mount, look: Look) -> dict[str, Any]:
    """What ``list`` says of a mount, with the names that it has in JSON; None for what is not known."""
    counters, record = look.counters, mount.found.record if mount.found else None
    known = not look.problem and mount.is_here
    return {
        "mount-point": mount.point,
        "file": look.file or (record.file if record else None),
        "image": mount.image,
        "state": state_of(mount, look),
        "read-only": mount.read_only if mount.is_here else None,
        "virtual-size": look.size if known else None,
        "actual-size": look.allocated if known else None,
        "open-files": counters.get("open_files"),
        "pid": mount.found.pid if mount.found else counters.get("pid"),
        "uid": mount.uid,
        "user": user_name(mount.uid),
        "since": record.since if record else counters.get("since"),
    }


def state_of(mount: Mount, look: Look) -> str:
    """One or two words: what a user has to know of it."""
    if not mount.is_here:
        if mount.is_elsewhere:
            return "in another mount namespace"
        return f"unmounted, {mount.found.record.state}" if mount.found else "unmounted"
    if look.problem:
        return look.problem
    flags = {"stopping": "stopping", "image.flush_failed": "a flush has failed", "image.corrupt": "marked corrupt"}
    found = [text for name, text in flags.items() if look.counters.get(name)]
    if mount.found is not None and mount.found.has_no_image:
        found.append("its image is deleted")
    return ", ".join(found) or "serving"


def user_name(uid: int) -> str:
    """The user's name, or the number where there is none."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)
