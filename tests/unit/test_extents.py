"""Counting the clusters of a slice that hold data, against asking for each run."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfuse.format.entries import COMPRESSED, COMPRESSED_V1, COPIED, READS_ZERO, ClusterKind, entry_format
from qcowfuse.format.extents import Extent, clipped, count_data, lookup_run

CLUSTER = 1 << 12
DATA = st.integers(1, 1 << 40).map(lambda cluster: cluster * CLUSTER)
ENTRY_V3 = st.one_of(
    st.just(0),
    st.just(READS_ZERO),
    DATA,
    DATA.map(lambda offset: offset | COPIED),
    DATA.map(lambda offset: offset | COPIED | READS_ZERO),
    st.integers(1, (1 << 61) - 1).map(lambda place: place | COMPRESSED),
)
ENTRY_V1 = st.one_of(st.just(0), DATA, st.integers(1, (1 << 62) - 1).map(lambda place: place | COMPRESSED_V1))


def by_runs(entries: array[int], version: int) -> tuple[int, bool]:
    """Clusters with data, and whether there are some that fall through."""
    n_data, has_holes, place = 0, False, 0
    end = len(entries) * CLUSTER
    while place < end:
        run = lookup_run(entries, entry_format(version, 12), place // CLUSTER, 0, end - place)
        n_data += run.n_bytes // CLUSTER if run.kind in (ClusterKind.DATA, ClusterKind.COMPRESSED) else 0
        has_holes |= run.kind == ClusterKind.UNALLOCATED
        place += run.n_bytes
    return n_data, has_holes


@given(st.lists(ENTRY_V3, min_size=1, max_size=40))
def test_the_count_is_that_of_the_runs(values: list[int]) -> None:
    """Data and compressed clusters count, zero clusters with and without a place and unallocated ones don't."""
    entries = array("Q", values)
    n_data, has_holes = by_runs(entries, 3)
    assert count_data(entries, entry_format(3, 12), needs_holes=False) == n_data
    assert count_data(entries, entry_format(3, 12), needs_holes=True) == (None if has_holes else n_data)


@given(st.lists(ENTRY_V1, min_size=1, max_size=40))
def test_version_1_has_no_zero_flag(values: list[int]) -> None:
    """In version 1 whatever is not 0 is data, odd places of compressed clusters too."""
    entries = array("Q", values)
    assert count_data(entries, entry_format(1, 12), needs_holes=False) == by_runs(entries, 1)[0]


@pytest.mark.parametrize("needs_holes", [False, True])
def test_extended_entries_are_not_counted(needs_holes: bool) -> None:
    """Their subclusters have to be looked at."""
    extended = entry_format(3, 16, is_extended=True)
    assert count_data(array("Q", [0, 0]), extended, needs_holes=needs_holes) is None


def test_extents_are_clipped_to_a_range() -> None:
    """Places move with the start of what is left; a compressed cluster stays named by its entry."""
    extents = [
        Extent(ClusterKind.DATA, 0, 0x50000, 0, 4096),
        Extent(ClusterKind.COMPRESSED, 1, 0x4000_0000_0001_2345, 4096, 4096),
        Extent(ClusterKind.ENCRYPTED, 2, 0x90000, 8192, 4096),
        Extent(ClusterKind.ZERO, 0, 0, 12288, 4096),
    ]
    assert clipped(extents, 0, 16384) == extents
    assert clipped(extents, 1000, 500) == [Extent(ClusterKind.DATA, 0, 0x50000 + 1000, 1000, 500)]
    assert clipped(extents, 5000, 8000) == [
        Extent(ClusterKind.COMPRESSED, 1, 0x4000_0000_0001_2345, 5000, 3192),
        Extent(ClusterKind.ENCRYPTED, 2, 0x90000, 8192, 4096),
        Extent(ClusterKind.ZERO, 0, 0, 12288, 712),
    ]
    assert clipped(extents, 9000, 100) == [Extent(ClusterKind.ENCRYPTED, 2, 0x90000 + 808, 9000, 100)]
    assert clipped(extents, 4096, 0) == []
