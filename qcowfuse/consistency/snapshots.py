"""The snapshot table as a check reads it: what is wrong with it, and what a repair makes of it.

1. Without repair a table that QEMU refuses is refused here.
2. With repair its extra data is cut to the limit, and what does not fit into a table is dropped, last entries first.
3. Nothing is written here: :mod:`~qcowfuse.consistency.repair` writes the mended table.

Source: QEMU's qcow2_check_read_snapshot_table(), qcow2_write_snapshots().
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator
from typing import NamedTuple

from ..errors import FormatError
from ..format.header import Qcow2Header
from ..format.header_fields import SNAPSHOT_ENTRY_SIZE
from ..format.snapshots import (
    EXPECTED_EXTRA,
    MAX_SNAPSHOT_EXTRA,
    MAX_SNAPSHOT_TABLE_SIZE,
    WRITTEN_EXTRA,
    Snapshot,
    lengths_of_snapshot,
    parse_snapshot,
    serialise_snapshots,
    with_extra_length,
)
from ..storage.base import Storage
from ..system.alone import checkpoint

_MAX_TABLE_SPAN = (1 << 31) - 1
_WINDOW = 1 << 18
_PER_CHECKPOINT = 256


class _Window:
    """A stretch of the file, so that a table is not read entry by entry."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._start = 0
        self._data = b""

    async def read(self, host_offset: int, n_bytes: int) -> bytes:
        """Bytes of the image; zeroes past its end."""
        if not self._start <= host_offset <= host_offset + n_bytes <= self._start + len(self._data):
            self._start = host_offset
            self._data = bytes(await self._storage.pread(host_offset, max(n_bytes, _WINDOW)))
        return self._data[host_offset - self._start : host_offset - self._start + n_bytes]


class SnapshotTable:
    """What is known of all snapshots; the entries themselves, with their names, are read again when they are needed:
    together they may have 64 MiB.

    ``n_bytes``: the length on disk. ``n_cut`` entries had too much extra data, ``n_dropped`` did not fit.
    ``l1_offsets`` and ``l1_sizes`` (in entries) say where their L1 tables lie, ``incomplete_entries`` lack what
    version 3 asks for.
    """

    def __init__(self, storage: Storage, header: Qcow2Header) -> None:
        self._window = _Window(storage)
        self._table_offset = header.snapshots_offset
        self._positions = array("Q")
        self.n_bytes = 0
        self.n_cut = 0
        self.n_dropped = 0
        self.l1_offsets = array("Q")
        self.l1_sizes = array("L")
        self.incomplete_entries = array("L")

    def __len__(self) -> int:
        return len(self._positions)

    def add(self, entry: Snapshot, position: int) -> None:
        """The next entry, which begins at byte ``position`` of the table."""
        if entry.n_extra < EXPECTED_EXTRA:
            self.incomplete_entries.append(len(self))
        self._positions.append(position)
        self.l1_offsets.append(entry.l1_table_offset)
        self.l1_sizes.append(entry.l1_size)

    def incomplete(self, version: int) -> array[int]:
        """The numbers of entries that lack what version 3 asks for."""
        return self.incomplete_entries if version >= 3 else array("L")

    def must_be_written(self, version: int) -> bool:
        """Whether only a new table mends it."""
        return bool(self.n_cut or self.n_dropped or self.incomplete(version))

    async def entry(self, number: int) -> Snapshot:
        """One of them, without what was cut off. Raises OSError."""
        return (await _read_entry(self._window, self._table_offset + self._positions[number])).snapshot

    async def pieces(self, virtual_size: int) -> AsyncIterator[bytes]:
        """A table without fault, bit by bit; snapshots that do not say how large their disk was get
        ``virtual_size``. Raises OSError."""
        for number in range(len(self)):
            if number % _PER_CHECKPOINT == 0:
                await checkpoint()
            entry = await self.entry(number)
            n_extra = max(entry.n_extra, WRITTEN_EXTRA)
            disk_size = virtual_size if entry.disk_size is None else entry.disk_size
            yield serialise_snapshots([entry._replace(n_extra=n_extra, disk_size=disk_size)])


class _Read(NamedTuple):
    snapshot: Snapshot
    n_extra: int
    """Bytes of extra data on disk; those above the limit are not in ``snapshot``."""
    n_bytes: int
    """On disk."""


async def _read_entry(window: _Window, offset: int) -> _Read:
    fixed = await window.read(offset, SNAPSHOT_ENTRY_SIZE)
    n_extra, n_names = lengths_of_snapshot(fixed)
    n_kept = min(n_extra, MAX_SNAPSHOT_EXTRA)
    extra = await window.read(offset + SNAPSHOT_ENTRY_SIZE, n_kept)
    names = await window.read(offset + SNAPSHOT_ENTRY_SIZE + n_extra, n_names)
    snapshot, _ = parse_snapshot(with_extra_length(fixed, n_kept) + extra + names, 0)
    return _Read(snapshot, n_extra, SNAPSHOT_ENTRY_SIZE + n_extra + n_names)


async def load_snapshot_table(storage: Storage, header: Qcow2Header, *, repair: bool = False) -> SnapshotTable:
    """Read the table. Raises FormatError for what QEMU would not read (with ``repair`` not at all), OSError."""
    table = SnapshotTable(storage, header)
    window = _Window(storage)
    kept_bytes = position = 0
    for number in range(header.n_snapshots):
        if number % _PER_CHECKPOINT == 0:
            await checkpoint()
        start = -(-position // 8) * 8
        offset = header.snapshots_offset + start
        read = await _read_entry(window, offset)
        n_cut = max(read.n_extra - MAX_SNAPSHOT_EXTRA, 0)
        if n_cut and not repair:
            raise FormatError(
                "snapshot table entry",
                offset,
                f"extra data of {read.n_extra} bytes, expected at most {MAX_SNAPSHOT_EXTRA}",
            )
        end = start + read.n_bytes
        kept_bytes = -(-kept_bytes // 8) * 8 + read.n_bytes - n_cut
        if kept_bytes > MAX_SNAPSHOT_TABLE_SIZE or end > _MAX_TABLE_SPAN:
            if not repair:
                raise FormatError(
                    "snapshot table",
                    header.snapshots_offset,
                    f"more than {MAX_SNAPSHOT_TABLE_SIZE} bytes, in {header.n_snapshots} entries",
                )
            table.n_dropped = header.n_snapshots - number
            break
        table.n_cut += bool(n_cut)
        table.add(read.snapshot, start)
        position = end
    table.n_bytes = position
    return table
