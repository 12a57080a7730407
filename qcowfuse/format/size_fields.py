"""The header fields that change when a disk grows: its size, and the length and place of its L1 table.

All of them lie between the bytes 24 and 48 of every version, inside the first sector, so one write switches them.
"""

from __future__ import annotations

from ..errors import FormatError

SIZE_FIELDS_OFFSET = 24
SIZE_FIELDS_LENGTH = 24


def disk_size_in(fields: bytes) -> int:
    """The size of the disk, in bytes, in the 24 bytes at offset 24."""
    return int.from_bytes(fields[:8], "big")


def replace_size_fields(fields: bytes, *, version: int, size: int, l1_size: int, l1_table_offset: int) -> bytes:
    """The 24 bytes at offset 24 with new values. Version 1 does not store ``l1_size`` (entries): it follows from
    the size. Raises FormatError when ``fields`` are too short."""
    if len(fields) != SIZE_FIELDS_LENGTH:
        raise FormatError("header", SIZE_FIELDS_OFFSET, f"{len(fields)} bytes, expected {SIZE_FIELDS_LENGTH}")
    kept = fields[8:16] if version == 1 else fields[8:12] + l1_size.to_bytes(4, "big")
    return size.to_bytes(8, "big") + kept + l1_table_offset.to_bytes(8, "big")
