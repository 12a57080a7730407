"""Serves one open image at a mount point, from opening to closing: the life of the daemon.

1. Ready means: mounted, and seen to answer from outside. Whatever fails before that is raised, and leaves nothing.
2. The size of a root inode (a file mounted over a file) starts as zero in the kernel, and with the write-back
   cache stays so until a setattr tells it. So the served file is truncated to its own size, from outside: that is
   at the same time the proof that the mount answers.
3. The end is always an unmount that the kernel has completed: by the user's hand, or by ours after SIGTERM or
   SIGINT (in the foreground also SIGHUP). Requests are answered until the kernel closes the connection, so
   that an unmount can write back all that the page cache holds. Then the image is flushed and closed.
4. A stop signal while the file is in use (a loop device, a virtual machine) takes nothing away: a forced or lazy
   unmount would cut off the last writes of whoever uses it. What the kernel holds back is written and flushed at
   once, the log says who uses the file, and the service goes on, flushing as it waits, until it is used no
   longer; then it ends. Another stop signal makes it try again. If it is killed meanwhile (systemd does that
   after TimeoutStopSec), all but the last second or so of what had reached the served file is durable.
5. After a failure (an exception, a connection aborted from outside) the mount stays, and answers ENOTCONN: an
   empty folder in its place would be mistaken for the disk. The image is flushed and closed all the same.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple

import pyfuse3
import trio

from ..driver.image import Image
from ..errors import MountError
from . import mountpoint
from .at_once import AtOnce
from .extra_operations import ExtraOperations
from .mountpoint import MountBusyError
from .operations import Operations, Ownership
from .outside import Outside
from .poll_first import PollFirstTrio, RequestGate
from .process import become_io_flusher, captured_stderr
from .session_hook import SessionHook

MIN_TASKS = 16
MAX_TASKS = 160
"""Workers: one per request in flight; this many at least wait for the next, this many at most run."""

_CHECK_SECONDS = 30.0
_BUSY_RETRY_SECONDS = 1.0
_DISCARD_FLUSH_SECONDS = 2.0
_BUSY_LOG_SECONDS = 60.0
_STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})

_log = logging.getLogger(__name__)


class StoppedEarlyError(MountError):
    """A signal asked for the end before the mount was ready."""


class MountSettings(NamedTuple):
    """Where and how to serve. ``fuse_options`` are libfuse's own, as they would stand after its ``-o``.

    ``counts_allocated`` False leaves out the count of what is allocated, which reads all L2 tables in the
    background: for measurements. ``growable``: truncating to more, and writing past the end, makes the disk larger.
    ``uid``, ``gid`` and ``umask`` None: the user who mounts, and mode 0600.
    """

    mount_point: str
    file_name: str = "disk.raw"
    fuse_options: frozenset[str] = frozenset()
    source: str | None = None
    writeback_cache: bool = True
    allow_non_empty: bool = False
    uid: int | None = None
    gid: int | None = None
    umask: int | None = None
    ends_on_hangup: bool = False
    counts_allocated: bool = True
    growable: bool = False


def _no_notice(_: str) -> None:
    return None


class Notices(NamedTuple):
    """What the surroundings want to hear, each with a line for a person. They are called in the trio thread."""

    ready: Callable[[str], None] = _no_notice
    stopping: Callable[[str], None] = _no_notice


class _Stop:
    """What the signals have asked for."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.wake = trio.Event()
        self.early = trio.CancelScope()

    def request(self, reason: str) -> None:
        self.reason = reason
        self.wake.set()
        self.early.cancel()

    def nudge(self) -> None:
        """Have another look at once, if a stop is under way."""
        if self.reason is not None:
            self.wake.set()


