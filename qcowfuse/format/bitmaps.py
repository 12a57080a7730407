"""A dirty bitmap: one bit per granule of the virtual disk, in memory and as the clusters that its table points at.

1. Bit ``n`` stands for the guest bytes from ``n << granularity_bits`` on. Bit ``n`` of the stored form is bit
   ``n % 8``, counted from the lowest, of byte ``n // 8``; bits behind the end of the disk are stored as 0.
2. Memory has one chunk per table entry, as long as a cluster, and only where a bit is or was set: a disk of 1 TiB
   with granules of 64 KiB takes 2 MiB at most. All chunks that hold nothing but ones when they are loaded are one
   object: bits are only ever set, so nothing changes in it, and a table of such entries takes no more than itself.

Source: qcow2 specification, "Bitmap table" and "Bitmap data".
"""

from __future__ import annotations

from enum import Enum

from ..buffer import Buffer
from .geometry import divide_up


class Contents(Enum):
    """What a chunk holds; the value of ZEROES and ONES is their entry in the bitmap's table."""

    ZEROES = 0
    ONES = 1
    MIXED = -1


def table_entries_needed(*, size: int, granularity: int, cluster_size: int) -> int:
    """Entries of the table of a bitmap of a disk of ``size`` bytes."""
    return divide_up(divide_up(size, granularity), 8 * cluster_size)


class DirtyBits:
    """The bits of one bitmap; ``granularity`` in bytes, a power of two."""

    __slots__ = ("_chunk_mask", "_chunk_shift", "_ones", "_shift", "chunks", "cluster_size")

    def __init__(self, *, granularity: int, cluster_size: int) -> None:
        self.cluster_size = cluster_size
        self.chunks: dict[int, bytearray] = {}
        self._ones: bytearray | None = None
        self._shift = granularity.bit_length() - 1
        self._chunk_shift = cluster_size.bit_length() + 2  # log2 of the bits in a chunk
        self._chunk_mask = (1 << self._chunk_shift) - 1

    def mark(self, guest_offset: int, n_bytes: int) -> None:
        """Set the bits of all granules that the bytes touch."""
        if not n_bytes:
            return
        first = guest_offset >> self._shift
        last = (guest_offset + n_bytes - 1) >> self._shift
        if first == last:
            chunk = self.chunks.get(first >> self._chunk_shift)
            if chunk is not None:
                chunk[(first & self._chunk_mask) >> 3] |= 1 << (first & 7)
                return
        self._set(first, last + 1)

    def _set(self, first: int, end: int) -> None:
        while first < end:
            number = first >> self._chunk_shift
            chunk = self.chunks.get(number)
            if chunk is None:
                chunk = self.chunks[number] = bytearray(self.cluster_size)
            base = number << self._chunk_shift
            stop = min(end - base, self._chunk_mask + 1)
            _set_bits(chunk, first - base, stop)
            first = base + stop

    def load(self, number: int, data: Buffer | None, *, size: int) -> None:
        """Take over a stored chunk of a disk of ``size`` bytes; None for one that is all ones."""
        n_bits = divide_up(size, 1 << self._shift) - (number << self._chunk_shift)
        if data is None and n_bits > self._chunk_mask:
            self.chunks[number] = self._all_ones()
            return
        chunk = bytearray(b"\xff" * self.cluster_size if data is None else data)
        if n_bits <= self._chunk_mask:
            whole, left = divmod(max(n_bits, 0), 8)
            if left:
                chunk[whole] &= (1 << left) - 1
                whole += 1
            chunk[whole:] = bytes(len(chunk) - whole)
        if chunk.count(0xFF) == self.cluster_size:
            self.chunks[number] = self._all_ones()
        elif chunk.count(0) < self.cluster_size:
            self.chunks[number] = chunk
        else:
            self.chunks.pop(number, None)

    def _all_ones(self) -> bytearray:
        if self._ones is None:
            self._ones = bytearray(b"\xff" * self.cluster_size)
        return self._ones

    def contents(self, number: int) -> Contents:
        """What is to be stored for a chunk."""
        chunk = self.chunks.get(number)
        if chunk is not None and chunk is self._ones:
            return Contents.ONES
        if chunk is None or chunk.count(0) == self.cluster_size:
            return Contents.ZEROES
        return Contents.ONES if chunk.count(0xFF) == self.cluster_size else Contents.MIXED


def _set_bits(chunk: bytearray, first: int, end: int) -> None:
    """Set the bits ``first`` to ``end`` (exclusive, and at least one)."""
    first_byte, last_byte = first >> 3, (end - 1) >> 3
    head = 0xFF << (first & 7) & 0xFF
    tail = 0xFF >> (-end & 7)
    if first_byte == last_byte:
        chunk[first_byte] |= head & tail
        return
    chunk[first_byte] |= head
    chunk[last_byte] |= tail
    chunk[first_byte + 1 : last_byte] = b"\xff" * (last_byte - first_byte - 1)
