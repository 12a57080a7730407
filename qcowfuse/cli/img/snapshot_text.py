"""Snapshots as ``info`` and ``snapshot -l`` print them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ...printable import printable
from ..size_text import size_text

if TYPE_CHECKING:
    from ...tools.info import Snapshot


async def snapshots_json(snapshots: AsyncGenerator[Snapshot]) -> AsyncGenerator[dict[str, Any]]:
    """For :func:`~qcowfuse.cli.json_text.write_json`: the ``snapshots`` of ``qemu-img info --output=json``."""
    async with aclosing(snapshots):
        async for snapshot in snapshots:
            yield _snapshot_json(snapshot)


def _snapshot_json(snapshot: Snapshot) -> dict[str, Any]:
    found: dict[str, Any] = {
        "id": snapshot.snapshot_id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec // 1_000_000_000,
        "vm-clock-nsec": snapshot.vm_clock_nsec % 1_000_000_000,
    }
    if snapshot.icount is not None:
        found["icount"] = snapshot.icount
    return found


SNAPSHOT_HEADING = f"{'ID':<8}{'TAG':<16}{'VM_SIZE':>10}{'DATE':>21}{'VM_CLOCK':>16}"


def snapshot_line(snapshot: Snapshot) -> str:
    """A line below :data:`SNAPSHOT_HEADING`."""
    try:
        date = datetime.fromtimestamp(snapshot.date_sec).isoformat(" ")
    except (OverflowError, OSError, ValueError):
        date = "?"
    seconds, milliseconds = divmod(snapshot.vm_clock_nsec // 1_000_000, 1000)
    clock = f"{seconds // 3600:04}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"
    name, snapshot_id = printable(snapshot.name), printable(snapshot.snapshot_id)
    return f"{snapshot_id:<7} {name:<15} {size_text(snapshot.vm_state_size):>9} {date:>20} {clock:>15}"
