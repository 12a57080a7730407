"""Files that end before what their header and tables name: what is read from them, and which of them are written.

1. What lies behind the end of the file reads as zeroes, as in QEMU: L1, L2 and refcount tables, and data. Some
   writers leave trailing zeroes out, and of an image that lost its end the rest can be saved.
2. Such a file is written only if it has lost nothing but zeroes. An L2 table behind the end is a loss: nobody points
   at an empty one. Where tables or refcounts are cut off, a check of the whole image tells: what is missing
   was zero when each cluster in use has its count, and no cluster has a count that is in no use, be it behind the end
   of the file. QEMU writes in more cases, and then hands out clusters a second time whose counts were cut off, or
   leaks what a table had named.
3. Version 1 has no counts: new clusters are put where the file ends, and must not be those that a table names there.
   The L1 table must follow the header at once, so that nothing in the file can have been named by what is missing;
   of the L2 tables the last ones in the file are looked at, which name what was written last. All of them would
   take too long, so a truncated version 1 image whose lost clusters others name is not found out. Of one cluster the
   file may hold the start: nothing is put where the rest of it would be, which QEMU does.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator

from ..errors import FormatError, ImageUsageError
from ..format.entries import ALL_BITS, OFFSET_MASK, Table, entry_format, masked, parse_table
from ..format.geometry import SECTOR_SIZE, WORD_SIZE, round_up
from ..format.header import Qcow1Header, Qcow2Header
from ..format.header_fields import V1_HEADER_LENGTH
from ..format.refcounts import REFCOUNT_TABLE_OFFSET_MASK
from ..storage.base import Storage, pread
from ..system.late_logging import LateLogger
from ..tables.paged_table import PagedTable
from ..tables.snapshot_table import parts_in_use

log = LateLogger(__name__)

_MAX_TABLES_SEARCHED = 8

Place = tuple[str, int, int]
"""A structure, where it lies, and its length in bytes."""


def l1_place(header: Qcow1Header | Qcow2Header) -> Place:
    """The L1 table."""
    n_entries = header.n_l1_entries if isinstance(header, Qcow1Header) else header.l1_size
    return "L1 table", header.l1_table_offset, n_entries * WORD_SIZE


def _last_l2_table(l1_table: Table, offset_mask: int) -> int:
    return max((max(masked(part, offset_mask)) for part in parts_in_use(l1_table)), default=0)


def _lost_l2_table(storage: Storage, l1_table: Table, offset_mask: int) -> Place | None:
    return _lost_table_at(storage, _last_l2_table(l1_table, offset_mask))


def _lost_table_at(storage: Storage, last_table: int) -> Place | None:
    return ("L2 table", last_table, 1) if last_table >= max(storage.size(), 1) else None


def _first_lost(storage: Storage, places: Iterable[Place]) -> Place | None:
    return next((place for place in places if place[2] and place[1] + place[2] > storage.size()), None)


def warn_of_lost_end(
    path: str, storage: Storage, header: Qcow1Header | Qcow2Header, l1_table: Table | PagedTable, offset_mask: int
) -> None:
    """Of a layer that is only read: the log says what reads as zeroes because it is not there. Of L2 tables that a
    paged L1 table names it says so when one of them is met."""
    lost = None if isinstance(l1_table, PagedTable) else _lost_l2_table(storage, l1_table, offset_mask)
    lost = lost or _first_lost(storage, (l1_place(header),))
    if lost is not None:
        log.warning("%s: %s; what is missing reads as zeroes", path, _what_is_lost(storage, lost))


def warn_of_lost_table(storage: Storage, host_offset: int) -> None:
    """As :func:`warn_of_lost_end`, of an L2 table that was found to lie past the end of the file."""
    lost = _what_is_lost(storage, ("L2 table", host_offset, 1))
    log.warning("%s: %s; what is missing reads as zeroes", storage.name, lost)


async def refuse_lost_end(
    path: str,
    storage: Storage,
    header: Qcow1Header | Qcow2Header,
    *,
    l1_table: Table,
    refcount_table: array[int] | None = None,
    others: Iterable[Place] = (),
) -> None:
    """Of an image that is to be written: see rules 2 and 3. ``others``: what must not be cut off, either.

    Raises ImageUsageError, OSError.
    """
    if isinstance(header, Qcow1Header):
        lost = _lost_l2_table(storage, l1_table, ALL_BITS) or _first_lost(storage, (l1_place(header),))
        behind_header = V1_HEADER_LENGTH + (header.backing_file_size if header.backing_file_offset else 0)
        if header.l1_table_offset < V1_HEADER_LENGTH:
            raise ImageUsageError(
                f"{path}: L1 table at {header.l1_table_offset:#x} lies on the header; "
                "serve it read-only (qcowfuse -r) to save what is there"
            )
        if lost is None:
            lost = await _lost_data_v1(storage, header, l1_table)
        if lost is None or (lost[0] == "L1 table" and lost[1] <= round_up(behind_header, SECTOR_SIZE)):
            return
    else:
        last_table = _last_l2_table(l1_table, OFFSET_MASK)
        lost = _lost_table_at(storage, last_table)
        if lost is None:
            places = [*_places_of(header, refcount_table), *others]
            places.append(("L2 table", last_table, 1 << header.cluster_bits if last_table else 0))
            lost = _first_lost(storage, places)
            end = max(place + n_bytes for _, place, n_bytes in places)
            # Beyond the last cluster of the file a check finds fault with any table, and it takes its time.
            is_near = end - round_up(storage.size(), SECTOR_SIZE) < 1 << header.cluster_bits
            if lost is None or (is_near and await _is_sound(storage, header, end)):
                return
    raise ImageUsageError(
        f"{path}: {_what_is_lost(storage, lost)}: truncated, and left as it is; serve it read-only "
        "(qcowfuse -r) to save what is left"
    )


def _places_of(header: Qcow2Header, refcount_table: array[int] | None) -> Iterator[Place]:
    cluster_size = 1 << header.cluster_bits
    yield l1_place(header)
    yield "refcount table", header.refcount_table_offset, header.refcount_table_clusters * cluster_size
    last_block = max((entry & REFCOUNT_TABLE_OFFSET_MASK for entry in filter(None, refcount_table or ())), default=0)
    if last_block:
        yield "refcount block", last_block, cluster_size


async def _is_sound(storage: Storage, header: Qcow2Header, end: int) -> bool:
    """``end``: where the last structure that is known to lie behind the end of the file ends."""
    from .compare import check_storage
    from .counted_refcounts import StoredRefcounts

    try:
        result = await check_storage(storage, header, lambda finding: log.debug("%s", finding))
        if result.corruptions or result.leaks or result.check_errors:
            return False
        stored = StoredRefcounts(storage, header)
        await stored.load_table()
        n_clusters = -(-max(end, storage.size()) >> header.cluster_bits)
        for number in range(n_clusters >> stored.block_bits, len(stored.table)):
            block = await stored.block(number)
            if block is not None and any(block[max(n_clusters - (number << stored.block_bits), 0) :]):
                return False
    except FormatError as error:
        log.debug("%s", error)
        return False
    return True


async def _lost_data_v1(storage: Storage, header: Qcow1Header, l1_table: Table) -> Place | None:
    entries, end = entry_format(1, header.cluster_bits), storage.size()
    cluster_size = 1 << header.cluster_bits
    cut_from = end - cluster_size if end % cluster_size == 0 else end - 1  # else first_free_v1() leaves room
    for table in _last_tables_v1(l1_table):
        words = parse_table(await pread(storage, table, WORD_SIZE << header.l2_bits))
        for entry in filter(None, words):
            if entry & entries.compressed:
                continue  # its length is rounded up; what is cut off does not decode, and nothing is put there
            if entry & entries.offset_mask > cut_from:
                return "data cluster", entry & entries.offset_mask, 1
    return None


def _last_tables_v1(l1_table: Table) -> list[int]:
    last: list[int] = []
    for part in parts_in_use(l1_table):
        last = heapq.nlargest(_MAX_TABLES_SEARCHED, [*filter(None, part), *last])
    return last


def first_free_v1(storage: Storage, header: Qcow1Header) -> int:
    """Where new clusters may be put: behind the L1 table, and behind a cluster of which the file holds the start."""
    _, l1_offset, l1_bytes = l1_place(header)
    end, cluster_size = storage.size(), 1 << header.cluster_bits
    if end <= round_up(l1_offset + l1_bytes, SECTOR_SIZE) or end % cluster_size == 0:
        return l1_offset + l1_bytes
    return max(end + cluster_size - 1, l1_offset + l1_bytes)


def _what_is_lost(storage: Storage, lost: Place) -> str:
    what, place, _ = lost
    how = "lies past" if place >= storage.size() else "is cut off by"
    return f"{what} at {place:#x} {how} the end of the file ({storage.size()} bytes)"
