"""Which partition table a disk has, which of its partitions can be used, and which one a user means."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import ImageUsageError
from .file_systems import is_boot_sector
from .gpt import Gpt, find_gpt
from .mbr import SECTOR_SIZE, Mbr, is_protective, is_table, parse_boot_record, read_mbr
from .overlaps import Extent, find_overlaps
from .values import Look, Partition, PartitionTable

_THE_TABLE = "the partition table"


def find_table(size: int) -> Look[PartitionTable]:
    """The table of a disk of ``size`` bytes."""
    if size < 2 * SECTOR_SIZE:
        return PartitionTable()
    first = yield 0, SECTOR_SIZE
    entries = parse_boot_record(first)
    if entries is not None and is_protective(entries):
        found = yield from find_gpt(size)
        if isinstance(found, str):
            return PartitionTable("gpt", problems=(found,))
        is_hybrid = any(entry.n_sectors and entry.kind != 0xEE for entry in entries)
        hybrid = ("the MBR has partitions of its own beside the GPT's: those of the GPT count",) if is_hybrid else ()
        return _gpt_table(found, hybrid)
    unprotected = yield from _look_for_unprotected(size)
    if entries is None or not is_table(entries) or is_boot_sector(first):
        return PartitionTable(problems=unprotected)
    mbr = yield from read_mbr(first, entries, size)
    return _mbr_table(mbr, unprotected)


def _look_for_unprotected(size: int) -> Look[tuple[str, ...]]:
    """What is to be said of a GPT that does not count. It may be left from an earlier use of the disk."""
    found = yield from find_gpt(size)
    if isinstance(found, str):
        return ()
    return ("there is a GPT, but no protective MBR: it does not count, as for the kernel",)


def _gpt_table(gpt: Gpt, problems: tuple[str, ...]) -> PartitionTable:
    copy = gpt.copy
    own = [(0, 2 * copy.sector_size), *copy.extents(), *(gpt.backup.extents() if gpt.backup is not None else ())]
    return PartitionTable(
        kind="gpt",
        sector_size=copy.sector_size,
        disk_id=copy.header.disk_id,
        partitions=_judged(copy.partitions, own),
        problems=(*gpt.problems, *problems),
    )


def _mbr_table(mbr: Mbr, problems: tuple[str, ...]) -> PartitionTable:
    records = [(place, place + SECTOR_SIZE) for place in (0, *mbr.records)]
    logical = _judged(mbr.partitions, records, without_containers=True)
    # Extended partitions hold the logical ones, and must keep apart from the primary ones.
    n_primary = sum(partition.number < 5 for partition in mbr.partitions)
    primary = _judged(mbr.partitions[:n_primary], [(0, SECTOR_SIZE)])
    partitions = tuple(
        of_all if of_all.problem or number >= n_primary else primary[number] for number, of_all in enumerate(logical)
    )
    return PartitionTable("mbr", SECTOR_SIZE, mbr.disk_id, partitions, (*mbr.problems, *problems))


def _judged(
    partitions: tuple[Partition, ...], own: Iterable[tuple[int, int]], *, without_containers: bool = False
) -> tuple[Partition, ...]:
    """The partitions; those that overlap others, or the table itself in its places ``own``, with that problem."""
    # Parts of a table may share a place, but a partition in one is wrong.
    extents = [
        Extent(partition.start, partition.end, f"partition {partition.number}", index)
        for index, partition in enumerate(partitions)
        if not (without_containers and partition.is_container)
    ]
    found = find_overlaps(extents)
    for start, end in own:
        for extent in extents:
            if extent.start < min(end, extent.end) and extent.end > start:
                found[extent.key] = _THE_TABLE
    return tuple(
        partition.with_problem(f"lies over {found[index]}") if index in found else partition
        for index, partition in enumerate(partitions)
    )


def choose_partition(table: PartitionTable, wanted: str) -> Partition:
    """The one that ``wanted`` means: its number, else its UUID or label. Raises ImageUsageError, which does not name
    the image, where that is none, more than one, or one that can't be used."""
    if not table.partitions:
        why = "; ".join(table.problems) or "the disk has no partition table"
        raise ImageUsageError(f"there is no partition {wanted}: {why}")
    partition = _find(table, wanted)
    if partition.is_container:
        raise ImageUsageError(f"partition {partition.number} is an extended one, which only holds others")
    if partition.problem:
        raise ImageUsageError(f"partition {partition.number} can't be used: it {partition.problem}")
    return partition


def _find(table: PartitionTable, wanted: str) -> Partition:
    if re.fullmatch(r"\d{1,9}", wanted, re.ASCII):
        for partition in table.partitions:
            if partition.number == int(wanted):
                return partition
    found = [
        partition
        for partition in table.partitions
        if wanted and (partition.label == wanted or partition.uuid == wanted.lower())
    ]
    if len(found) == 1:
        return found[0]
    numbers = ", ".join(str(partition.number) for partition in found or table.partitions)
    if found:
        raise ImageUsageError(f"{wanted} may be any of the partitions {numbers}: give the number")
    raise ImageUsageError(f"there is no partition {wanted} (there are: {numbers})")
