"""Clusters that are in use although their refcount is 0, in a damaged image: found, so that no write takes them.

1. Free by their counts, and inside the image file, are few clusters or none. Those are found first, block by block.
   Where there are none (an image that only grew), nothing else is looked at.
2. Otherwise every L2 table of the disk and of its snapshots, and every table of a bitmap, is looked at once, for
   references to one of the free clusters. A cluster with such a reference is never handed out; the log says so once.
3. Where the tables are small, the first write waits for that. Else it is done in the background, and until it has
   ended, new clusters are taken from behind the end of the file, where nothing is.
4. All is read from the file, past the caches. What this program changes meanwhile can't deceive: it takes no cluster
   inside the file, and lowers no count before nothing on disk refers to the cluster (rule R3 of ``write_back``).
5. Whatever can't be found out (an error, more of anything than the limits here) leaves the image growing at its end
   for as long as it is open.

Not found: references to what lies behind the end of the file, and clusters with more references than their count,
when that is not 0. Tables of the active image are guarded by :mod:`~qcowfuse.driver.writing.guarded_clusters`,
whatever their counts.
"""

from __future__ import annotations

import logging
import sys
from array import array
from collections.abc import Iterable, Iterator
from contextlib import aclosing, suppress

import trio

from ...buffer import Buffer
from ...errors import FormatError, QcowFuseError
from ...format.bitmap_directory import TABLE_ENTRY_OFFSET_MASK
from ...format.entries import OFFSET_MASK, EntryFormat, Table, parse_table
from ...format.header import Qcow2Header
from ...format.refcounts import REFCOUNT_TABLE_OFFSET_MASK, entries_per_block, parse_refcounts
from ...storage.base import Storage, pread
from ...tables.bitmap_listing import each_bitmap
from ...tables.snapshot_table import each_snapshot, each_snapshot_l1_place, load_snapshot_l1_table
from .refcount_allocation import RefcountAllocator
from .sorted_clusters import sorted_array

log = logging.getLogger(__name__)

INLINE_BYTES = 2 << 20
"""Tables and refcount blocks up to this size are looked through by the first write itself."""
MAX_FILE_CLUSTERS = 1 << 31
MAP_CLUSTERS = 1 << 26
"""So many clusters have a map of the free ones at a time, a byte each. With 64 KiB clusters that is a file of 4 TiB;
the tables of a larger one are looked at several times."""
MAX_TABLES = 1 << 22
MAX_FOUND = 1 << 15
_CHUNK = 1 << 20
_PART_BYTES = 64 << 10
"""Of a table, in one go: 1 ms."""
_ENTRIES_AT_ONCE = 8192


class _TooMuchError(Exception):
    """More than one of the limits."""


