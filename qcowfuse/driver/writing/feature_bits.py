"""The feature bits in the header of a running QCOW2 version 3 image.

1. Each change is one aligned 8-byte write followed by a flush (R5), and happens at most once. The flush is that of
   the ordering rules: should it fail, that is as final as for any other.
2. Autoclear bits: the first write clears all but those whose data is kept up to date (``kept_autoclear``), so that
   a program that opens the image later ignores what they describe instead of trusting it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ...format.header_fields import AUTOCLEAR_FIELD, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_FIELD
from ...storage.base import Storage

Flush = Callable[[], Awaitable[None]]


class FeatureBits:
    """Writes feature bits in place; ``incompatible`` and ``autoclear`` are the fields as they were read."""

    def __init__(self, storage: Storage, *, incompatible: int, autoclear: int, kept_autoclear: int = 0) -> None:
        self._storage = storage
        self._incompatible = incompatible
        self._autoclear = autoclear
        self._kept_autoclear = kept_autoclear

    async def before_first_write(self, flush: Flush) -> None:
        """Clear the autoclear bits that don't stay true, durably. Raises OSError."""
        kept = self._autoclear & self._kept_autoclear
        if self._autoclear != kept:
            await self._write(AUTOCLEAR_FIELD, kept, flush)
            self._autoclear = kept

    async def mark_corrupt(self, flush: Flush) -> None:
        """Set the corrupt bit, durably. Raises OSError."""
        self._incompatible |= INCOMPATIBLE_CORRUPT
        await self._write(INCOMPATIBLE_FIELD, self._incompatible, flush)

    async def _write(self, host_offset: int, value: int, flush: Flush) -> None:
        await self._storage.pwritev(host_offset, [value.to_bytes(8, "big")])
        await flush()
