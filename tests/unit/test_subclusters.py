"""Extended L2 entries and zeroing, against a model that looks at one subcluster at a time."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfuse.errors import CorruptImageError
from qcowfuse.format.cow_plan import Action
from qcowfuse.format.entries import COMPRESSED, COPIED, READS_ZERO, ClusterKind, entry_format
from qcowfuse.format.subclusters import (
    ALL_ALLOCATED,
    ALL_ZERO,
    link_extended,
    lookup_run_extended,
    plan_write_extended,
)
from qcowfuse.format.zero_plan import can_zero_by_entry, zero_clusters

BITS = 14
SIZE = 1 << BITS
SUB = SIZE // 32
FORMAT = entry_format(3, BITS, is_extended=True)
STANDARD = entry_format(3, BITS)


@st.composite
def extended_entry(draw: st.DrawFn) -> tuple[int, int]:
    """A valid entry: compressed, without a cluster, owned or shared, with any subclusters."""
    kind = draw(st.sampled_from(["compressed", "none", "owned", "shared"]))
    offset = draw(st.integers(1, 5)) << BITS
    if kind == "compressed":
        return offset | COMPRESSED, 0
    zero = draw(st.sampled_from([0, ALL_ALLOCATED, 1, 0xFFFF, 0xF0F0F0F0]) | st.integers(0, ALL_ALLOCATED))
    if kind == "none":
        return 0, zero << 32
    allocated = draw(st.sampled_from([0, ALL_ALLOCATED, 1, 0xFF00]) | st.integers(0, ALL_ALLOCATED)) & ~zero
    return offset | (COPIED if kind == "owned" else 0), zero << 32 | allocated


TABLES = st.lists(extended_entry(), min_size=1, max_size=5).map(
    lambda entries: array("Q", [word for entry in entries for word in entry])
)


def model(table: array[int], byte: int) -> tuple[int, int]:
    """Kind and host offset (the entry, where compressed) of one byte of the slice."""
    entry, bitmap = table[2 * (byte // SIZE)], table[2 * (byte // SIZE) + 1]
    number = byte % SIZE // SUB
    if entry & COMPRESSED:
        return ClusterKind.COMPRESSED, entry
    if bitmap >> number & 1:
        return ClusterKind.DATA, (entry & FORMAT.offset_mask) + byte % SIZE
    return (ClusterKind.ZERO if bitmap >> 32 + number & 1 else ClusterKind.UNALLOCATED), 0


@given(TABLES, st.data())
def test_runs_say_of_every_subcluster_what_its_bits_say(table: array[int], data: st.DataObject) -> None:
    """A run is of one kind, contiguous where it is data, and inside the request and the slice."""
    n_total = len(table) // 2 * SIZE
    start = data.draw(st.integers(0, n_total - 1))
    n_bytes = data.draw(st.integers(1, n_total - start))
    run = lookup_run_extended(table, FORMAT, start // SIZE, start % SIZE, n_bytes)
    assert 0 < run.n_bytes <= n_bytes
    for byte in {start, *range(start - start % SUB + SUB, start + run.n_bytes, SUB), start + run.n_bytes - 1}:
        kind, value = model(table, byte)
        assert kind == run.kind
        if kind == ClusterKind.DATA:
            assert value == run.value + byte - start
        if kind == ClusterKind.COMPRESSED:
            assert value == run.value


@given(TABLES, st.data())
def test_a_planned_and_linked_write_changes_what_it_wrote_and_nothing_else(
    table: array[int], data: st.DataObject
) -> None:
    """Head, data and tail become data at the plan's place; every other subcluster stays what it was."""
    n_total = len(table) // 2 * SIZE
    start = data.draw(st.integers(0, n_total - 1))
    n_bytes = data.draw(st.integers(1, n_total - start))
    plan = plan_write_extended(table, FORMAT, start // SIZE, start % SIZE, n_bytes)
    before = array("Q", table)
    first, end = start - plan.head, start + plan.n_bytes + plan.tail
    assert 0 < plan.n_bytes <= n_bytes
    assert first // SIZE == start // SIZE
    place = plan.host_offset
    if plan.action is Action.IN_PLACE:
        assert (plan.head, plan.tail) == (0, 0)
    else:
        place = place or 100 << BITS
        link_extended(table, FORMAT, start // SIZE, host_offset=place, in_cluster=first % SIZE, n_bytes=end - first)
    for byte in range(0, n_total, SUB):
        inside = byte // SUB in range(first // SUB, (end - 1) // SUB + 1)
        if inside:
            expected = place + byte - start // SIZE * SIZE
            assert model(table, byte) == (ClusterKind.DATA, expected)
            for edge in (max(byte, first), min(byte + SUB, end) - 1):
                if not first <= byte or not byte + SUB <= end:
                    assert model(before, edge)[0] == ClusterKind.DATA, "a subcluster was filled in part only"
        elif plan.action is Action.ALLOCATE and table[2 * (byte // SIZE)] != before[2 * (byte // SIZE)]:
            assert model(before, byte)[0] in (ClusterKind.UNALLOCATED, ClusterKind.ZERO)
            assert model(table, byte)[0] == model(before, byte)[0]
        else:
            assert model(table, byte) == model(before, byte)


@pytest.mark.parametrize(
    ("entry", "bitmap"),
    [(0, 1), (READS_ZERO, 1), (1 << BITS, 1 << 32 | 1), (1 << BITS | 512, 0)],
)
def test_impossible_extended_entries(entry: int, bitmap: int) -> None:
    """Allocated without a cluster, allocated and zero, misaligned."""
    with pytest.raises(CorruptImageError):
        lookup_run_extended(array("Q", [entry, bitmap]), FORMAT, 0, 0, 1)


def test_bits_that_mean_nothing_are_passed_over() -> None:
    """The zero flag of standard entries, and the bitmap of a compressed cluster."""
    table = array("Q", [1 << BITS | READS_ZERO, 1, READS_ZERO, 0, COMPRESSED | 512, 1 << 32 | 1])
    assert lookup_run_extended(table, FORMAT, 0, 0, SUB) == (ClusterKind.DATA, 1 << BITS, SUB)
    assert lookup_run_extended(table, FORMAT, 0, SUB, 9 * SIZE).kind == ClusterKind.UNALLOCATED
    assert lookup_run_extended(table, FORMAT, 2, 0, 9 * SIZE) == (ClusterKind.COMPRESSED, COMPRESSED | 512, SIZE)


@given(TABLES, st.booleans())
def test_zeroing_extended_clusters(table: array[int], unmap: bool) -> None:
    """All subclusters read as zeroes; what is owned alone is kept unless it may go, the rest is let go."""
    before = array("Q", table)
    let_go = zero_clusters(table, FORMAT, 0, len(table) // 2, unmap=unmap)
    kept = [entry for entry in table[::2] if entry]
    assert all(bitmap == ALL_ZERO for bitmap in table[1::2])
    assert sorted(let_go + kept) == sorted(entry for entry in before[::2] if entry)
    assert all(entry & COPIED and not unmap for entry in kept)


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroing_standard_clusters(unmap: bool) -> None:
    """As QEMU does it: a flag where the cluster is owned and kept, else let go."""
    owned, shared, compressed = 1 << BITS | COPIED, 2 << BITS, 3 << BITS | COMPRESSED
    table = array("Q", [0, owned, shared, compressed, READS_ZERO, owned | READS_ZERO])
    let_go = zero_clusters(table, STANDARD, 0, len(table), unmap=unmap)
    if unmap:
        assert list(table) == [READS_ZERO] * 6
        assert let_go == [owned, shared, compressed, owned | READS_ZERO]
    else:
        zeroed = owned | READS_ZERO
        assert list(table) == [READS_ZERO, zeroed, READS_ZERO, READS_ZERO, READS_ZERO, zeroed]
        assert let_go == [shared, compressed]


def test_zeroing_leaves_an_impossible_table_alone() -> None:
    """Corruption is found before anything is changed."""
    table = array("Q", [1 << BITS | COPIED, 512])
    with pytest.raises(CorruptImageError):
        zero_clusters(table, STANDARD, 0, 2, unmap=True)
    assert list(table) == [1 << BITS | COPIED, 512]


def test_which_formats_can_zero_by_entry() -> None:
    """Version 3 always, version 2 where nothing lies below, version 1 never."""
    for version, falls, expected in [(3, False, True), (2, True, True), (2, False, False), (1, True, False)]:
        assert can_zero_by_entry(entry_format(version, 12), may_fall_through=falls) is expected
