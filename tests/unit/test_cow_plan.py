"""Runs and plans against a model that looks at one cluster at a time."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from qcowfuse.format.cow_plan import Action, plan_write, shortened
from qcowfuse.format.entries import COMPRESSED, COPIED, READS_ZERO, ClusterKind, entry_format
from qcowfuse.format.extents import lookup_run

BITS = 9
SIZE = 1 << BITS
FORMAT = entry_format(3, BITS)
HOST = st.integers(1, 6).map(lambda cluster: cluster << BITS)
ENTRY = st.one_of(
    st.just(0),
    st.just(READS_ZERO),
    HOST,
    HOST.map(lambda offset: offset | COPIED),
    HOST.map(lambda offset: offset | COPIED | READS_ZERO),
    HOST.map(lambda offset: offset | COMPRESSED),
)
TABLE = st.lists(ENTRY, min_size=1, max_size=12).map(lambda entries: array("Q", entries))


@given(TABLE, st.data())
def test_runs_say_of_every_cluster_what_its_entry_says(table: array[int], data: st.DataObject) -> None:
    """A run is uniform, contiguous on the host where it is data, and inside the request and the slice."""
    index = data.draw(st.integers(0, len(table) - 1))
    in_cluster = data.draw(st.integers(0, SIZE - 1))
    n_bytes = data.draw(st.integers(1, 8 * SIZE))
    run = lookup_run(table, FORMAT, index, in_cluster, n_bytes)
    assert 0 < run.n_bytes <= n_bytes
    assert index * SIZE + in_cluster + run.n_bytes <= len(table) * SIZE
    for number in range((in_cluster + run.n_bytes + SIZE - 1) // SIZE):
        entry = table[index + number]
        assert FORMAT.classify(entry) == run.kind
        if run.kind == ClusterKind.DATA:
            assert FORMAT.host_offset(entry) == run.value - in_cluster + number * SIZE
        if run.kind == ClusterKind.COMPRESSED:
            assert entry == run.value


@given(TABLE, st.data())
def test_plans_treat_every_cluster_as_it_must_be_treated(table: array[int], data: st.DataObject) -> None:
    """In place only where owned alone and contiguous; head, data and tail are whole clusters."""
    index = data.draw(st.integers(0, len(table) - 1))
    in_cluster = data.draw(st.integers(0, SIZE - 1))
    n_bytes = data.draw(st.integers(1, 8 * SIZE))
    plan = plan_write(table, FORMAT, index, in_cluster, n_bytes)
    assert plan.head == in_cluster
    assert plan.head + plan.n_bytes + plan.tail == plan.n_clusters * SIZE
    assert 0 < plan.n_bytes <= n_bytes
    assert 0 <= plan.tail < SIZE
    for number in range(plan.n_clusters):
        entry = table[index + number]
        owned = bool(entry & COPIED)
        kind = FORMAT.classify(entry)
        if plan.action is Action.IN_PLACE:
            assert owned
            assert kind is ClusterKind.DATA
        elif plan.action is Action.REUSE:
            assert FORMAT.is_reusable_zero(entry)
        else:
            assert not owned
        if plan.action is not Action.ALLOCATE:
            assert FORMAT.host_offset(entry) == plan.host_offset + number * SIZE
    first = shortened(plan, 1, in_cluster, BITS)
    assert first.head + first.n_bytes + first.tail == SIZE
