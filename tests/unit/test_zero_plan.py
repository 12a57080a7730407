"""Discarding clusters in bulk, against doing it entry by entry."""

from __future__ import annotations

import random
from array import array
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfuse.format.entries import COMPRESSED, COPIED, READS_ZERO, entry_format
from qcowfuse.format.zero_plan import discard_owned, zero_clusters

BITS = 16


@pytest.mark.parametrize("version", [2, 3])
@given(
    seed=st.integers(0, 1 << 32), n_clusters=st.sampled_from([1, 2, 60, 70, 200]), zeroes=st.sampled_from([0, 0.5, 1])
)
def test_runs_are_the_clusters_that_are_let_go(version: int, seed: int, n_clusters: int, zeroes: float) -> None:
    """The same entries and the same clusters, each as often, in as few runs as their order allows."""
    chooser = random.Random(seed)
    form = entry_format(version, BITS)
    host = 5 << 30
    entries = array("Q")
    for _ in range(n_clusters + 9):
        host = host + (1 << BITS) if chooser.random() < 0.8 else chooser.randrange(1, 1 << 30) << BITS
        zero = READS_ZERO if version == 3 and chooser.random() < zeroes else 0
        entries.append(host | COPIED | zero)
    index = chooser.randrange(9)
    slowly, quickly = entries[:], entries[:]
    let_go = [entry & form.offset_mask for entry in zero_clusters(slowly, form, index, n_clusters, unmap=True)]
    runs = discard_owned(quickly, form, index, n_clusters)
    assert runs is not None
    assert quickly == slowly
    assert [start + (number << BITS) for start, n_here in runs for number in range(n_here)] == let_go
    if zeroes in (0, 1):
        assert all(start + (n_here << BITS) != following for (start, n_here), (following, _) in pairwise(runs))


@pytest.mark.parametrize("other", [0, READS_ZERO, 1 << 40, READS_ZERO | COPIED, COMPRESSED, COPIED, 512 | COPIED])
@pytest.mark.parametrize("place", [0, 100, 199])
def test_anything_else_is_not_for_bulk(other: int, place: int) -> None:
    """Nothing, plain zeroes, shared, compressed and impossible entries: nothing is changed."""
    entries = array("Q", [number << BITS | COPIED for number in range(1, 201)])
    entries[place] = other
    before = entries[:]
    assert discard_owned(entries, entry_format(3, BITS), 0, 200) is None
    assert entries == before


@pytest.mark.parametrize("form", [entry_format(1, BITS), entry_format(3, BITS, has_data_file=True)])
def test_formats_that_are_not_for_bulk(form: object) -> None:
    """Version 1 gives nothing back, clusters in a data file are not counted."""
    assert discard_owned(array("Q", [1 << 30 | COPIED]), form, 0, 1) is None  # type: ignore[arg-type]
