"""A mount point: what may be one, whether it is ours, and how it is given up.

1. Whatever asks the served file system blocks, and must not be called by a thread of the daemon once the mount
   exists: see :mod:`.outside`, which calls it.
2. Unmounting is never forced, and lazy only where nothing has been promised yet: either would take the disk away
   from its users.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from ..errors import MountError

FILE_SYSTEM_TYPE = "fuse.qcowfuse"
READ_AHEAD_KIB = 1024
"""As large as one request gets."""
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8


class MountBusyError(MountError):
    """The mount is in use and cannot be given up now."""


class MountEntry(NamedTuple):
    """A line of the kernel's table of mounts; ``parent_id`` is the ``mount_id`` of the mount below."""

    mount_id: int
    parent_id: int
    device: int
    path: str
    file_system: str
    source: str


def mount_table(process: str = "self") -> Iterator[MountEntry]:
    """The mounts of a process's namespace (by default this one's), in the kernel's order. Raises OSError."""
    with open(f"/proc/{process}/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.rstrip("\n").partition(" - ")
            fields, kind = left.split(" "), right.split(" ")
            major, minor = fields[2].split(":")
            yield MountEntry(
                mount_id=int(fields[0]),
                parent_id=int(fields[1]),
                device=os.makedev(int(major), int(minor)),
                path=_unescape(fields[4]),
                file_system=kind[0],
                source=_unescape(kind[1]),
            )


def _unescape(text: str) -> str:
    for octal in ("040", "011", "012", "134"):
        text = text.replace(f"\\{octal}", chr(int(octal, 8)))
    return text


def check_mount_point(path: str, *, allow_non_empty: bool) -> str:
    """The real path of a mount point that can be used, else MountError that says what is wrong with it."""
    real = os.path.realpath(path)
    try:
        status = os.stat(real)
        if stat.S_ISDIR(status.st_mode):
            entries = os.listdir(real)
        elif stat.S_ISREG(status.st_mode):
            entries = []
        else:
            raise MountError(f"{path}: mount point is neither a directory nor a regular file")
    except OSError as exc:
        raise MountError(_why_unusable(path, exc)) from exc
    for mount in mount_table():
        if mount.path == real and mount.device == status.st_dev and mount.file_system == FILE_SYSTEM_TYPE:
            raise MountError(f"{path}: already mounted, it serves {mount.source}")
    if entries and not allow_non_empty:
        raise MountError(f"{path}: mount point is not empty (use another one, or -o nonempty to hide what is in it)")
    return real


def _why_unusable(path: str, exc: OSError) -> str:
    if exc.errno == errno.ENOENT:
        return f"{path}: mount point does not exist"
    if exc.errno == errno.ENOTCONN:
        return f"{path}: a dead mount is there, its daemon was killed (fusermount3 -u {path} removes it)"
    return f"{path}: mount point cannot be used: {exc.strerror}"


def check_fuse() -> None:
    """Raise MountError where this process cannot use FUSE, saying what is missing."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise MountError("/dev/fuse does not exist (modprobe fuse; a container must be given the device)") from None
    except OSError as exc:
        hint = "a user must be able to read and write it" if exc.errno == errno.EACCES else "modprobe fuse"
        raise MountError(f"/dev/fuse cannot be opened: {exc.strerror} ({hint})") from exc
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise MountError("fusermount3 is missing, only root can mount without it (install the package fuse3)")


def device_at(path: str) -> int:
    """The device number of what is at ``path``."""
    return os.stat(path, follow_symlinks=False).st_dev


def mounts_of(device: int) -> list[str]:
    """Where in this namespace the file system ``device`` is mounted; the last mounted first."""
    return [mount.path for mount in mount_table() if mount.device == device][::-1]


def raise_read_ahead(device: int) -> None:
    """Have the kernel read further ahead of sequential readers of a mount than its 128 KiB. Only root may."""
    setting = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    with suppress(OSError, ValueError):
        with open(setting) as file:
            n_kib = int(file.read())
        if n_kib < READ_AHEAD_KIB:
            with open(setting, "w") as file:
                file.write(str(READ_AHEAD_KIB))


def unmount(device: int, is_lazy: bool = False) -> None:
    """Give up every mount of ``device`` in this namespace; ``is_lazy``: though it is in use.

    Raises MountBusyError when it is in use or something is mounted on top, MountError when it cannot be done.
    """
    table = list(mount_table())
    for mount in table[::-1]:
        if mount.device != device:
            continue
        path = mount.path
        if any(other.parent_id == mount.mount_id for other in table):  # no look at the path: it would be a user
            raise MountBusyError(f"{path}: something else is mounted on top")
        if os.geteuid() == 0:
            _unmount_as_root(path, is_lazy)
        else:
            _unmount_as_user(path, is_lazy)


def _unmount_as_root(path: str, is_lazy: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), _UMOUNT_NOFOLLOW | (_MNT_DETACH if is_lazy else 0)) == 0:
        return
    number = ctypes.get_errno()
    if number == errno.EBUSY:
        raise MountBusyError(f"{path}: in use")
    if number not in (errno.EINVAL, errno.ENOENT):  # those two: it is gone already
        raise MountError(f"{path}: cannot be unmounted: {os.strerror(number)}")


def _unmount_as_user(path: str, is_lazy: bool) -> None:
    try:
        done = subprocess.run(
            ["fusermount3", "-u", *["-z"] * is_lazy, "--", path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as exc:
        raise MountError(f"fusermount3 cannot be run: {exc.strerror}") from exc
    if done.returncode:
        text = " ".join(done.stderr.split())
        raise (MountBusyError if "busy" in text else MountError)(text or f"{path}: fusermount3 failed")
