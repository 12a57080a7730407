"""The partition table in the master boot record (MBR), and the chain of boot records (EBR) in an extended partition.

Source: the kernel's ``block/partitions/msdos.c``, which says what counts; there is no specification.

1. Sectors are taken for 512 bytes: nothing in the table says what they are.
2. A logical partition counts from its own boot record, and a link from the start of the extended partition. A chain
   ends where it would meet a sector twice, leave the extended partition, or become too long; that is said.
3. The third and fourth entry of a boot record in the chain hold garbage at times: what does not fit is passed over.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from .type_names import MBR_TYPES
from .values import Look, Partition

SECTOR_SIZE = 512
PROTECTIVE = 0xEE
MAX_LINKS = 256
"""Boot records of all extended partitions of a disk; the kernel stops at 256 partitions."""
_EXTENDED = frozenset((0x05, 0x0F, 0x85))
_ENTRY = struct.Struct("<B3xB3xII")
_FIRST_ENTRY = 446
_DISK_ID_OFFSET = 440
_ACTIVE = 0x80


class MbrEntry(NamedTuple):
    """Numbers of sectors; ``number`` from 1."""

    number: int
    flag: int
    kind: int
    start: int
    n_sectors: int


class Mbr(NamedTuple):
    """``records``: host offsets of the boot records in the chains. ``problems``: of the chains."""

    disk_id: str
    partitions: tuple[Partition, ...]
    records: tuple[int, ...]
    problems: tuple[str, ...]


def parse_boot_record(data: bytes) -> tuple[MbrEntry, ...] | None:
    """The four entries of the boot record in ``data``, a sector; None where the signature is missing."""
    if data[510:512] != b"\x55\xaa":
        return None
    return tuple(
        MbrEntry(number, *_ENTRY.unpack_from(data, _FIRST_ENTRY + 16 * (number - 1))) for number in range(1, 5)
    )


def is_table(entries: tuple[MbrEntry, ...]) -> bool:
    """Whether the flags are those of a table: the boot sector of a file system has code there."""
    return all(entry.flag in (0, _ACTIVE) for entry in entries)


def is_protective(entries: tuple[MbrEntry, ...]) -> bool:
    """Whether the record says that a GPT is to be looked for."""
    return any(entry.kind == PROTECTIVE for entry in entries)


def read_mbr(data: bytes, entries: tuple[MbrEntry, ...], size: int) -> Look[Mbr]:
    """All partitions of a disk of ``size`` bytes whose first sector is ``data`` with ``entries``."""
    (disk_id,) = struct.unpack_from("<I", data, _DISK_ID_OFFSET)
    chains = _Chains(disk_id, size)
    used = [entry for entry in entries if entry.n_sectors]
    primary = [_partition(entry.number, entry, entry.start, disk_id, size) for entry in used]
    for entry, partition in zip(used, primary, strict=True):
        if partition.is_container:
            yield from chains.follow(entry)
    return Mbr(f"{disk_id:08x}", (*primary, *chains.partitions), tuple(chains.records), tuple(chains.problems))


def _partition(number: int, entry: MbrEntry, start: int, disk_id: int, size: int) -> Partition:
    partition = Partition(
        number=number,
        start=start * SECTOR_SIZE,
        n_bytes=entry.n_sectors * SECTOR_SIZE,
        type_id=f"{entry.kind:02x}",
        type_name=MBR_TYPES.get(entry.kind, ""),
        uuid=f"{disk_id:08x}-{number:02x}",
        is_bootable=entry.flag == _ACTIVE,
        is_container=entry.kind in _EXTENDED,
    )
    if partition.end > size:
        return partition.with_problem("reaches beyond the end of the disk")
    return partition


class _Chains:
    """The logical partitions of a disk."""

    def __init__(self, disk_id: int, size: int) -> None:
        self.partitions: list[Partition] = []
        self.records: list[int] = []
        self.problems: list[str] = []
        self._disk_id = disk_id
        self._size = size
        self._seen: set[int] = set()

    def follow(self, extended: MbrEntry) -> Look[None]:
        """Read the chain in ``extended``."""
        first, end = extended.start, extended.start + extended.n_sectors
        sector, n_sectors = first, extended.n_sectors
        where = f"the chain of logical partitions in partition {extended.number}"
        while True:
            if sector in self._seen:
                self.problems.append(f"{where} is a loop: it comes back to sector {sector}")
                return
            if len(self._seen) == MAX_LINKS:
                self.problems.append(f"{where} has more than {MAX_LINKS} links")
                return
            if not first <= sector < end or (sector + 1) * SECTOR_SIZE > self._size:
                self.problems.append(f"{where} leaves it: sector {sector} of {first} to {end - 1}")
                return
            self._seen.add(sector)
            data = yield sector * SECTOR_SIZE, SECTOR_SIZE
            entries = parse_boot_record(data)
            if entries is None:
                if sector != first or any(data):  # an extended partition that holds nothing may be all zeroes
                    self.problems.append(f"{where} is broken: there is no boot record in sector {sector}")
                return
            self.records.append(sector * SECTOR_SIZE)
            for entry in entries:
                if _is_logical(entry, sector, n_sectors, first, end):
                    self._add(entry, sector, extended)
            link = next((entry for entry in entries if entry.n_sectors and entry.kind in _EXTENDED), None)
            if link is None:
                return
            sector, n_sectors = first + link.start, link.n_sectors

    def _add(self, entry: MbrEntry, sector: int, extended: MbrEntry) -> None:
        start = sector + entry.start
        partition = _partition(5 + len(self.partitions), entry, start, self._disk_id, self._size)
        if start + entry.n_sectors > extended.start + extended.n_sectors:
            partition = partition.with_problem(f"reaches out of partition {extended.number}, in which it lies")
        self.partitions.append(partition)


def _is_logical(entry: MbrEntry, sector: int, n_sectors: int, first: int, end: int) -> bool:
    if not entry.n_sectors or entry.kind in _EXTENDED:
        return False
    is_garbage_elsewhere = entry.number >= 3  # rule 3
    start = sector + entry.start
    fits = entry.start + entry.n_sectors <= n_sectors and first <= start and start + entry.n_sectors <= end
    return fits or not is_garbage_elsewhere
