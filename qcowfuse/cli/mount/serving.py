"""The process that serves: opens and mounts, tells the starter and systemd, and serves to the end.

1. All that a mount needs is imported here or when the image is opened, before the mount exists. A mount that serves
   imports nothing: the file could lie on that very mount, and memory for it could depend on it.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import sdnotify
import trio

from ...daemon.ending import Notices
from ...daemon.mount_client import MountClient
from ...daemon.mountpoint import MountPoint
from ...daemon.outside import Outside
from ...daemon.outside_process import OutsideProcess
from ...daemon.process import Starter, leave_session
from ...daemon.service import serve
from ...daemon.settings import MountSettings
from ...driver.chain import open_image
from ...driver.image import Image
from ...printable import printable
from .. import logs
from ..exit_codes import ExitCode
from ..passphrase import KeySource
from .arguments import Arguments

if TYPE_CHECKING:
    from ...daemon.metrics_process import MetricsProcess
    from ...driver.overlay import Overlay


def serve_image(
    arguments: Arguments,
    key: KeySource,
    starter: Starter | None,
    on_ready: Callable[[], None],
    *,
    settings: MountSettings,
    place: MountPoint,
    process: OutsideProcess[MountClient],
    metrics: MetricsProcess | None,
) -> None:
    """Serve at ``place`` until unmounted or told to stop. ``starter`` is told when the mount is ready, after
    ``on_ready``.

    Raises what opening, mounting and closing raise.
    """
    notifier = sdnotify.SystemdNotifier()
    stays = starter is not None and starter.lifeline is not None
    syslog = logs.open_syslog() if starter is not None and not stays and arguments.log_file is None else None

    def served() -> None:
        if starter is not None:
            leave_session(keeps_stderr=stays)
            outside.leave_session()

    def ready(description: str) -> None:
        on_ready()
        if starter is not None:
            if syslog is not None:
                logs.log_to(syslog)
            starter.report(ExitCode.OK)
        notifier.notify(f"READY=1\nSTATUS={printable(description)}")

    def waiting(text: str) -> None:
        # An unmount by hand is no order to stop within some minutes: the time for that does not run yet.
        notifier.notify(f"EXTEND_TIMEOUT_USEC=180000000\nSTATUS={printable(text)}")

    def stopping(text: str) -> None:
        notifier.notify(f"STOPPING=1\nSTATUS={printable(text)}")

    options = arguments.open_options._replace(passphrase=key)
    opener: Callable[[], Awaitable[Image]] = functools.partial(
        open_image, arguments.image, options, overlay=_overlay_of(arguments)
    )
    if arguments.partition is not None:
        opener = functools.partial(_open_partition, opener, arguments.partition)
    with Outside(process) as outside:
        trio.run(serve, opener, settings, place, outside, Notices(served, ready, waiting, stopping), metrics)


def _overlay_of(arguments: Arguments) -> Overlay | None:
    """What takes the writes in place of the image."""
    if not arguments.has_overlay:
        return None
    from ...tools.overlay import EphemeralOverlay, KeptOverlay

    if arguments.overlay is None:
        return EphemeralOverlay(arguments.ephemeral or None)
    options = arguments.open_options
    return KeptOverlay(arguments.overlay, writable=not options.read_only, unnamed_format=options.backing_format)


async def _open_partition(open_disk: Callable[[], Awaitable[Image]], wanted: str) -> Image:
    """A partition of the disk that ``open_disk`` opens. Raises what that does, and ImageUsageError."""
    from ...driver.partition_window import open_partition

    disk = await open_disk()
    try:
        return await open_partition(disk, wanted)
    except BaseException:
        with trio.CancelScope(shield=True):
            await disk.aclose()
        raise
