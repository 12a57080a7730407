"""A consistency check of an image in memory, written from the specification and independent of the package.

1. It counts every reference to every host cluster (tables of the active image and of all snapshots, data,
   compressed data, refcount structures, the snapshot table, bitmaps that are not stale) and compares with the
   stored refcounts.
2. A count that is too high is a leak; too low is an error, as is a COPIED flag that does not tell the truth, a
   table or cluster outside the file and, where it must not be, anything that is used twice.
3. Of encryption, only the place of the LUKS area is known here.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

from .bitmaps import all_stored_bitmaps, bitmap_directory

_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_L1_RESERVED = 0x7F00_0000_0000_01FF
_L2_RESERVED = 0x3F00_0000_0000_01FE


@dataclass
class CheckReport:
    """``leaks`` in clusters; ``behind_end``: what will be leaks when the file is longer; ``errors`` are damage."""

    leaks: int = 0
    behind_end: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """As ``qemu-img check``: 0, 2 or 3."""
        return 2 if self.errors else 3 if self.leaks else 0


def check_image_bytes(data: bytes | bytearray) -> CheckReport:
    """Check a QCOW or QCOW2 image."""
    (version,) = struct.unpack_from(">I", data, 4)
    return _check_v1(data) if version == 1 else _Qcow2Check(data).run()


def free_clusters(data: bytes | bytearray) -> list[int]:
    """The host clusters of a QCOW2 image that lie in the file and have a count of 0."""
    image = _Qcow2Check(data)
    counts = image.counts()
    return [cluster for cluster in range(image.n_clusters) if cluster not in counts]


def linked_guest_clusters(data: bytes | bytearray) -> set[int]:
    """The guest clusters of a QCOW2 image whose L2 entries are not 0."""
    image = _Qcow2Check(data)
    words_per_entry = 2 if image.is_extended else 1
    n_per_table = image.cluster_size // 8 // words_per_entry
    linked = set()
    for l1_index, l1_entry in enumerate(_table(data, image.l1_offset, image.l1_size)):
        if l2_offset := l1_entry & _OFFSET:
            words = _table(data, l2_offset, image.cluster_size // 8)[::words_per_entry]
            linked |= {l1_index * n_per_table + number for number, word in enumerate(words) if word}
    return linked


def _table(data: bytes | bytearray, offset: int, n_entries: int) -> tuple[int, ...]:
    part = bytes(data[offset : offset + 8 * n_entries]).ljust(8 * n_entries, b"\0")
    return struct.unpack(f">{n_entries}Q", part)


def _luks_area(data: bytes | bytearray) -> tuple[int, int]:
    """Offset and length, from the header extensions."""
    (version,) = struct.unpack_from(">I", data, 4)
    position = struct.unpack_from(">I", data, 100)[0] if version >= 3 else 72
    while True:
        magic, length = struct.unpack_from(">II", data, position)
        if magic == 0x0537BE77:
            offset, n_bytes = struct.unpack_from(">QQ", data, position + 8)
            return offset, n_bytes
        assert magic, "no LUKS header pointer"
        position += 8 + (length + 7) // 8 * 8


class _Qcow2Check:
    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data
        self.report = CheckReport()
        (self.version,) = struct.unpack_from(">I", data, 4)
        (self.cluster_bits,) = struct.unpack_from(">I", data, 20)
        self.l1_size, self.l1_offset = struct.unpack_from(">IQ", data, 36)
        self.table_offset, self.table_clusters = struct.unpack_from(">QI", data, 48)
        self.n_snapshots, self.snapshots_offset = struct.unpack_from(">IQ", data, 60)
        self.order = struct.unpack_from(">I", data, 96)[0] if self.version >= 3 else 4
        incompatible = struct.unpack_from(">Q", data, 72)[0] if self.version >= 3 else 0
        self.is_extended = bool(incompatible & 1 << 4)
        self.has_data_file = bool(incompatible & 1 << 2)
        self.cluster_size = 1 << self.cluster_bits
        self.references: Counter[int] = Counter()
        self.metadata: Counter[int] = Counter()
        self.copied: list[tuple[int, int, str]] = []
        self.n_clusters = -(-len(data) // self.cluster_size)

    def run(self) -> CheckReport:
        size = self.cluster_size
        self._refer_metadata(0, size, "header")
        self._walk(self.l1_offset, self.l1_size, active=True)
        position = self.snapshots_offset
        for _ in range(self.n_snapshots):
            l1_offset, l1_size, id_size, name_size = struct.unpack_from(">QIHH", self.data, position)
            (extra,) = struct.unpack_from(">I", self.data, position + 36)
            self._walk(l1_offset, l1_size, active=False)
            if self.version >= 3 and extra < 16:
                self._error(f"snapshot table entry has {extra} bytes of extra data")
            position = (position + 40 + extra + id_size + name_size + 7) // 8 * 8
        if self.n_snapshots:
            self._refer_metadata(self.snapshots_offset, position - self.snapshots_offset, "snapshot table")
        self._refer_bitmaps()
        if struct.unpack_from(">I", self.data, 32) == (2,):
            self._refer_metadata(*_luks_area(self.data), "LUKS area")
        self._refer_metadata(self.table_offset, self.table_clusters * size, "refcount table")
        self._compare(self.counts())
        return self.report

    def counts(self) -> dict[int, int]:
        """The stored counts that are not 0, by host cluster."""
        size = self.cluster_size
        table = _table(self.data, self.table_offset, self.table_clusters * size // 8)
        counts: dict[int, int] = {}
        per_block = size * 8 >> self.order
        for index, entry in enumerate(table):
            if not entry:
                continue
            if entry % size or entry >= len(self.data):
                self._error(f"refcount table entry {index}: {entry:#x}")
                continue
            self._refer_metadata(entry, size, "refcount block")
            for number, count in enumerate(self._block(entry)):
                if count:
                    counts[index * per_block + number] = count
        return counts

    def _error(self, text: str) -> None:
        self.report.errors.append(text)

    def _block(self, offset: int) -> list[int]:
        """The counts up to the last one that is not 0."""
        raw = bytes(self.data[offset : offset + self.cluster_size]).rstrip(b"\0")
        if self.order >= 3:
            code = {3: "B", 4: "H", 5: "I", 6: "Q"}[self.order]
            n_counts = -(-len(raw) * 8 >> self.order)
            return list(struct.unpack(f">{n_counts}{code}", raw.ljust(n_counts << self.order >> 3, b"\0")))
        width = 1 << self.order
        return [byte >> shift & ((1 << width) - 1) for byte in raw for shift in range(0, 8, width)]

    def _refer(self, offset: int, n_bytes: int) -> None:
        for cluster in range(offset >> self.cluster_bits, (offset + n_bytes - 1 >> self.cluster_bits) + 1):
            self.references[cluster] += 1

    def _refer_metadata(self, offset: int, n_bytes: int, what: str) -> None:
        if offset % self.cluster_size:
            self._error(f"{what} at {offset:#x} is not aligned")
        for cluster in range(offset >> self.cluster_bits, (offset + n_bytes - 1 >> self.cluster_bits) + 1):
            self.references[cluster] += 1
            self.metadata[cluster] += 1

    def _walk(self, l1_offset: int, l1_size: int, *, active: bool) -> None:
        if l1_size:
            self._refer_metadata(l1_offset, 8 * l1_size, "L1 table")
        for l1_index, l1_entry in enumerate(_table(self.data, l1_offset, l1_size)):
            l2_offset = l1_entry & _OFFSET
            if l1_entry & _L1_RESERVED:
                self._error(f"L1 entry {l1_entry:#x} has reserved bits")
            if not l2_offset:
                continue
            if l2_offset % self.cluster_size or l2_offset >= len(self.data):
                self._error(f"L1 entry {l1_entry:#x} is impossible")
                continue
            self._refer(l2_offset, self.cluster_size)
            if active:
                self.copied.append((l2_offset, l1_entry, "L1"))
            words = _table(self.data, l2_offset, self.cluster_size // 8)
            if self.is_extended:
                self._check_bitmaps(words)
                words = words[::2]
            if self.has_data_file:
                self._check_places(words, l1_index * len(words))
                continue
            for entry in filter(None, words):
                self._refer_entry(entry, active=active)

    def _check_places(self, words: tuple[int, ...], first_cluster: int) -> None:
        """With an external data file: data lies where it lies in the disk, nothing is counted."""
        for number, entry in enumerate(words, first_cluster):
            if entry and (entry & ~_COPIED & ~1 != number << self.cluster_bits or not entry & _COPIED) and entry != 1:
                self._error(f"L2 entry {entry:#x} of guest cluster {number:#x} with an external data file")

    def _refer_bitmaps(self) -> None:
        place = bitmap_directory(self.data)
        if place is None:
            return
        self._refer_metadata(*place, "bitmap directory")
        for bitmap in all_stored_bitmaps(self.data):
            self._refer_metadata(bitmap.table_offset, 8 * len(bitmap.table), f"table of bitmap {bitmap.name}")
            for entry in bitmap.table:
                if entry > 1:
                    self._refer_metadata(entry, self.cluster_size, f"data of bitmap {bitmap.name}")
                    if entry >= len(self.data):
                        self._error(f"bitmap {bitmap.name}: entry {entry:#x} past the end")

    def _check_bitmaps(self, words: tuple[int, ...]) -> None:
        for entry, bitmap in zip(words[::2], words[1::2], strict=True):
            if not bitmap:
                continue
            allocated, zero = bitmap & 0xFFFF_FFFF, bitmap >> 32
            if allocated & zero or (allocated and not self._has_cluster(entry)) or entry & _COMPRESSED:
                self._error(f"L2 entry {entry:#x} has bitmap {bitmap:#x}")

    def _has_cluster(self, entry: int) -> bool:
        return bool(entry & _OFFSET or (self.has_data_file and entry & _COPIED))

    def _refer_entry(self, entry: int, *, active: bool) -> None:
        if entry & _COMPRESSED:
            bits = 62 - (self.cluster_bits - 8)
            offset = entry & ((1 << bits) - 1)
            n_sectors = (entry >> bits & ((1 << (self.cluster_bits - 8)) - 1)) + 1
            self._refer(offset, n_sectors * 512 - offset % 512)
            if entry & _COPIED:
                self._error(f"compressed entry {entry:#x} is COPIED")
            return
        if entry & (_L2_RESERVED | (self.version < 3 or self.is_extended)):
            self._error(f"L2 entry {entry:#x} has reserved bits")
        offset = entry & _OFFSET
        if not offset:
            return
        if offset % self.cluster_size:
            self._error(f"L2 entry {entry:#x} is not aligned")
            return
        self.references[offset >> self.cluster_bits] += 1
        if active:
            self.copied.append((offset, entry, "L2"))

    def _compare(self, counts: dict[int, int]) -> None:
        for cluster in self.references.keys() | counts.keys():
            stored, wanted = counts.get(cluster, 0), self.references[cluster]
            if stored < wanted:
                self._error(f"cluster {cluster:#x}: refcount {stored}, {wanted} references")
            elif stored > wanted and cluster < self.n_clusters:
                self.report.leaks += 1
            elif stored > wanted:
                self.report.behind_end += 1  # QEMU does not look behind the end of the file
        for cluster, n_uses in self.metadata.items():
            if n_uses > 1 or self.references[cluster] > n_uses:
                self._error(f"cluster {cluster:#x} of metadata is used {self.references[cluster]} times")
        for offset, entry, level in self.copied:
            count = counts.get(offset >> self.cluster_bits, 0)
            if bool(entry & _COPIED) != (count == 1):
                self._error(f"{level} entry {entry:#x}: COPIED is {bool(entry & _COPIED)}, refcount {count}")


def _check_v1(data: bytes | bytearray) -> CheckReport:
    report = CheckReport()
    (size,) = struct.unpack_from(">Q", data, 24)
    cluster_bits, l2_bits = data[32], data[33]
    (l1_offset,) = struct.unpack_from(">Q", data, 40)
    cluster_size = 1 << cluster_bits
    n_l1 = -(-size // (1 << (cluster_bits + l2_bits)))
    uses: list[tuple[int, int, str]] = [(0, 48, "header"), (l1_offset, l1_offset + 8 * n_l1, "L1 table")]
    for l2_offset in _table(data, l1_offset, n_l1):
        if not l2_offset:
            continue
        if l2_offset >= len(data):
            report.errors.append(f"L2 table at {l2_offset:#x} past the end")
            continue
        uses.append((l2_offset, l2_offset + (8 << l2_bits), "L2 table"))
        for entry in _table(data, l2_offset, 1 << l2_bits):
            if entry >> 63:
                bits = 63 - cluster_bits
                start = entry & ((1 << bits) - 1)
                uses.append((start, start + (entry >> bits & (cluster_size - 1)), "compressed"))
            elif entry:
                uses.append((entry, entry + cluster_size, "data"))
            if uses[-1][0] >= len(data):
                report.errors.append(f"entry {entry:#x} past the end")
    uses.sort()
    for (start, end, what), (next_start, _, next_what) in pairwise(uses):
        if next_start < end:
            report.errors.append(f"{what} at {start:#x} and {next_what} at {next_start:#x} overlap")
    return report
