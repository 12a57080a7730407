"""Walking an image: one count for each reference to each host cluster, and every impossible entry on the way.

1. References come from the header, the active L1 and L2 tables, those of the snapshots, the snapshot table, the
   refcount table and blocks, the LUKS header, and valid bitmaps with their directory and tables.
2. What counts as what is as in ``qemu-img check``, so that numbers can be compared. Deliberately different in two
   places: the zero flag in version 2, with which this project and QEMU itself refuse to read a cluster, is a
   corruption; a compressed cluster with a subcluster bitmap, which both read, refers to its host clusters all the
   same (in QEMU's check it does not, so that its repair frees them).
3. L2 tables of standard entries without compressed clusters (:mod:`.plain_tables`) take 20 to 500 ns an entry, all
   others about 1 us.
4. The only things that are ever written here, and only on request, with one write inside one sector, and not where
   the table overlaps another structure, are two L2 entries: one that claims a cluster at a place that none can have
   and holds no data becomes zero, and a compressed one loses its subcluster bitmap.

Source: QEMU's calculate_refcounts(), check_refcounts_l1(), check_refcounts_l2(), check_refblocks().
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from contextlib import aclosing
from itertools import accumulate

from ..buffer import Buffer
from ..errors import FormatError
from ..format.bitmap_directory import (
    TABLE_ENTRY_OFFSET_MASK,
    BitmapEntry,
    bitmap_directory_place,
    is_valid_table_entry,
)
from ..format.entries import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    READS_ZERO,
    parse_table,
    serialise_table,
)
from ..format.extensions import EXTENSION_LUKS_HEADER, find_extension
from ..format.geometry import SECTOR_SIZE, round_up
from ..format.header import Qcow2Header
from ..format.header_fields import INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2, MAX_L1_SIZE
from ..format.refcounts import REFCOUNT_TABLE_OFFSET_MASK, REFCOUNT_TABLE_RESERVED
from ..format.subclusters import ALL_ALLOCATED, ALL_ZERO
from ..storage.base import Storage, pread
from ..system.alone import checkpoint
from ..tables.bitmap_listing import each_bitmap
from .counted_refcounts import PagesOfTables, ReferenceCounts, StoredRefcounts, counts_limit
from .plain_tables import PlainTable, PlainTables
from .result import CheckResult, Progress, Report
from .snapshots import SnapshotTable

MAX_CLUSTERS = (1 << 31) - 1
"""Host clusters of an image that can be checked; QEMU's limit."""

_TABLE_CHUNK = 1 << 20
_PER_READ = 64
"""What the read of a part of a table counts, beside its items."""
_STEPS_PER_CHECKPOINT = 32
ITEMS_PER_CHECKPOINT = 1 << 13
"""Of about 1 us each."""
MAX_BEYOND = 1 << 14
"""Places past the end of the file that are noted one by one."""


