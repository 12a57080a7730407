"""Finding a file by a name that is not to be trusted, without leaving a folder, and opening it without side effects.

1. A name is walked component by component, each looked up in the descriptor of its folder (``O_PATH`` and
   ``O_NOFOLLOW``), as openat2() does with RESOLVE_BENEATH, which not every kernel and sandbox has. ``..`` goes back
   to the folder that was walked through; nothing is looked up twice by name, so a race can't lead out.
2. A symbolic link is read and walked in the same way. What leads out of the folder, by ``..``, by a link or as an
   absolute name, is looked for beneath the other folders that the caller allows, and is an :class:`OutsideError`
   where none holds it: nothing out there is even looked at.
3. Nothing is opened to see what it is. The type of the file, and of its file system, are asked of the ``O_PATH``
   descriptor, and the file is opened through that very descriptor (``/proc/self/fd``). So no device, FIFO or
   terminal notices anything. Files of the kernel's own (procfs, sysfs and their like) are no files to keep data in,
   though they claim to be regular ones.
4. What is left to a race: a user who may write to the folder can replace the file before it is found, as at any time
   before. Afterwards the descriptor stays with the file that was checked. A folder that is moved elsewhere during
   the walk is still walked: it was beneath when it was found.

Source: openat2(2), path_resolution(7); the rule for links in sticky folders is fs.protected_symlinks of proc(5).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterable, Sequence

from .opened import go_on, open_descriptor

MAX_LINKS = 40
"""Symbolic links in one name, as in the kernel."""
MAX_DEPTH = 100
"""Folders below the first one: each is a descriptor while a name is walked."""
MAX_NAME = 4095
"""Bytes of a name or of what a link holds (PATH_MAX without its NUL)."""

_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_KERNEL_FILE_SYSTEMS = {
    0x9FA0: "procfs",
    0x62656572: "sysfs",
    0x64626720: "debugfs",
    0x74726163: "tracefs",
    0x73636673: "securityfs",
    0x62656570: "configfs",
    0x1CD1: "devpts",
    0x27E0EB: "cgroup",
    0x63677270: "cgroup2",
    0xCAFE4A11: "bpf",
    0xDE5E81E4: "efivarfs",
    0x6165676C: "pstore",
    0x42494E4D: "binfmt_misc",
    0x19800202: "mqueue",
    0x6E736673: "nsfs",
    0xF97CFF8C: "selinuxfs",
    0x43415D53: "smackfs",
    0x67596969: "rpc_pipefs",
    0x65735543: "fusectl",
}
_TYPES = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}
_libc = ctypes.CDLL(None, use_errno=True)


class OutsideError(Exception):
    """A name leads out of all folders that it may lead into; ``target`` is the absolute path that it leads to."""

    def __init__(self, target: str) -> None:
        self.target = target
        super().__init__(target)


class UnfitFileError(Exception):
    """What a name leads to is nothing to keep data in; ``what`` it is, and whether it is a block device."""

    def __init__(self, what: str, *, is_block_device: bool = False) -> None:
        self.what = what
        self.is_block_device = is_block_device
        super().__init__(what)


class Folder:
    """A folder that is held by a descriptor. ``path`` is its real path, ``given`` what the caller called it, both
    absolute."""

    __slots__ = ("fd", "given", "path")

    def __init__(self, fd: int, path: str, given: str) -> None:
        self.fd = fd
        self.path = path
        self.given = given

    def copy(self) -> Folder:
        """Another descriptor of it, for another owner."""
        return Folder(os.dup(self.fd), self.path, self.given)

    def close(self) -> None:
        """Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class FoundFile:
    """A file that was found and judged, and not opened yet: ``fd`` is of the ``O_PATH`` kind. ``folder`` is where the
    last component of the name was looked up: names inside the file start from there."""

    __slots__ = ("fd", "folder", "path", "status")

    def __init__(self, fd: int, status: os.stat_result, path: str, folder: Folder) -> None:
        self.fd = fd
        self.status = status
        self.path = path
        self.folder = folder

    def open(self, *, writable: bool, before_wait: Callable[[], None] = go_on) -> int:
        """A descriptor for reading, or for both, of this very file, as :func:`open_descriptor` opens it. Raises
        OSError."""
        return open_descriptor(f"/proc/self/fd/{self.fd}", writable=writable, before_wait=before_wait)

    def close(self) -> None:
        """Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        self.folder.close()


def open_folder(path: str) -> Folder:
    """Hold a folder that the user named, links and all. Raises OSError."""
    fd = os.open(path or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return Folder(fd, _path_of(fd) or os.path.realpath(path or "."), os.path.abspath(path or "."))
    except BaseException:
        os.close(fd)
        raise


def find_file(start: Folder, name: str, allowed: Sequence[Folder] = ()) -> FoundFile:
    """The regular file that ``name`` means, seen from ``start``, without leaving ``start`` or one of ``allowed``; a
    block device where one of ``allowed`` holds it. The caller closes what it gets.

    Raises OutsideError, UnfitFileError, OSError (ENOENT, ELOOP, ENAMETOOLONG, EACCES ...).
    """
    walk = _Walk(start, allowed)
    try:
        fd, path = walk.find(name)
        try:
            status = os.fstat(fd)
            is_allowed = any(_rest_below(folder.path, path) is not None for folder in allowed)
            refuse_unfit(fd, status, takes_block_device=is_allowed)
        except BaseException:
            os.close(fd)
            raise
        folder, walk.named_folder = walk.named_folder, None
        assert folder is not None
        return FoundFile(fd, status, path, folder)
    finally:
        walk.close()


def refuse_unfit(fd: int, status: os.stat_result, *, takes_block_device: bool) -> None:
    """Raises UnfitFileError for what is neither a regular file of an ordinary file system nor, where
    ``takes_block_device``, a block device; OSError."""
    if not stat.S_ISREG(status.st_mode) and not (takes_block_device and stat.S_ISBLK(status.st_mode)):
        kind = _TYPES.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise UnfitFileError(kind, is_block_device=stat.S_ISBLK(status.st_mode))
    if stat.S_ISREG(status.st_mode) and (name := _kernel_file_system(fd)):
        raise UnfitFileError(f"a file of the kernel's ({name})")


class _Walk:
    """The way down from a folder: the descriptors of all folders on it, the first one of which is never left."""

    def __init__(self, start: Folder, allowed: Sequence[Folder]) -> None:
        self._roots = (start, *allowed)
        self._way = [start.copy()]
        self._n_turns = 0
        self.named_folder: Folder | None = None
        """Where the last component of the name itself was looked up, before any link there was followed."""

    def close(self) -> None:
        for folder in self._way:
            folder.close()
        if self.named_folder is not None:
            self.named_folder.close()

    def find(self, name: str) -> tuple[int, str]:
        """An ``O_PATH`` descriptor and the path of what is there; never a link."""
        rest = self._turn_to(name, [])
        while rest:
            part = rest.pop()
            if not rest and self.named_folder is None:
                self.named_folder = self._way[-1].copy()
            if part == ".":
                continue
            if part == "..":
                if len(self._way) > 1:
                    self._way.pop().close()
                else:
                    above = os.path.dirname(self._way[0].path)
                    while rest and rest[-1] == "..":
                        rest.pop()
                        above = os.path.dirname(above)
                    rest = self._turn_to(above, rest)
                continue
            here = self._way[-1]
            fd = os.open(part, _PATH_FLAGS, dir_fd=here.fd)
            try:
                mode = os.fstat(fd).st_mode
                if stat.S_ISLNK(mode):
                    _refuse_planted_link(here.fd, fd)
                    rest = self._turn_to(os.readlink("", dir_fd=fd), rest)
                elif not rest:
                    kept, fd = fd, -1
                    return kept, os.path.join(here.path, part)
                elif stat.S_ISDIR(mode):
                    if name_of_kernel := _kernel_file_system(fd):
                        raise UnfitFileError(f"a file of the kernel's ({name_of_kernel})")
                    if len(self._way) > MAX_DEPTH:
                        raise OSError(errno.ENAMETOOLONG, f"more than {MAX_DEPTH} folders deep")
                    path = os.path.join(here.path, part)
                    self._way.append(Folder(fd, path, path))
                    fd = -1
                else:
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            finally:
                if fd >= 0:
                    os.close(fd)
        raise UnfitFileError("a directory")

    def _turn_to(self, target: str, rest: list[str]) -> list[str]:
        """Follow the name or a link to ``target``, and ``rest`` after it: the components of both, the last one first.
        What is absolute starts anew from the folder that holds it."""
        self._n_turns += 1
        if self._n_turns > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if len(os.fsencode(target)) > MAX_NAME:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        parts = rest + _parts_of(target)
        if not target.startswith("/"):
            return parts
        absolute = "/" + "/".join(reversed(parts))
        while absolute.startswith("/../"):
            absolute = absolute[3:]
        for root in self._roots:
            for path in (root.path, root.given):
                below = _rest_below(path, absolute)
                if below is not None:
                    for folder in self._way:
                        folder.close()
                    self._way[:] = [root.copy()]
                    return _parts_of(below)
        raise OutsideError(os.path.normpath(absolute))


def _parts_of(name: str) -> list[str]:
    """The components, the last one first; a "." only at the end, where it says that the one before is a folder."""
    first, *others = reversed(name.split("/"))
    return ["." if first == "" and others else first] + [part for part in others if part not in ("", ".")]


def _rest_below(folder: str, path: str) -> str | None:
    """What of the absolute ``path`` comes after ``folder``; None where it is not beneath it."""
    start = folder.rstrip("/") + "/"
    return path[len(start) :] if path.startswith(start) else None


def _refuse_planted_link(folder_fd: int, link_fd: int) -> None:
    """What the kernel itself would do for a name in a folder like /tmp: a link there counts only if it belongs to the
    user that follows it, or to the owner of the folder."""
    folder, link = os.fstat(folder_fd), os.fstat(link_fd)
    is_shared = folder.st_mode & stat.S_ISVTX and folder.st_mode & stat.S_IWOTH
    if is_shared and link.st_uid not in (os.geteuid(), folder.st_uid):
        raise PermissionError(errno.EACCES, "a symbolic link of another user in a folder that all may write to")


def _kernel_file_system(fd: int) -> str | None:
    """The name of the file system if it holds nothing but the kernel's own files. Raises OSError."""
    # struct statfs is 120 bytes at most; its first word is the type, of the size of a long on every Linux.
    buffer = (ctypes.c_long * 64)()
    if _libc.fstatfs(fd, buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return _KERNEL_FILE_SYSTEMS.get(buffer[0] & 0xFFFFFFFF)


def _path_of(fd: int) -> str | None:
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return None
    return path if path.startswith("/") and not path.endswith(" (deleted)") else None


def open_folders(paths: Iterable[str]) -> list[Folder]:
    """Those of the folders that can be opened: a folder that is missing holds no file."""
    folders = []
    for path in paths:
        try:
            folders.append(open_folder(path))
        except OSError:
            continue
    return folders
