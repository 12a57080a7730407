"""L1 tables of version 1 that are larger than any of version 2: up to 2 GiB, of which what is in use takes memory.

1. The table is a private anonymous mapping. Nothing is written to a page of it that is all zero in the image, so the
   kernel gives no memory for it: an image of 9 TiB as QEMU makes it has a table of 36 MiB and takes none.
2. No more than :data:`MAX_USED` bytes of it may be in use: that is 8 TiB of data with clusters of 4 KiB.
3. What looks at all entries goes by pieces, and passes over those that are zero at the speed of a comparison.
"""

from __future__ import annotations

import mmap
import sys
from array import array
from collections.abc import Iterator

from ..errors import ImageUsageError
from ..format.header_fields import MAX_L1_SIZE
from ..storage.base import Storage, pread

MAX_USED = MAX_L1_SIZE
_PIECE = 1 << 20
_PAGE = mmap.PAGESIZE
_ZEROES = bytes(_PIECE)


async def load_large_table(storage: Storage, host_offset: int, n_entries: int) -> memoryview:
    """The table at ``host_offset``, as native words; what lies past the end of the file is zero.

    Raises ImageUsageError where too much of it is in use to be held in memory, OSError.
    """
    n_bytes = n_entries * 8
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)  # Python 3.11 lacks the last
    raw = memoryview(mmap.mmap(-1, n_bytes, flags=flags))
    n_used = 0
    for start in range(0, min(n_bytes, max(storage.size() - host_offset, 0)), _PIECE):
        length = min(_PIECE, n_bytes - start)
        data = bytes(await pread(storage, host_offset + start, length))
        if data == _ZEROES[:length]:
            continue
        for place in range(0, length, _PAGE):
            page = data[place : place + _PAGE]
            if page != _ZEROES[: len(page)]:
                n_used += len(page)
                if n_used > MAX_USED:
                    raise ImageUsageError(
                        f"{storage.name}: its L1 table has more than {MAX_USED >> 20} MiB in use, too much to write "
                        "the image; serve it read-only (qcowfuse -r)"
                    )
                words = array("Q", page)
                if sys.byteorder == "little":
                    words.byteswap()
                raw[start + place : start + place + len(page)] = words.tobytes()
    return raw.cast("Q")


def parts_of_large_table(table: memoryview) -> Iterator[array[int]]:
    """The entries, part by part, but for parts that are all zero."""
    raw = table.cast("B")
    for start in range(0, len(raw), _PIECE):
        piece = bytes(raw[start : start + _PIECE])
        if piece != _ZEROES[: len(piece)]:
            yield array("Q", piece)
