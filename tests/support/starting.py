"""Requests that are only started: what can be had at once, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

from qcowfuse.buffer import Buffer
from qcowfuse.driver.image import Image, never
from qcowfuse.driver.pending import PendingRead


def read_at_once(
    image: Image, guest_offset: int, n_bytes: int, is_alone: Callable[[], bool] = never
) -> Buffer | None:
    """The bytes, or None where the read has to wait; then it is abandoned."""
    started = image.start_read(guest_offset, n_bytes, is_alone)
    if isinstance(started, PendingRead):
        started.abandon()
        return None
    return started


def write_at_once(image: Image, guest_offset: int, data: Buffer) -> bool:
    """Whether all was written; else the write is abandoned."""
    pending = image.start_write(guest_offset, data)
    if pending is not None:
        pending.abandon()
    return pending is None


async def read_alone(image: Image, guest_offset: int, n_bytes: int, *, is_alone: bool) -> Buffer:
    """The bytes, for a client beside which there is nobody, or somebody."""
    started = image.start_read(guest_offset, n_bytes, lambda: is_alone)
    return await started.finish() if isinstance(started, PendingRead) else started
