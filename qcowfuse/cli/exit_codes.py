"""Exit codes, and which exception ends in which."""

from __future__ import annotations

from enum import IntEnum

from ..errors import (
    BackingChainError,
    FormatError,
    ImageLockedError,
    ImageUsageError,
    MountError,
    QcowFuseError,
)
from .failures import lacks_memory


class ExitCode(IntEnum):
    """What the shell sees; part of the interface."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    IMAGE = 3
    LOCKED = 4
    MOUNT = 5
    SYSTEM = 6


EXPLANATIONS: dict[ExitCode, str] = {
    ExitCode.OK: "it serves; with -f: it served and ended cleanly, everything is in the image",
    ExitCode.UNEXPECTED: "an unexpected failure, a bug in qcowfuse",
    ExitCode.USAGE: "the arguments are wrong",
    ExitCode.IMAGE: "no QCOW image, damaged, not supported, names a file that it can't have; or the key is wrong",
    ExitCode.LOCKED: "another process holds the image; umount: something uses the disk",
    ExitCode.MOUNT: "the mount point or FUSE cannot be used, or the mount broke",
    ExitCode.SYSTEM: "the system refused an access to the image (permissions, no such file, I/O error)",
}

_BY_EXCEPTION: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (FormatError, ExitCode.IMAGE),
    (BackingChainError, ExitCode.IMAGE),
    (ImageLockedError, ExitCode.LOCKED),
    (ImageUsageError, ExitCode.IMAGE),
    (MountError, ExitCode.MOUNT),
    (QcowFuseError, ExitCode.IMAGE),
    (OSError, ExitCode.SYSTEM),
)


def exit_code_of(exc: BaseException) -> ExitCode:
    """The code for an exception that ends the program."""
    for kind, code in _BY_EXCEPTION:
        if isinstance(exc, kind):
            return code
    return ExitCode.SYSTEM if lacks_memory(exc) else ExitCode.UNEXPECTED