class UnguardedClusters:
    """One look, on behalf of ``allocator``; ``l1_table`` is the active one."""

    def __init__(
        self,
        storage: Storage,
        header: Qcow2Header,
        *,
        entry_format: EntryFormat,
        l1_table: Table,
        refcount_table: array[int],
        allocator: RefcountAllocator,
    ) -> None:
        self.found: set[int] = set()
        self._storage = storage
        self._header = header
        self._entry_format = entry_format
        self._l1_table = l1_table
        self._refcount_table = refcount_table
        self._allocator = allocator
        self._bits = header.cluster_bits
        self._n_clusters = -(-storage.size() >> self._bits)
        self._free = bytearray()
        self._map_start = 0
        self._n_looked_at = 0
        self._scope = trio.CancelScope()
        self._ended: trio.Event | None = None
        self._has_begun = False
        self._part_bytes = min(1 << self._bits, _PART_BYTES)
        n_words = self._part_bytes // 8
        tables = (table if isinstance(table, array) else array("Q", table) for table in (l1_table, refcount_table))
        self._n_tables = sum(len(table) - table.count(0) for table in tables)
        self._has_clusters = not entry_format.has_data_file
        self._plain_high = bytes(value for value in range(256) if not value & 0x40)
        self._ones = int.from_bytes((1).to_bytes(8, "big") * n_words, "big")
        ramp = array("Q", range(0, n_words << self._bits, 1 << self._bits))
        if sys.byteorder == "little":
            ramp.byteswap()
        self._ramp = int.from_bytes(ramp.tobytes(), "big")

    async def begin(self) -> None:
        """Before the first cluster is taken: look, or begin to. Nothing when that was done."""
        if self._has_begun:
            return
        self._allocator.hold_back(self._n_clusters)
        n_blocks = -(-self._n_clusters // entries_per_block(self._bits, self._header.refcount_order))
        self._refcount_table = self._refcount_table[:n_blocks]  # as it is now: blocks in memory only can't be read
        if self._storage.is_fixed or await self._is_small():  # nothing can be taken behind the end of a device
            await self._run()
            self._has_begun = True
            return
        self._has_begun = True
        self._ended = trio.Event()
        trio.lowlevel.spawn_system_task(self._run_behind, self._ended, name="qcowfuse look at free clusters")

    async def _is_small(self) -> bool:
        n_tables = self._n_tables
        if n_tables << self._bits <= INLINE_BYTES and self._header.n_snapshots:
            with suppress(OSError, QcowFuseError):  # the look itself will meet it
                async with aclosing(each_snapshot_l1_place(self._storage, self._header)) as entries:
                    async for (_, l1_size), _ in entries:
                        n_tables += l1_size
        return n_tables << self._bits <= INLINE_BYTES

    async def wait(self) -> None:
        """Until the look has ended."""
        if self._ended is not None:
            await self._ended.wait()

    async def aclose(self) -> None:
        """Give it up. Idempotent."""
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self.wait()

    async def _run_behind(self, ended: trio.Event) -> None:
        try:
            with self._scope:
                await self._run()
        finally:
            ended.set()

    async def _run(self) -> None:
        """Raises nothing."""
        name = self._storage.name
        try:
            if self._n_clusters > MAX_FILE_CLUSTERS:
                raise _TooMuchError("the file has too many clusters")
            for start in range(0, self._n_clusters, MAP_CLUSTERS):
                await self._find_free(start, min(start + MAP_CLUSTERS, self._n_clusters))
                if self._free:
                    await self._look_at_tables()
        except (OSError, QcowFuseError, _TooMuchError) as error:
            log.warning(
                "%s: which free clusters are really free was not found out (%s): none is used, the image grows",
                name,
                error,
            )
            return
        except Exception:  # a bug; but nothing may leave a system task, that would end the program
            log.exception("%s: the look at free clusters failed", name)
            return
        finally:
            self._free = bytearray()
        if self.found:
            log.warning(
                "%s: clusters in use are free by their refcounts (%d of them, the first at %#x); nothing else is "
                "written there; qcowfuse-img check -r all mends that",
                name,
                len(self.found),
                min(self.found) << self._bits,
            )
        self._allocator.let_in(frozenset(self.found))

    async def _find_free(self, first: int, end: int) -> None:
        """Make the map of free clusters from ``first`` to ``end``; it is empty where there are none."""
        self._map_start, self._free = first, bytearray()
        order = self._header.refcount_order
        per_block = entries_per_block(self._bits, order)
        for number in range(first // per_block, -(-end // per_block)):
            block_start = number * per_block
            start, stop = max(block_start, first), min(block_start + per_block, end)
            entry = self._refcount_table[number] if number < len(self._refcount_table) else 0
            host_offset = entry & REFCOUNT_TABLE_OFFSET_MASK
            if host_offset:
                # Of the last block only what counts clusters of the file: most of it, where the file is small.
                data = await pread(self._storage, host_offset, (stop - block_start << order) + 7 >> 3)
                free = _free_in(data, order)[start - block_start : stop - block_start]
            else:
                free = b"\1" * (stop - start)
            await self._pause(per_block // 16)
            if free.count(1):
                if not self._free:
                    self._free = bytearray(end - first)
                self._free[start - first : stop - first] = free
        if self._free and not first:
            self._free[0] = 0  # the header; and what an entry of 0 seems to refer to

    async def _look_at_tables(self) -> None:
        tables = self._tables_of(self._l1_table)
        async with aclosing(each_snapshot(self._storage, self._header)) as entries:
            async for snapshot, _ in entries:
                inactive = self._tables_of(await load_snapshot_l1_table(self._storage, self._header, snapshot))
                self._note(inactive)
                tables.extend(inactive)
                await self._pause(len(inactive))
                if len(tables) > MAX_TABLES:
                    break
        if len(tables) > MAX_TABLES:
            raise _TooMuchError("there are too many L2 tables")
        if self._has_clusters:
            previous = 0
            for host_offset in sorted_array([tables]):
                if host_offset == previous:
                    continue
                previous = host_offset
                for part in range(host_offset, host_offset + (1 << self._bits), self._part_bytes):
                    self._note_table(await pread(self._storage, part, self._part_bytes))
                    await self._pause(self._part_bytes // 8)
        with suppress(FormatError):  # then the first write gives the bitmaps up
            await self._look_at_bitmaps()

    async def _look_at_bitmaps(self) -> None:
        async with aclosing(each_bitmap(self._storage, self._header)) as bitmaps:
            async for bitmap in bitmaps:
                start, end = bitmap.table_offset, bitmap.table_offset + 8 * bitmap.table_size
                end = min(end, self._storage.size())
                self._note(range(start, end, 1 << self._bits))
                for chunk in range(start, end, _CHUNK):
                    table = parse_table(await pread(self._storage, chunk, min(_CHUNK, end - chunk) // 8 * 8))
                    self._note(entry & TABLE_ENTRY_OFFSET_MASK for entry in table if entry)
                    await self._pause(len(table))

    def _tables_of(self, l1_table: Table) -> array[int]:
        """Where its L2 tables lie; what is impossible, or behind the end, is left to the request that needs it."""
        mask, end = (1 << self._bits) - 1, self._storage.size()
        found = array("Q")
        for start in range(0, len(l1_table), _ENTRIES_AT_ONCE):
            entries = set(l1_table[start : start + _ENTRIES_AT_ONCE])  # a table that is named often is kept once
            places = {entry & OFFSET_MASK for entry in entries}
            found.extend(place for place in places if 0 < place < end and not place & mask)
        return found

    async def _pause(self, n_entries: int) -> None:
        """Let others run now and then."""
        self._n_looked_at += n_entries
        if self._n_looked_at >= _ENTRIES_AT_ONCE:
            self._n_looked_at = 0
            await trio.lowlevel.checkpoint()

    def _note(self, host_offsets: Iterable[int]) -> None:
        """Each is the start of a cluster in use."""
        self._add(self._free_of(host_offset >> self._bits for host_offset in host_offsets))

    def _free_of(self, clusters: Iterable[int]) -> list[int]:
        free, start = self._free, self._map_start
        end = start + len(free)
        return [cluster for cluster in clusters if start <= cluster < end and free[cluster - start]]

    def _add(self, clusters: list[int]) -> None:
        self.found.update(clusters)
        if len(self.found) > MAX_FOUND:
            raise _TooMuchError(f"more than {MAX_FOUND} free clusters are in use: qcowfuse-img check -r all")

    def _note_table(self, data: Buffer) -> None:
        """What an L2 table refers to."""
        raw = bytes(data)
        entry_format = self._entry_format
        free, bits = self._free, self._bits
        if not raw.strip(b"\0"):
            return
        entries = parse_table(raw)[:: entry_format.words]
        if raw[:: 8 * entry_format.words].translate(None, self._plain_high):  # some are compressed
            self._add(self._free_of(self._clusters_of(entries)))
            return
        if not entry_format.is_extended and self._is_run(raw):
            first = ((entries[0] & OFFSET_MASK) >> bits) - self._map_start
            if free.find(1, max(first, 0), max(first + len(entries), 0)) < 0:
                return
        clusters = [(entry & OFFSET_MASK) >> bits for entry in entries]
        if self._map_start or max(clusters) >= len(free):
            self._add(self._free_of(clusters))
        else:  # in half the time
            self._add([cluster for cluster in clusters if free[cluster]])

    def _is_run(self, raw: bytes) -> bool:
        """Whether all clusters of a table follow each other in the file."""
        first = int.from_bytes(raw[:8], "big")
        if int.from_bytes(raw[-8:], "big") != first + (len(raw) // 8 - 1 << self._bits):
            return False
        return raw == (first * self._ones + self._ramp).to_bytes(len(raw), "big")

    def _clusters_of(self, entries: array[int]) -> Iterator[int]:
        entry_format, bits = self._entry_format, self._bits
        for entry in entries:
            if entry & entry_format.compressed:
                where = entry_format.compressed_cluster(entry)
                yield from range(where.host_offset >> bits, (where.host_offset + where.n_bytes - 1 >> bits) + 1)
            elif entry:
                yield (entry & OFFSET_MASK) >> bits


def _free_in(data: Buffer, order: int) -> bytes:
    """For each count of a refcount block a byte: 1 where it is 0."""
    raw = bytes(data)
    n_bytes = (1 << order) // 8
    if n_bytes == 0:
        raw = parse_refcounts(raw, order).tobytes()
    elif n_bytes > 1:
        # One byte each, which is 0 where all bytes of the count are: their columns as large numbers.
        columns = (int.from_bytes(raw[column::n_bytes], "big") for column in range(n_bytes))
        merged = 0
        for column in columns:
            merged |= column
        raw = merged.to_bytes(len(raw) // n_bytes, "big")
    return raw.translate(_IS_ZERO)


_IS_ZERO = bytes([1]) + bytes(255)
