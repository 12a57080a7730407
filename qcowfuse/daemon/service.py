"""Serves one open image at a mount point, from opening to closing: the life of the daemon.

1. Ready means: mounted, and seen to answer from outside. Whatever fails before that is raised, and leaves nothing.
2. The end is always an unmount that the kernel has completed: by the user's hand, or by ours after SIGTERM or
   SIGINT (in the foreground also SIGHUP). Requests are answered until the kernel closes the connection, so
   that an unmount can write back all that the page cache holds. Then the image is flushed and closed.
3. A stop signal while the file is in use (a loop device, a virtual machine) takes nothing away: a forced or lazy
   unmount would cut off the last writes of the processes that use it. What happens then is in :mod:`.ending`.
4. After a failure (an exception, a connection aborted from outside) the mount stays, and answers ENOTCONN: an
   empty folder in its place would be mistaken for the disk. The image is flushed and closed all the same.
"""

from __future__ import annotations

import functools
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

import pyfuse3
import trio

from ..driver.image import Image
from ..errors import MountError, StoppedEarlyError
from .ending import Ending, Notices, Stop
from .mount_client import MountClient
from .mountpoint import MountBusyError, MountPoint
from .outside import Outside
from .process import STOP_SIGNALS, become_io_flusher, become_user, stop_signals_let_through
from .record import RecordWriter, State
from .sandbox import enter_sandbox
from .session import MountSession
from .settings import MountSettings

if TYPE_CHECKING:
    from .idle import IdleWatch
    from .metrics_process import MetricsProcess

_log = logging.getLogger(__name__)


