"""Image locks that QEMU understands: open-file-description locks on single bytes far inside the file.

1. One byte per permission, always a read lock: byte 100 + p says "I use p", byte 200 + p "I don't share p".
   Taken first, then tested: an opener that finds, as if for a write lock, an opposing byte of another holder, gives
   up. All locks being read locks, one's own never stand in the way.
2. The sets are those of QEMU 10 for the file below a qcow2 image: a writer uses consistent reads (0), writes
   (1) and resizes (3), a reader consistent reads only; neither shares writes and resizes. So readers go
   together, a writer goes with nobody, and a reader under ``--force-share``, which only uses 0, goes with all.
   A raw backing file, where QEMU shares everything, is locked like the others: its writer would spoil the image.
3. They belong to the open file description: a fork keeps them, closing the last descriptor drops them.
4. Where the file system has no locks, the log warns, and the image is opened all the same. Where the user wants no
   locks, none is asked for: a lock manager that is dead would not answer.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from ..errors import ImageLockedError
from ..system.late_logging import LateLogger

_log = LateLogger(__name__)

_USES_BASE = 100
_UNSHARED_BASE = 200
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3
_UNSHARED = (_WRITE, _RESIZE)

POLL_INTERVAL = 0.05
"""Seconds between two attempts of :func:`wait_image_lock`."""

QUIET_SECONDS = 1.0
"""A daemon that is just closing the image takes less as a rule."""

FLOCK = struct.Struct("@hhqqi4x")
_HELD_BY_OTHER = frozenset({errno.EAGAIN, errno.EACCES})
_NO_LOCKS_HERE = frozenset({errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})


def _set_lock(fd: int, kind: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _is_held_by_other(fd: int, byte: int) -> bool:
    """Whether another open file description has any lock on ``byte``."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    kind: int = FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def _uses(writable: bool) -> tuple[int, ...]:
    return (_CONSISTENT_READ, _WRITE, _RESIZE) if writable else (_CONSISTENT_READ,)


def acquire_image_lock(fd: int, path: str, *, writable: bool) -> None:
    """Lock an open image: to write it, or to read it (a read-only image, a backing file).

    Raises ImageLockedError, with all locks given back, when another opener stands in the way; the message names it
    and what to do. Other errors of fcntl are OSError. Closing ``fd`` releases.
    """
    uses = _uses(writable)
    bytes_held = [_USES_BASE + p for p in uses] + [_UNSHARED_BASE + p for p in _UNSHARED]
    opposing = [_UNSHARED_BASE + p for p in uses] + [_USES_BASE + p for p in _UNSHARED]
    n_taken = 0
    conflict: int | None = None
    try:
        for byte in bytes_held:
            conflict = byte
            _set_lock(fd, fcntl.F_RDLCK, byte)
            n_taken += 1
        conflict = next((byte for byte in opposing if _is_held_by_other(fd, byte)), None)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            _log.warning("%s: the file system has no locks (%s): nothing keeps others out", path, error.strerror)
            return
        if error.errno not in _HELD_BY_OTHER:
            raise OSError(error.errno, f"cannot lock: {error.strerror}", path) from error
    if conflict is None:
        return
    try:
        detail = _describe(fd, conflict, writable)
    finally:
        for byte in bytes_held[:n_taken]:
            _set_lock(fd, fcntl.F_UNLCK, byte)
    raise ImageLockedError(path, detail)


async def wait_image_lock(fd: int, path: str, *, writable: bool, timeout: float) -> None:
    """:func:`acquire_image_lock`, tried again for ``timeout`` seconds (0: once), of which the log tells when it takes
    long. Raises what that raises."""
    if timeout <= 0:
        acquire_image_lock(fd, path, writable=writable)
        return
    import random

    import trio

    start = trio.current_time()
    is_told = False
    while True:
        try:
            acquire_image_lock(fd, path, writable=writable)
        except ImageLockedError as error:
            waited = trio.current_time() - start
            remaining = timeout - waited
            if remaining <= 0:
                raise
            if waited >= QUIET_SECONDS and not is_told:
                _log.warning("%s (waiting for it, %g seconds at most)", error, timeout)
                is_told = True
        else:
            return
        # Two that try at the same moment both see the other and both give up: don't come back in step.
        await trio.sleep(min(remaining, POLL_INTERVAL * random.uniform(0.7, 1.3)))


def warn_of_no_lock(path: str, *, writable: bool) -> None:
    """Say that a file was opened without looking at its locks."""
    danger = "a second writer destroys it" if writable else "a writer may change it meanwhile"
    _log.warning("%s: opened without a look at its locks: %s", path, danger)


def _describe(fd: int, conflict: int, writable: bool) -> str:
    holder = _find_holder(fd, conflict) or (
        "another process (not visible from here; if it is surely dead: qcowfuse --ignore-locks)"
    )
    is_written = any(_is_held_by_other(fd, _USES_BASE + p) for p in _UNSHARED)
    if writable and not is_written:
        return f"in use by {holder}; stop it, or serve the image read-only (qcowfuse -r)"
    return f"open for writing by {holder}; stop it first"


def _find_holder(fd: int, byte: int) -> str | None:
    """Who has ``byte`` of the file locked, as ``name (pid N)``; best effort: other users' files can't be seen.

    An OFD lock has no owner's pid, but /proc/PID/fdinfo/FD lists the locks of each descriptor. Only those that may
    be it are asked for more: a stat of some other file could wait for a dead network or FUSE server.
    """
    status = os.fstat(fd)
    own_pid = os.getpid()
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with os.scandir(f"/proc/{pid}/fd") as descriptors:
                numbers = [entry.name for entry in descriptors]
        except OSError:
            continue
        for number in numbers:
            if int(pid) == own_pid and int(number) == fd:
                continue
            try:
                if not _locks_byte(f"/proc/{pid}/fdinfo/{number}", byte, status.st_ino):
                    continue
                if not os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), status):
                    continue
                with open(f"/proc/{pid}/comm", errors="replace") as comm:
                    name = comm.read().strip()
            except (OSError, ValueError):
                continue
            return "this process" if int(pid) == own_pid else f"{name} (pid {pid})"
    return None


def _locks_byte(fdinfo_path: str, byte: int, inode: int) -> bool:
    """Whether the descriptor has a lock on ``byte`` of a file with that inode number, on whatever device:
    ``lock: 1: OFDLCK ADVISORY READ -1 fe:00:42 100 101``."""
    with open(fdinfo_path) as fdinfo:
        for line in fdinfo:
            if line.startswith("lock:"):
                place, first, last = line.split()[-3:]
                if place.endswith(f":{inode}") and int(first) <= byte and (last == "EOF" or byte <= int(last)):
                    return True
    return False
