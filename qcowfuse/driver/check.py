"""Consistency of a QCOW2 image: count every reference, compare with the stored refcounts, report.

1. Nothing is repaired and nothing is written. A finding is a leak (count too high: space is lost) or a corruption
   (count too low, impossible entry, wrong COPIED flag); what cannot be read or judged is a check error.
2. Counts are kept in arrays of the refcounts' own width, one per refcount block and only where something refers to
   it: memory follows what the image uses, not the length of the file, and has a limit.
3. References come from the header, the active L1 and L2 tables, those of the snapshots, the snapshot table, the
   refcount table and blocks, the LUKS header, and valid bitmaps with their directory and tables.
4. What counts as what is as in ``qemu-img check``, so that numbers can be compared. Deliberately stricter in two
   places, where this project and QEMU itself refuse to read: the zero flag in version 2, and in extended entries.

Source: qcow2 specification; the categories are those of ``qemu-img check``.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import trio

from ..errors import FormatError, UnsupportedFeatureError
from ..format.bitmap_directory import (
    TABLE_ENTRY_OFFSET_MASK,
    bitmap_directory_place,
    is_valid_table_entry,
)
from ..format.compression import parse_compressed_entry
from ..format.entries import COMPRESSED, COPIED, OFFSET_MASK, READS_ZERO, parse_table
from ..format.extensions import EXTENSION_LUKS_HEADER, find_extension
from ..format.header import INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2, Qcow2Header
from ..format.refcounts import (
    REFCOUNT_TABLE_OFFSET_MASK,
    empty_refcounts,
    entries_per_block,
    max_refcount,
    parse_refcounts,
)
from ..storage.base import Buffer, Storage
from .inspect import load_bitmaps, load_snapshots, opener_for, read_header
from .options import OpenOptions

MAX_CLUSTERS = (1 << 31) - 1
"""Host clusters of an image that can be checked; QEMU's limit."""
MAX_COUNTS_BYTES = 1 << 30
"""Memory for counts; 32 TiB of data in clusters of 64 KiB with 16 bits each."""

_L1_RESERVED = 0x7F00_0000_0000_01FF
_L2_RESERVED = 0x3F00_0000_0000_01FE
_REFCOUNT_TABLE_RESERVED = 0x1FF
_BLOCK_CACHE_BYTES = 16 << 20
_TABLE_CHUNK = 1 << 20

