"""The feature bits in the header of a running QCOW2 version 3 image.

1. Each change is one aligned 8-byte write followed by a flush (R5), and happens at most once. The flush is that of
   the ordering rules: should it fail, that is as final as for any other.
2. Autoclear bits: whatever is set describes data that we do not keep up to date, so the first write clears
   all of them; a QEMU that opens the image later then ignores the bitmaps instead of trusting them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ..format.header import INCOMPATIBLE_CORRUPT
from ..storage.base import Storage

Flush = Callable[[], Awaitable[None]]
_INCOMPATIBLE_OFFSET = 72
_AUTOCLEAR_OFFSET = 88


class HeaderBits:
    """Writes feature bits in place; ``incompatible`` and ``autoclear`` are the fields as they were read."""

    def __init__(self, storage: Storage, *, incompatible: int, autoclear: int) -> None:
        self._storage = storage
        self._incompatible = incompatible
        self._autoclear = autoclear

    async def before_first_write(self, flush: Flush) -> None:
        """Clear the autoclear bits, durably. Raises OSError."""
        if self._autoclear:
            await self._write(_AUTOCLEAR_OFFSET, 0, flush)
            self._autoclear = 0

    async def mark_corrupt(self, flush: Flush) -> None:
        """Set the corrupt bit, durably. Raises OSError."""
        self._incompatible |= INCOMPATIBLE_CORRUPT
        await self._write(_INCOMPATIBLE_OFFSET, self._incompatible, flush)

    async def _write(self, host_offset: int, value: int, flush: Flush) -> None:
        await self._storage.pwritev(host_offset, [value.to_bytes(8, "big")])
        await flush()