async def serve(
    open_image: Callable[[], Awaitable[Image]],
    settings: MountSettings,
    outside: Outside,
    notices: Notices | None = None,
) -> None:
    """Open, mount and serve until unmounted or told to stop; returns after a clean end.

    Raises MountError (StoppedEarlyError), and what ``open_image`` and ``Image.aclose`` raise. Runs in the main
    thread only, once per process.
    """
    stop = _Stop()
    failure: Exception | None = None
    service = _Service(settings, outside, notices or Notices(), stop)
    with trio.open_signal_receiver(*_STOP_SIGNALS, signal.SIGUSR1, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.watch_signals, signals)
            try:
                await service.run(open_image)
            except Exception as exc:
                failure = exc
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class _Service:
    def __init__(self, settings: MountSettings, outside: Outside, notices: Notices, stop: _Stop) -> None:
        self._settings = settings
        self._outside = outside
        self._notices = notices
        self._stop = stop
        self._image: Image | None = None
        self._mount: _Mount | None = None

    async def watch_signals(self, signals: AsyncIterator[int]) -> None:
        """Turn signals into what rule 3 says; SIGUSR1 prints the statistics."""
        async for number in signals:
            if number == signal.SIGUSR1:
                self._log_statistics()
            elif number in _STOP_SIGNALS or self._settings.ends_on_hangup:
                self._stop.request(signal.Signals(number).name)

    def _log_statistics(self) -> None:
        if self._image is None:
            return
        try:
            values = self._image.statistics()
        except Exception as exc:
            _log.error("no statistics: %s", exc)
            return
        _log.info("statistics: %s", " ".join(f"{name}={value}" for name, value in values.items()))

    async def run(self, open_image: Callable[[], Awaitable[Image]]) -> None:
        mountpoint.check_fuse()
        path = mountpoint.check_mount_point(
            self._settings.mount_point, allow_non_empty=self._settings.allow_non_empty
        )
        become_io_flusher()
        with self._stop.early:
            self._image = await open_image()
        if self._image is None:
            raise StoppedEarlyError(f"stopped by {self._stop.reason} before the image was open")
        failure: Exception | None = None
        try:
            await self._serve_image(self._image, path)
        except Exception as exc:
            failure = exc
        try:
            with trio.CancelScope(shield=True):
                await self._image.aclose()
        except Exception as exc:
            _log.error("the image could not be closed cleanly: %s", exc)
            if failure is None:
                raise
        if failure is not None:
            raise failure
        _log.info("%s: closed", self._image.path)

    async def _serve_image(self, image: Image, path: str) -> None:
        if self._stop.reason is not None:
            raise StoppedEarlyError(f"stopped by {self._stop.reason} before the image was mounted")
        mount = self._mount = _Mount(image, path, self._settings, self._outside, self._stop)
        mount.mount()
        failure: Exception | None = None
        try:
            async with trio.open_nursery() as nursery:
                mount.extra.nursery = nursery
                nursery.start_soon(mount.answer_requests)
                try:
                    await mount.check()
                    self._notices.ready(mount.description)
                    _log.info("%s", mount.description)
                    await self._wait_for_end(mount)
                except Exception as exc:
                    failure = exc
                    await mount.abandon()
                nursery.cancel_scope.cancel()
        finally:
            pyfuse3.close(unmount=False)
        if failure is not None:
            raise failure
        mount.check_end()

    async def _wait_for_end(self, mount: _Mount) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount.repair_size)
            nursery.start_soon(mount.flush_discards)
            if self._settings.counts_allocated:
                nursery.start_soon(mount.count_allocated)
            nursery.start_soon(self._unmount_when_told, mount)
            await mount.ended.wait()
            nursery.cancel_scope.cancel()

    async def _unmount_when_told(self, mount: _Mount) -> None:
        stop = self._stop
        await stop.wake.wait()
        self._notices.stopping(f"stopping ({stop.reason})")
        _log.info("%s: stopping (%s)", mount.path, stop.reason)
        last_notice, noticed = -math.inf, ""
        while True:
            stop.wake = trio.Event()
            try:
                await self._outside.run(mountpoint.unmount, mount.device)
                await trio.sleep(_BUSY_RETRY_SECONDS)  # cancelled when the kernel closes the connection
                users = "whoever held it open when it was detached, or another mount namespace"
            except MountBusyError:
                users = await mount.users()
            except MountError as exc:
                users = str(exc)
            await mount.sync()
            now = trio.current_time()
            if users != noticed or now - last_notice >= _BUSY_LOG_SECONDS:
                _log.warning("%s: still in use by %s; it ends when it is free", mount.path, users)
                self._notices.stopping(f"stopping, still in use by {users}")
                last_notice, noticed = now, users
            with trio.move_on_after(_BUSY_RETRY_SECONDS):
                await stop.wake.wait()


