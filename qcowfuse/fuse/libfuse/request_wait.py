"""What pyfuse3 takes for its ``trio`` module: the same services, with the wait for requests of ``request_gate``."""

from __future__ import annotations

from types import TracebackType

import trio

from ..request_gate import RequestGate


class NoLock:
    """Stands in for ``trio.Lock``: rule 1 of ``request_gate`` makes the lock needless."""

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class PollFirstTrio:
    """Stands in for the module ``trio`` where pyfuse3 looks it up: set ``pyfuse3.trio`` before ``pyfuse3.main``."""

    ClosedResourceError = trio.ClosedResourceError
    Lock = NoLock
    from_thread = trio.from_thread
    open_nursery = staticmethod(trio.open_nursery)

    def __init__(self, gate: RequestGate) -> None:
        self.lowlevel = gate
