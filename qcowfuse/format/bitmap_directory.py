"""The directory of persistent bitmaps: where each bitmap's table lies and what it is called.

An entry is changed in place, in the directory's own bytes, so that everything nobody here knows stays as it is.
The bitmaps' contents are in :mod:`qcowfuse.format.bitmaps`.

Source: qcow2 specification, "Bitmaps".
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ..errors import FormatError
from .extensions import EXTENSION_BITMAPS, find_extension
from .geometry import round_up
from .header import Qcow2Header
from .header_fields import AUTOCLEAR_BITMAPS

IN_USE = 1 << 0
AUTO = 1 << 1
_KNOWN_FLAGS = (1 << 3) - 1
_TYPE_DIRTY_TRACKING = 1
_MAX_TABLE_SIZE = 0x8000000
_MAX_NAME = 1023
_MIN_GRANULARITY_BITS, _MAX_GRANULARITY_BITS = 9, 31
TABLE_ENTRY_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
TABLE_ENTRY_RESERVED = 0xFF00_0000_0000_01FE
TABLE_ENTRY_ALL_ONES = 1

_EXTENSION = struct.Struct(">IIQQ")
_ENTRY = struct.Struct(">QIIBBHI")
_CHANGING = struct.Struct(">QII")
MAX_BITMAP_ENTRY = _ENTRY.size + _MAX_NAME + 7
"""Bytes of the longest entry."""


class BitmapEntry(NamedTuple):
    """A bitmap: its table of ``table_size`` entries, its ``flags``, ``granularity`` in bytes; ``position`` is the
    byte of the directory at which the entry begins."""

    name: str
    table_offset: int
    table_size: int
    flags: int
    granularity: int
    position: int = 0


def bitmap_directory_place(header: Qcow2Header) -> tuple[int, int, int] | None:
    """Host offset and bytes of the directory and how many bitmaps it has; None where there is no valid one."""
    data = find_extension(header.extensions, EXTENSION_BITMAPS)
    if data is None or len(data) != _EXTENSION.size or not header.autoclear_features & AUTOCLEAR_BITMAPS:
        return None
    n_bitmaps, _, n_bytes, host_offset = _EXTENSION.unpack(data)
    return host_offset, n_bytes, n_bitmaps


def parse_bitmap_entry(
    data: bytes, data_start: int, position: int, n_bytes: int, cluster_size: int
) -> tuple[BitmapEntry, int]:
    """The entry at byte ``position`` of a directory of ``n_bytes``, and where the next one begins. ``data`` has the
    directory from byte ``data_start`` on, :data:`MAX_BITMAP_ENTRY` bytes from ``position`` on if there are so many.
    Raises FormatError for one that QEMU would not load."""
    if n_bytes - position < _ENTRY.size:
        raise _error(position, "cut short")
    in_data = position - data_start
    table_offset, table_size, flags, kind, granularity_bits, name_size, n_extra = _ENTRY.unpack_from(data, in_data)
    start = position + _ENTRY.size + n_extra
    end = start + name_size
    if end > n_bytes:
        raise _error(position, f"reaches to byte {end:#x} of {n_bytes:#x}")
    bad = (
        not table_size
        or not table_offset
        or table_offset % cluster_size
        or table_size > _MAX_TABLE_SIZE
        or not 1 <= name_size <= _MAX_NAME
        or not _MIN_GRANULARITY_BITS <= granularity_bits <= _MAX_GRANULARITY_BITS
        or flags & ~_KNOWN_FLAGS
        or kind != _TYPE_DIRTY_TRACKING
        or n_extra
    )
    if bad:
        raise _error(
            position,
            f"table of {table_size} entries at {table_offset:#x}, flags {flags:#x}, type {kind}, granularity "
            f"2^{granularity_bits}, name of {name_size} bytes, {n_extra} extra bytes: not a valid bitmap",
        )
    name = bytes(data[start - data_start : end - data_start]).partition(b"\0")[0].decode("utf-8", "surrogateescape")
    entry = BitmapEntry(name, table_offset, table_size, flags, 1 << granularity_bits, position)
    return entry, position + round_up(end - position, 8)


def parse_bitmap_directory(data: bytes, n_bitmaps: int, cluster_size: int) -> tuple[BitmapEntry, ...]:
    """The entries of a whole directory. Raises FormatError for one that QEMU would not load."""
    entries: list[BitmapEntry] = []
    position = 0
    while position < len(data):
        entry, position = parse_bitmap_entry(data, 0, position, len(data), cluster_size)
        entries.append(entry)
    require_bitmaps(len(entries), n_bitmaps, position)
    return tuple(entries)


def require_bitmaps(n_found: int, n_bitmaps: int, position: int) -> None:
    """Raises FormatError where a directory that was read up to byte ``position`` has another number of bitmaps."""
    if n_found != n_bitmaps:
        raise _error(position, f"{n_found} bitmaps, expected {n_bitmaps}")


def replace_entry(directory: bytearray, entry: BitmapEntry) -> None:
    """Put table, size of the table and flags of ``entry`` into its place in ``directory``; nothing else changes."""
    _CHANGING.pack_into(directory, entry.position, entry.table_offset, entry.table_size, entry.flags)


def is_valid_table_entry(entry: int, cluster_size: int) -> bool:
    """Whether an entry of a bitmap's table is one that the format allows."""
    host_offset = entry & TABLE_ENTRY_OFFSET_MASK
    if entry & TABLE_ENTRY_RESERVED or host_offset % cluster_size:
        return False
    return not (host_offset and entry & TABLE_ENTRY_ALL_ONES)


def _error(position: int, detail: str) -> FormatError:
    return FormatError("bitmap directory", None, f"entry at byte {position:#x}: {detail}")
