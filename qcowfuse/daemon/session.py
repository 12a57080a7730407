"""The mount itself: the session of pyfuse3, and what keeps it right until it ends.

1. The size of a root inode (a file mounted over a file) starts as zero in the kernel, and with the write-back
   cache stays so until a setattr tells it. So the served file is truncated to its own size, from outside: that is
   at the same time the proof that the mount answers.
2. Whatever asks the mount is called outside of the daemon (:mod:`.outside`).
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import pyfuse3
import trio

from ..driver.image import Image
from ..errors import MountError
from ..fuse.attributes import Ownership
from ..fuse.libfuse.extended_session import ExtendedSession
from ..fuse.operations import Operations
from ..fuse.request_gate import RequestGate
from . import mountpoint
from .mount_client import MountClient
from .mountpoint import MountBusyError, MountPoint
from .outside import Outside
from .process import captured_stderr
from .record import Record
from .settings import MountSettings

if TYPE_CHECKING:
    from .idle import IdleWatch

MIN_TASKS = 16
MAX_TASKS = 160
"""Workers: one per request in flight; this many at least wait for the next, this many at most run."""

_CHECK_SECONDS = 30.0
_DISCARD_FLUSH_SECONDS = 2.0
_TABLE_SECONDS = 0.1
"""Between two looks at the table of mounts."""
_ABANDON_SECONDS = 5
_BUSY_LOOK_DELAY_SECONDS = 0.5
"""Before a look that would make an unmount fail (rule 3 of :mod:`.served_file`)."""

_log = logging.getLogger(__name__)


class MountSession:
    """One mount of ``image`` at ``place``. ``on_release`` is called when somebody has closed the file;
    it must not block. ``partitions``: by what their names have behind that of the disk; None for the disk alone."""

    def __init__(
        self,
        image: Image,
        place: MountPoint,
        settings: MountSettings,
        outside: Outside[MountClient],
        on_release: Callable[[], None],
        partitions: Mapping[str, Image] | None = None,
    ) -> None:
        self.path = place.path
        self._place = place
        self._file_name = settings.file_name if place.is_folder else None
        self.device = -1
        self.ended = trio.Event()
        self._failure: Exception | None = None
        self._image = image
        self._settings = settings
        self._outside = outside
        self._looks_keep_busy = False
        self._has_discarded = trio.Event()
        gate = RequestGate()
        self._final_ownership = self._ownership()
        self._partitions = partitions or {}
        make: Callable[..., Operations] = Operations
        if partitions is not None:
            from ..fuse.several_files import SeveralFiles

            named = {os.fsencode(f"{settings.file_name}.{name}"): window for name, window in partitions.items()}
            make = functools.partial(SeveralFiles, partitions=named)
        self._operations = make(
            image,
            file_name=os.fsencode(settings.file_name) if place.is_folder else None,
            ownership=self._final_ownership,
            folder_mode=self._folder_mode(),
            mtime_ns=_mtime_ns(image.path),
            gate=gate,
            growable=settings.growable,
            on_release=on_release,
            on_discard=self._note_discard,
        )
        # Two names for one byte must not have a page each: see several_files.
        wants_cache = settings.writeback_cache and not image.read_only and partitions is None
        self._session = ExtendedSession(self._operations, gate, writeback_cache=wants_cache)
        self.idle: IdleWatch | None = None
        if settings.idle_timeout is not None:
            from .idle import IdleWatch

            self.idle = IdleWatch(self._operations, settings.idle_timeout)
        self.is_stopping = False
        # What the mount is a mount of, to others; made before the working directory is another.
        self._image_path = os.path.abspath(settings.image or image.path)
        self._gate = gate
        self._statistics = {"pid": os.getpid(), "since": int(time.time())}
        self._operations.daemon_statistics = lambda: self.statistics

    @property
    def file_path(self) -> str:
        """Where users find the file."""
        return self.path if self._file_name is None else os.path.join(self.path, self._file_name)

    @property
    def n_open(self) -> int:
        """How many have the file open."""
        return self._operations.n_open

    @property
    def description(self) -> str:
        """One line: what is served, how large, where."""
        image = self._image
        access = "read-only" if image.read_only else "read-write"
        return f"{image.path}: {image.format_name}, {image.size} bytes, {access}, at {self.file_path}"

    def mount(self) -> None:
        """Mount. Raises MountError; then there is no mount."""
        options = set(pyfuse3.default_options) | self._settings.fuse_options
        options.add("subtype=qcowfuse")
        options.add("fsname=" + escape_option(self._settings.source or self._image_path))
        if self._image.read_only:
            options.add("ro")
        self._session.prepare()
        said = ""
        with captured_stderr() as captured:
            try:
                self._session.init(self._place.target, options)
            except (RuntimeError, ValueError) as exc:
                said = captured() or str(exc)
        if not self._place.is_in_place:
            self._place.take_back()
            raise MountError(f"{self.path}: the mount point was moved or replaced while the image was opened")
        if said:
            raise MountError(f"{self.path}: mounting failed: {_one_line(said)}")
        self._session.report()
        self.device = self._place.device_on_top()
        self._place.close()

    async def answer_requests(self, nursery: trio.Nursery) -> None:
        """Answer until the connection is closed; sets :attr:`ended`. ``nursery`` is closed before the session."""
        try:
            await self._session.main(MIN_TASKS, MAX_TASKS, nursery)
        except Exception as exc:
            _log.critical("serving failed, the mount is dead now", exc_info=exc)
            self._failure = exc
        finally:
            self.ended.set()

    @property
    def statistics(self) -> dict[str, int]:
        """Counters of the daemon, beside those of the image. ``since``: seconds since the epoch; ``open_files``: how
        many have the file open; ``waiting_requests``: those that wait for the image, or for their turn."""
        now = {
            "stopping": int(self.is_stopping),
            "open_files": self.n_open,
            "waiting_requests": self._gate.n_slow + len(self._gate.elsewhere),
        }
        return self._statistics | now | self._session.statistics()

    @property
    def record(self) -> Record:
        """What others may read where the mount can't be asked."""
        return Record(self._image_path, self.path, self.file_path, self.device, self._statistics["since"])

    def add_statistics(self, statistics: dict[str, int]) -> None:
        """Show these as well, as extended attributes and in the log."""
        self._statistics |= statistics

    async def check(self) -> None:
        """See from outside that the mount answers, and tell the kernel the size. Raises MountError."""
        problem = f"no answer within {_CHECK_SECONDS:g} seconds"
        with trio.move_on_after(_CHECK_SECONDS):
            try:
                await self._check_from_outside()
                _log.debug("%s", self._session)  # by now INIT has been answered
                mountpoint.raise_read_ahead(self.device)  # only now: the answer to INIT sets it
                return
            except OSError as exc:
                problem = str(exc)
        raise MountError(f"{self.path}: mounted, but does not serve: {problem}")

    async def _check_from_outside(self) -> None:
        if self.device < 0 or await self._outside.run(MountClient.adopt) != self.device:
            raise OSError("it is not in the table of mounts")
        tells_size = self._operations.enable_writeback_cache
        is_free = await self._outside.run(MountClient.check_served, self._image.size, tells_size)
        self._looks_keep_busy = not is_free

    def _ownership(self) -> Ownership:
        settings = self._settings
        readable_only = self._image.read_only
        if settings.umask is None:
            mode = 0o400 if readable_only else 0o600
        else:
            mode = (0o444 if readable_only else 0o666) & ~settings.umask
        return Ownership(
            uid=os.getuid() if settings.uid is None else settings.uid,
            gid=os.getgid() if settings.gid is None else settings.gid,
            mode=mode,
        )

    def _folder_mode(self) -> int:
        if self._settings.umask is None and "allow_other" in self._settings.fuse_options:
            # Others were let in: whether they get to the file is for its mode to say, which can be changed.
            return 0o755
        mode = self._final_ownership.mode
        return mode | (mode & 0o444) >> 2  # a user who may read the file may enter the folder

    def begin_rest(self) -> None:
        """From now on there is nothing to do but to answer requests."""
        self._gate.may_rest = True

    async def repair_size(self) -> None:
        """Put the kernel's idea of the size right, whenever it may be wrong, and have it send data when asked."""
        self._operations.unsent.serve(self._write_back_pages)
        await self._operations.watch_sizes(self._mend)

    async def _mend(self, n_bytes: int, *, lowers: bool, syncs: bool, forgets: bool) -> None:
        if self._looks_keep_busy and (lowers or forgets):
            # A user whose copy has just failed may unmount at once: this look comes after that.
            await trio.sleep(_BUSY_LOOK_DELAY_SECONDS)
        if not (self._operations.enable_writeback_cache or forgets):
            # The kernel believes attributes then, but not during a truncation: reads would end too early meanwhile.
            await self._outside.run(MountClient.look_at_served)
            return
        await self._outside.run(MountClient.mend_served, n_bytes, lowers, syncs, forgets)

    async def _write_back_pages(self) -> bool:
        # A call that goes on may wait for the lock that the asker holds.
        if self._looks_keep_busy or self._outside.is_busy:
            return False
        await self._outside.run(MountClient.write_back_served)
        return True

    def _note_discard(self) -> None:
        self._has_discarded.set()

    async def flush_discards(self) -> None:
        """Discarded space goes back to the host with a flush, and not every file system sends one after fstrim."""
        while True:
            await self._has_discarded.wait()
            await trio.sleep(_DISCARD_FLUSH_SECONDS)
            self._has_discarded = trio.Event()
            with suppress(Exception):  # the next sync reports it
                await self._image.flush()

    async def count_allocated(self) -> None:
        """Have the image find out what ``du`` should say."""
        try:
            await self._image.count_allocated()
            for window in self._partitions.values():
                await window.count_allocated()
        except Exception as exc:
            _log.warning("what is allocated could not be counted: %s", exc)

    async def sync(self) -> None:
        """Write back and flush what there is; failures are in the log already."""
        if self._image.read_only:
            return
        try:
            await self._outside.run(MountClient.sync_served)
        except OSError:
            with suppress(Exception):
                await self._image.flush()

    async def sync_by_any_means(self) -> None:
        """The same for a mount that is gone from here, of which others may keep us away."""
        if not self._image.read_only:
            with suppress(OSError):
                await self._outside.run(MountClient.sync_everything)

    async def users(self) -> str:
        """Who uses the mount, for a message; a look that takes long is given up."""
        with trio.move_on_after(2):
            return await self._outside.run(MountClient.users)
        return "someone"

    def is_mounted(self) -> bool:
        """Whether this namespace still has the mount."""
        return bool(mountpoint.mounts_of(self.device))

    async def until_unmounted(self) -> None:
        """Return when this namespace has the mount no more."""
        table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        try:
            while self.is_mounted():
                # The kernel tells of a change as if it were an error of the descriptor (proc_pid_mountinfo(5)).
                await trio.lowlevel.wait_writable(table)
                await trio.sleep(_TABLE_SECONDS)
        finally:
            os.close(table)

    async def abandon(self) -> None:
        """Take a mount away that never became ready; from the processes that use it already as well."""
        if self.device < 0 or self.ended.is_set():
            return
        with trio.move_on_after(_ABANDON_SECONDS), suppress(MountError):
            try:
                await self._outside.run(MountClient.unmount)
            except MountBusyError:
                await self._outside.run(MountClient.unmount, True)

    def check_end(self) -> None:
        """After the loop has ended: raise MountError when that was no unmount (rule 4 of :mod:`.service`)."""
        if self._failure is not None:
            raise MountError(f"{self.path}: serving failed: {self._failure!r}") from self._failure
        if self.is_mounted():
            raise MountError(
                f"{self.path}: the FUSE connection was aborted; the mount is dead (fusermount3 -u removes it)"
            )


def escape_option(text: str) -> str:
    """``text`` as libfuse wants it in an option: all but plain characters as a backslash and three octal digits."""
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+=:@%"
    return "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in os.fsencode(text))


def _mtime_ns(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return time.time_ns()


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