Report = Callable[[str], None]
"""Called with one line for each finding."""
Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all, now and then."""


@dataclass(slots=True)
class CheckResult:
    """The counts of ``qemu-img check``: clusters, but for ``image_end_offset`` in bytes."""

    leaks: int = 0
    corruptions: int = 0
    check_errors: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    image_end_offset: int = 0


async def check_image(
    path: str, *, report: Report, progress: Progress | None = None, force_share: bool = False
) -> CheckResult:
    """Check the image at ``path``; each finding goes to ``report``, and the sums are returned.

    Raises UnsupportedFeatureError for version 1, which has nothing to check; FormatError where the image cannot be
    understood at all; ImageLockedError, OSError.
    """
    storage = await opener_for(force_share=force_share)(path, False, OpenOptions(read_only=True))
    try:
        header = await read_header(storage)
        if not isinstance(header, Qcow2Header):
            raise UnsupportedFeatureError(["checks of version 1 images"])
        return await _Check(storage, header, report, progress).run()
    finally:
        await storage.aclose()


async def is_preallocated(storage: Storage) -> bool:
    """Whether a QCOW2 image has many more clusters in use than the host has blocks for, as after preallocation of
    metadata: then what its tables call data may well be holes. Raises FormatError, OSError."""
    header = await read_header(storage)
    if not isinstance(header, Qcow2Header):
        return False
    stored = _StoredRefcounts(storage, header)
    await stored.load_table()
    n_on_host = storage.allocated_bytes() >> header.cluster_bits
    threshold = max(n_on_host * 10 // 9, n_on_host + 2)
    n_clusters = -(-storage.size() >> header.cluster_bits)
    if n_clusters < threshold:
        return False
    n_used = 0
    for number in range(min(len(stored.table), -(-n_clusters >> stored.block_bits))):
        block = await stored.block(number)
        if block is not None:
            left = n_clusters - (number << stored.block_bits)
            part = block[:left]
            n_used += len(part) - part.count(0)
            if n_used >= threshold:
                return True
    return False


class _StoredRefcounts:
    """The refcounts as the image has them; blocks are read when asked for, the latest ones kept."""

    def __init__(self, storage: Storage, header: Qcow2Header) -> None:
        self._storage = storage
        self._header = header
        self.order = header.refcount_order
        self.n_per_block = entries_per_block(header.cluster_bits, header.refcount_order)
        self.block_bits = self.n_per_block.bit_length() - 1
        self.table: array[int] = array("Q")
        self._blocks: OrderedDict[int, array[int]] = OrderedDict()
        self._empty = empty_refcounts(header.cluster_bits, header.refcount_order)
        self._max_blocks = max(_BLOCK_CACHE_BYTES // (len(self._empty) * self._empty.itemsize), 1)

    async def load_table(self) -> None:
        """Read the refcount table."""
        n_bytes = self._header.refcount_table_clusters << self._header.cluster_bits
        self.table = parse_table(await self._storage.pread(self._header.refcount_table_offset, n_bytes))

    async def block(self, number: int) -> array[int] | None:
        """The counts of a block, None where there is none (all zero). Raises FormatError for a place that no block
        can have, OSError."""
        if number >= len(self.table):
            return None
        host_offset = self.table[number] & REFCOUNT_TABLE_OFFSET_MASK
        if not host_offset:
            return None
        block = self._blocks.get(number)
        if block is not None:
            self._blocks.move_to_end(number)
            return block
        cluster_size = 1 << self._header.cluster_bits
        if host_offset % cluster_size:
            raise FormatError("refcount table entry", None, f"block {number} at {host_offset:#x} is not aligned")
        if host_offset >= self._storage.size():
            block = self._empty
        else:
            block = parse_refcounts(await self._storage.pread(host_offset, cluster_size), self.order)
        self._blocks[number] = block
        if len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)
        return block


class _Check:
    def __init__(self, storage: Storage, header: Qcow2Header, report: Report, progress: Progress | None) -> None:
        self._storage = storage
        self._header = header
        self._report = report
        self._progress = progress
        self._cluster_bits = header.cluster_bits
        self._cluster_size = 1 << header.cluster_bits
        self._file_size = storage.size()
        self._n_clusters = -(-self._file_size >> header.cluster_bits)
        self._has_data_file = bool(header.incompatible_features & INCOMPATIBLE_DATA_FILE)
        self._is_extended = bool(header.incompatible_features & INCOMPATIBLE_EXTENDED_L2)
        self._stored = _StoredRefcounts(storage, header)
        self._max_count = max_refcount(header.refcount_order)
        self._counts: dict[int, array[int]] = {}
        self._counts_bytes = 0
        self._empty = empty_refcounts(header.cluster_bits, header.refcount_order)
        self._steps_done = 0
        self._steps = 1
        self.result = CheckResult(total_clusters=-(-header.virtual_size >> header.cluster_bits))

    async def run(self) -> CheckResult:
        if self._n_clusters > MAX_CLUSTERS:
            raise FormatError(
                "image", None, f"{self._n_clusters} clusters, more than the {MAX_CLUSTERS} there can be"
            )
        await self._count_references()
        await self._compare()
        await self._check_copied()
        if self._progress is not None:
            self._progress(self._steps, self._steps)
        return self.result

    def _corrupt(self, text: str) -> None:
        self.result.corruptions += 1
        self._report(f"ERROR {text}")

    async def _step(self) -> None:
        self._steps_done += 1
        if self._progress is not None:
            self._progress(min(self._steps_done, self._steps), self._steps)
        await trio.lowlevel.checkpoint()

    async def _read(self, host_offset: int, n_bytes: int) -> Buffer:
        if host_offset >= self._file_size:
            return bytes(n_bytes)
        data = self._storage.try_pread(host_offset, n_bytes)
        return await self._storage.pread(host_offset, n_bytes) if data is None else data

    # Counting

    def _count(self, host_offset: int, n_bytes: int, what: str) -> None:
        """One reference more to each cluster of the range."""
        if n_bytes <= 0:
            return
        # The last cluster of an image need not be there to its end.
        if host_offset + n_bytes - self._file_size >= self._cluster_size:
            self._corrupt(f"{what} at {host_offset:#x} ({n_bytes:#x} bytes) lies past the end of the file")
            return
        block_bits = self._stored.block_bits
        mask = (1 << block_bits) - 1
        last = host_offset + n_bytes - 1 >> self._cluster_bits
        self._n_clusters = max(self._n_clusters, last + 1)
        for cluster in range(host_offset >> self._cluster_bits, last + 1):
            counts = self._counts.get(cluster >> block_bits)
            if counts is None:
                counts = self._new_counts(cluster >> block_bits)
            if counts[cluster & mask] >= self._max_count:
                self._corrupt(f"{what} at {host_offset:#x}: more references than its refcount can hold")
            else:
                counts[cluster & mask] += 1

    def _new_counts(self, number: int) -> array[int]:
        self._counts_bytes += len(self._empty) * self._empty.itemsize
        if self._counts_bytes > MAX_COUNTS_BYTES:
            raise FormatError("image", None, f"needs more than {MAX_COUNTS_BYTES >> 20} MiB of memory to be checked")
        counts = self._counts[number] = self._empty[:]
        return counts

    async def _count_references(self) -> None:
        header = self._header
        snapshots, snapshots_bytes = await load_snapshots(self._storage, header)
        await self._stored.load_table()
        n_blocks = len(self._stored.table) - self._stored.table.count(0)
        n_tables = 2 * header.l1_size + sum(entry.l1_size for entry in snapshots if not entry.l1_is_too_large)
        self._steps = n_tables + n_blocks + 1
        self._count(0, self._cluster_size, "header")
        await self._count_l1(header.l1_table_offset, header.l1_size, is_active=True)
        if self._has_data_file and snapshots:
            self._corrupt(f"{len(snapshots)} snapshots in an image with an external data file")
        for snapshot in snapshots:
            who = f"snapshot {snapshot.snapshot_id} ({snapshot.name})"
            if header.version >= 3 and not snapshot.is_complete:
                self._corrupt(f"{who}: table entry has {snapshot.n_extra} bytes of extra data, expected at least 16")
            if snapshot.l1_table_offset % self._cluster_size:
                self._corrupt(f"{who}: L1 table at {snapshot.l1_table_offset:#x} is not cluster aligned")
            elif snapshot.l1_is_too_large:
                self._corrupt(f"{who}: L1 table of {snapshot.l1_size} entries is too large")
            else:
                await self._count_l1(snapshot.l1_table_offset, snapshot.l1_size, is_active=False)
        self._count(header.snapshots_offset, snapshots_bytes, "snapshot table")
        self._count(
            header.refcount_table_offset, header.refcount_table_clusters << self._cluster_bits, "refcount table"
        )
        luks = find_extension(header.extensions, EXTENSION_LUKS_HEADER)
        if luks is not None and len(luks) >= 16:
            self._count(int.from_bytes(luks[:8], "big"), int.from_bytes(luks[8:16], "big"), "LUKS header")
        await self._count_bitmaps()
        self._count_refcount_blocks()

    async def _count_l1(self, l1_offset: int, l1_size: int, *, is_active: bool) -> None:
        if not l1_size:
            return
        self._count(l1_offset, l1_size * 8, "L1 table")
        table = parse_table(await self._read(l1_offset, l1_size * 8))
        for index, entry in enumerate(table):
            if not entry:
                self._steps_done += 1
                continue
            if entry & _L1_RESERVED:
                self._corrupt(f"L1 entry {index} {entry:#018x} has reserved bits set")
            l2_offset = entry & OFFSET_MASK
            self._count(l2_offset, self._cluster_size, "L2 table")
            if l2_offset % self._cluster_size:
                self._corrupt(f"L2 table at {l2_offset:#x} is not cluster aligned")
                continue
            words = parse_table(await self._read(l2_offset, self._cluster_size))
            self._count_l2(words, is_active=is_active)
            await self._step()

    def _count_l2(self, words: array[int], *, is_active: bool) -> None:
        result = self.result
        cluster_size = self._cluster_size
        stride = 2 if self._is_extended else 1
        next_offset = 0
        if words.count(0) == len(words):
            return
        for index in range(0, len(words), stride):
            entry = words[index]
            bitmap = words[index + 1] if stride == 2 else 0
            if not entry and not bitmap:
                continue
            if entry & COMPRESSED:
                self._count_compressed(entry, bitmap, is_active=is_active)
                continue
            if entry & _L2_RESERVED:
                self._corrupt(f"L2 entry {entry:#018x} has reserved bits set")
            if entry & READS_ZERO and (self._is_extended or self._header.version < 3):
                self._corrupt(f"L2 entry {entry:#018x} has the zero flag, which this image cannot have")
            host_offset = entry & OFFSET_MASK
            if not host_offset and not (self._has_data_file and entry & COPIED):
                if bitmap & 0xFFFF_FFFF:
                    self._corrupt(f"L2 entry {entry:#018x}: unallocated, but its bitmap is {bitmap:#018x}")
                continue
            if bitmap & bitmap >> 32:
                self._corrupt(f"cluster at {host_offset:#x}: subclusters both allocated and zero ({bitmap:#018x})")
            if host_offset & (cluster_size - 1):
                self._corrupt(f"cluster at {host_offset:#x} is not cluster aligned")
            if is_active:
                result.allocated_clusters += 1
                if next_offset and host_offset != next_offset:
                    result.fragmented_clusters += 1
                next_offset = host_offset + cluster_size
            if not self._has_data_file:
                self._count(host_offset, cluster_size, "cluster")

    def _count_compressed(self, entry: int, bitmap: int, *, is_active: bool) -> None:
        place = parse_compressed_entry(entry, self._cluster_bits)
        if entry & COPIED:
            self._corrupt(f"compressed cluster at {place.host_offset:#x} has the COPIED flag")
        if self._has_data_file:
            self._corrupt(f"compressed cluster at {place.host_offset:#x} in an image with an external data file")
            return
        if bitmap:
            self._corrupt(f"compressed cluster at {place.host_offset:#x} has a subcluster bitmap ({bitmap:#018x})")
            return
        self._count(place.host_offset, place.n_bytes, "compressed cluster")
        if is_active:
            self.result.allocated_clusters += 1
            self.result.compressed_clusters += 1
            # They share sectors, so a reader always seeks back: fragmented by nature.
            self.result.fragmented_clusters += 1

    async def _count_bitmaps(self) -> None:
        place = bitmap_directory_place(self._header)
        if place is None:
            return
        self._count(place[0], place[1], "bitmap directory")
        for bitmap in await load_bitmaps(self._storage, self._header):
            n_bytes = bitmap.table_size * 8
            self._count(bitmap.table_offset, n_bytes, f"table of bitmap {bitmap.name}")
            end = min(bitmap.table_offset + n_bytes, self._file_size)
            for chunk in range(bitmap.table_offset, end, _TABLE_CHUNK):
                for entry in parse_table(await self._read(chunk, min(_TABLE_CHUNK, end - chunk) // 8 * 8)):
                    if not is_valid_table_entry(entry, self._cluster_size):
                        self._corrupt(f"entry {entry:#018x} in the table of bitmap {bitmap.name} is invalid")
                    elif host_offset := entry & TABLE_ENTRY_OFFSET_MASK:
                        self._count(host_offset, self._cluster_size, f"cluster of bitmap {bitmap.name}")

    def _count_refcount_blocks(self) -> None:
        block_bits = self._stored.block_bits
        for number, entry in enumerate(self._stored.table):
            if not entry:
                continue
            host_offset = entry & REFCOUNT_TABLE_OFFSET_MASK
            cluster = host_offset >> self._cluster_bits
            if entry & _REFCOUNT_TABLE_RESERVED:
                self._corrupt(f"refcount table entry {number} {entry:#018x} has reserved bits set")
            elif host_offset % self._cluster_size:
                self._corrupt(f"refcount block {number} at {host_offset:#x} is not cluster aligned")
            elif cluster >= self._n_clusters:
                self._corrupt(f"refcount block {number} at {host_offset:#x} lies past the end of the file")
            elif host_offset:
                self._count(host_offset, self._cluster_size, "refcount block")
                counts = self._counts.get(cluster >> block_bits)
                n_references = counts[cluster & ((1 << block_bits) - 1)] if counts is not None else 0
                if n_references != 1:
                    self._corrupt(f"refcount block {number} at {host_offset:#x} has {n_references} references")

    # Comparing

    async def _compare(self) -> None:
        """The stored refcounts against the counted ones, block by block."""
        block_bits = self._stored.block_bits
        highest = 0
        stored_blocks = (number for number, entry in enumerate(self._stored.table) if entry)
        for number in sorted({*stored_blocks, *self._counts}):
            first = number << block_bits
            n_here = min(len(self._empty), self._n_clusters - first)
            if n_here <= 0:
                continue
            counted = self._counts.get(number, self._empty)[:n_here]
            try:
                stored = await self._stored.block(number)
            except (FormatError, OSError) as error:
                self.result.check_errors += n_here
                self._report(f"ERROR {error}")
                continue
            stored = self._empty[:n_here] if stored is None else stored[:n_here]
            for index in range(n_here - 1, -1, -1):
                if stored[index] or counted[index]:
                    highest = max(highest, first + index)
                    break
            if stored != counted:
                self._compare_block(first, stored, counted)
            await self._step()
        self.result.image_end_offset = (highest + 1) << self._cluster_bits

    def _compare_block(self, first: int, stored: array[int], counted: array[int]) -> None:
        for index, (has, needs) in enumerate(zip(stored, counted, strict=True)):
            if has == needs:
                continue
            where = f"cluster {first + index:#x}: refcount {has}, {needs} references"
            if has < needs:
                self._corrupt(where)
            else:
                self.result.leaks += 1
                self._report(f"Leaked {where}")

    async def _refcount(self, host_offset: int) -> int | None:
        """The stored refcount of a cluster, None where it cannot be told (reported already)."""
        cluster = host_offset >> self._cluster_bits
        try:
            block = await self._stored.block(cluster >> self._stored.block_bits)
        except (FormatError, OSError):
            return None
        return 0 if block is None else block[cluster & (self._stored.n_per_block - 1)]

    async def _check_copied(self) -> None:
        """The COPIED flag says "refcount is 1", in both directions, in the active tables."""
        header = self._header
        stride = 2 if self._is_extended else 1
        table = parse_table(await self._read(header.l1_table_offset, header.l1_size * 8)) if header.l1_size else ()
        for entry in table:
            l2_offset = entry & OFFSET_MASK
            if not l2_offset:
                self._steps_done += 1
                continue
            refcount = await self._refcount(l2_offset)
            if refcount is None:
                continue
            if (refcount == 1) != bool(entry & COPIED):
                self._corrupt(f"COPIED flag of L1 entry {entry:#018x} is wrong: refcount {refcount}")
            words = parse_table(await self._read(l2_offset, self._cluster_size))
            if words.count(0) < len(words):
                await self._check_copied_l2(words, stride)
            await self._step()

    async def _check_copied_l2(self, words: array[int], stride: int) -> None:
        block_bits = self._stored.block_bits
        mask = (1 << block_bits) - 1
        known, block = -1, None
        for index in range(0, len(words), stride):
            entry = words[index]
            host_offset = entry & OFFSET_MASK
            if not host_offset and not (self._has_data_file and entry & COPIED):
                continue
            if entry & COMPRESSED:
                continue
            if self._has_data_file:
                refcount: int | None = 1
            else:
                cluster = host_offset >> self._cluster_bits
                if cluster >> block_bits != known:
                    known = cluster >> block_bits
                    try:
                        block = await self._stored.block(known)
                    except (FormatError, OSError):
                        known = -1
                        continue
                refcount = 0 if block is None else block[cluster & mask]
            if (refcount == 1) != bool(entry & COPIED):
                self._corrupt(f"COPIED flag of L2 entry {entry:#018x} is wrong: refcount {refcount}")
