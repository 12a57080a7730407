"""The GUID partition table: two copies of a header and an array of entries, each with a checksum.

Source: UEFI specification 2.10, section 5.3; the kernel's ``block/partitions/efi.c``.

1. A copy counts if its header and its array have the right checksums and lie where they say. The primary copy is in
   sector 1, the backup where the primary says, else in the last sector. Only if the primary copy does not count, the
   backup is used, and that is said.
2. The sector size is the one with which sector 1 holds a header: 512 goes before 4096.
3. A table for another size of disk (one that was made larger or smaller since) is used, and that is said: its
   partitions are judged one by one.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from ..errors import FormatError
from .type_names import GPT_TYPES
from .values import Look, Partition

SECTOR_SIZES = (512, 4096)
MAX_ENTRY_BYTES = 1 << 20
"""8192 entries of the usual size; the specification asks for room for 128 at least, and tools make that."""
_SIGNATURE = b"EFI PART"
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")
_CHECKSUM_OFFSET = 16
_LEGACY_BOOTABLE = 1 << 2
_NO_TYPE = bytes(16)


class GptHeader(NamedTuple):
    """Numbers of sectors; ``last_usable`` is the last one, not the one behind it."""

    sector: int
    other_sector: int
    first_usable: int
    last_usable: int
    disk_id: str
    entries_sector: int
    n_entries: int
    entry_size: int
    entries_checksum: int

    @property
    def entry_bytes(self) -> int:
        """Of the whole array."""
        return self.n_entries * self.entry_size


class GptCopy(NamedTuple):
    """A copy that counts. ``partitions`` have no problems yet but their own."""

    header: GptHeader
    partitions: tuple[Partition, ...]
    sector_size: int

    def extents(self) -> tuple[tuple[int, int], ...]:
        """Where it lies itself, in bytes: first and behind the last."""
        header = self.header
        start, entries = header.sector * self.sector_size, header.entries_sector * self.sector_size
        return (start, start + self.sector_size), (entries, entries + header.entry_bytes)


class Gpt(NamedTuple):
    """The copy that is used, the backup copy beside it if that counts, and what is to be said of the table."""

    copy: GptCopy
    backup: GptCopy | None
    problems: tuple[str, ...]


def text_of_guid(raw: bytes) -> str:
    """A GUID as text: the first three numbers are little-endian."""
    first, second, third = struct.unpack_from("<IHH", raw)
    return f"{first:08x}-{second:04x}-{third:04x}-{raw[8:10].hex()}-{raw[10:16].hex()}"


def parse_header(data: bytes, sector: int, n_sectors: int) -> GptHeader | None:
    """The header in ``data``, all of sector ``sector`` of a disk of ``n_sectors``; None where none is. Raises
    FormatError for a damaged one."""
    if not data.startswith(_SIGNATURE):
        return None
    place = sector * len(data)
    (_, _, n_bytes, checksum, _, own, other, first, last, guid, entries, n_entries, entry_size, entries_checksum) = (
        _HEADER.unpack_from(data)
    )
    if not _HEADER.size <= n_bytes <= len(data):
        raise FormatError("GPT header", place, f"length {n_bytes}, expected {_HEADER.size} to {len(data)}")
    counted = bytearray(data[:n_bytes])
    counted[_CHECKSUM_OFFSET : _CHECKSUM_OFFSET + 4] = bytes(4)
    if zlib.crc32(counted) != checksum:
        raise FormatError("GPT header", place, "wrong checksum")
    if own != sector:
        raise FormatError("GPT header", place, f"says that it is in sector {own}, not {sector}")
    if first > last:
        raise FormatError("GPT header", place, f"usable sectors {first} to {last}")
    if not 128 <= entry_size <= 4096 or entry_size % 8:
        raise FormatError("GPT header", place, f"entries of {entry_size} bytes, expected 128 to 4096")
    if n_entries * entry_size > MAX_ENTRY_BYTES:
        raise FormatError("GPT header", place, f"{n_entries} entries of {entry_size} bytes: too many")
    if entries < 1 or entries * len(data) + n_entries * entry_size > n_sectors * len(data):
        raise FormatError("GPT header", place, f"entries in sector {entries} of {n_sectors}")
    return GptHeader(own, other, first, last, text_of_guid(guid), entries, n_entries, entry_size, entries_checksum)


def parse_entries(data: bytes, header: GptHeader, sector_size: int, n_sectors: int) -> tuple[Partition, ...]:
    """The entries in use. Raises FormatError for a wrong checksum."""
    if zlib.crc32(data) != header.entries_checksum:
        raise FormatError("GPT entries", header.entries_sector * sector_size, "wrong checksum")
    found = []
    for number in range(1, header.n_entries + 1):
        kind, guid, first, last, attributes, name = _ENTRY.unpack_from(data, (number - 1) * header.entry_size)
        if kind == _NO_TYPE:
            continue
        type_id = text_of_guid(kind)
        partition = Partition(
            number=number,
            start=first * sector_size,
            n_bytes=max(0, last + 1 - first) * sector_size,
            type_id=type_id,
            type_name=GPT_TYPES.get(type_id, ""),
            label=name.decode("utf-16-le", "replace").partition("\0")[0],
            uuid=text_of_guid(guid),
            is_bootable=bool(attributes & _LEGACY_BOOTABLE),
        )
        if last < first:
            partition = partition.with_problem("ends before it starts")
        elif last >= n_sectors:
            partition = partition.with_problem("reaches beyond the end of the disk")
        if first < header.first_usable or last > header.last_usable:
            usable = f"{header.first_usable} to {header.last_usable}"
            partition = partition.with_problem(f"reaches out of the sectors for partitions, {usable}")
        found.append(partition)
    return tuple(found)


def find_gpt(size: int) -> Look[Gpt | str]:
    """The table of a disk of ``size`` bytes, or why there is none."""
    failures: list[str] = []
    for sector_size in SECTOR_SIZES:
        copy = yield from _read_copy(size, sector_size, 1)
        if isinstance(copy, GptCopy):
            return (yield from _with_backup(size, copy))
        if copy:
            failures.append(copy)
    primary = "; ".join(failures) or "there is no GPT header in sector 1"
    failures = []
    for sector_size in SECTOR_SIZES:
        copy = yield from _read_copy(size, sector_size, size // sector_size - 1)
        if isinstance(copy, GptCopy):
            said = f"the primary table is damaged ({primary}): the backup at the end of the disk is used"
            return Gpt(copy, None, (said, *_other_size(copy, size)))
        if copy:
            failures.append(copy)
    backup = "; ".join(failures) or "there is no GPT header in the last sector"
    return f"{primary}; {backup}"


def _read_copy(size: int, sector_size: int, sector: int) -> Look[GptCopy | str]:
    """The copy with its header in ``sector``, or what is wrong with it; empty where nothing looks like one."""
    n_sectors = size // sector_size
    if not 1 <= sector < n_sectors:
        return ""
    try:
        header = parse_header((yield sector * sector_size, sector_size), sector, n_sectors)
        if header is None:
            return ""
        entries = b""
        if header.entry_bytes:
            entries = yield header.entries_sector * sector_size, header.entry_bytes
        return GptCopy(header, parse_entries(entries, header, sector_size, n_sectors), sector_size)
    except FormatError as exc:
        return str(exc)


def _with_backup(size: int, primary: GptCopy) -> Look[Gpt]:
    problems = _other_size(primary, size)
    sector = primary.header.other_sector
    backup = yield from _read_copy(size, primary.sector_size, sector)
    if not isinstance(backup, GptCopy):
        if sector >= size // primary.sector_size:
            problems = (*problems, f"the backup table, in sector {sector}, is beyond the end of the disk")
        else:
            why = backup or "there is no GPT header"
            problems = (*problems, f"the backup table, in sector {sector}, is damaged ({why})")
        return Gpt(primary, None, problems)
    if backup.partitions != primary.partitions or backup.header.disk_id != primary.header.disk_id:
        problems = (*problems, "the backup table is another one than the primary, which is used")
    return Gpt(primary, backup, problems)


def _other_size(copy: GptCopy, size: int) -> tuple[str, ...]:
    """What is to be said of a table that is for a disk of another size."""
    last = size // copy.sector_size - 1
    header = copy.header
    if header.last_usable > last:
        return (f"the table is for a larger disk: sectors up to {header.last_usable}, the last is {last}",)
    if max(header.sector, header.other_sector) < last:
        return ("the backup table is not at the end of the disk, which is larger than it was",)
    return ()
