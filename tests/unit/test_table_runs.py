"""Runs of L2 entries, against a look at each entry."""

from __future__ import annotations

import random
from array import array

from hypothesis import given
from hypothesis import strategies as st

from qcowfuse.format.entries import COPIED, OFFSET_MASK
from qcowfuse.format.table_runs import MANY, clear_copied, n_back_to_back

CLUSTER = 4096


def by_steps(entries: array[int], index: int) -> int:
    """How many entries go up cluster by cluster."""
    n_found = 1
    while index + n_found < len(entries) and entries[index + n_found] == entries[index] + n_found * CLUSTER:
        n_found += 1
    return n_found


@given(seed=st.integers(0, 1 << 32), length=st.sampled_from([1, 7, 9, 70, 700]), n_entries=st.integers(1, 1500))
def test_a_run_is_as_long_as_its_entries_go_up(seed: int, length: int, n_entries: int) -> None:
    """From every place in tables of runs of all lengths."""
    chooser = random.Random(seed)
    entries = array("Q")
    while len(entries) < n_entries:
        first = chooser.choice([0, COPIED]) | chooser.randrange(1 << 30) * CLUSTER
        entries.extend(first + number * CLUSTER for number in range(chooser.randint(1, length)))
    del entries[n_entries:]
    for index in [0, n_entries - 1, *(chooser.randrange(n_entries) for _ in range(20))]:
        expected = by_steps(entries, index)
        assert n_back_to_back(entries, index, CLUSTER) == (expected if expected >= MANY else 1)


def test_no_run_goes_beyond_the_places_that_there_are() -> None:
    """Nor into the flags, nor beyond what a word holds: such entries are looked at one by one."""
    for first in (OFFSET_MASK + 1 - 10 * CLUSTER, COPIED | OFFSET_MASK + 1 - 10 * CLUSTER):
        entries = array("Q", [first + number * CLUSTER for number in range(20)])
        assert n_back_to_back(entries, 0, CLUSTER) == 1
    last = (1 << 64) - CLUSTER
    entries = array("Q", [last - (9 - number) * CLUSTER for number in range(10)] + [0] * 10)
    assert n_back_to_back(entries, 0, CLUSTER) == 1


@given(words=st.lists(st.integers(0, (1 << 64) - 1), min_size=2, max_size=20), stride=st.sampled_from([1, 2]))
def test_the_flag_is_cleared_where_it_stands(words: list[int], stride: int) -> None:
    """In extended tables the bitmaps stay as they are."""
    table = array("Q", words)
    expected = [word if number % stride else word & ~COPIED for number, word in enumerate(words)]
    assert clear_copied(table, stride) is (expected != words)
    assert list(table) == expected
