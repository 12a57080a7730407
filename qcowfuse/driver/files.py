"""Which files a chain may open: the image that the user named, and what images name, by rules.

1. What the user says is the user's will: the image, ``OpenOptions.backing_file`` and ``data_file`` are opened as
   any program would open them, links, block devices and all.
2. A name inside an image is no order. It is a plain local path, without a protocol, relative to the folder of the
   image that holds it, and it is followed only to a regular file beneath that folder or beneath one that the user
   allows (``OpenOptions.allow_dirs``); to a block device only beneath one of those. How nothing else is even
   touched: :mod:`~qcowfuse.storage.beneath`. ``OpenOptions.no_backing`` refuses all that images name.
3. Only what belongs to the image that the user writes to is opened for writing: the image, and its data file. A
   data file that the image names must have the image's owner for that, since anyone may put an image beside the
   files of others.
4. A file that is open stays the file: nothing is opened a second time by its name. The folders are held by
   descriptors while the chain is opened. What the user named is resolved by the kernel, once for the image and once
   for its folder; a process that can change that path can lead the user anywhere in any case.
5. An opener of the caller's own (tests, tools) has no real files behind it: names go to it as paths, and only the
   part of rule 2 that looks at the name itself holds.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import BackingChainError, ImageUsageError
from ..storage.base import Storage
from ..storage.blocking_file import BlockingFile
from ..storage.file_systems import NETWORK_FILE_SYSTEMS
from ..storage.locks import wait_image_lock, warn_of_no_lock
from ..storage.opening import AnyFile, file_on, open_file
from ..system.alone import check_stopped, run_blocking
from .options import OpenOptions

if TYPE_CHECKING:
    from ..storage.beneath import Folder, FoundFile

StorageOpener = Callable[[str, bool, OpenOptions], Awaitable[Storage]]
"""``(path, writable, options)`` to a Storage; tests and tools put their own in."""

_USER_OPTION = {"backing file": "--backing-file", "data file": "--data-file"}


async def open_storage(path: str, writable: bool, options: OpenOptions) -> Storage:
    """Open and lock a file that the user named, with the measuring layers that the options ask for.

    Raises OSError, ImageLockedError.
    """
    file = await open_file(path, writable=writable, io_uring=options.io_uring)
    return await _ready(file, path, writable, options)


async def open_ignoring_locks(path: str, writable: bool, options: OpenOptions) -> Storage:
    """:func:`open_storage`, whatever locks other processes hold. Raises OSError."""
    return await open_storage(path, writable, options._replace(ignore_locks=True))


async def _ready(file: AnyFile, path: str, writable: bool, options: OpenOptions) -> Storage:
    try:
        if options.ignore_locks:
            warn_of_no_lock(path, writable=writable)
        elif writable or not options.force_share:
            await wait_image_lock(file.fileno(), path, writable=writable, timeout=options.lock_wait)
            file.refresh_size()
            if writable and file.file_system in NETWORK_FILE_SYSTEMS:
                from ..storage.lock_reach import warn_of_reach

                warn_of_reach(file.fileno(), path)
        return _measured(file, options)
    except BaseException:
        await file.aclose()
        raise


def _measured(file: AnyFile, options: OpenOptions) -> Storage:
    storage: Storage = file
    if options.image_in_memory:
        from ..storage.measuring.memory import ResidentStorage

        assert not isinstance(file, BlockingFile)
        storage = ResidentStorage(file)
    if options.io_delay is not None:
        from ..storage.measuring.latency import LatencyStorage

        storage = LatencyStorage(storage, options.io_delay)
    return storage


def local_path(holder: str, name: str, what: str) -> str:
    """The file that ``name``, found inside the image ``holder``, means. Raises BackingChainError."""
    return os.path.join(os.path.dirname(holder), plain_name(holder, name, what))


def plain_name(holder: str, name: str, what: str) -> str:
    """``name``, found inside the image ``holder``, without "file:". Raises BackingChainError for other protocols."""
    plain = name.removeprefix("file:")
    protocol, colon, _ = plain.partition(":")
    if "\0" in plain or not plain or (colon and "/" not in protocol):
        raise BackingChainError(holder, f"its {what} {name!r} is not a plain local path")
    return plain


class ChainFile:
    """A file of a chain, open. ``folder`` is held only where the file was found by the rules; ``status`` is None for
    what is no real file."""

    __slots__ = ("folder", "path", "status", "storage")

    def __init__(
        self, path: str, storage: Storage, status: os.stat_result | None = None, folder: Folder | None = None
    ) -> None:
        self.path = path
        self.storage = storage
        self.status = status
        self.folder = folder

    def forget_folder(self) -> None:
        """Nothing more that this file names is going to be opened."""
        if self.folder is not None:
            self.folder.close()


class ChainFiles:
    """Opens the files of one chain, none of them twice. A context manager: it holds folders, not the files."""

    def __init__(self, options: OpenOptions, opener: StorageOpener | None) -> None:
        self._options = options
        self._opener = opener
        self._seen: set[tuple[object, ...]] = set()
        self._allowed: list[Folder] | None = None
        self._folders: list[Folder] = []

    def __enter__(self) -> ChainFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for folder in self._folders:
            folder.close()
        self._folders.clear()

    async def open_image(self, path: str, *, writable: bool) -> ChainFile:
        """The image itself. Raises OSError, ImageLockedError."""
        if self._opener is not None:
            self._seen.add((os.path.realpath(path),))
            return ChainFile(path, await self._opener(path, writable, self._options))
        file = await open_file(path, writable=writable, io_uring=self._options.io_uring)
        status = os.fstat(file.fileno())
        self._seen.add(_identity(status))
        return ChainFile(path, await _ready(file, path, writable, self._options), status)

    async def open_overlay(self, path: str, *, writable: bool) -> ChainFile:
        """The file that the user named to lie over the chain.

        Raises ImageUsageError where it is part of the chain, OSError, ImageLockedError.
        """
        identity = (os.path.realpath(path),) if self._opener is not None else _identity(os.stat(path))
        if identity in self._seen:
            raise ImageUsageError(f"{path}: is part of the chain that it should lie over")
        return await self.open_image(path, writable=writable)

    def adopt(self, fd: int, path: str) -> ChainFile:
        """A file that nobody else opens, now or later: it needs no lock, and is not made durable. ``path``: what it
        is called. Owns ``fd`` from now on."""
        from ..storage.throw_away import ThrowAwayFile

        try:
            file = ThrowAwayFile(fd, path, writable=True, io_uring=self._options.io_uring)
        except BaseException:
            os.close(fd)
            raise
        return ChainFile(path, _measured(file, self._options), os.fstat(fd))

    async def is_named(self, holder: ChainFile, name: str, path: str, status: os.stat_result | None) -> bool:
        """Whether ``name``, found inside ``holder``, is the open file with ``status``, which the user named ``path``.

        Nothing is looked at but in the folders that ``name`` may lead into and in those of ``path``.
        """
        try:
            plain = plain_name(holder.path, name, "backing file")
            if status is None:
                named = os.path.join(os.path.dirname(holder.path), plain)
                return os.path.realpath(named) == os.path.realpath(path)
            found = await self._find(holder, plain, "backing file", beside=(path, os.path.realpath(path)))
        except (BackingChainError, OSError):
            return False
        found.close()
        return _identity(found.status) == _identity(status)

    async def open_given(self, holder: ChainFile, path: str, what: str, *, writable: bool) -> ChainFile:
        """The file at ``path``, which the user named in place of the one that ``holder`` names.

        Raises BackingChainError, also for an OSError, ImageLockedError.
        """
        try:
            identity = (os.path.realpath(path),) if self._opener is not None else _identity(os.stat(path))
            self._enter(holder, identity, path, what)
            return await self.open_image(path, writable=writable)
        except OSError as error:
            raise self._cannot_open(holder, path, what, error) from error

    async def open_named(self, holder: ChainFile, name: str, what: str, *, writable: bool) -> ChainFile:
        """The file that ``holder`` calls ``name``, its ``what`` ("backing file", "data file").

        Raises BackingChainError, also for an OSError, ImageLockedError.
        """
        plain = plain_name(holder.path, name, what)
        path = os.path.join(os.path.dirname(holder.path), plain)
        if self._options.no_backing:
            raise BackingChainError(holder.path, f"names {what} {name}, which --no-backing refuses")
        try:
            if self._opener is not None:
                self._enter(holder, (os.path.realpath(path),), path, what)
                return ChainFile(path, await self._opener(path, writable, self._options))
            found = await self._find(holder, plain, what)
            self._folders.append(found.folder)
            try:
                return await self._open_found(holder, found, path, what, writable=writable)
            finally:
                os.close(found.fd)
        except OSError as error:
            raise self._cannot_open(holder, path, what, error) from error

    async def _open_found(
        self, holder: ChainFile, found: FoundFile, path: str, what: str, *, writable: bool
    ) -> ChainFile:
        self._enter(holder, _identity(found.status), path, what)
        if writable and holder.status is not None and found.status.st_uid != holder.status.st_uid:
            detail = (
                f"its {what} {path} belongs to user {found.status.st_uid}, the image to user {holder.status.st_uid}: "
                f"not opened for writing; {_USER_OPTION[what]} PATH allows it"
            )
            raise BackingChainError(holder.path, detail)

        def opens() -> int:
            return found.open(writable=writable, before_wait=check_stopped)

        fd = await run_blocking(opens)
        file = file_on(fd, path, writable=writable, io_uring=self._options.io_uring)
        storage = await _ready(file, path, writable, self._options)
        return ChainFile(path, storage, found.status, found.folder)

    async def _find(self, holder: ChainFile, name: str, what: str, *, beside: Sequence[str] = ()) -> FoundFile:
        """``beside``: the name may lead to the folders of these paths as well."""
        from ..storage.beneath import OutsideError, UnfitFileError, find_file, open_folder, open_folders

        def find() -> FoundFile:
            if self._allowed is None:
                self._allowed = open_folders(self._options.allow_dirs)
                self._folders += self._allowed
            if holder.folder is None:
                holder.folder = open_folder(os.path.dirname(holder.path))
                self._folders.append(holder.folder)
            others = open_folders(os.path.dirname(path) or "." for path in beside)
            try:
                return find_file(holder.folder, name, [*self._allowed, *others])
            finally:
                for folder in others:
                    folder.close()

        try:
            return await run_blocking(find)
        except OutsideError as error:
            place = name if error.target == name else f"{name} ({error.target})"
            detail = f"names {what} {place}, outside of its own folder: not opened"
            if not error.target.startswith(("/proc/", "/sys/")):
                detail += f"; --allow-dir {os.path.dirname(error.target)} allows it"
                if error.target.startswith("/dev/") and not error.target.startswith("/dev/shm/"):
                    detail += ", if it is a block device"
            raise BackingChainError(holder.path, detail) from error
        except UnfitFileError as error:
            detail = f"names {what} {name}, which is {error.what}: not opened"
            if error.is_block_device:
                detail += f"; {_USER_OPTION[what]} PATH allows it, and --allow-dir for all in a folder"
            raise BackingChainError(holder.path, detail) from error

    def _enter(self, holder: ChainFile, identity: tuple[object, ...], path: str, what: str) -> None:
        if identity in self._seen:
            already = "itself" if what == "data file" else "already"
            raise BackingChainError(holder.path, f"its {what} {path} is part of the chain {already}")
        self._seen.add(identity)

    def _cannot_open(self, holder: ChainFile, path: str, what: str, error: OSError) -> BackingChainError:
        detail = f"cannot open its {what} {path}: {error.strerror or error}"
        if isinstance(error, FileNotFoundError) and what == "data file" and self._options.data_file is None:
            detail += "; if it is elsewhere (QEMU starts from the working directory), say --data-file PATH"
        if error.errno == errno.EROFS:
            detail += "; qcowfuse -r serves the image read-only"
        return BackingChainError(holder.path, detail)


def _identity(status: os.stat_result) -> tuple[object, ...]:
    """What two names of one file have in common."""
    if stat.S_ISBLK(status.st_mode):
        return ("device", status.st_rdev)
    return (status.st_dev, status.st_ino)
