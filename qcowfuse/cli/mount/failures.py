"""A failure that ends qcowfuse, as one line for a person."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from ...errors import MountError, QcowFuseError, StoppedEarlyError
from ...printable import printable
from ..failures import describe_known, lacks_memory

if TYPE_CHECKING:
    from .arguments import Arguments


def describe(exc: BaseException, arguments: Arguments, *, has_served: bool = False) -> str:
    """One line for a person. ``has_served``: it is no failure to start, and nothing is looked for: a daemon in its
    sandbox can neither open the image by its name nor import anything."""
    if isinstance(exc, StoppedEarlyError):
        text = f"{arguments.image}: {exc}"
    elif isinstance(exc, MountError):
        text = str(exc)  # it names the place
        if not has_served and not os.path.lexists(arguments.image):
            from ..near_misses import verb_meant

            text += verb_meant(arguments.image)
    elif isinstance(exc, OSError) and has_served:
        text = f"{arguments.image}: {exc.strerror or exc}"
    elif isinstance(exc, QcowFuseError) and has_served:
        text = str(exc) if arguments.image in str(exc) else f"{arguments.image}: {exc}"
    elif isinstance(exc, OSError | QcowFuseError) or (lacks_memory(exc) and not has_served):
        text = describe_known(exc, arguments.image)
        if isinstance(exc, OSError) and exc.errno == errno.EROFS and not _is_only_read(arguments):
            text += " (-r serves the image read-only)"
        if isinstance(exc, OSError) and exc.errno == errno.ENOSPC and arguments.is_ephemeral:
            text += " (another folder for what is written to the disk: --ephemeral=/var/tmp)"
        if isinstance(exc, FileNotFoundError) and exc.filename == arguments.image:
            from ..near_misses import verb_meant

            text += verb_meant(arguments.image)
        if _look_swapped(arguments.image, arguments.mount_point):
            text += " (IMAGE comes first: qcowfuse IMAGE MOUNTPOINT)"
    else:
        detail = " ".join(str(exc).split())
        text = f"unexpected failure, please report it: {type(exc).__name__}: {detail} (--debug shows more)"
    return printable(text)


def _is_only_read(arguments: Arguments) -> bool:
    return arguments.open_options.read_only or arguments.has_overlay


def _look_swapped(image: str, mount_point: str) -> bool:
    """Whether the mount point is an image, and what is called the image can't be one."""
    if os.path.isfile(image):
        from ..other_formats import is_qcow

        return is_qcow(mount_point) and not is_qcow(image)
    return os.path.isdir(image) and os.path.isfile(mount_point)
