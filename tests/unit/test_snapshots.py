"""Snapshot table entries: bytes to values and back, and refusal of what no table holds."""

from __future__ import annotations

import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfuse.errors import FormatError
from qcowfuse.format.snapshots import (
    EXPECTED_EXTRA,
    MAX_SNAPSHOT_EXTRA,
    Snapshot,
    end_of_snapshot,
    parse_snapshot,
    serialise_snapshots,
)

names = st.binary(max_size=300).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
u32 = st.integers(0, (1 << 32) - 1)
u63 = st.integers(0, (1 << 63) - 1)
snapshots = st.builds(
    Snapshot,
    snapshot_id=names,
    name=names,
    l1_table_offset=u63,
    l1_size=u32,
    date_sec=u32,
    date_nsec=u32,
    vm_clock_nsec=u63,
    vm_state_size=u63,
    disk_size=u63,
    icount=st.none() | u63,
    n_extra=st.just(24),
    unknown_extra=st.just(b""),
)


@given(st.lists(snapshots, max_size=5))
def test_entries_survive_a_round_trip(table: list[Snapshot]) -> None:
    """Whatever the names, a table that is written is read back as it was, each entry on a multiple of 8 bytes. A name
    ends at its first NUL, as for QEMU."""
    data = serialise_snapshots(table)
    position = 0
    for snapshot in table:
        found, position = parse_snapshot(data, position)
        id_seen, name_seen = (text.partition("\0")[0] for text in (snapshot.snapshot_id, snapshot.name))
        assert found == snapshot._replace(snapshot_id=id_seen, name=name_seen)
        assert position % 8 == 0
    assert position == len(data)


@given(st.integers(0, 40), st.binary(min_size=40, max_size=40))
def test_bytes_survive_a_round_trip(n_extra: int, extra: bytes) -> None:
    """Extra data of any length, also beyond the fields known, comes back byte for byte."""
    fixed = struct.pack(">QIHHIIQII", 65536, 2, 1, 3, 7, 8, 9, 0, n_extra)
    entry = fixed + extra[:n_extra] + b"1abc"
    entry += bytes(-len(entry) % 8)
    snapshot, end = parse_snapshot(entry, 0)
    assert end == len(entry)
    if n_extra >= 24 or n_extra in (0, 16):
        if n_extra >= 8 and snapshot.vm_state_size < 1 << 32:
            # The 32-bit field is written too, for readers that know no other.
            entry = entry[:32] + struct.pack(">I", snapshot.vm_state_size) + entry[36:]
        assert serialise_snapshots([snapshot]) == entry


def test_short_entries_lack_the_optional_fields() -> None:
    """Without extra data there is no disk size, and the VM state's size is the 32-bit one."""
    entry = struct.pack(">QIHHIIQII", 65536, 2, 1, 1, 7, 8, 9, 1234, 0) + b"1a" + bytes(6)
    snapshot, _ = parse_snapshot(entry, 0)
    assert (snapshot.disk_size, snapshot.icount, snapshot.vm_state_size) == (None, None, 1234)
    assert snapshot.n_extra < EXPECTED_EXTRA


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_are_an_entry_or_an_error(data: bytes, position: int) -> None:
    """Arbitrary bytes give an entry that lies inside them, but for the padding, or FormatError."""
    try:
        _, end = parse_snapshot(data, position)
    except FormatError as error:
        with pytest.raises(FormatError, match=re.escape(str(error))):
            end_of_snapshot(data, position)
        return
    assert end_of_snapshot(data, position) == end
    assert position + 40 <= end < len(data) + 8


@pytest.mark.parametrize("n_extra", [MAX_SNAPSHOT_EXTRA + 1, (1 << 32) - 1])
def test_refuses_too_much_extra_data(n_extra: int) -> None:
    """Extra data beyond QEMU's limit is refused before anything is cut out."""
    entry = struct.pack(">QIHHIIQII", 0, 0, 0, 0, 0, 0, 0, 0, n_extra)
    with pytest.raises(FormatError, match="extra data"):
        parse_snapshot(entry, 0)
