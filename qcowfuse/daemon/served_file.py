"""Calls on the served file that the daemon has made outside of itself, and that keep nobody from unmounting it.

1. These calls wait for the daemon, and must not be made by a thread of it: see :mod:`.outside`, which makes them.
2. A descriptor in a mount, and even a look at a path in it that waits for an answer, makes that mount busy: an
   unmount at that moment fails. So the calls do not go through the mount that users see, but through a clone of
   it that is attached nowhere (open_tree(2)): the mount can be unmounted meanwhile, and the file system ends when
   the clone is closed. To clone takes a look-up that asks the daemon nothing.
3. To clone, root's rights are needed, or those of root in a user namespace of one's own; some systems forbid that
   too (Ubuntu, many containers). There the file is reached by its path, and :func:`check_served` says so.
4. A path is not a mount: something else may have been mounted over it, or the mount may have been detached. So
   whatever is found is compared with the device number first. (Otherwise the repair of a size could truncate the
   plain file below.)
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from . import mount_users

_SYS_OPEN_TREE = 428
_AT_FDCWD = -100
_OPEN_TREE_CLONE = 1
_SYNC_WRITE_AND_WAIT = 7
"""SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER."""
_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000


class ServedFile(NamedTuple):
    """The file ``name`` in the mount of ``device`` at ``mount_path``; None: the mount itself is the file."""

    mount_path: str
    name: str | None
    device: int

    @property
    def path(self) -> str:
        """Where users find it."""
        return self.mount_path if self.name is None else os.path.join(self.mount_path, self.name)


def mend_served(file: ServedFile, n_bytes: int, lowers: bool, syncs: bool, forgets: bool) -> None:
    """Have the kernel show ``n_bytes``. ``lowers``: it may show more, and with ``syncs`` it first sends all that it
    holds back. ``forgets``: drop cached pages. Raises OSError."""
    with _named(file) as (named, _):  # names the file without an open and a close of it
        path = f"/proc/self/fd/{named}"
        if forgets or (lowers and syncs):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                if lowers and syncs:
                    with suppress(OSError):  # the writer hears of it
                        os.fsync(fd)
                if forgets:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        # Not where it seems to be needed: a look comes too early while another truncation goes on, for which this one
        # waits. The kernel first sends what it holds back of a longer file, and takes the answer for true.
        try:
            os.truncate(path, n_bytes)
        except PermissionError:
            if os.fstat(named).st_size != n_bytes:
                raise


def look_at_served(file: ServedFile) -> None:
    """Have the kernel ask for the attributes, if it does not know them. Raises OSError."""
    with _named(file) as (fd, _):
        os.fstat(fd)


def check_served(file: ServedFile, n_bytes: int, tells_size: bool) -> bool:
    """See that the mount answers with a file of ``n_bytes``; first, where asked, tell the kernel that size.

    Returns whether such looks leave users free to unmount (rule 3). Raises OSError.
    """
    with _named(file) as (fd, is_clone):
        if tells_size:
            os.truncate(f"/proc/self/fd/{fd}", n_bytes)
        status = os.fstat(fd)
    if status.st_size != n_bytes:
        raise OSError(f"the file shows {status.st_size} bytes instead of {n_bytes}")
    return is_clone


def sync_served(file: ServedFile) -> None:
    """Have the kernel send what it holds back, and make it durable. Where the mount is gone from here, by way of
    the processes that still have it. Raises OSError."""
    try:
        with _named(file) as (named, _):
            fd = os.open(f"/proc/self/fd/{named}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        fd = _open_elsewhere(file)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_back_served(file: ServedFile) -> None:
    """Have the kernel send what it holds back, without the lock of the inode, which a caller of lseek(2) holds.
    Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with _named(file) as (named, _):
        fd = os.open(f"/proc/self/fd/{named}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        sync_range = libc.sync_file_range
        sync_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        if sync_range(fd, 0, 0, _SYNC_WRITE_AND_WAIT):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), file.path)
    finally:
        # The close takes that lock: it ends after the answer.
        threading.Thread(target=os.close, args=(fd,), daemon=True).start()


def sync_everything(file: ServedFile) -> None:
    """:func:`sync_served`; where nobody lets us near the file, all file systems of the machine, this one included."""
    try:
        sync_served(file)
    except OSError:
        os.sync()


def _open_elsewhere(file: ServedFile) -> int:
    for path in mount_users.paths_elsewhere(file.device, file.name):
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if os.fstat(fd).st_dev == file.device:
                return fd
            os.close(fd)
    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), file.path)


@contextmanager
def root_of(mount_path: str, device: int) -> Iterator[tuple[int, bool]]:
    """A descriptor that only names the root of the mount (O_PATH), and whether users can unmount meanwhile. Raises
    OSError; ESTALE where something else is mounted there."""
    clone = _clone(mount_path)
    root = os.open(mount_path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW) if clone is None else clone
    try:
        if os.fstat(root).st_dev != device:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), mount_path)
        yield root, clone is not None
    finally:
        os.close(root)


@contextmanager
def _named(file: ServedFile) -> Iterator[tuple[int, bool]]:
    """The same of the file."""
    with root_of(file.mount_path, file.device) as (root, is_clone):
        if file.name is None:
            yield root, is_clone
            return
        fd = os.open(file.name, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=root)
        try:
            yield fd, is_clone
        finally:
            os.close(fd)


def _clone(path: str) -> int | None:
    """A descriptor of the root of an unattached clone of the mount at ``path``; None where that is forbidden."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = _open_tree(libc, path)
    if fd >= 0:
        return fd
    if ctypes.get_errno() != errno.EPERM or threading.current_thread() is not threading.main_thread():
        return None
    return _clone_in_user_namespace(libc, path)


def _open_tree(libc: ctypes.CDLL, path: str) -> int:
    result: int = libc.syscall(
        ctypes.c_long(_SYS_OPEN_TREE),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC),
    )
    return result


def _clone_in_user_namespace(libc: ctypes.CDLL, path: str) -> int | None:
    """The same by a process that is root in namespaces of its own, and gone with them at once: while they exist they
    hold a copy of every mount of the system."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = os.fork()
        if pid == 0:
            try:
                if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) == 0 and (fd := _open_tree(libc, path)) >= 0:
                    socket.send_fds(theirs, [b"fd"], [fd])
            finally:
                os._exit(0)
        theirs.close()
        _, fds, _, _ = socket.recv_fds(ours, 2, 1)
        os.waitpid(pid, 0)
    return fds[0] if fds else None
