"""Damage to the metadata of version 2 and 3 images: at random for comparing verdicts, and of a chosen kind.

Everything works on the bytes of an image file and knows nothing of the code under test.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63


def damage_at_random(rng: random.Random, data: bytearray, cluster_size: int) -> None:
    """Flip, clear or swap one to three words, mostly such as look like table entries, or change a header field."""
    words = [place for place in range(cluster_size, len(data) - 8, 8) if data[place : place + 8] != bytes(8)]
    tables = [place for place in words if data[place] in (0, 0x40, 0x80)] or words
    for _ in range(rng.randint(1, 3)):
        place = rng.choice(tables)
        kind = rng.random()
        if kind < 0.6:
            data[place + rng.randrange(8)] ^= 1 << rng.randrange(8)
        elif kind < 0.75:
            data[place : place + 8] = bytes(8)
        elif kind < 0.95:
            other = rng.choice(tables)
            data[place : place + 8], data[other : other + 8] = data[other : other + 8], data[place : place + 8]
        else:
            field = rng.choice((40, 48, 56, 60, 64, 72, 80, 88))
            data[field + rng.randrange(4)] ^= 1 << rng.randrange(8)


class Tables:
    """Where the tables of an image lie."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data
        self.version, cluster_bits = self.u32(4), self.u32(20)
        self.cluster_size = 1 << cluster_bits
        self.l1_size, self.l1_offset, self.refcount_table_offset = self.u32(36), self.u64(40), self.u64(48)
        self.n_snapshots, self.snapshots_offset = self.u32(60), self.u64(64)
        self.refcount_order = self.u32(96) if self.version >= 3 else 4

    def u64(self, place: int) -> int:
        """A big-endian word."""
        word: int = struct.unpack_from(">Q", self.data, place)[0]
        return word

    def u32(self, place: int) -> int:
        """A big-endian half."""
        half: int = struct.unpack_from(">I", self.data, place)[0]
        return half

    @property
    def refcount_block(self) -> int:
        """The first refcount block."""
        return self.u64(self.refcount_table_offset)

    def l2_entries(self) -> Iterator[int]:
        """Places of the L2 entries (words of 8 bytes) that are not 0, of the active tables."""
        for l1_place in range(self.l1_offset, self.l1_offset + 8 * self.l1_size, 8):
            l2_offset = self.u64(l1_place) & OFFSET_MASK
            if l2_offset:
                for place in range(l2_offset, l2_offset + self.cluster_size, 8):
                    if self.u64(place):
                        yield place


Damage = Callable[[bytearray], None]


def leak_clusters(data: bytearray) -> None:
    """Refcounts (16 bits) of a few clusters in use and of free ones are raised."""
    tables = Tables(data)
    for number, place in enumerate(tables.l2_entries()):
        if number % 5 == 0:
            _set_count(data, tables, tables.u64(place) & OFFSET_MASK, 3)
    _set_count(data, tables, len(data) // tables.cluster_size * tables.cluster_size - tables.cluster_size, 7)


def lower_counts(data: bytearray) -> None:
    """Every third data cluster has refcount 0, as an interrupted run with lazy refcounts leaves it; and is dirty."""
    tables = Tables(data)
    for number, place in enumerate(tables.l2_entries()):
        if number % 3 == 0:
            _set_count(data, tables, tables.u64(place) & OFFSET_MASK, 0)
    mark_dirty(data)


def drop_refcount_block(data: bytearray) -> None:
    """The first refcount block is gone."""
    tables = Tables(data)
    struct.pack_into(">Q", data, tables.refcount_table_offset, 0)


def misplace_refcount_block(data: bytearray) -> None:
    """The first refcount block lies far behind the end."""
    tables = Tables(data)
    struct.pack_into(">Q", data, tables.refcount_table_offset, 1 << 40)


def flip_copied(data: bytearray) -> None:
    """Every fourth COPIED flag, and that of the first L1 entry, is wrong."""
    tables = Tables(data)
    for number, place in enumerate(list(tables.l2_entries())):
        if number % 4 == 0 and tables.u64(place) & OFFSET_MASK and not tables.u64(place) >> 62 & 1:
            struct.pack_into(">Q", data, place, tables.u64(place) ^ COPIED)
    struct.pack_into(">Q", data, tables.l1_offset, tables.u64(tables.l1_offset) ^ COPIED)


def everything(data: bytearray) -> None:
    """Leaks, low counts and wrong flags at once."""
    flip_copied(data)
    leak_clusters(data)
    lower_counts(data)


def mark_dirty(data: bytearray) -> None:
    """Set the dirty bit."""
    data[79] |= 1


def shorten_snapshot_entry(data: bytearray) -> None:
    """The first snapshot's entry lacks its extra data, which version 3 asks for."""
    tables = Tables(data)
    place = tables.snapshots_offset
    n_extra = tables.u32(place + 36)
    id_size, name_size = struct.unpack_from(">HH", data, place + 12)
    names = bytes(data[place + 40 + n_extra : place + 40 + n_extra + id_size + name_size])
    struct.pack_into(">I", data, place + 36, 0)
    data[place + 40 : place + 40 + len(names)] = names


def _set_count(data: bytearray, tables: Tables, host_offset: int, count: int) -> None:
    assert tables.refcount_order == 4
    cluster = host_offset // tables.cluster_size
    per_block = tables.cluster_size // 2
    block = tables.u64(tables.refcount_table_offset + 8 * (cluster // per_block))
    if block:
        struct.pack_into(">H", data, block + 2 * (cluster % per_block), count)
