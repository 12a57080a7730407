"""What the user says about files that images name: options, alike for all programs, and the administrator's folders.

1. ``/etc/qcowfuse/qcowfuse.conf`` may hold lines ``allow-dir = DIR``, for bases that are kept in one place. It counts
   only if it belongs to root and nobody else may write to it.
2. What is wrong with that file is a warning: it keeps no image from being opened that needs nothing of it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..driver.options import OpenOptions
from ..errors import ImageUsageError
from ..system.late_logging import LateLogger
from .option_table import Option

if TYPE_CHECKING:
    from types import SimpleNamespace

CONFIGURATION = "/etc/qcowfuse/qcowfuse.conf"
MAX_CONFIGURATION = 1 << 16
"""Bytes of it that are read."""

_BACKING_FORMATS = ("raw", "qcow2", "auto")
_log = LateLogger(__name__)


def backing_format(text: str) -> str:
    """A value of ``--backing-format``. Raises ValueError."""
    if text not in _BACKING_FORMATS:
        raise ValueError(f"{text!r} is not one of raw, qcow2 and auto")
    return text


_GROUP = "names inside images"
NAME_OPTIONS = (
    Option(
        "allow-dir",
        "images may name files in or below this folder, too, not only in or below their own; may be repeated",
        _GROUP,
        metavar="DIR",
        is_repeated=True,
    ),
    Option("backing-file", "the backing file, in place of the one the image names", _GROUP, metavar="PATH"),
    Option("data-file", "the data file, in place of the one the image names", _GROUP, metavar="PATH"),
    Option(
        "backing-format",
        "the format of backing files for which no format is named (raw; refused if it looks like QCOW). auto goes by "
        "the content: never for a raw disk that a guest has written",
        _GROUP,
        metavar="raw|qcow2|auto",
        convert=backing_format,
    ),
    Option("no-backing", "open nothing that the image names", _GROUP),
)
"""The options, for the table of a program."""


def check_names(*, backing_file: str | None, allow_dirs: Sequence[str], no_backing: bool) -> None:
    """Raises ValueError for options that exclude each other."""
    if no_backing and (backing_file is not None or allow_dirs):
        other = "--backing-file" if backing_file is not None else "--allow-dir"
        raise ValueError(f"--no-backing and {other} exclude each other")


def options_of_names(given: SimpleNamespace) -> OpenOptions:
    """What was given of :data:`NAME_OPTIONS`. Raises ImageUsageError."""
    try:
        check_names(backing_file=given.backing_file, allow_dirs=given.allow_dir, no_backing=given.no_backing)
        return OpenOptions(
            backing_file=given.backing_file,
            backing_format=None if given.backing_format is None else backing_format(given.backing_format),
            data_file=given.data_file,
            allow_dirs=(*given.allow_dir, *configured_folders()),
            no_backing=given.no_backing,
        )
    except ValueError as exc:
        raise ImageUsageError(f"{given.image}: {exc}") from exc


def configured_folders(path: str = CONFIGURATION, *, owner: int = 0) -> tuple[str, ...]:
    """The folders that the administrator allows in the file at ``path``; ``owner``: whose it has to be."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        return ()
    except OSError as exc:
        _log.warning("%s: %s; ignored", path, exc.strerror)
        return ()
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != owner or status.st_mode & 0o022:
            _log.warning("%s: not a file of root's that only root may write to; ignored", path)
            return ()
        text = os.fsdecode(file.read(MAX_CONFIGURATION))
    folders: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        name, has_value, value = (part.strip() for part in line.partition("="))
        if not name or name.startswith("#"):
            continue
        if name == "allow-dir" and os.path.isabs(value):
            folders.append(value)
        else:
            expected = "expected allow-dir = DIR, from the root on"
            _log.warning("%s: line %d (%s) means nothing: %s", path, number, name if has_value else line, expected)
    return tuple(folders)
