"""Who sees the locks of an image on a network file system, as far as its mount options tell.

1. CIFS passes locks to the server, where they are mandatory: nobody can write to a byte that is locked, the holder of
   the lock included, and a new header goes over such bytes. Two programs here that open a file alike share its handle
   on the server (deferred close), and then neither sees the other's locks (``cifs_find_fid_lock_conflict`` of Linux).
   With ``nobrl`` the locks stay on this machine, where they are what they are elsewhere.
2. NFS with ``nolock``, or ``local_lock`` of posix or all (nfs(5)), keeps them on this machine as well.
3. With ``nosharecache`` each mount has files of its own. With NFS 3 one does not see the locks of another then; NFS 4
   keeps them apart.
"""

from __future__ import annotations

import errno
import logging

from . import file_systems
from .file_systems import CIFS

_log = logging.getLogger(__name__)

_HERE_ALONE = ("nobrl", "nolock", "local_lock=posix", "local_lock=all")


def warn_of_reach(fd: int, path: str) -> None:
    """Say who does not see the locks of ``fd``, where that can be told."""
    mount = file_systems.mount_of(fd)
    if mount is None:
        return
    if needs_nobrl(mount.file_system, mount.options):
        _log.warning("%s: on CIFS without the mount option nobrl, other programs here may not see its lock", path)
    for option in mount.options:
        if option in _HERE_ALONE:
            _log.warning("%s: its lock is seen on this machine alone (mount option %s)", path, option)
            break
    if mount.file_system == "nfs" and "nosharecache" in mount.options:
        _log.warning("%s: its lock may not be seen by other mounts here (mount option nosharecache)", path)


def needs_nobrl(file_system: str, options: tuple[str, ...]) -> bool:
    """Whether locks are mandatory. With the Unix extensions of SMB 1 they are not, unless ``forcemand`` has it so."""
    if file_system not in CIFS or "nobrl" in options:
        return False
    return "unix" not in options or "forcemand" in options


def refusal(fd: int, error: OSError) -> str:
    """The words of an ``error`` of a write to ``fd``, with what to do where it is the locks that it has."""
    mount = file_systems.mount_of(fd) if error.errno == errno.EACCES else None
    if mount is None or not needs_nobrl(mount.file_system, mount.options):
        return error.strerror or str(error)
    return f"{error.strerror} (CIFS keeps what is locked from being written: mount it with the option nobrl)"
