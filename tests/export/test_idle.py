"""When a mount counts as idle, with a clock that runs by itself."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from qcowfuse.daemon.idle import WATCHED, IdleWatch
from qcowfuse.fuse.operations import Operations


class Handlers:
    """Handlers that say which one was called."""

    def __init__(self) -> None:
        self.n_open = 0
        for name in WATCHED:
            setattr(self, name, self._handler(name))

    def _handler(self, name: str) -> object:
        async def handler(*args: object) -> tuple[object, ...]:
            return (name, *args)

        return handler


async def test_any_request_begins_the_time_anew(autojump_clock: MockClock) -> None:
    """Each kind of them, which still answers as it did."""
    handlers = Handlers()
    watch = IdleWatch(handlers, 10)

    async def use() -> None:
        for name in WATCHED:
            await trio.sleep(9)
            assert await getattr(handlers, name)(1, 2) == (name, 1, 2)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(use)
        await watch.until_idle()
    assert trio.current_time() == 9 * len(WATCHED) + 10


async def test_an_open_file_keeps_it(autojump_clock: MockClock) -> None:
    """For as long as it is open; the time begins with the release."""
    handlers = Handlers()
    watch = IdleWatch(handlers, 10)
    handlers.n_open = 1

    async def close() -> None:
        await trio.sleep(1234.5)
        handlers.n_open = 0
        await handlers.release(1)  # type: ignore[attr-defined]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        await watch.until_idle()
    assert trio.current_time() == 1244.5


def test_what_is_watched_is_what_answers() -> None:
    """Every name is a handler; left out are those that need an open file, and those that this file system refuses."""
    assert all(hasattr(Operations, name) for name in WATCHED)
