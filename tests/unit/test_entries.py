"""L1 and L2 entries: what each bit pattern means in each version."""

from __future__ import annotations

import random
from array import array

import pytest

from qcowfuse.errors import CorruptImageError
from qcowfuse.format.entries import (
    ALL_BITS,
    COMPRESSED,
    COPIED,
    READS_ZERO,
    ClusterKind,
    EntryFormat,
    entry_format,
    masked,
    parse_table,
    serialise_table,
)

V1 = entry_format(1, 12)
V2 = entry_format(2, 16)
V3 = entry_format(3, 16)


@pytest.mark.parametrize(
    ("fmt", "entry", "kind"),
    [
        (V3, 0, ClusterKind.UNALLOCATED),
        (V3, COPIED, ClusterKind.UNALLOCATED),
        (V3, 0x50000, ClusterKind.DATA),
        (V3, 0x50000 | COPIED, ClusterKind.DATA),
        (V3, READS_ZERO, ClusterKind.ZERO),
        (V3, 0x50000 | COPIED | READS_ZERO, ClusterKind.ZERO),
        (V3, COMPRESSED | 0x12345, ClusterKind.COMPRESSED),
        (V2, COMPRESSED | 0x12345, ClusterKind.COMPRESSED),
        (V1, 1 << 63 | 0x1234, ClusterKind.COMPRESSED),
        (V1, 0x5000, ClusterKind.DATA),
        (V1, 0x5200, ClusterKind.DATA),
        (V1, 0, ClusterKind.UNALLOCATED),
    ],
)
def test_classify(fmt: EntryFormat, entry: int, kind: ClusterKind) -> None:
    """Every kind of cluster is told by its bits."""
    assert fmt.classify(entry) is kind


@pytest.mark.parametrize(
    ("fmt", "entry"),
    [(V3, 0x50200), (V3, 0x50200 | COPIED | READS_ZERO), (V2, 0x50000 | READS_ZERO), (V1, 1 << 57), (V1, 0x5001)],
)
def test_impossible_entries_are_refused(fmt: EntryFormat, entry: int) -> None:
    """Misaligned offsets, zero flags in version 2 and offsets beyond 2^56 are corruption."""
    with pytest.raises(CorruptImageError):
        fmt.classify(entry)


@pytest.mark.parametrize("fmt", [V1, V2, V3])
def test_plain_and_in_place_masks_agree_with_classify(fmt: EntryFormat) -> None:
    """The one-test answers of the hot path never say more than classify() does."""
    patterns = [
        offset | copied | compressed | zero
        for offset in (0, 0x50000, 0x50200, 1 << 55)
        for copied in (0, fmt.copied)
        for compressed in (0, fmt.compressed)
        for zero in (0, 1 if fmt.version > 1 else 0)
    ]
    for entry in patterns:
        plain = not entry & fmt.not_plain and entry & fmt.offset_mask
        in_place = entry & fmt.in_place_mask == fmt.in_place_value and entry & fmt.offset_mask
        if plain:
            assert fmt.classify(entry) is ClusterKind.DATA
        if in_place:
            assert plain
            assert entry & fmt.copied == fmt.copied


def test_reusable_zero() -> None:
    """Only a zero cluster that owns its host cluster alone may be filled where it is."""
    assert V3.is_reusable_zero(0x50000 | COPIED | READS_ZERO)
    assert not V3.is_reusable_zero(0x50000 | READS_ZERO)
    assert not V3.is_reusable_zero(COPIED | READS_ZERO)
    assert not V3.is_reusable_zero(READS_ZERO)
    assert not V3.is_reusable_zero(COMPRESSED | COPIED | 0x50001)
    assert not V2.is_reusable_zero(0x50000 | COPIED | READS_ZERO)


def test_l1_entries() -> None:
    """An L1 entry gives its table; a misaligned one is corruption."""
    assert V3.l1_host_offset(0x30000 | COPIED) == 0x30000
    assert V3.l1_host_offset(0) == 0
    with pytest.raises(CorruptImageError, match="L1 entry"):
        V3.l1_host_offset(0x30200)


def test_tables_round_trip() -> None:
    """Tables are big endian on disk and native in memory."""
    table = parse_table(bytes.fromhex("8000000000050000 0000000000000001"))
    assert table == array("Q", [0x8000000000050000, 1])
    assert serialise_table(table, 1, 2) == bytes.fromhex("0000000000000001")
    assert serialise_table(table, 0, 2)[:8] == bytes.fromhex("8000000000050000")


@pytest.mark.parametrize(("mask", "shift"), [(0x00FF_FFFF_FFFF_0000, 16), (0x00FF_FFFF_FFFF_FE00, 9), (ALL_BITS, 0)])
def test_all_entries_are_masked_at_once(mask: int, shift: int) -> None:
    """No bit of one entry gets into another."""
    chooser = random.Random(shift)
    table = array("Q", [chooser.getrandbits(64) for _ in range(1000)] + [ALL_BITS, 0, ALL_BITS])
    assert masked(table, mask, shift) == array("Q", [(entry & mask) >> shift for entry in table])
    assert masked(array("Q"), mask, shift) == array("Q")
