"""The snapshot table as a check reads it: what is wrong with it, and what a repair makes of it.

1. Without repair a table that QEMU refuses is refused here.
2. With repair its extra data is cut to the limit, and what does not fit into a table is dropped, last entries first.
3. Nothing is written here: :mod:`~qcowfuse.driver.repair` writes the mended table.

Source: QEMU's qcow2_check_read_snapshot_table(), qcow2_write_snapshots().
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

import trio

from ..errors import FormatError
from ..format.header import Qcow2Header
from ..format.snapshots import (
    EXPECTED_EXTRA,
    MAX_SNAPSHOT_EXTRA,
    MAX_SNAPSHOT_TABLE_SIZE,
    Snapshot,
    parse_snapshot,
    serialise_snapshots,
)
from ..storage.base import Storage

_FIXED_SIZE = 40
_WRITTEN_EXTRA = 24
_MAX_TABLE_SPAN = (1 << 31) - 1
_WINDOW = 1 << 18
_PER_CHECKPOINT = 256


@dataclass(slots=True)
class SnapshotTable:
    """``n_bytes``: the length on disk. ``n_cut`` entries had too much extra data, ``n_dropped`` did not fit."""

    snapshots: tuple[Snapshot, ...] = ()
    n_bytes: int = 0
    n_cut: int = 0
    n_dropped: int = 0

    def incomplete(self, version: int) -> list[int]:
        """The entries that lack what version 3 asks for."""
        if version < 3:
            return []
        return [number for number, entry in enumerate(self.snapshots) if entry.n_extra < EXPECTED_EXTRA]

    def must_be_written(self, version: int) -> bool:
        """Whether only a new table mends it."""
        return bool(self.n_cut or self.n_dropped or self.incomplete(version))

    def serialise(self, virtual_size: int) -> bytes:
        """A table without fault; snapshots that do not say how large their disk was get ``virtual_size``."""
        return serialise_snapshots(
            replace(
                entry,
                n_extra=max(entry.n_extra, _WRITTEN_EXTRA),
                disk_size=virtual_size if entry.disk_size is None else entry.disk_size,
            )
            for entry in self.snapshots
        )


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


async def load_snapshot_table(storage: Storage, header: Qcow2Header, *, repair: bool = False) -> SnapshotTable:
    """Read the table. Raises FormatError for what QEMU would not read (with ``repair`` not at all), OSError."""
    table = SnapshotTable()
    window = _Window(storage)
    found: list[Snapshot] = []
    kept_bytes = position = 0
    for number in range(header.n_snapshots):
        if number % _PER_CHECKPOINT == 0:
            await trio.lowlevel.checkpoint()
        start = -(-position // 8) * 8
        offset = header.snapshots_offset + start
        fixed = await window.read(offset, _FIXED_SIZE)
        id_size, name_size = struct.unpack_from(">HH", fixed, 12)
        (n_extra,) = struct.unpack_from(">I", fixed, 36)
        n_kept = min(n_extra, MAX_SNAPSHOT_EXTRA)
        if n_kept < n_extra:
            if not repair:
                raise FormatError(
                    "snapshot table entry",
                    offset,
                    f"extra data of {n_extra} bytes, expected at most {MAX_SNAPSHOT_EXTRA}",
                )
            fixed = fixed[:36] + struct.pack(">I", n_kept)
        extra = await window.read(offset + _FIXED_SIZE, n_kept)
        names = await window.read(offset + _FIXED_SIZE + n_extra, id_size + name_size)
        end = start + _FIXED_SIZE + n_extra + id_size + name_size
        kept_bytes = -(-kept_bytes // 8) * 8 + _FIXED_SIZE + n_kept + len(names)
        if kept_bytes > MAX_SNAPSHOT_TABLE_SIZE or end > _MAX_TABLE_SPAN:
            if not repair:
                raise FormatError(
                    "snapshot table",
                    header.snapshots_offset,
                    f"more than {MAX_SNAPSHOT_TABLE_SIZE} bytes, in {header.n_snapshots} entries",
                )
            table.n_dropped = header.n_snapshots - number
            break
        table.n_cut += n_kept < n_extra
        found.append(parse_snapshot(fixed + extra + names, 0)[0])
        position = end
    table.snapshots = tuple(found)
    table.n_bytes = position
    return table
