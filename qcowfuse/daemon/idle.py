"""When a mount has not been used for so long that it may go.

1. It is used while a process has a file open: a loop device or a virtual machine, for example. Without an open file
   there are neither reads nor writes. So these two are not watched, and cost nothing more.
2. A request for names, attributes or counters (``ls``, ``qcowfuse list``) is a use, too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import trio

WATCHED = tuple(str.split("lookup getattr setattr access open release opendir readdir statfs getxattr listxattr"))
AT_ONCE = (("opens", "open"), ("opens", "release"), ("fsyncs", "start_getattr"))
"""Plain functions that answer such requests as soon as they have been read: attribute of the handlers, and name."""


class Handlers(Protocol):
    """What is watched: the handlers of requests, by the names in :data:`WATCHED` and :data:`AT_ONCE`."""

    @property
    def n_open(self) -> int:
        """How many have a file open."""


class IdleWatch:
    """Notes when ``handlers`` were last used, and knows when that is ``seconds`` ago. Made in trio, before the first
    request."""

    def __init__(self, handlers: Handlers, seconds: float) -> None:
        self.seconds = seconds
        self._handlers = handlers
        self._last_use = trio.current_time()
        for name in WATCHED:
            setattr(handlers, name, self._noting(getattr(handlers, name)))
        for owner, name in AT_ONCE:
            answering = getattr(handlers, owner)
            setattr(answering, name, self._noting_at_once(getattr(answering, name)))

    def note_use(self) -> None:
        """It is used now."""
        self._last_use = trio.current_time()

    async def until_idle(self) -> None:
        """Return when it has not been used for the time."""
        while True:
            if self._handlers.n_open:
                self.note_use()
            left = self._last_use + self.seconds - trio.current_time()
            if left <= 0:
                return
            await trio.sleep(left)

    def _noting_at_once(self, answer: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any) -> Any:
            self._last_use = trio.current_time()
            return answer(*args)

        return noting

    def _noting(self, handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def noting(*args: Any) -> Any:
            self._last_use = trio.current_time()
            return await handler(*args)

        return noting
