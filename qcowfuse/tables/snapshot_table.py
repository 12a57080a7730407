"""Reading the snapshots of an image: their table, one of them by id or name, and its L1 table."""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

from ..errors import FormatError, ImageUsageError
from ..format.entries import Table, parse_table
from ..format.header import Qcow1Header, Qcow2Header
from ..format.header_fields import MAX_L1_SIZE
from ..storage.base import Storage, pread
from ..system.alone import checkpoint
from .paged_table import MAX_HELD, PagedTable, TableParts

if TYPE_CHECKING:
    from ..format.snapshots import Snapshot

_CHUNK = 1 << 19
MAX_EDITED_TABLE = 8 << 20
"""Bytes of a table of snapshots that is changed: all of it is in memory then."""
_PER_CHECKPOINT = 256
_PART = 1 << 12
_MAX_NAMES_SHOWN = 20
_Entry = TypeVar("_Entry")


def each_snapshot(storage: Storage, header: Qcow2Header) -> AsyncGenerator[tuple[Snapshot, int]]:
    """The snapshots one after the other, each with the length in bytes of the table up to its end. A table has up to
    64 MiB, and more as text, so that a caller keeps them only if it must. To be closed by ``aclosing`` unless it is
    run to its end. Raises FormatError, OSError."""
    if not header.n_snapshots:
        return _each_entry(storage, header, None)
    from ..format.snapshots import parse_snapshot

    return _each_entry(storage, header, parse_snapshot)


def each_snapshot_l1_place(storage: Storage, header: Qcow2Header) -> AsyncGenerator[tuple[tuple[int, int], int]]:
    """As :func:`each_snapshot`, of each only the host offset of its L1 table and how many entries that has."""
    if not header.n_snapshots:
        return _each_entry(storage, header, None)
    from ..format.snapshots import snapshot_l1_place

    return _each_entry(storage, header, snapshot_l1_place)


async def require_snapshots(storage: Storage, header: Qcow2Header) -> int:
    """How many snapshots there are. Raises FormatError where :func:`each_snapshot` would, OSError."""
    if header.n_snapshots:
        from ..format.snapshots import end_of_snapshot

        async for _ in _each_entry(storage, header, lambda data, position: (None, end_of_snapshot(data, position))):
            pass
    return header.n_snapshots


async def _each_entry(
    storage: Storage, header: Qcow2Header, parse: Callable[[bytes, int], tuple[_Entry, int]] | None
) -> AsyncGenerator[tuple[_Entry, int]]:
    if parse is None:
        return
    from ..format.snapshots import MAX_SNAPSHOT_ENTRY, MAX_SNAPSHOT_TABLE_SIZE

    buffer = b""
    buffer_offset = position = 0
    for number in range(header.n_snapshots):
        if len(buffer) - position < MAX_SNAPSHOT_ENTRY:
            buffer_offset, buffer, position = buffer_offset + position, buffer[position:], 0
            buffer += await storage.pread(header.snapshots_offset + buffer_offset + len(buffer), _CHUNK)
        entry, position = parse(buffer, position)
        if number % _PER_CHECKPOINT == 0:
            await checkpoint()
        if buffer_offset + position > MAX_SNAPSHOT_TABLE_SIZE:
            detail = f"more than {MAX_SNAPSHOT_TABLE_SIZE} bytes, in {header.n_snapshots} entries"
            raise FormatError("snapshot table", header.snapshots_offset, detail)
        yield entry, buffer_offset + position


async def load_snapshots(storage: Storage, header: Qcow2Header) -> tuple[tuple[Snapshot, ...], int]:
    """The table of snapshots, which is to be changed, and its length in bytes. Raises ImageUsageError where that is
    above :data:`MAX_EDITED_TABLE`, FormatError, OSError."""
    snapshots: list[Snapshot] = []
    n_bytes = 0
    async with aclosing(each_snapshot(storage, header)) as entries:
        async for snapshot, n_bytes in entries:
            if n_bytes > MAX_EDITED_TABLE:
                raise ImageUsageError(
                    f"{storage.name}: the table of its {header.n_snapshots} snapshots has more than "
                    f"{MAX_EDITED_TABLE >> 20} MiB, too much to be changed here (qemu-img snapshot can)"
                )
            snapshots.append(snapshot)
    return tuple(snapshots), n_bytes


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
    shown = [_shown(snapshot) for snapshot in snapshots[:_MAX_NAMES_SHOWN]]
    raise _no_such_snapshot(path, id_or_name, shown, len(snapshots))


async def find_stored_snapshot(path: str, storage: Storage, header: Qcow2Header, id_or_name: str) -> Snapshot:
    """As :func:`find_snapshot`, of the snapshots of an image. Raises FormatError, OSError as well."""
    named: Snapshot | None = None
    shown: list[str] = []
    async with aclosing(each_snapshot(storage, header)) as entries:
        async for snapshot, _ in entries:
            if snapshot.snapshot_id == id_or_name:
                return snapshot
            if named is None and snapshot.name == id_or_name:
                named = snapshot
            if len(shown) < _MAX_NAMES_SHOWN:
                shown.append(_shown(snapshot))
    if named is None:
        raise _no_such_snapshot(path, id_or_name, shown, header.n_snapshots)
    return named


def _shown(snapshot: Snapshot) -> str:
    return f"{snapshot.name} (id {snapshot.snapshot_id})"


def _no_such_snapshot(path: str, id_or_name: str, shown: list[str], n_snapshots: int) -> ImageUsageError:
    if n_snapshots > len(shown):
        shown.append(f"{n_snapshots - len(shown)} more")
    there_are = f"there are: {', '.join(shown)}" if shown else "the image has none"
    return ImageUsageError(f"{path}: no snapshot {id_or_name!r}; {there_are}")


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


def parts_in_use(table: Table) -> Iterator[array[int]]:
    """The entries of a table, part by part, but for parts that are all zero."""
    if not isinstance(table, array):
        from .large_table import parts_of_large_table

        yield from parts_of_large_table(table)
        return
    zeroes = array("Q", bytes(8 * _PART))
    for start in range(0, len(table), _PART):
        part = table[start : start + _PART]
        if part != zeroes[: len(part)]:
            yield part


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
