"""A failure that ends the program, as one line for a person."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from ..errors import QcowFuseError
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
        if arguments.image not in text and not text.startswith(arguments.mount_point):
            text = f"{arguments.image}: {text}"
    else:
        detail = " ".join(str(exc).split())
        text = f"unexpected failure, please report it: {type(exc).__name__}: {detail} (--debug shows more)"
    return printable(text)
