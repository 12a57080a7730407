"""What pyfuse3 takes for its ``trio`` module: the same services, with the wait for requests of ``request_gate``.

1. It is in place before ``pyfuse3.init``: pyfuse3 3.4 makes its lock there, later ones in the first worker.
2. Whatever else a pyfuse3 looks for in ``trio`` or ``trio.lowlevel`` it finds there.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import pyfuse3
import trio

from ...system.import_slot import SlotError
from ..request_gate import RequestGate


class NoLock:
    """Stands in for ``trio.Lock``: rule 1 of ``request_gate`` makes the lock needless."""

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class _LowLevel:
    """Stands in for ``trio.lowlevel``."""

    def __init__(self, gate: RequestGate) -> None:
        self.wait_readable = gate.wait_readable
        self.notify_closing = gate.notify_closing
        self.current_task = trio.lowlevel.current_task
        self.current_trio_token = trio.lowlevel.current_trio_token

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)


class PollFirstTrio:
    """Stands in for the module ``trio`` where pyfuse3 looks it up."""

    def __init__(self, gate: RequestGate) -> None:
        self.lowlevel = _LowLevel(gate)
        self.Lock = NoLock
        self.ClosedResourceError = trio.ClosedResourceError
        self.open_nursery = trio.open_nursery

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


def divert_waits(gate: RequestGate) -> None:
    """Have pyfuse3 wait as ``gate`` does, for the rest of this process. Raises SlotError where pyfuse3 has no
    ``trio`` to exchange, then nothing is changed."""
    if getattr(pyfuse3, "trio", None) is not trio and not isinstance(getattr(pyfuse3, "trio", None), PollFirstTrio):
        raise SlotError("pyfuse3 has no module trio of its own")
    pyfuse3.trio = PollFirstTrio(gate)  # type: ignore[attr-defined]
