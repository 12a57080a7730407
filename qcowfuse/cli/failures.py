"""A failure that ends a program, in words for a person."""

from __future__ import annotations

import os

from ..errors import FormatError, ImageLockedError, QcowFuseError


def describe_known(exc: OSError | QcowFuseError, image: str) -> str:
    """What was met with ``image``, for any program, not yet printable."""
    if isinstance(exc, OSError):
        path = image if exc.filename is None else os.fsdecode(exc.filename)
        return f"{path}: {exc.strerror or exc}"
    text = str(exc)
    if isinstance(exc, ImageLockedError):
        text += _where_mounted(exc.path)
    if isinstance(exc, FormatError):
        from .other_formats import what_it_is

        found = what_it_is(image)
        if found is not None:
            return f"{image}: is {found}"
    return text if image in text else f"{image}: {text}"


def _where_mounted(image: str) -> str:
    """What to do, where it is qcowfuse that holds an image: unmounting here may not be enough."""
    from ..daemon.mount_users import where_mounted

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