class Walk:
    """One walk. ``fix_entries``: mend the L2 entries of rule 4.

    Afterwards ``counts`` has the references; ``needs_rebuild`` says that refcount blocks cannot be used as they are,
    ``has_block_outside``: a block lies past the end of the file; ``beyond`` are the first and last clusters of
    whatever else was found to lie there, at most :data:`MAX_BEYOND` of them, or else one that covers all.
    """

    def __init__(
        self,
        storage: Storage,
        header: Qcow2Header,
        snapshots: SnapshotTable,
        report: Report,
        progress: Progress | None,
        *,
        fix_entries: bool = False,
    ) -> None:
        self.storage = storage
        self.header = header
        self.snapshots = snapshots
        self.stored = StoredRefcounts(storage, header)
        self.counts = ReferenceCounts(header.cluster_bits, header.refcount_order, counts_limit(storage))
        self.cluster_size = 1 << header.cluster_bits
        self._file_size = round_up(storage.size(), SECTOR_SIZE)  # as QEMU counts it
        self.n_clusters = -(-self._file_size >> header.cluster_bits)
        self.has_data_file = bool(header.incompatible_features & INCOMPATIBLE_DATA_FILE)
        self.is_extended = bool(header.incompatible_features & INCOMPATIBLE_EXTENDED_L2)
        self.needs_rebuild = False
        self.has_block_outside = False
        self.beyond: list[tuple[int, int]] = []
        self.pages_of_tables = PagesOfTables()
        self.report = report
        self.result = CheckResult(total_clusters=-(-header.virtual_size >> header.cluster_bits))
        self._progress = progress
        self._fix_entries = fix_entries and header.version >= 3
        self._protected: list[tuple[str, int, int]] = []
        self._tables: list[tuple[str, int, int]] = []
        self._taken: list[tuple[int, ...]] = []
        self._ends: list[int] = []
        self._cluster_bits = header.cluster_bits
        self._steps_done = 0
        self._n_handled = 0
        self._steps = 1
        self._plain_tables: PlainTables | None = None
        if not self.is_extended and not self.has_data_file:
            self._plain_tables = PlainTables(
                self.counts, header.cluster_bits, self.n_clusters, has_zeroes=header.version >= 3
            )

    async def run(self) -> None:
        """Walk. Raises FormatError for what cannot be walked at all, OSError."""
        header, snapshots = self.header, self.snapshots
        if self.n_clusters > MAX_CLUSTERS:
            raise FormatError("image", None, f"{self.n_clusters} clusters, more than the {MAX_CLUSTERS} there can be")
        await self.stored.load_table()
        n_blocks = len(self.stored.table) - self.stored.table.count(0)
        n_tables = 2 * header.l1_size + sum(size for size in snapshots.l1_sizes if size * 8 <= MAX_L1_SIZE)
        self._steps = n_tables + n_blocks + 1
        self._list_tables()
        self.count(0, self.cluster_size, "header")
        await self._count_l1(header.l1_table_offset, header.l1_size, is_active=True)
        if self.has_data_file and snapshots:
            self.corrupt(f"{len(snapshots)} snapshots in an image with an external data file")
        for number, (l1_offset, l1_size) in enumerate(zip(snapshots.l1_offsets, snapshots.l1_sizes, strict=True)):
            if l1_offset % self.cluster_size or l1_size * 8 > MAX_L1_SIZE:
                entry = await snapshots.entry(number)
                is_unaligned = l1_offset % self.cluster_size
                fault = "is not cluster aligned" if is_unaligned else f"has {l1_size} entries, which is too many"
                self.corrupt(f"snapshot {entry.snapshot_id} ({entry.name}): L1 table at {l1_offset:#x} {fault}")
            else:
                await self._count_l1(l1_offset, l1_size, is_active=False)
            await self.handled(1)
        for what, host_offset, n_bytes in self._tables:
            self.count(host_offset, n_bytes, what)
        await self._count_bitmaps()
        self._count_refcount_blocks()
        await self._note_overlaps()

    def corrupt(self, text: str) -> None:
        """A finding."""
        self.result.corruptions += 1
        self.report(f"ERROR {text}")

    async def step(self) -> None:
        """One step more is done."""
        self._steps_done += 1
        if self._steps_done % _STEPS_PER_CHECKPOINT == 0 or self.cluster_size > 1 << 15:
            if self._progress is not None:
                self._progress(min(self._steps_done, self._steps), self._steps)
            await checkpoint()

    async def l1_part(self, l1_offset: int, l1_size: int, start: int) -> array[int]:
        """Some thousand entries of an L1 table, from entry ``start`` on."""
        n_entries = min(ITEMS_PER_CHECKPOINT, l1_size - start)
        return parse_table(await self.read(l1_offset + 8 * start, 8 * n_entries))

    def used(self, part: array[int], start: int) -> list[tuple[int, int]]:
        """Index and entry of those of a part of an L1 table, from entry ``start`` on, that are not 0; the others are
        steps that are done."""
        used = [(index, entry) for index, entry in enumerate(part, start) if entry] if any(part) else []
        self._steps_done += len(part) - len(used)
        return used

    def skip_step(self) -> None:
        """A step that there was nothing to do for."""
        self._steps_done += 1

    async def handled(self, n_items: int) -> None:
        """So many more entries or counts were looked at one by one: now and then there is a checkpoint."""
        self._n_handled += n_items
        if self._n_handled >= ITEMS_PER_CHECKPOINT:
            self._n_handled = 0
            await checkpoint()

    async def read(self, host_offset: int, n_bytes: int) -> Buffer:
        """Bytes of the image; zeroes past its end."""
        if host_offset >= self._file_size:
            return bytes(n_bytes)
        return await pread(self.storage, host_offset, n_bytes)

    def count(self, host_offset: int, n_bytes: int, what: str) -> None:
        """One reference more to each cluster of the range. Raises FormatError when there are too many."""
        if n_bytes <= 0:
            return
        # The last cluster of an image need not be there to its end.
        if host_offset + n_bytes - self._file_size >= self.cluster_size:
            self.corrupt(f"{what} at {host_offset:#x} ({n_bytes:#x} bytes) lies past the end of the file")
            self._note_beyond(host_offset >> self._cluster_bits, host_offset + n_bytes - 1 >> self._cluster_bits)
            return
        first = host_offset >> self._cluster_bits
        last = host_offset + n_bytes - 1 >> self._cluster_bits
        if last >= self.n_clusters:
            self.n_clusters = last + 1
        if first == last:
            if not self.counts.add(first):
                self._overflow(what, first)
            return
        for cluster in self.counts.add_run(first, last + 1 - first):
            self._overflow(what, cluster)

    def _note_beyond(self, first: int, last: int) -> None:
        if len(self.beyond) >= MAX_BEYOND:
            everything = [*self.beyond, (first, last)]
            self.beyond = [(min(start for start, _ in everything), max(end for _, end in everything))]
        elif not self.beyond or not self.beyond[-1][0] <= first <= last <= self.beyond[-1][1]:
            self.beyond.append((first, last))

    def _overflow(self, what: str, cluster: int) -> None:
        self.corrupt(f"{what}: cluster {cluster:#x} has more references than its refcount can hold")

    def _list_tables(self) -> None:
        """The structures that have a place of their own; all that must not be written as something else."""
        header = self.header
        luks = find_extension(header.extensions, EXTENSION_LUKS_HEADER)
        self._tables = [
            ("snapshot table", header.snapshots_offset, self.snapshots.n_bytes),
            ("refcount table", header.refcount_table_offset, header.refcount_table_clusters << self._cluster_bits),
        ]
        if luks is not None and len(luks) >= 16:
            from ..format.luks import MAX_LUKS_AREA

            place, length = int.from_bytes(luks[:8], "big"), int.from_bytes(luks[8:16], "big")
            if length > MAX_LUKS_AREA:  # no image with it can be opened, and there is no end to counting it
                self.corrupt(f"LUKS header at {place:#x} has {length:#x} bytes, more than {MAX_LUKS_AREA:#x}")
            else:
                self._tables.append(("LUKS header", place, length))
        self._protected = [("header", 0, self.cluster_size), *self._tables]
        self._protected.append(("L1 table", header.l1_table_offset, header.l1_size * 8))
        for number, l1_offset in enumerate(self.snapshots.l1_offsets):
            self._protected.append(
                (f"L1 table of snapshot table entry {number}", l1_offset, self.snapshots.l1_sizes[number] * 8)
            )

    def may_write_l2(self, l2_offset: int) -> bool:
        """Whether an L2 table lies where nothing else does, so that mending it breaks nothing."""
        if l2_offset % self.cluster_size or not 0 < l2_offset < self._file_size:
            return False
        if not self._taken:
            blocks = {entry & REFCOUNT_TABLE_OFFSET_MASK for entry in self.stored.table if entry}
            self._taken = [(place, place + n_bytes) for _, place, n_bytes in self._protected if n_bytes]
            self._taken += [(place, place + self.cluster_size) for place in blocks]
            self._taken.sort()
            self._ends = [*accumulate((end for _, end in self._taken), max)]
        # Of the structures that begin before the table's end, none may reach into it.
        n_before = bisect_left(self._taken, (l2_offset + self.cluster_size,))
        return not n_before or self._ends[n_before - 1] <= l2_offset

    # L1 and L2 tables

    async def _count_l1(self, l1_offset: int, l1_size: int, *, is_active: bool) -> None:
        if not l1_size:
            return
        self.count(l1_offset, l1_size * 8, "L1 table")
        for start in range(0, l1_size, ITEMS_PER_CHECKPOINT):
            await self.handled(_PER_READ + min(ITEMS_PER_CHECKPOINT, l1_size - start))
            for index, entry in self.used(await self.l1_part(l1_offset, l1_size, start), start):
                if entry & L1_RESERVED:
                    self.corrupt(f"L1 entry {index} {entry:#018x} has reserved bits set")
                l2_offset = entry & OFFSET_MASK
                self.count(l2_offset, self.cluster_size, "L2 table")
                if l2_offset % self.cluster_size:
                    self.corrupt(f"L2 table at {l2_offset:#x} is not cluster aligned")
                raw = bytes(await self.read(l2_offset, self.cluster_size))
                found = None if self._plain_tables is None else self._plain_tables.count(raw)
                if found is None:
                    await self._count_any(l2_offset, parse_table(raw), is_active=is_active)
                else:
                    await self._note_plain(index, found, is_active=is_active)
                await self.step()

    async def _note_plain(self, index: int, found: PlainTable, *, is_active: bool) -> None:
        for cluster in found.overflowed:
            self._overflow("cluster", cluster)
        for cluster in found.beyond:
            await self.handled(1)
            self.corrupt(f"cluster at {cluster << self._cluster_bits:#x} lies past the end of the file")
            self._note_beyond(cluster, cluster)
        if not is_active:
            return
        self.result.allocated_clusters += found.n_allocated
        self.result.fragmented_clusters += found.n_fragmented
        if found.is_empty:
            self.pages_of_tables[index] = 1, 0
        elif found.is_copied and not found.beyond:
            self.pages_of_tables[index] = found.first_page, found.last_page

    async def _count_any(self, l2_offset: int, words: array[int], *, is_active: bool) -> None:
        result, header, cluster_size = self.result, self.header, self.cluster_size
        stride = 2 if self.is_extended else 1
        next_offset = 0
        fixed: list[int] = []
        for index in range(0, len(words), stride):
            if index % ITEMS_PER_CHECKPOINT == 0:
                await self.handled(min(ITEMS_PER_CHECKPOINT, len(words) - index))
            entry = words[index]
            bitmap = words[index + 1] if stride == 2 else 0
            if not entry and not bitmap:
                continue
            if entry & COMPRESSED:
                if bitmap and not self.has_data_file:
                    if self._fix_entries and self.may_write_l2(l2_offset):
                        words[index + 1] = 0
                        fixed.append(index)
                        result.corruptions_fixed += 1
                        self.report(f"Repaired L2 entry {entry:#018x}: compressed, with bitmap {bitmap:#018x}")
                    else:
                        self.corrupt(f"L2 entry {entry:#018x}: compressed, with bitmap {bitmap:#018x}")
                self._count_compressed(entry, is_active=is_active)
                continue
            n_before = result.corruptions
            if entry & L2_RESERVED:
                self.corrupt(f"L2 entry {entry:#018x} has reserved bits set")
            if entry & READS_ZERO and header.version < 3:
                self.corrupt(f"L2 entry {entry:#018x} has the zero flag, which this image cannot have")
            host_offset = entry & OFFSET_MASK
            if not host_offset and not (self.has_data_file and entry & COPIED):
                if bitmap & ALL_ALLOCATED:
                    self.corrupt(f"L2 entry {entry:#018x}: unallocated, but its bitmap is {bitmap:#018x}")
                continue
            if bitmap & bitmap >> 32:
                self.corrupt(f"cluster at {host_offset:#x}: subclusters both allocated and zero ({bitmap:#018x})")
            if host_offset & (cluster_size - 1):
                has_data = bitmap & ALL_ALLOCATED if stride == 2 else not entry & READS_ZERO
                if not has_data and self._fix_entries and self.may_write_l2(l2_offset):
                    words[index] = 0 if stride == 2 else READS_ZERO
                    if stride == 2:
                        words[index + 1] = (bitmap | bitmap << 32) & ALL_ZERO
                    fixed.append(index)
                    result.corruptions_fixed += 1 + result.corruptions - n_before
                    result.corruptions = n_before
                    self.report(f"Repaired L2 entry {entry:#018x}: not cluster aligned, now reads as zeroes")
                    continue
                self.corrupt(f"cluster at {host_offset:#x} is not cluster aligned")
            if is_active:
                result.allocated_clusters += 1
                if next_offset and host_offset != next_offset:
                    result.fragmented_clusters += 1
                next_offset = host_offset + cluster_size
            if not self.has_data_file:
                self.count(host_offset, cluster_size, "cluster")
        for index in fixed:
            await self.storage.pwritev(l2_offset + 8 * index, [serialise_table(words, index, index + stride)])

    def _count_compressed(self, entry: int, *, is_active: bool) -> None:
        offset_bits = 70 - self._cluster_bits
        host_offset = entry & (1 << offset_bits) - 1
        if entry & COPIED:
            self.corrupt(f"compressed cluster at {host_offset:#x} has the COPIED flag")
        if self.has_data_file:
            self.corrupt(f"compressed cluster at {host_offset:#x} in an image with an external data file")
            return
        n_sectors = (entry >> offset_bits & (1 << self._cluster_bits - 8) - 1) + 1
        self.count(host_offset, n_sectors * 512 - host_offset % 512, "compressed cluster")
        if is_active:
            self.result.allocated_clusters += 1
            self.result.compressed_clusters += 1
            # They share sectors, so a reader always seeks back: fragmented by nature.
            self.result.fragmented_clusters += 1

    # Other structures

    async def _count_bitmaps(self) -> None:
        place = bitmap_directory_place(self.header)
        if place is None:
            return
        self.count(place[0], place[1], "bitmap directory")
        async with aclosing(each_bitmap(self.storage, self.header)) as bitmaps:
            async for bitmap in bitmaps:
                await self._count_bitmap(bitmap)

    async def _count_bitmap(self, bitmap: BitmapEntry) -> None:
        n_bytes = bitmap.table_size * 8
        self.count(bitmap.table_offset, n_bytes, f"table of bitmap {bitmap.name}")
        end = min(bitmap.table_offset + n_bytes, self._file_size)
        for chunk in range(bitmap.table_offset, end, _TABLE_CHUNK):
            await self.handled(_TABLE_CHUNK // 8)
            for entry in parse_table(await self.read(chunk, min(_TABLE_CHUNK, end - chunk) // 8 * 8)):
                if not is_valid_table_entry(entry, self.cluster_size):
                    self.corrupt(f"entry {entry:#018x} in the table of bitmap {bitmap.name} is invalid")
                elif host_offset := entry & TABLE_ENTRY_OFFSET_MASK:
                    self.count(host_offset, self.cluster_size, f"cluster of bitmap {bitmap.name}")

    def _count_refcount_blocks(self) -> None:
        for number, entry in enumerate(self.stored.table):
            if not entry:
                continue
            host_offset = entry & REFCOUNT_TABLE_OFFSET_MASK
            cluster = host_offset >> self._cluster_bits
            if entry & REFCOUNT_TABLE_RESERVED:
                self.corrupt(f"refcount table entry {number} {entry:#018x} has reserved bits set")
                self.needs_rebuild = True
            elif host_offset % self.cluster_size:
                self.corrupt(f"refcount block {number} at {host_offset:#x} is not cluster aligned")
                self.needs_rebuild = True
            elif cluster >= self.n_clusters:
                self.corrupt(f"refcount block {number} at {host_offset:#x} lies past the end of the file")
                self.has_block_outside = True
            elif host_offset:
                self.count(host_offset, self.cluster_size, "refcount block")
                n_references = self.counts.get(cluster)
                if n_references != 1:
                    self.corrupt(f"refcount block {number} at {host_offset:#x} has {n_references} references")
                    self.needs_rebuild = True

    async def _note_overlaps(self) -> None:
        """Say which tables share a cluster with something else. Not counted: the refcounts of such clusters are."""
        for what, host_offset, n_bytes in self._protected:
            end = min(host_offset + n_bytes, self._file_size)
            for place in range(host_offset, end, self.cluster_size):
                await self.handled(1)
                n_references = self.counts.get(place >> self._cluster_bits)
                if n_references > 1:
                    self.report(f"Overlap: {what} shares the cluster at {place:#x} ({n_references} references)")