class _Mount:
    """The mount itself: the session of pyfuse3 and what keeps it right."""

    def __init__(self, image: Image, path: str, settings: MountSettings, outside: Outside, stop: _Stop) -> None:
        is_folder = os.path.isdir(path)
        self.path = path
        self.file_path = os.path.join(path, settings.file_name) if is_folder else path
        self.device = -1
        self.ended = trio.Event()
        self._failure: Exception | None = None
        self._image = image
        self._settings = settings
        self._outside = outside
        self._size_is_wrong = trio.Event()
        self._has_discarded = trio.Event()
        self._gate = RequestGate()
        self._final_ownership = self._ownership()
        self._operations = Operations(
            image,
            file_name=os.fsencode(settings.file_name) if is_folder else None,
            ownership=self._final_ownership,
            mtime_ns=_mtime_ns(image.path),
            gate=self._gate,
            growable=settings.growable,
            on_write_past_end=self._note_wrong_size,
            on_release=stop.nudge,
            on_discard=self._note_discard,
        )

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
        options.add("fsname=" + escape_option(self._settings.source or os.path.abspath(self._image.path)))
        if self._image.read_only:
            options.add("ro")
        self.extra = ExtraOperations(self._operations)
        hook = self._hook = SessionHook(self.extra)  # kept, since libfuse holds addresses of what it owns
        before = mountpoint.device_at(self.path)
        said = ""
        with captured_stderr() as captured:
            try:
                with hook.active():
                    pyfuse3.init(self._operations, self.path, options)
            except (RuntimeError, ValueError) as exc:
                said = captured() or str(exc)
        if said:
            raise MountError(f"{self.path}: mounting failed: {_one_line(said)}")
        if hook.refusal is not None:
            _log.warning(
                "FUSE session not tuned, slower and without discard (no write-back cache either): %s", hook.refusal
            )
        self._operations.enable_writeback_cache = (
            self._settings.writeback_cache and not self._image.read_only and hook.refusal is None
        )
        pyfuse3.trio = PollFirstTrio(self._gate)  # type: ignore[attr-defined]
        # Newest last. The kernel numbers file systems without a device by itself, so `before` can't be ours.
        ours = [m for m in mountpoint.mount_table() if m.path == self.path and m.device != before]
        if ours and ours[-1].file_system == mountpoint.FILE_SYSTEM_TYPE:
            self.device = ours[-1].device

    async def answer_requests(self) -> None:
        """Answer until the connection is closed; sets :attr:`ended`."""
        try:
            with AtOnce(self._operations, self._gate).active():
                await pyfuse3.main(MIN_TASKS, MAX_TASKS)
        except Exception as exc:
            _log.critical("serving failed, the mount is dead now", exc_info=exc)
            self._failure = exc
        finally:
            self.ended.set()

    async def check(self) -> None:
        """See from outside that the mount answers, and tell the kernel the size. Raises MountError."""
        problem = f"no answer within {_CHECK_SECONDS:g} seconds"
        with trio.move_on_after(_CHECK_SECONDS):
            try:
                await self._check_from_outside()
                mountpoint.raise_read_ahead(self.device)  # only now: the answer to INIT sets it
                return
            except OSError as exc:
                problem = str(exc)
        raise MountError(f"{self.path}: mounted, but does not serve: {problem}")

    async def _check_from_outside(self) -> None:
        if self.device < 0:
            raise OSError("it is not in the table of mounts")
        tells_size = self._operations.enable_writeback_cache
        await self._outside.run(mountpoint.check_served, self.file_path, self.device, self._image.size, tells_size)

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

    def _note_wrong_size(self) -> None:
        self._size_is_wrong.set()

    async def repair_size(self) -> None:
        """Put the kernel's idea of the size right after writes past the end, whenever there were some."""
        while True:
            await self._size_is_wrong.wait()
            self._size_is_wrong = trio.Event()
            try:
                await self._outside.run(mountpoint.tell_size, self.file_path, self.device, self._image.size)
            except OSError as exc:
                _log.warning("the size that the kernel shows may be wrong: %s", exc)

    def _note_discard(self) -> None:
        self._has_discarded.set()

    async def flush_discards(self) -> None:
        """Discarded space goes back to the host with a flush, and not every file system sends one after fstrim."""
        while True:
            await self._has_discarded.wait()
            await trio.sleep(_DISCARD_FLUSH_SECONDS)
            self._has_discarded = trio.Event()
            with suppress(Exception):  # whoever syncs next hears of it
                await self._image.flush()

    async def count_allocated(self) -> None:
        """Have the image find out what ``du`` should say."""
        try:
            await self._image.count_allocated()
        except Exception as exc:
            _log.warning("what is allocated could not be counted: %s", exc)

    async def sync(self) -> None:
        """Write back and flush what there is; failures are in the log already."""
        if self._image.read_only:
            return
        try:
            await self._outside.run(mountpoint.sync_served, self.file_path, self.device)
        except OSError:
            with suppress(Exception):
                await self._image.flush()

    async def users(self) -> str:
        """Who uses the mount, for a message; a look that takes long is given up."""
        with trio.move_on_after(2):
            return await self._outside.run(mountpoint.users_of, self.file_path, self.device)
        return "someone"

    def is_mounted(self) -> bool:
        """Whether this namespace still has the mount."""
        return bool(mountpoint.mounts_of(self.device))

    async def abandon(self) -> None:
        """Take a mount away that never became ready."""
        if self.device >= 0 and not self.ended.is_set():
            with trio.move_on_after(5), suppress(MountError):
                await self._outside.run(mountpoint.unmount, self.device)

    def check_end(self) -> None:
        """After the loop has ended: raise MountError when that was no unmount (rule 5)."""
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
