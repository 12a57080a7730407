"""Requests that could not be answered when they were started, and go on from there.

1. A pending request owns what was found out: where the bytes lie, or what still has to be loaded, and for a write how
   much of it is done. ``finish`` goes on with that; nothing is looked up, written or counted a second time.
2. From its start to its end it is an operation in flight: host clusters that it looks at keep their bytes
   (:class:`~qcowfuse.driver.layers.range_claims.InFlightEpochs`). Before ``finish`` it holds neither pin nor claim.
3. It ends once, by ``finish`` or by ``abandon``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import NoReturn, Protocol

from ..buffer import Buffer
from ..errors import CorruptImageError
from ..storage.base import Deliver, OnEnd, OnWritten


class Epochs(Protocol):
    """Counts operations in flight."""

    def enter(self) -> int:
        """An operation begins; returns what :meth:`leave` wants."""

    def leave(self, epoch: int) -> None:
        """The operation has ended."""


class RequestGuard(Protocol):
    """What surrounds every request of one image."""

    @property
    def epochs(self) -> Epochs:
        """The operations in flight."""

    async def freeze(self, error: CorruptImageError) -> None:
        """The image was found corrupt: nothing is written from now on."""


class Place(Protocol):
    """Where all the bytes of a write go."""

    def start_pwrite(self, host_offset: int, data: Buffer, on_written: OnWritten, on_end: OnEnd) -> bool:
        """See Storage."""


class Source(Protocol):
    """Where all the bytes of a read lie: each call as Storage has it."""

    async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
        """See Storage."""

    def start_delivery(self, host_offset: int, n_bytes: int, deliver: Deliver, on_end: OnEnd) -> bool:
        """See Storage."""


class PendingRead:
    """A read that was started; ``rest`` gives its bytes."""

    __slots__ = ("_epoch", "_guard", "_rest")

    def __init__(self, guard: RequestGuard, rest: Callable[[], Awaitable[Buffer]]) -> None:
        self._guard = guard
        self._rest = rest
        self._epoch = guard.epochs.enter()

    def start_delivery(self, deliver: Deliver, on_end: OnEnd) -> bool:
        """Have the bytes handed to ``deliver`` in another thread, and the read ended, before ``on_end`` is called in
        this one (:meth:`~qcowfuse.storage.base.Storage.start_delivery`). False where the way to them is longer: then
        nothing has happened."""
        return False

    async def finish(self) -> Buffer:
        """The bytes. Raises FormatError, OSError; CorruptImageError, and then the image is frozen."""
        try:
            return await self._rest()
        except CorruptImageError as error:
            await self._guard.freeze(error)
            raise
        finally:
            self._guard.epochs.leave(self._epoch)

    def abandon(self) -> None:
        """Nobody wants the answer any more."""
        self._guard.epochs.leave(self._epoch)


class PendingSource(PendingRead):
    """A read of ``n_bytes`` at ``host_offset`` of ``source``, as they are there."""

    __slots__ = ("_host_offset", "_n_bytes", "_source")

    def __init__(self, guard: RequestGuard, source: Source, host_offset: int, n_bytes: int) -> None:
        super().__init__(guard, partial(source.pread, host_offset, n_bytes))
        self._source = source
        self._host_offset = host_offset
        self._n_bytes = n_bytes

    def start_delivery(self, deliver: Deliver, on_end: OnEnd) -> bool:
        """See PendingRead."""

        def end(error: Exception | None) -> None:
            self.abandon()
            on_end(error)

        return self._source.start_delivery(self._host_offset, self._n_bytes, deliver, end)


class PendingWrite:
    """A write that was started; ``rest`` writes what is left of the data that it is given.

    The data is not copied: the caller leaves it as it is until ``finish`` has returned, or hands in a copy.
    """

    __slots__ = ("_data", "_epoch", "_guard", "_rest")

    def __init__(self, guard: RequestGuard, rest: Callable[[Buffer], Awaitable[None]], data: Buffer) -> None:
        self._guard = guard
        self._rest = rest
        self._data = data
        self._epoch = guard.epochs.enter()

    def start_in_thread(self, on_written: OnWritten, on_end: OnEnd) -> bool:
        """Have another thread write all of the data, which stays as it is until the end, and call ``on_written``
        there; then the write is ended, and ``on_end`` called in this one
        (:meth:`~qcowfuse.storage.base.Storage.start_pwrite`). False where there is more to do: then nothing has
        happened."""
        return False

    def use(self, data: Buffer) -> None:
        """Take the same bytes from ``data`` from now on."""
        self._data = data

    async def finish(self) -> None:
        """Write the rest. Raises ReadOnlyImageError, OSError; CorruptImageError, and then the image is frozen."""
        try:
            await self._rest(self._data)
        except CorruptImageError as error:
            await self._guard.freeze(error)
            raise
        finally:
            self._guard.epochs.leave(self._epoch)

    def abandon(self) -> None:
        """Leave it as it is: a first part of the data may have been written."""
        self._guard.epochs.leave(self._epoch)


class PendingPlace(PendingWrite):
    """A write to ``host_offset`` of ``place``, of which nothing is done yet, and which changes no entry."""

    __slots__ = ("_host_offset", "_place")

    def __init__(
        self,
        guard: RequestGuard,
        rest: Callable[[Buffer], Awaitable[None]],
        data: Buffer,
        *,
        place: Place,
        host_offset: int,
    ) -> None:
        super().__init__(guard, rest, data)
        self._place = place
        self._host_offset = host_offset

    def start_in_thread(self, on_written: OnWritten, on_end: OnEnd) -> bool:
        """See PendingWrite."""

        def end(error: Exception | None) -> None:
            self.abandon()
            on_end(error)

        return self._place.start_pwrite(self._host_offset, self._data, on_written, end)


async def fail_with(error: Exception, data: Buffer = b"") -> NoReturn:
    """The rest of a request that met ``error`` at its start."""
    raise error
