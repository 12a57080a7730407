"""Disks with partition tables, field by field, and what must hold of whatever is found on one.

Fields are little-endian on a disk, so a change writes its number the other way round.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

from qcowfuse.errors import ImageUsageError
from qcowfuse.partitions.file_systems import find_file_system
from qcowfuse.partitions.table import choose_partition, find_table
from tests.support.partition_tables import Entry, answer, gpt_disk, mbr_disk, put_boot_record

from .subjects import Subject

_N_SECTORS = 400
_HEADER = (("signature", 0, 8), ("length", 12, 4), ("sector", 24, 8), ("other", 32, 8), ("first", 40, 8),
           ("last", 48, 8), ("entries", 72, 8),
           ("n_entries", 80, 4), ("entry_size", 84, 4), ("checksum", 88, 4))  # fmt: skip
_ENTRY = (("kind", 0, 8), ("first", 32, 8), ("last", 40, 8), ("attributes", 48, 8), ("name", 56, 8))
_RECORD = (("flag", 0, 1), ("kind", 4, 1), ("start", 8, 4), ("n_sectors", 12, 4))


def build_gpt(sector_size: int) -> Subject:
    """Three partitions, four entries, both copies."""
    entries = (Entry(10, 99, "first"), None, Entry(100, 199), Entry(200, 394, "last"))
    found = Subject(gpt_disk(_N_SECTORS, entries, sector_size=sector_size, n_entries=4), cluster_size=sector_size)
    _name_record(found, 0)
    for number, place in enumerate((sector_size, (_N_SECTORS - 1) * sector_size)):
        found.fields |= {f"header[{number}].{name}": (place + at, n_bytes) for name, at, n_bytes in _HEADER}
    for number, place in enumerate((2 * sector_size, (_N_SECTORS - 2) * sector_size)):
        for entry in range(4):
            at_entry = place + 128 * entry
            found.fields |= {f"entry[{number}][{entry}].{name}": (at_entry + at, n) for name, at, n in _ENTRY}
    return found


def build_mbr() -> Subject:
    """Two primary partitions, an extended one, and three logical ones."""
    disk = mbr_disk(_N_SECTORS, [(0x80, 0x83, 10, 40), (0, 0x82, 50, 50), (0, 0x05, 100, 290)])
    found = Subject(disk)
    _name_record(found, 0)
    for number in range(3):
        link = (0, 0x05, 90 * (number + 1), 90) if number < 2 else (0, 0, 0, 0)
        put_boot_record(disk, 100 + 90 * number, [(0, 0x83, 5, 80), link])
        _name_record(found, 100 + 90 * number)
    return found


def _name_record(found: Subject, sector: int) -> None:
    found.fields[f"record[{sector}].signature"] = (sector * 512 + 510, 2)
    for entry in range(4):
        place = sector * 512 + 446 + 16 * entry
        found.fields |= {f"record[{sector}][{entry}].{name}": (place + at, n) for name, at, n in _RECORD}


DISKS: dict[str, Callable[[], Subject]] = {
    "gpt": lambda: build_gpt(512),
    "gpt-4k": lambda: build_gpt(4096),
    "mbr": build_mbr,
}
"""By name."""


def judge_disk(given: Subject) -> None:
    """As it is, and with checksums that are right again, so that the changes behind them count."""
    disk = bytearray(given.data)
    _judge(disk)
    if "header[0].length" in given.fields and len(disk) == _N_SECTORS * given.cluster_size:
        _mend(disk, given.cluster_size)
        _judge(disk)


def _mend(disk: bytearray, sector_size: int) -> None:
    for place in (sector_size, (_N_SECTORS - 1) * sector_size):
        entries, n_entries, entry_size = struct.unpack_from("<QII", disk, place + 72)
        start, n_bytes = entries * sector_size, n_entries * entry_size
        if start + n_bytes <= len(disk):
            struct.pack_into("<I", disk, place + 88, zlib.crc32(disk[start : start + n_bytes]))
        length = min(struct.unpack_from("<I", disk, place + 12)[0], sector_size)
        struct.pack_into("<I", disk, place + 16, 0)
        struct.pack_into("<I", disk, place + 16, zlib.crc32(disk[place : place + length]))


def _judge(disk: bytearray) -> None:
    table = answer(find_table(len(disk)), disk, max_reads=400)
    numbers = [partition.number for partition in table.partitions]
    assert len(set(numbers)) == len(numbers)
    assert all("\0" not in partition.label for partition in table.partitions)
    good = sorted((part.start, part.end) for part in table.partitions if not part.problem and not part.is_container)
    for start, end in good:
        assert 512 <= start < end <= len(disk)
        answer(find_file_system(end - start), disk[start:end], max_reads=3)
    for (_, end), (start, _) in pairwise(good):
        assert end <= start
    for number in numbers:
        with suppress(ImageUsageError):
            chosen = choose_partition(table, str(number))
            assert (chosen.start, chosen.end) in good
