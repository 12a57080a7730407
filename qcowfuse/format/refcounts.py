"""Refcount blocks: the counts of a run of host clusters, 1 to 64 bits wide.

1. A block is decoded once into an array with one item per cluster, so that the widths differ only here;
   searching it for a free cluster is then one C-speed call.
2. Widths below 8 bits are packed from the least significant bit of each byte upwards; wider ones are big endian.
3. A count never exceeds the width's maximum; the 64-bit width stops at 2^63 - 1 as QEMU does.

Source: qcow2 specification, "Host cluster management".
"""

from __future__ import annotations

import sys
from array import array

from ..buffer import Buffer
from ..errors import CorruptImageError

_TYPECODES = {3: "B", 4: "H", 5: "I", 6: "Q"}
REFCOUNT_TABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
REFCOUNT_TABLE_RESERVED = 0x1FF


def max_refcount(refcount_order: int) -> int:
    """The largest count that a width of ``2**refcount_order`` bits holds."""
    return (1 << 63) - 1 if refcount_order == 6 else (1 << (1 << refcount_order)) - 1


def entries_per_block(cluster_bits: int, refcount_order: int) -> int:
    """Host clusters that one refcount block describes."""
    return 1 << (cluster_bits + 3 - refcount_order)


def parse_refcounts(data: Buffer, refcount_order: int) -> array[int]:
    """The counts of a block, one array item each."""
    if refcount_order >= 3:
        counts = array(_TYPECODES[refcount_order])
        counts.frombytes(data)
        if sys.byteorder == "little":
            counts.byteswap()
        return counts
    width = 1 << refcount_order
    mask = (1 << width) - 1
    unpacked = [bytes((value >> shift) & mask for shift in range(0, 8, width)) for value in range(256)]
    return array("B", b"".join(map(unpacked.__getitem__, bytes(data))))


def serialise_refcounts(counts: array[int], refcount_order: int, start: int, end: int) -> bytes:
    """Counts ``start`` to ``end`` as they stand on disk; below 8 bits both must be multiples of ``8 / width``."""
    part = counts[start:end]
    if refcount_order >= 3:
        if sys.byteorder == "little":
            part.byteswap()
        return part.tobytes()
    width = 1 << refcount_order
    per_byte = 8 // width
    raw = part.tobytes()
    packed = bytearray(len(raw) // per_byte)
    for position in range(per_byte):
        shift = position * width
        for index, value in enumerate(raw[position::per_byte]):
            if value:
                packed[index] |= value << shift
    return bytes(packed)


def empty_refcounts(cluster_bits: int, refcount_order: int) -> array[int]:
    """A block in which every cluster is free."""
    typecode = _TYPECODES.get(refcount_order, "B")
    return array(typecode, bytes(entries_per_block(cluster_bits, refcount_order) * array(typecode).itemsize))


def decremented(count: int, cluster: int) -> int:
    """One reference less. Raises CorruptImageError when there was none."""
    if count < 1:
        raise CorruptImageError("refcount", None, f"host cluster {cluster:#x} is in use but its refcount is 0")
    return count - 1
