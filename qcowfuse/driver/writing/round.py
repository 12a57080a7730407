"""What one round of write-back has taken of all that was dirty; ``write_back`` says in which order it is written."""

from __future__ import annotations

from collections.abc import Callable

import trio

from ..layers.host_run import HostRun
from ..layers.table_cache import L2Slice
from .allocation import DirtyRefcounts, MetadataWrite

SizeFields = Callable[[int, int], MetadataWrite]
"""``(l1_size, l1_table_offset)`` to the write that puts them into the header, with the size of the disk."""


class SharedFlush:
    """A flush that has not begun: all that ask for one until then share it."""

    __slots__ = ("done", "error", "succeeded")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.succeeded = False
        self.error: Exception | None = None


class Part:
    """Writes that belong together: the dirty words ``start`` to ``end`` of a slice, or L1 entries (no slice)."""

    __slots__ = ("end", "is_written", "slice_", "start", "writes")

    def __init__(self, writes: list[MetadataWrite], slice_: L2Slice | None = None) -> None:
        self.writes = writes
        self.slice_ = slice_
        self.start, self.end = (0, 0) if slice_ is None else (slice_.dirty_start, slice_.dirty_end)
        self.is_written = False


class Round:
    """What a round has taken of all that was dirty, to be written and then to be forgotten or given back.

    ``early`` is for step 3, ``late`` for step 5, ``header`` for the write after it. ``dirty_l1`` are the L1 entries
    among ``late``, ``new_tables`` those of tables that nothing on disk pointed at when the round began.
    """

    __slots__ = (
        "dirty_l1",
        "early",
        "epoch",
        "header",
        "late",
        "links_written",
        "new_tables",
        "refcounts",
        "size_fields",
        "slices",
        "unlinked",
    )

    def __init__(self, refcounts: DirtyRefcounts, slices: list[L2Slice], size_fields: SizeFields | None) -> None:
        self.refcounts = refcounts
        self.slices = slices
        self.size_fields = size_fields
        self.early: list[Part] = []
        self.late: list[Part] = []
        self.header: list[MetadataWrite] = []
        self.dirty_l1: set[int] = set()
        self.new_tables: set[int] = set()
        self.unlinked: list[HostRun] = []
        self.epoch = 0
        self.links_written = False
