"""What is asked of a mount from outside of the daemon, and nothing else: the whole of what the daemon can have done.

1. The mount is the one at the place that was checked before an image was looked at. :meth:`MountClient.adopt` finds
   it in the kernel's table, once; no path and no device number ever comes from the daemon.
2. Arguments are numbers, and what they can do is what the owner of the mount may do to it anyway.
"""

from __future__ import annotations

import os
from contextlib import suppress

from ..errors import MountError
from . import mount_users, mountpoint, served_file
from .mountpoint import MountPoint
from .served_file import ServedFile


class MountClient:
    """The mount at ``place``, in which the file is called ``file_name`` if it is a folder. Methods raise OSError,
    MountError. ``removes_place``: the mount point goes with the mount."""

    VERBS = frozenset(
        str.split(
            "adopt check_served mend_served look_at_served sync_served write_back_served "
            "sync_everything users unmount"
        )
    )
    """The methods that may be asked for by name."""
    ONLY_OUTSIDE = frozenset(("write_back_served",))
    """Those that nobody but the process outside may call: they are a convenience, not worth a risk."""

    def __init__(self, place: MountPoint, file_name: str, *, removes_place: bool = False) -> None:
        self._place = place
        self._removes_place = removes_place
        self._name = file_name if place.is_folder else None
        self._device = -1

    @property
    def _file(self) -> ServedFile:
        return ServedFile(self._place.path, self._name, self._device)

    def adopt(self) -> int:
        """Find the mount that was just made, and remember it; gives its device number, -1 where there is none."""
        if self._device < 0:
            self._device = self._place.device_on_top()
        return self._device

    def check_served(self, n_bytes: int, tells_size: bool) -> bool:
        """See :func:`.served_file.check_served`."""
        return served_file.check_served(self._file, n_bytes, tells_size)

    def mend_served(self, n_bytes: int, lowers: bool, syncs: bool, forgets: bool) -> None:
        """See :func:`.served_file.mend_served`."""
        served_file.mend_served(self._file, n_bytes, lowers, syncs, forgets)

    def look_at_served(self) -> None:
        """See :func:`.served_file.look_at_served`."""
        served_file.look_at_served(self._file)

    def sync_served(self) -> None:
        """See :func:`.served_file.sync_served`."""
        served_file.sync_served(self._file)

    def write_back_served(self) -> None:
        """See :func:`.served_file.write_back_served`."""
        served_file.write_back_served(self._file)

    def sync_everything(self) -> None:
        """See :func:`.served_file.sync_everything`."""
        served_file.sync_everything(self._file)

    def finish(self) -> None:
        """The daemon is gone: leave nothing where that was asked for. It can't be asked for by name."""
        if self._removes_place:
            with suppress(OSError, MountError):
                self.unmount(True)  # a dead one; after a good end there is none
            with suppress(OSError):
                os.rmdir(self._place.path)

    def users(self) -> str:
        """See :func:`.mount_users.users_of`."""
        return mount_users.users_of(self._file.path, self._device)

    def unmount(self, is_lazy: bool = False) -> None:
        """See :func:`.mountpoint.unmount`."""
        if self._device >= 0:
            mountpoint.unmount(self._device, is_lazy)
