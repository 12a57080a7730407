"""Partition tables built field by field, from the specification, and an answer to what a look asks for.

Nothing here uses the package.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Generator, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")

LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
DISK = uuid.UUID("11111111-2222-4333-8444-555555555555")


class Entry(NamedTuple):
    """A GPT entry: first and last sector."""

    first: int
    last: int
    name: str = ""
    kind: uuid.UUID = LINUX
    attributes: int = 0

    @property
    def unique(self) -> uuid.UUID:
        return uuid.UUID(int=(self.first << 64) + self.last)


def answer(look: Generator[tuple[int, int], bytes, T], disk: bytes | bytearray, *, max_reads: int = 1 << 20) -> T:
    """What ``look`` finds on ``disk``. Every read lies inside of the disk, and there are at most ``max_reads``."""
    n_reads = 0
    try:
        place, n_bytes = next(look)
        while True:
            n_reads += 1
            assert n_reads <= max_reads
            assert n_bytes > 0
            assert 0 <= place <= len(disk) - n_bytes
            place, n_bytes = look.send(bytes(disk[place : place + n_bytes]))
    except StopIteration as end:
        result: T = end.value
        return result


def put_protective_mbr(disk: bytearray, n_sectors: int) -> None:
    """One entry for all of the disk."""
    disk[446:462] = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff" * 3, 1, min(n_sectors - 1, 0xFFFFFFFF))
    disk[510:512] = b"\x55\xaa"


def gpt_disk(
    n_sectors: int, entries: Sequence[Entry | None], *, sector_size: int = 512, n_entries: int = 128
) -> bytearray:
    """A disk with both copies; ``None`` is an entry that is not in use."""
    disk = bytearray(n_sectors * sector_size)
    put_protective_mbr(disk, n_sectors)
    raw = b"".join(
        bytes(128)
        if entry is None
        else struct.pack(
            "<16s16sQQQ72s",
            entry.kind.bytes_le,
            entry.unique.bytes_le,
            entry.first,
            entry.last,
            entry.attributes,
            entry.name.encode("utf-16-le"),
        )
        for entry in entries
    ).ljust(128 * n_entries, b"\0")
    length = -(-len(raw) // sector_size)
    disk[2 * sector_size : 2 * sector_size + len(raw)] = raw
    at_end = n_sectors - 1 - length
    disk[at_end * sector_size : at_end * sector_size + len(raw)] = raw
    for own, other, place in ((1, n_sectors - 1, 2), (n_sectors - 1, 1, at_end)):
        values = (own, other, 2 + length, at_end - 1, DISK.bytes_le, place, n_entries, 128, zlib.crc32(raw))
        disk[own * sector_size : own * sector_size + 92] = gpt_header(values)
    return disk


def gpt_header(values: tuple[object, ...]) -> bytes:
    """A header of 92 bytes with a right checksum. ``values``: from the number of its own sector on."""
    header = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, *values)
    return header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]


def with_checksum(disk: bytearray, place: int, n_bytes: int = 92) -> None:
    """Make the checksum of the header at ``place`` right again."""
    disk[place + 16 : place + 20] = bytes(4)
    disk[place + 16 : place + 20] = struct.pack("<I", zlib.crc32(disk[place : place + n_bytes]))


def put_boot_record(disk: bytearray, sector: int, entries: Sequence[tuple[int, int, int, int]]) -> None:
    """``entries``: flag, type, first sector, number of sectors."""
    place = sector * 512
    for number, (flag, kind, start, n_sectors) in enumerate(entries):
        at = place + 446 + 16 * number
        disk[at : at + 16] = struct.pack("<B3sB3sII", flag, b"\0" * 3, kind, b"\0" * 3, start, n_sectors)
    disk[place + 510 : place + 512] = b"\x55\xaa"


def mbr_disk(n_sectors: int, entries: Sequence[tuple[int, int, int, int]], *, disk_id: int = 0x12345678) -> bytearray:
    """A disk with a master boot record."""
    disk = bytearray(n_sectors * 512)
    disk[440:444] = struct.pack("<I", disk_id)
    put_boot_record(disk, 0, entries)
    return disk
