"""Coroutines of this package without an event loop: for a program that does one thing after the other.

1. In :func:`run_alone` all that would wait in a thread is done in place. Files are only read there
   (:mod:`~qcowfuse.storage.blocking_file`), or written by functions that block (:func:`run_blocking`).
2. A request to stop is seen where a cancellation would be: at checkpoints, and where a file is waited for.
3. Elsewhere each function here is that of trio. trio is imported where it runs already: its import takes as long as
   the whole of a short command.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, TypeVar, cast

T = TypeVar("T")

_check: ContextVar[Callable[[], None] | None] = ContextVar("what ends a program without an event loop", default=None)


def is_alone() -> bool:
    """Whether this runs in :func:`run_alone`."""
    return _check.get() is not None


def run_alone(function: Callable[[], Awaitable[T]], check: Callable[[], None]) -> T:
    """What ``function()`` returns. ``check`` is called at each checkpoint and raises a BaseException to end it all.

    Raises what either raises, and RuntimeError where something waits for an event loop.
    """
    token = _check.set(check)
    waits = function().__await__()
    try:
        next(waits)
    except StopIteration as end:
        return cast(T, end.value)
    finally:
        _check.reset(token)
    raise RuntimeError("something waits for an event loop where there is none")


async def checkpoint() -> None:
    """Others run, where there are others, and a request to stop is seen."""
    check = _check.get()
    if check is not None:
        check()
        return
    import trio

    await trio.lowlevel.checkpoint()


async def run_blocking(function: Callable[..., T], *args: Any) -> T:
    """``function(*args)``, which may block: in a thread where there is an event loop. A request to stop is seen
    before. Raises what it raises."""
    check = _check.get()
    if check is not None:
        check()
        return function(*args)
    import trio

    return await trio.to_thread.run_sync(function, *args)


def check_stopped() -> None:
    """To be called now and then by a function of :func:`run_blocking` that waits: raises what ends the wait."""
    check = _check.get()
    if check is not None:
        check()
        return
    import trio

    trio.from_thread.check_cancelled()
