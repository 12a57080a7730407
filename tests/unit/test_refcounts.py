"""Refcount blocks of every width."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfuse.errors import CorruptImageError
from qcowfuse.format.refcounts import (
    decremented,
    empty_refcounts,
    entries_per_block,
    max_refcount,
    parse_refcounts,
    serialise_refcounts,
)


@given(st.integers(0, 6), st.binary(min_size=64, max_size=64))
def test_round_trip(order: int, data: bytes) -> None:
    """What is parsed serialises to the same bytes, in every width."""
    counts = parse_refcounts(data, order)
    assert len(counts) == len(data) * 8 >> order
    assert serialise_refcounts(counts, order, 0, len(counts)) == data


def test_narrow_widths_are_packed_from_the_least_significant_bit() -> None:
    """Cluster 0 is the lowest bits of byte 0."""
    assert list(parse_refcounts(b"\x01", 0)) == [1, 0, 0, 0, 0, 0, 0, 0]
    assert list(parse_refcounts(b"\x1b", 1)) == [3, 2, 1, 0]
    assert list(parse_refcounts(b"\x5a", 2)) == [10, 5]


def test_wide_widths_are_big_endian() -> None:
    """16 bits and more have the most significant byte first."""
    assert list(parse_refcounts(b"\x01\x02", 4)) == [0x0102]
    assert list(parse_refcounts(b"\x00\x00\x00\x07", 5)) == [7]


@pytest.mark.parametrize("order", range(7))
def test_parts_serialise_as_they_stand_in_the_whole(order: int) -> None:
    """A part of a block is the same bytes as in the whole block."""
    counts = empty_refcounts(9, order)
    assert len(counts) == entries_per_block(9, order)
    per_byte = max(8 >> order, 1)
    index = len(counts) // 2 // per_byte * per_byte
    counts[index] = max_refcount(order)
    whole = serialise_refcounts(counts, order, 0, len(counts))
    part = serialise_refcounts(counts, order, index, index + per_byte)
    start = index << order >> 3
    assert whole[start : start + len(part)] == part


def test_a_count_never_falls_below_zero() -> None:
    """Giving back what is not taken is corruption, not wrap-around."""
    assert decremented(2, 5) == 1
    with pytest.raises(CorruptImageError, match="0x5"):
        decremented(0, 5)
