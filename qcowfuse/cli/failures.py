"""A failure that ends the program, as one line for a person."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from ..errors import ImageLockedError, QcowFuseError
from ..printable import printable

if TYPE_CHECKING:
    from .arguments import Arguments


def describe(exc: BaseException, arguments: Arguments) -> str:
    """One line for a person."""
    if isinstance(exc, OSError):
        path = arguments.image if exc.filename is None else os.fsdecode(exc.filename)
        text = f"{path}: {exc.strerror or exc}"
        if exc.errno == errno.EROFS and not arguments.open_options.read_only:
            text += " (-r serves the image read-only)"
    elif isinstance(exc, QcowFuseError):
        text = str(exc)
        if isinstance(exc, ImageLockedError):
            text += _where_mounted(exc.path)
        if arguments.image not in text and not text.startswith(arguments.mount_point):
            text = f"{arguments.image}: {text}"
    else:
        detail = " ".join(str(exc).split())
        text = f"unexpected failure, please report it: {type(exc).__name__}: {detail} (--debug shows more)"
    return printable(text)


def _where_mounted(image: str) -> str:
    """What to do, where it is qcowfuse that holds an image: unmounting here may not be enough."""
    from ..export.mount_users import where_mounted

    here, elsewhere = where_mounted(os.path.abspath(image))
    if here:
        return f" (it is mounted at {here[0]}: fusermount3 -u {here[0]})"
    if elsewhere:
        return f" (it is still mounted at {elsewhere[0]}; end that, or send the holder SIGTERM twice)"
    return ""


def is_interrupt(exc: BaseException) -> bool:
    """Whether this is Ctrl-C; an event loop may have wrapped it."""
    if isinstance(exc, BaseExceptionGroup):
        return all(is_interrupt(part) for part in exc.exceptions)
    return isinstance(exc, KeyboardInterrupt)
