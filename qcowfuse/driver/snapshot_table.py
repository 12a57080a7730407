"""Reading the snapshots of an image: their table, one of them by id or name, and its L1 table."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import trio

from ..errors import FormatError, ImageUsageError
from ..format.entries import Table, parse_table
from ..format.header import MAX_L1_SIZE, Qcow1Header, Qcow2Header
from ..storage.base import Storage, pread
from .paged_table import MAX_HELD, PagedTable, TableParts

if TYPE_CHECKING:
    from ..format.snapshots import Snapshot

_CHUNK = 1 << 20
_PER_CHECKPOINT = 256
_MAX_NAMES_SHOWN = 20


async def load_snapshots(storage: Storage, header: Qcow2Header) -> tuple[tuple[Snapshot, ...], int]:
    """The table of snapshots and its length in bytes. Raises FormatError, OSError."""
    if not header.n_snapshots:
        return (), 0
    from ..format.snapshots import MAX_SNAPSHOT_ENTRY, MAX_SNAPSHOT_TABLE_SIZE, parse_snapshot

    snapshots: list[Snapshot] = []
    buffer = bytearray()
    buffer_offset = position = 0
    while len(snapshots) < header.n_snapshots:
        if len(buffer) - position < MAX_SNAPSHOT_ENTRY:
            del buffer[:position]
            buffer_offset, position = buffer_offset + position, 0
            buffer += await storage.pread(header.snapshots_offset + buffer_offset + len(buffer), _CHUNK)
        snapshot, position = parse_snapshot(buffer, position)
        snapshots.append(snapshot)
        if len(snapshots) % _PER_CHECKPOINT == 0:
            await trio.lowlevel.checkpoint()
        if buffer_offset + position > MAX_SNAPSHOT_TABLE_SIZE:
            detail = f"more than {MAX_SNAPSHOT_TABLE_SIZE} bytes, in {header.n_snapshots} entries"
            raise FormatError("snapshot table", header.snapshots_offset, detail)
    return tuple(snapshots), buffer_offset + position


def find_snapshot(
    path: str, snapshots: Sequence[Snapshot], id_or_name: str, *, names_first: bool = False
) -> Snapshot:
    """The first one with that id, else with that name; the other way round with ``names_first``, as QEMU does it
    when it deletes one. Raises ImageUsageError, which names what there is."""
    found = [snapshot for snapshot in snapshots if snapshot.snapshot_id == id_or_name]
    named = [snapshot for snapshot in snapshots if snapshot.name == id_or_name]
    found = named + found if names_first else found + named
    if found:
        return found[0]
    shown = [f"{snapshot.name} (id {snapshot.snapshot_id})" for snapshot in snapshots[:_MAX_NAMES_SHOWN]]
    if len(snapshots) > len(shown):
        shown.append(f"{len(snapshots) - len(shown)} more")
    there_are = f"there are: {', '.join(shown)}" if shown else "the image has none"
    raise ImageUsageError(f"{path}: no snapshot {id_or_name!r}; {there_are}")


async def open_l1_table(
    storage: Storage, header: Qcow1Header | Qcow2Header, parts: TableParts, n_entries: int | None = None
) -> Table | PagedTable:
    """The active L1 table for reading only: a large one is read as it is needed. ``n_entries``: how many there shall
    be at least, zeroes at the end if need be. Raises OSError."""
    n_stored = header.l1_size if isinstance(header, Qcow2Header) else header.n_l1_entries
    n_entries = max(n_entries or 0, n_stored)
    if n_entries * 8 > MAX_HELD:
        return PagedTable(storage, parts, header.l1_table_offset, n_entries, n_stored)
    table = await load_l1_table(storage, header.l1_table_offset, n_stored)
    table.extend([0] * (n_entries - n_stored))
    return table


async def load_any_l1_table(storage: Storage, header: Qcow1Header | Qcow2Header) -> Table:
    """The active L1 table, as a whole; what of it lies past the end of the file is zero. Raises OSError."""
    if isinstance(header, Qcow2Header):
        return await load_l1_table(storage, header.l1_table_offset, header.l1_size)
    if header.n_l1_entries * 8 <= MAX_L1_SIZE:
        return await load_l1_table(storage, header.l1_table_offset, header.n_l1_entries)
    from .large_table import load_large_table

    return await load_large_table(storage, header.l1_table_offset, header.n_l1_entries)


def entries_in_use(table: Table) -> Iterable[int]:
    """The entries of an L1 table that are not zero."""
    if isinstance(table, array):
        return filter(None, table)
    from .large_table import large_table_entries

    return large_table_entries(table)


async def load_l1_table(storage: Storage, host_offset: int, n_entries: int) -> array[int]:
    """An L1 table of a size that is within the limits; what of it lies past the end of the file is zero. Raises
    OSError."""
    table = array("Q", [0]) * n_entries
    end = host_offset + n_entries * 8
    for start in range(host_offset, end, _CHUNK):  # by and by, and in place: it may have 32 MiB
        part = parse_table(await pread(storage, start, min(_CHUNK, end - start)))
        first = (start - host_offset) // 8
        table[first : first + len(part)] = part
    return table


async def load_snapshot_l1_table(storage: Storage, header: Qcow2Header, snapshot: Snapshot) -> array[int]:
    """The L1 table of a snapshot, as long as its entry says. Raises FormatError, OSError."""
    check_snapshot_l1_table(header, snapshot)
    return await load_l1_table(storage, snapshot.l1_table_offset, snapshot.l1_size)


def check_snapshot_l1_table(header: Qcow2Header, snapshot: Snapshot) -> None:
    """Raises FormatError for an L1 table that no snapshot can have."""
    place = snapshot.l1_table_offset
    if snapshot.l1_is_too_large or place % (1 << header.cluster_bits):
        raise FormatError("L1 table of a snapshot", place, f"{snapshot.l1_size} entries; too many, or not aligned")
