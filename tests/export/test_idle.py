"""When a mount counts as idle, with a clock that runs by itself."""

from __future__ import annotations

from types import SimpleNamespace

import trio
from trio.testing import MockClock

from qcowfuse.daemon.idle import AT_ONCE, WATCHED, IdleWatch
from qcowfuse.fuse.attributes import Ownership
from qcowfuse.fuse.operations import Operations
from tests.support.memory_image import MemoryImage


class Handlers:
    """Handlers that say which one was called."""

    def __init__(self) -> None:
        self.n_open = 0
        for name in WATCHED:
            setattr(self, name, self._handler(name))
        self.opens = SimpleNamespace(open=lambda flags: flags + 1, release=lambda handle: handle + 1)
        self.fsyncs = SimpleNamespace(start_getattr=lambda: 1)

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


async def test_so_does_one_that_is_answered_at_once(autojump_clock: MockClock) -> None:
    """Opening, closing and looking; they still answer as they did."""
    handlers = Handlers()
    watch = IdleWatch(handlers, 10)

    async def use() -> None:
        for owner, name in AT_ONCE:
            await trio.sleep(9)
            assert getattr(getattr(handlers, owner), name)(*([] if name == "start_getattr" else [0])) == 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(use)
        await watch.until_idle()
    assert trio.current_time() == 9 * len(AT_ONCE) + 10


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
    operations = Operations(MemoryImage(4096), file_name=b"disk.raw", ownership=Ownership(5, 6, 0o600), mtime_ns=0)
    assert all(callable(getattr(getattr(operations, owner), name)) for owner, name in AT_ONCE)