async def serve(
    open_image: Callable[[], Awaitable[Image]],
    settings: MountSettings,
    place: MountPoint,
    outside: Outside[MountClient],
    notices: Notices | None = None,
    metrics: MetricsProcess | None = None,
) -> None:
    """Open, mount at ``place``, and serve until unmounted or told to stop; returns after a clean end.

    Raises MountError (StoppedEarlyError), and what ``open_image`` and ``Image.aclose`` raise. Runs in the main
    thread only, once per process.
    """
    stop = Stop()
    failure: Exception | None = None
    service = _Service(settings, place, outside, notices or Notices(), stop, metrics)
    with trio.open_signal_receiver(*STOP_SIGNALS, signal.SIGUSR1, signal.SIGHUP) as signals:
        with stop_signals_let_through():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.watch_signals, signals)
                nursery.start_soon(service.watch_lifeline)
                try:
                    await service.run(open_image)
                except Exception as exc:
                    failure = exc
                nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class _Service:
    def __init__(
        self,
        settings: MountSettings,
        place: MountPoint,
        outside: Outside[MountClient],
        notices: Notices,
        stop: Stop,
        metrics: MetricsProcess | None,
    ) -> None:
        self._settings = settings
        self._place = place
        self._outside = outside
        self._notices = notices._replace(
            waiting=self._noting(State.WAITING, notices.waiting),
            stopping=self._noting(State.STOPPING, notices.stopping),
        )
        self._stop = stop
        self._metrics: Callable[[dict[str, str], Callable[[], dict[str, int]]], Awaitable[None]] | None = None
        if metrics is not None:
            from .metrics import answer_metrics

            self._metrics = functools.partial(answer_metrics, metrics)
        self._image: Image | None = None
        self._mount: MountSession | None = None
        self._record: RecordWriter | None = None

    def _noting(self, state: State, tell: Callable[[str], None]) -> Callable[[str], None]:
        def note_and_tell(text: str) -> None:
            self._note(state, text)
            tell(text)

        return note_and_tell

    def _note(self, state: State, detail: str = "") -> None:
        if self._record is not None:
            self._record.note(state, detail)

    async def watch_signals(self, signals: AsyncIterator[int]) -> None:
        """Turn signals into what rules 2 and 3 say; SIGUSR1 prints the statistics."""
        async for number in signals:
            if number == signal.SIGUSR1:
                self._log_statistics()
            elif number in STOP_SIGNALS or self._settings.ends_on_hangup:
                self._stop.request(signal.Signals(number).name)

    async def watch_lifeline(self) -> None:
        """The end of a starter that stays is an order to stop."""
        if self._settings.lifeline is not None:
            await trio.lowlevel.wait_readable(self._settings.lifeline)
            self._stop.request("the end of its starter")

    def _log_statistics(self) -> None:
        if self._image is None:
            return
        try:
            values = self._statistics()
        except Exception as exc:
            _log.error("no statistics: %s", exc)
            return
        _log.info("statistics: %s", " ".join(f"{name}={value}" for name, value in values.items()))

    def _statistics(self) -> dict[str, int]:
        values = {} if self._image is None else self._image.statistics()
        return values if self._mount is None else values | self._mount.statistics

    async def run(self, open_image: Callable[[], Awaitable[Image]]) -> None:
        become_io_flusher()
        with self._stop.early:
            self._image = await open_image()
        if self._image is None:
            raise StoppedEarlyError(f"stopped by {self._stop.reason} before the image was open")
        failure: Exception | None = None
        try:
            await self._serve_image(self._image)
        except Exception as exc:
            failure = exc
        try:
            with trio.CancelScope(shield=True):
                await self._image.aclose()
        except Exception as exc:
            _log.error("the image could not be closed cleanly: %s", exc)
            self._note(State.FAILED, f"the image could not be closed cleanly: {exc}")
            if failure is None:
                raise
        if failure is not None:
            self._note(State.FAILED, str(failure))
            raise failure
        self._note(State.CLOSED)
        _log.info("%s: closed", self._image.path)

    async def _serve_image(self, image: Image) -> None:
        if self._stop.reason is not None:
            raise StoppedEarlyError(f"stopped by {self._stop.reason} before the image was mounted")
        partitions = None
        if self._settings.serves_partitions:
            from ..driver.partition_window import partition_windows

            if not self._place.is_folder:
                raise MountError(f"{self._place.path}: partitions are files beside the disk: mount at a folder")
            partitions = await partition_windows(image)
        mount = self._mount = MountSession(
            image, self._place, self._settings, self._outside, self._stop.nudge, partitions
        )
        mount.mount()
        failure: Exception | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mount.answer_requests, nursery)
                try:
                    await mount.check()
                    if self._stop.reason is not None:
                        raise StoppedEarlyError(f"stopped by {self._stop.reason} before it served")
                    self._record = RecordWriter(mount.record)  # before the sandbox
                    self._notices.served()
                    await self._settle(mount)
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

    async def _settle(self, mount: MountSession) -> None:
        """Give up what it took to get here."""
        if self._settings.user is not None:
            become_user(self._settings.user)
        if self._settings.uses_sandbox:
            sandbox = await enter_sandbox()
            if sandbox.is_incomplete:
                _log.warning("the sandbox is incomplete: %s", sandbox)
            else:
                _log.debug("sandbox: %s", sandbox)
            mount.add_statistics(sandbox.statistics())

    async def _wait_for_end(self, mount: MountSession) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount.repair_size)
            nursery.start_soon(mount.flush_discards)
            if self._settings.counts_allocated:
                nursery.start_soon(mount.count_allocated)
            if mount.idle is not None:
                nursery.start_soon(self._unmount_when_idle, mount, mount.idle)
            if self._metrics is not None:
                labels = {"image": mount.record.image, "file": mount.record.file}
                nursery.start_soon(self._metrics, labels, self._statistics)
            nursery.start_soon(self._end, mount)
            await trio.lowlevel.checkpoint()  # all of these have begun
            mount.begin_rest()
            await mount.ended.wait()
            self._notices.stopping("unmounted, closing the image")
            self._note(State.CLOSING)
            nursery.cancel_scope.cancel()

    async def _unmount_when_idle(self, mount: MountSession, idle: IdleWatch) -> None:
        while True:
            await idle.until_idle()
            # Once it is unmounted, there may be no time to say so.
            _log.info("%s: idle for %g seconds, unmounting", mount.path, idle.seconds)
            try:
                await self._outside.run(MountClient.unmount)
            except MountBusyError:  # somebody stands in it, or has just come
                _log.info("%s: in use, not unmounted", mount.path)
                idle.note_use()
            except MountError as exc:
                _log.warning("%s: idle, but cannot be unmounted: %s", mount.path, exc)
                idle.note_use()
            else:
                return

    async def _end(self, mount: MountSession) -> None:
        await Ending(mount, self._outside, self._notices, self._stop).run()
        mount.ended.set()
