"""A failure that ends a program, in words for a person."""

from __future__ import annotations

import errno
import os

from ..errors import BackingChainError, FormatError, ImageLockedError


def describe_known(exc: BaseException, image: str) -> str:
    """What was met with ``image``, for any program, not yet printable. An OSError, a QcowFuseError, or one of which
    :func:`lacks_memory` is true."""
    if isinstance(exc, OSError):
        return describe_os_error(exc, image)
    if lacks_memory(exc):
        return f"{image}: not enough memory, or too many processes (ulimit -v and ulimit -u say how much is allowed)"
    text = str(exc)
    if isinstance(exc, ImageLockedError):
        text += _where_mounted(exc.path)
    if isinstance(exc, FormatError):
        found = _what_it_is(image)
        if found:
            return f"{image}: {found}"
    if isinstance(exc, BackingChainError) and isinstance(exc.__cause__, FormatError):
        text = text.replace(str(exc.__cause__), _what_it_is(exc.path) or str(exc.__cause__))
    return text if image in text else f"{image}: {text}"


def describe_os_error(exc: OSError, place: str) -> str:
    """The place, ``place`` where the failure names none, and the system's reason."""
    if exc.errno == errno.EMFILE:  # which file was one too many says nothing
        return f"{place}: {exc.strerror}: no more than {os.sysconf('SC_OPEN_MAX')} are allowed here (ulimit -n)"
    path = place if exc.filename is None else os.fsdecode(exc.filename)
    is_url = exc.errno == errno.ENOENT and ("://" in path or path.startswith("json:"))
    return f"{path}: {exc.strerror or exc}{' (a local path is expected, no URL)' if is_url else ''}"


def _what_it_is(path: str) -> str:
    from .other_formats import what_it_is

    found = what_it_is(path)
    return f"is {found}" if found is not None else ""


def lacks_memory(exc: BaseException) -> bool:
    """Whether the system gave no memory, or no thread; an event loop may have wrapped that."""
    if isinstance(exc, BaseExceptionGroup):
        return any(lacks_memory(part) for part in exc.exceptions)
    return isinstance(exc, MemoryError) or (isinstance(exc, RuntimeError) and "start new thread" in str(exc))


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
