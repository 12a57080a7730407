"""The bits of dirty bitmaps, and entries of their directory, on plain bytes."""

from __future__ import annotations

import random
import struct

import pytest

from qcowfuse.format.bitmap_directory import IN_USE, parse_bitmap_directory, replace_entry
from qcowfuse.format.bitmaps import Contents, DirtyBits, table_entries_needed


def granules(bits: DirtyBits) -> set[int]:
    """The granules whose bits are set, by the definition in the specification."""
    found = set()
    for number, chunk in bits.chunks.items():
        for index, byte in enumerate(chunk):
            found |= {(number * bits.cluster_size + index) * 8 + bit for bit in range(8) if byte >> bit & 1}
    return found


def test_chunks_of_ones_take_no_memory_and_stay_ones() -> None:
    """They are one object, marks in it change nothing, and the one at the end of the disk has zeroes behind it."""
    size = (3 * 8 * 512 - 5) * 512
    bits = DirtyBits(granularity=512, cluster_size=512)
    for number in range(3):
        bits.load(number, None, size=size)
    bits.load(1, bytes(512), size=size)
    bits.load(1, None, size=size)
    assert bits.chunks[0] is bits.chunks[1]
    bits.mark(0, size // 2)
    assert [bits.contents(number) for number in range(3)] == [Contents.ONES, Contents.ONES, Contents.MIXED]
    assert granules(bits) == set(range(3 * 8 * 512 - 5))
    other = DirtyBits(granularity=512, cluster_size=512)
    other.mark(0, 512)
    assert granules(other) == {0}


def test_what_is_stored_as_zeroes_or_ones_is_not_kept() -> None:
    """A cluster of zeroes, as a hole of the file reads, takes nothing; one of ones is the one that all share."""
    bits = DirtyBits(granularity=512, cluster_size=512)
    for number, data in enumerate((bytes(512), b"\xff" * 512, None, bytes(511) + b"\x80")):
        bits.load(number, data, size=4 * 8 * 512 * 512)
    assert sorted(bits.chunks) == [1, 2, 3]
    assert bits.chunks[1] is bits.chunks[2]
    kinds = [bits.contents(number) for number in range(4)]
    assert kinds == [Contents.ZEROES, Contents.ONES, Contents.ONES, Contents.MIXED]
    bits.load(3, bytes(512), size=4 * 8 * 512 * 512)
    assert sorted(bits.chunks) == [1, 2]
    bits.load(3, bytes(511) + b"\x80", size=4 * 8 * 512 * 512)
    bits.mark(0, 512)
    assert granules(bits) == {0, *range(8 * 512, 3 * 8 * 512), 4 * 8 * 512 - 1}


@pytest.mark.parametrize("granularity", [512, 1024, 65536])
@pytest.mark.parametrize("cluster_size", [512, 4096])
def test_every_granule_touched_is_set_and_no_other(granularity: int, cluster_size: int) -> None:
    """Ranges of any length and alignment, over chunk boundaries too, set exactly the granules that they touch."""
    chooser = random.Random(granularity + cluster_size)
    bits = DirtyBits(granularity=granularity, cluster_size=cluster_size)
    expected: set[int] = set()
    limit = 3 * 8 * cluster_size * granularity
    for n in range(300):
        n_bytes = chooser.choice([1, 512, granularity, chooser.randint(1, 40 * granularity)])
        if n % 60 == 59:
            n_bytes = chooser.randint(limit // 3, limit // 2)
        start = chooser.randrange(limit - n_bytes)
        bits.mark(start, n_bytes)
        expected |= set(range(start // granularity, (start + n_bytes - 1) // granularity + 1))
        if n % 60 == 58:
            assert granules(bits) == expected
    assert granules(bits) == expected


def test_nothing_is_set_by_an_empty_range() -> None:
    """0 bytes change nothing, wherever they are."""
    bits = DirtyBits(granularity=512, cluster_size=512)
    for start in (0, 1, 511, 512, 513, 1 << 40):
        bits.mark(start, 0)
    assert granules(bits) == set()


def test_one_bit_at_every_place() -> None:
    """Each single granule of a chunk sets its own bit, lowest bit first within a byte."""
    for granule in range(4096):
        bits = DirtyBits(granularity=512, cluster_size=512)
        bits.mark(granule * 512 + 511, 1)
        assert bits.chunks[0][granule // 8] == 1 << granule % 8
        assert sum(bits.chunks[0]) == 1 << granule % 8


def test_contents_of_a_chunk() -> None:
    """All zeroes, all ones and anything else are told apart; a chunk that is missing is all zeroes."""
    bits = DirtyBits(granularity=512, cluster_size=512)
    assert bits.contents(0) is Contents.ZEROES
    bits.load(0, bytes(512), size=1 << 30)
    assert bits.contents(0) is Contents.ZEROES
    bits.mark(0, 512 * 4096)
    assert bits.contents(0) is Contents.ONES
    assert bits.contents(1) is Contents.ZEROES
    bits.load(0, b"\xff" * 511 + b"\x7f", size=1 << 30)
    assert bits.contents(0) is Contents.MIXED


@pytest.mark.parametrize("n_granules", [1, 7, 8, 9, 4095, 4096, 4097, 4100])
def test_bits_behind_the_end_are_dropped(n_granules: int) -> None:
    """A stored chunk has zeroes behind the end of the disk, whatever was loaded."""
    for data in (None, b"\xff" * 512):
        bits = DirtyBits(granularity=512, cluster_size=512)
        for number in range(-(-n_granules // 4096)):
            bits.load(number, data, size=n_granules * 512 - 100)
        assert granules(bits) == set(range(n_granules))


def test_entries_needed() -> None:
    """Disk, granule and cluster decide how long a table is; the last bit counts whole."""
    assert table_entries_needed(size=1 << 40, granularity=65536, cluster_size=65536) == 32
    assert table_entries_needed(size=(1 << 40) + 1, granularity=65536, cluster_size=65536) == 33
    assert table_entries_needed(size=1, granularity=512, cluster_size=512) == 1
    assert table_entries_needed(size=0, granularity=512, cluster_size=512) == 0


def test_an_entry_is_replaced_in_place() -> None:
    """Table, its size and flags change; names, unknown flags and padding of all entries stay byte for byte."""
    directory = bytearray()
    for name in (b"a", b"bitmap one", b"x" * 1023):
        entry = struct.pack(">QIIBBHI", 65536, 1, 2 | 4, 1, 16, len(name), 0) + name
        directory += entry + b"\xee" * (-len(entry) % 8)
    before = bytes(directory)
    entries = parse_bitmap_directory(before, 3, 65536)
    changed = entries[1]._replace(table_offset=1 << 33, table_size=77, flags=entries[1].flags | IN_USE)
    replace_entry(directory, changed)
    assert parse_bitmap_directory(bytes(directory), 3, 65536) == (entries[0], changed, entries[2])
    start = entries[1].position
    assert directory[:start] == before[:start]
    assert directory[start + 16 :] == before[start + 16 :]
    replace_entry(directory, entries[1])
    assert directory == before
