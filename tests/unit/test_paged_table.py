"""L1 tables that are read part by part."""

from __future__ import annotations

import struct
from array import array

import pytest

from qcowfuse.format import entries
from qcowfuse.tables import paged_table
from qcowfuse.tables.paged_table import NOT_HERE, PART_ENTRIES, PagedTable, TableParts
from tests.support.memory_storage import MemoryStorage

N_ENTRIES = 5 * PART_ENTRIES + 100


def stored(n_entries: int = N_ENTRIES) -> MemoryStorage:
    """A table at offset 512 in which the entries of odd parts are their number plus 1, and those of even ones 0."""
    entries = [index + 1 if index // PART_ENTRIES % 2 else 0 for index in range(n_entries)]
    return MemoryStorage(bytes(512) + struct.pack(f">{n_entries}Q", *entries))


async def test_entries_are_what_the_image_has_once_they_are_loaded() -> None:
    """Before, an entry looks as if there were an L2 table; slices reach over parts that are here and that are not."""
    table = PagedTable(stored(), TableParts(), 512, N_ENTRIES)
    last = N_ENTRIES - 1
    assert len(table) == N_ENTRIES
    assert table[0] == table[last] == NOT_HERE
    assert await table.load(PART_ENTRIES + 7) == table[PART_ENTRIES + 7] == PART_ENTRIES + 8
    assert list(table[2 * PART_ENTRIES - 1 : 2 * PART_ENTRIES + 1]) == [2 * PART_ENTRIES, NOT_HERE]
    assert await table.load(2 * PART_ENTRIES) == 0
    assert list(table[2 * PART_ENTRIES - 1 : 2 * PART_ENTRIES + 1]) == [2 * PART_ENTRIES, 0]
    assert await table.load(last) == last + 1
    assert list(table[last - 1 : last + 50]) == [last, last + 1]
    with pytest.raises(IndexError):
        table[N_ENTRIES]


async def test_zeroes_are_passed_over_as_far_as_they_are_known() -> None:
    """To the next entry in use, to the end that was asked for, or to what is not in memory."""
    table = PagedTable(stored(), TableParts(), 512, N_ENTRIES)
    assert table.empty_until(3, N_ENTRIES) == 3
    await table.load(0)
    assert table.empty_until(3, N_ENTRIES) == PART_ENTRIES
    assert table.empty_until(3, 50) == 50
    await table.load(PART_ENTRIES)
    assert table.empty_until(PART_ENTRIES - 1, N_ENTRIES) == PART_ENTRIES
    await table.load(4 * PART_ENTRIES)
    assert table.empty_until(4 * PART_ENTRIES, N_ENTRIES) == 5 * PART_ENTRIES


async def test_what_is_not_stored_is_zero() -> None:
    """Entries behind those that the image has, and behind the end of the file."""
    table = PagedTable(stored(2 * PART_ENTRIES), TableParts(), 512, 4 * PART_ENTRIES, PART_ENTRIES + 3)
    assert [await table.load(PART_ENTRIES + index) for index in (2, 3)] == [PART_ENTRIES + 3, 0]
    assert await table.load(3 * PART_ENTRIES) == 0
    cut = PagedTable(stored(PART_ENTRIES + 3), TableParts(), 512, 2 * PART_ENTRIES)
    assert [await cut.load(PART_ENTRIES + index) for index in (2, 3)] == [PART_ENTRIES + 3, 0]


async def test_zeroes_are_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is all zero is one look at its bytes: an image may name thousands of them, all holes."""
    parsed: list[int] = []

    def parse_table(data: bytes) -> array[int]:
        parsed.append(len(data))
        return entries.parse_table(data)

    monkeypatch.setattr(paged_table, "parse_table", parse_table)
    table = PagedTable(stored(), TableParts(), 512, N_ENTRIES)
    assert [await table.load(number * PART_ENTRIES) for number in (0, 2, 4)] == [0, 0, 0]
    assert parsed == []
    assert await table.load(5 * PART_ENTRIES) == 5 * PART_ENTRIES + 1
    assert parsed == [100 * 8]


async def test_memory_for_parts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tables of a chain together keep the latest parts; those that are all zero cost next to nothing."""
    monkeypatch.setattr(paged_table, "MAX_PARTS_BYTES", 2 * PART_ENTRIES * 8 + 4096)
    parts = TableParts()
    tables = [PagedTable(stored(), parts, 512, N_ENTRIES) for _ in range(3)]
    for table in tables:
        for number in range(5):
            await table.load(number * PART_ENTRIES)
    here = [table[number * PART_ENTRIES] != NOT_HERE for table in tables for number in (1, 3)]
    assert here == [False, False, False, False, True, True]
    assert tables[2][4 * PART_ENTRIES] == 0
    assert await tables[0].load(PART_ENTRIES) == PART_ENTRIES + 1
    assert tables[1][PART_ENTRIES] == NOT_HERE
