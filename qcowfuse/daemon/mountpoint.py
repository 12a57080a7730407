"""A mount point: what may be one, whether it is ours, and how it is given up.

1. Whatever asks the served file system blocks, and must not be called by a thread of the daemon once the mount
   exists: see :mod:`.outside`, which calls it.
2. Unmounting is never forced, and lazy only where nothing has been promised yet: either would take the disk away
   from its users.
3. Between the look at a mount point and the mount, the image is opened, which may take minutes; meanwhile the folder
   above may belong to somebody who exchanges the mount point for a link. So a mount point is held by a descriptor
   from the look on, root mounts on that very descriptor, and unmounts at a place whose way there has no links.
   (Other users mount by fusermount3, which looks at the path with their rights.)
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from contextlib import suppress

from ..errors import MountError
from ..system.mountinfo import mount_table

FILE_SYSTEM_TYPE = "fuse.qcowfuse"
READ_AHEAD_KIB = 1024
"""As large as one request gets."""
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8


class MountBusyError(MountError):
    """The mount is in use and cannot be given up now."""


class MountPoint:
    """A place to mount at, held by a descriptor. ``path`` is its real path, ``is_folder``: not a regular file."""

    def __init__(self, path: str, descriptor: int, status: os.stat_result) -> None:
        self.path = path
        self.is_folder = stat.S_ISDIR(status.st_mode)
        self._descriptor = descriptor
        self._device_below = status.st_dev

    @property
    def descriptor_path(self) -> str:
        """A path that leads to what is held, in this process."""
        return f"/proc/self/fd/{self._descriptor}"

    @property
    def target(self) -> str:
        """What libfuse is to mount on (rule 3)."""
        return self.descriptor_path if os.geteuid() == 0 else self.path

    @property
    def is_in_place(self) -> bool:
        """Whether the path still leads to what is held."""
        return os.readlink(self.descriptor_path) == self.path

    def device_on_top(self) -> int:
        """The device number of the mount of ours that was made here last, -1 where there is none."""
        # Newest last. The kernel numbers file systems without a device by itself, so what is below can't be ours.
        here = [mount for mount in mount_table() if mount.path == self.path and mount.device != self._device_below]
        return here[-1].device if here and here[-1].file_system == FILE_SYSTEM_TYPE else -1

    def take_back(self) -> None:
        """Undo a mount on what is held, wherever that has been moved to."""
        with suppress(OSError, MountError):
            where = os.readlink(self.descriptor_path)
            if any(mount.path == where and mount.file_system == FILE_SYSTEM_TYPE for mount in mount_table()):
                unmount_path(where, is_lazy=True)

    def close(self) -> None:
        """Let go of it. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def open_mount_point(path: str, *, allow_non_empty: bool) -> MountPoint:
    """A mount point that can be used, else MountError that says what is wrong with it."""
    real = os.path.realpath(path)
    try:
        descriptor = os.open(real, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as exc:
        raise MountError(_why_unusable(path, exc)) from exc
    try:
        place = MountPoint(real, descriptor, os.fstat(descriptor))
        if not place.is_in_place:
            raise MountError(f"{path}: mount point was moved while it was looked at")
        _check(path, place, os.fstat(descriptor), allow_non_empty=allow_non_empty)
    except OSError as exc:
        os.close(descriptor)
        raise MountError(_why_unusable(path, exc)) from exc
    except BaseException:
        os.close(descriptor)
        raise
    return place


def _check(path: str, place: MountPoint, status: os.stat_result, *, allow_non_empty: bool) -> None:
    if not place.is_folder and not stat.S_ISREG(status.st_mode):
        raise MountError(f"{path}: mount point is neither a directory nor a regular file")
    # First, since a dead mount has a line in the table as well; here it fails.
    entries = os.listdir(f"{place.descriptor_path}/.") if place.is_folder else []
    for mount in mount_table():
        if mount.path == place.path and mount.device == status.st_dev and mount.file_system == FILE_SYSTEM_TYPE:
            raise MountError(f"{path}: already mounted, it serves {mount.source}")
    if entries and not allow_non_empty:
        raise MountError(
            f"{path}: mount point is not empty, it holds {min(entries)} "
            "(use another one, or -o nonempty to hide what is in it)"
        )


def _why_unusable(path: str, exc: OSError) -> str:
    if exc.errno == errno.ENOENT:
        return f"{path}: mount point does not exist"
    if exc.errno == errno.ENOTCONN:
        place = _mount_above(path)
        return f"{path}: a dead mount is there, its daemon was killed (fusermount3 -u {place} removes it)"
    return f"{path}: mount point cannot be used: {exc.strerror}"


def _mount_above(path: str) -> str:
    """``path`` where it is a mount point itself, else the mount that it lies in."""
    above = os.path.abspath(path)
    points = {mount.path for mount in mount_table()}
    while above not in points and above != "/":
        above = os.path.dirname(above)
    return path if above in (os.path.abspath(path), "/") else above


def check_fuse() -> None:
    """Raise MountError where this process cannot use FUSE, saying what is missing."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise MountError("/dev/fuse does not exist (modprobe fuse; a container must be given the device)") from None
    except OSError as exc:
        hint = "a user must be able to read and write it" if exc.errno == errno.EACCES else "modprobe fuse"
        raise MountError(f"/dev/fuse cannot be opened: {exc.strerror} ({hint})") from exc
    if os.geteuid() != 0:
        from . import fusermount  # not only when it is needed: the mount might hold what is to be imported

        fusermount.check()


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
        unmount_path(path, is_lazy=is_lazy)


def unmount_path(path: str, *, is_lazy: bool = False) -> None:
    """Give up the mount at the real path ``path``. Raises MountBusyError, MountError, OSError."""
    if os.geteuid() == 0:
        _unmount_as_root(path, is_lazy)
    else:
        from . import fusermount

        if text := fusermount.unmount(path, is_lazy=is_lazy):
            raise (MountBusyError if "busy" in text else MountError)(text)


def _unmount_as_root(path: str, is_lazy: bool) -> None:
    folder, name = os.path.split(path)
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if os.readlink(f"/proc/self/fd/{descriptor}") != folder:
            raise MountError(f"{path}: cannot be unmounted: {folder} leads elsewhere by now")
        libc = ctypes.CDLL(None, use_errno=True)
        flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if is_lazy else 0)
        if libc.umount2(os.fsencode(f"/proc/self/fd/{descriptor}/{name}"), flags) == 0:
            return
        number = ctypes.get_errno()
    finally:
        os.close(descriptor)
    if number == errno.EBUSY:
        raise MountBusyError(f"{path}: in use")
    if number not in (errno.EINVAL, errno.ENOENT):  # those two: it is gone already
        raise MountError(f"{path}: cannot be unmounted: {os.strerror(number)}")
