"""What lies below a file: the kinds of file systems that are treated in their own way, and how one is told."""

from __future__ import annotations

import os

from ..system.mountinfo import MountEntry, mount_table
from .blocking import NOT_SUPPORTED
from .opened import is_block_device

MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
"""Reads and writes never wait, and RWF_NOWAIT is refused."""
PLAIN_WRITE_FILE_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs"})
"""A plain buffered write ends in microseconds."""
COPY_ON_WRITE_FILE_SYSTEMS = frozenset({"btrfs", "bcachefs"})
"""Writing over something takes new space."""
LOCAL_FILE_SYSTEMS = PLAIN_WRITE_FILE_SYSTEMS | COPY_ON_WRITE_FILE_SYSTEMS | {"f2fs"}
"""On disks of this machine: the errors of a flush are those of a disk."""

CIFS = frozenset({"cifs", "smb3"})
NETWORK_FILE_SYSTEMS = CIFS | {"nfs", "nfs4"}
"""Locks there may not be seen by all programs that can open the file: see :mod:`.lock_reach`."""


def type_of(fd: int) -> str:
    """The type of the file system below ``fd`` ("" when it can't be found; block devices have none)."""
    mount = mount_of(fd)
    return "" if mount is None else mount.file_system


def mount_of(fd: int) -> MountEntry | None:
    """The mount that ``fd`` was opened in (None when it can't be found, and for block devices)."""
    try:
        if is_block_device(fd):
            return None
        with open(f"/proc/self/fdinfo/{fd}") as fdinfo:
            mount_id = next(line.split()[1] for line in fdinfo if line.startswith("mnt_id:"))
        return next(mount for mount in mount_table() if mount.mount_id == int(mount_id))
    except (OSError, StopIteration, IndexError, ValueError):
        return None


def takes_nowait(fd: int) -> bool:
    """Whether reads of ``fd`` take RWF_NOWAIT, by a trial."""
    try:
        os.preadv(fd, (bytearray(1),), 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError as error:
        # A medium error is for the first real read to report.
        return error.errno not in NOT_SUPPORTED
    return True
