"""Reading the directory of persistent bitmaps entry by entry: it has up to 64 MiB, and its names more as text."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from ..format.bitmap_directory import (
    MAX_BITMAP_ENTRY,
    BitmapEntry,
    bitmap_directory_place,
    parse_bitmap_entry,
    require_bitmaps,
)
from ..format.header import Qcow2Header
from ..storage.base import Storage, pread
from ..system.alone import checkpoint

_CHUNK = 1 << 18
_PER_CHECKPOINT = 256


async def each_bitmap(storage: Storage, header: Qcow2Header) -> AsyncGenerator[BitmapEntry]:
    """The persistent bitmaps that are valid. To be closed by ``aclosing`` unless it is run to its end. Raises
    FormatError, OSError."""
    place = bitmap_directory_place(header)
    if place is None:
        return
    host_offset, n_bytes, n_bitmaps = place
    buffer = b""
    buffer_start = position = n_found = 0
    while position < n_bytes:
        if position + MAX_BITMAP_ENTRY > buffer_start + len(buffer) < n_bytes:
            buffer_start = position
            buffer = bytes(await pread(storage, host_offset + position, min(_CHUNK, n_bytes - position)))
        entry, position = parse_bitmap_entry(buffer, buffer_start, position, n_bytes, 1 << header.cluster_bits)
        n_found += 1
        if n_found % _PER_CHECKPOINT == 0:
            await checkpoint()
        yield entry
    require_bitmaps(n_found, n_bitmaps, position)
