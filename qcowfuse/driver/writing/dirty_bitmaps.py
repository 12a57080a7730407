"""Persistent dirty bitmaps of a running image, kept so that an incremental backup made from them is correct.

1. Before the first write every enabled bitmap (flag auto) that is valid is loaded and marked in_use on disk, durably.
   From then on whatever happens leaves it in_use, which says "don't trust this", until rule 3 is through.
2. Bits are set in memory before the bytes that they stand for are written. Nothing is stored by fsync, as in QEMU.
3. At the end, when everything else is durable: contents and counts of new clusters, flush, tables, flush, directory
   with in_use cleared, flush. Each step may tear between sectors: an in_use bitmap may have any contents, and every
   place that its table may name has its count. Clusters that are no longer named are freed last
   (:mod:`.bitmap_storing`).
4. Contents and tables are written in place where that is possible: nobody trusts them while in_use is set.
5. A bitmap that was in_use is not touched, nor is a disabled one, but that its table grows with the disk. One that
   can't be kept (damaged, too large) is marked in_use and left so. A directory that can't be read keeps nobody from
   using the disk: its bitmaps are given up by clearing the autoclear bit before the first write, where QEMU refuses
   to open the image. What is changed in place later is looked at before the first write: a cluster that is a
   bitmap's without having a count could become the guest's.
6. Unlike QEMU, which clears the autoclear bit for the time of a change to the directory: marking changes one byte per
   entry and clearing the mark too, and what changes in between (a table that had to grow) does so while in_use is
   set, its place and its length in two steps. A crash never costs a bitmap that was not in use.

Source: QEMU block/qcow2-bitmap.c for the meaning of flags, limits and what counts as valid.
"""

from __future__ import annotations

import logging

import trio

from ...buffer import Buffer
from ...errors import CorruptImageError, FormatError, QcowFuseError
from ...format.bitmap_directory import (
    AUTO,
    IN_USE,
    TABLE_ENTRY_ALL_ONES,
    TABLE_ENTRY_OFFSET_MASK,
    BitmapEntry,
    bitmap_directory_place,
    is_valid_table_entry,
    parse_bitmap_directory,
    replace_entry,
)
from ...format.bitmaps import DirtyBits, table_entries_needed
from ...format.entries import parse_table
from ...format.extensions import EXTENSION_BITMAPS, find_extension
from ...format.geometry import WORD_SIZE, divide_up
from ...format.header import Qcow2Header
from ...storage.base import Storage, pread
from .bitmap_storing import BitmapStorer, KeptBitmap, shown_name, write
from .guarded_clusters import MetadataClusters
from .refcount_allocation import RefcountAllocator
from .write_back import WriteBack

log = logging.getLogger(__name__)

MAX_BITMAP_BYTES = 256 << 20
"""Memory that the bitmaps of one image may come to when a guest writes all over the disk; QEMU's limit is 512 MiB for
each."""
MAX_LOADED_BYTES = 48 << 20
"""Memory for what the bitmaps of one image hold when the first write comes."""
MAX_BITMAPS = 4096
"""Of a directory whose bitmaps are kept right. QEMU's limit is 65,535."""
MAX_DIRECTORY_BYTES = 4 << 20
"""Of a directory whose bitmaps are kept right: it is in memory as a whole. QEMU's limit is 64 MiB."""
_CHECKPOINT_EVERY = 256
_CHUNK_OVERHEAD = 192
"""Bytes of memory that a part of a bitmap takes beside its contents, which all parts of ones share."""
_MAX_WARNINGS = 20


async def load_kept_bitmaps(
    storage: Storage,
    header: Qcow2Header,
    *,
    size: int,
    allocator: RefcountAllocator,
    metadata: MetadataClusters,
) -> DirtyBitmaps | None:
    """The bitmaps of an image of ``size`` bytes that is opened for writing; None where it has none that are worth
    anything, and the autoclear bit has to go. Raises OSError."""
    place = bitmap_directory_place(header)
    if place is None:
        if header.version >= 3 and find_extension(header.extensions, EXTENSION_BITMAPS) is not None:
            log.info("%s: its persistent bitmaps are out of date already and stay so", storage.name)
        return None
    host_offset, n_bytes, n_bitmaps = place
    cluster_size = 1 << header.cluster_bits
    kept = DirtyBitmaps(
        storage,
        cluster_size=cluster_size,
        directory_offset=host_offset,
        allocator=allocator,
        metadata=metadata,
    )
    try:
        if n_bytes > MAX_DIRECTORY_BYTES:
            raise FormatError("bitmap directory", host_offset, f"{n_bytes} bytes, more than {MAX_DIRECTORY_BYTES}")
        if n_bitmaps > MAX_BITMAPS:
            raise FormatError("bitmap directory", host_offset, f"{n_bitmaps} bitmaps, more than {MAX_BITMAPS}")
        await kept.require_own(host_offset, n_bytes, "bitmap directory")
        directory = bytes(await storage.pread(host_offset, n_bytes))
        entries = parse_bitmap_directory(directory, n_bitmaps, cluster_size)
    except QcowFuseError as error:
        log.warning(
            "%s: %s; the disk can be used, but its persistent bitmaps will be given up by the first write",
            storage.name,
            error,
        )
        return None
    metadata.add(host_offset, n_bytes)
    await kept.take_directory(directory, entries, size)
    return kept


class DirtyBitmaps:
    """See the module docstring; made by :func:`load_kept_bitmaps`."""

    def __init__(
        self,
        storage: Storage,
        *,
        cluster_size: int,
        directory_offset: int,
        allocator: RefcountAllocator,
        metadata: MetadataClusters,
    ) -> None:
        self._storage = storage
        self._cluster_size = cluster_size
        self._directory_offset = directory_offset
        self._allocator = allocator
        self._metadata = metadata
        self._directory = b""
        self._entries: list[BitmapEntry] = []
        self._kept: list[KeptBitmap] = []
        self._tracked: list[DirtyBits] = []
        self._n_loaded = 0
        self._n_warnings = 0
        self._unsound: dict[int, QcowFuseError] = {}
        self._lock = trio.Lock()

    async def take_directory(self, directory: bytes, entries: tuple[BitmapEntry, ...], size: int) -> None:
        """The directory as it is on disk. The tables of valid bitmaps are looked at and guarded now: later a cluster
        that is theirs without having a count could have become somebody else's. Raises OSError."""
        self._directory = directory
        self._entries = list(entries)
        for entry in entries:
            if entry.flags & IN_USE:
                continue
            try:
                await self._guard_table(entry, size)
            except QcowFuseError as error:
                self._unsound[entry.position] = error.with_traceback(None)  # which would keep all frames

    async def _guard_table(self, entry: BitmapEntry, size: int) -> None:
        cluster_size = self._cluster_size
        needed = table_entries_needed(size=size, granularity=entry.granularity, cluster_size=cluster_size)
        if entry.table_size != needed:
            raise FormatError("bitmap table", entry.table_offset, f"{entry.table_size} entries, expected {needed}")
        self._check_room(needed * cluster_size, entry)
        table_bytes = entry.table_size * WORD_SIZE
        if entry.table_offset + table_bytes > self._storage.size():
            raise FormatError("bitmap table", entry.table_offset, "reaches past the end of the file")
        await self.require_own(entry.table_offset, table_bytes, "bitmap table")
        self._metadata.add(entry.table_offset, table_bytes)

    @property
    def has_enabled(self) -> bool:
        """Whether there are bitmaps that :meth:`mark` has to be told of."""
        return any(entry.flags & (AUTO | IN_USE) == AUTO for entry in self._entries)

    def mark(self, guest_offset: int, n_bytes: int) -> None:
        """The bytes are about to change; call it after :meth:`begin`."""
        for bits in self._tracked:
            bits.mark(guest_offset, n_bytes)

    async def begin(self, write_back: WriteBack, size: int) -> None:
        """Rule 1, for a disk of ``size`` bytes; may be called again after an error. Raises OSError."""
        async with self._lock:
            chosen = [entry for entry in self._entries if entry.flags & (AUTO | IN_USE) == AUTO]
            await self._take(write_back, chosen, size)

    async def before_growth(self, write_back: WriteBack, size: int, new_size: int) -> None:
        """To be called after :meth:`begin` and before the disk's size rises to ``new_size`` bytes in the header:
        disabled bitmaps are marked and stored again as well, for QEMU refuses an image with a valid bitmap that is
        too short. Bits of the new part are clear until the guest writes there. Raises OSError."""
        async with self._lock:
            await self._take(write_back, [entry for entry in self._entries if not entry.flags & IN_USE], size)
            n_bytes = 0
            for bitmap in list(self._kept):
                n_more = self._bytes_needed(bitmap.entry, new_size)
                try:
                    self._check_room(n_bytes + n_more, bitmap.entry)
                except FormatError as error:
                    self._warn(bitmap.entry, error)
                    self._kept.remove(bitmap)
                    self._tracked = [bits for bits in self._tracked if bits is not bitmap.bits]
                else:
                    n_bytes += n_more

    async def _take(self, write_back: WriteBack, chosen: list[BitmapEntry], size: int) -> None:
        if not chosen:
            return
        kept: list[KeptBitmap] = []
        n_bytes = sum(bitmap.entry.table_size for bitmap in self._kept) * self._cluster_size
        seen = {word & TABLE_ENTRY_OFFSET_MASK for bitmap in self._kept for word in bitmap.table}
        for entry in chosen:
            n_more = self._bytes_needed(entry, size)
            try:
                self._check_room(n_bytes + n_more, entry)
                kept.append(await self._load(entry, seen, size))
            except (QcowFuseError, OSError) as error:
                self._warn(entry, error)
            else:
                n_bytes += n_more
        directory = bytearray(self._directory)
        marked = [entry._replace(flags=entry.flags | IN_USE) for entry in chosen]
        for entry in marked:
            replace_entry(directory, entry)
        await write(self._storage, self._directory_offset, directory)
        await write_back.flush_storage()
        self._directory = bytes(directory)
        by_position = {entry.position: entry for entry in marked}
        self._entries = [by_position.get(entry.position, entry) for entry in self._entries]
        for bitmap in kept:
            bitmap.entry = by_position[bitmap.entry.position]
        self._kept += kept
        self._tracked += [bitmap.bits for bitmap in kept if bitmap.bits is not None]

    async def _load(self, entry: BitmapEntry, seen: set[int], size: int) -> KeptBitmap:
        """``seen``: host offsets of clusters that other bitmaps have."""
        if (error := self._unsound.get(entry.position)) is not None:
            raise error
        table = parse_table(await self._storage.pread(entry.table_offset, entry.table_size * WORD_SIZE))
        for number, word in enumerate(table):
            if not is_valid_table_entry(word, self._cluster_size):
                raise FormatError("bitmap table", entry.table_offset, f"entry {number} {word:#018x} is invalid")
        if not entry.flags & AUTO:
            return KeptBitmap(entry, None, table)
        bits = DirtyBits(granularity=entry.granularity, cluster_size=self._cluster_size)
        n_clusters = sum(1 for word in table if word & TABLE_ENTRY_OFFSET_MASK)
        if table and table[-1] == TABLE_ENTRY_ALL_ONES:
            n_clusters += 1  # it may end inside, and is no part of ones then
        n_parts = len(table) - table.count(0)
        n_loaded = self._n_loaded + n_clusters * self._cluster_size + n_parts * _CHUNK_OVERHEAD
        if n_loaded > MAX_LOADED_BYTES:
            detail = f"has {n_clusters} clusters, which takes all bitmaps above {MAX_LOADED_BYTES} bytes in the image"
            raise FormatError("bitmap", None, detail)
        for number, word in enumerate(table):
            host_offset = word & TABLE_ENTRY_OFFSET_MASK
            if host_offset:
                bits.load(number, await self._read_cluster(host_offset, seen), size=size)
            elif word & TABLE_ENTRY_ALL_ONES:
                bits.load(number, None, size=size)
            if number % _CHECKPOINT_EVERY == 0:
                await trio.lowlevel.checkpoint()
        self._n_loaded = n_loaded
        return KeptBitmap(entry, bits, table)

    async def _read_cluster(self, host_offset: int, seen: set[int]) -> Buffer:
        if host_offset >= self._storage.size():
            raise FormatError("bitmap data", host_offset, "lies past the end of the file")
        if host_offset in seen:
            raise FormatError("bitmap data", host_offset, "belongs to more than one part of a bitmap")
        await self.require_own(host_offset, self._cluster_size, "bitmap data")
        seen.add(host_offset)
        return await pread(self._storage, host_offset, self._cluster_size)

    def _bytes_needed(self, entry: BitmapEntry, size: int) -> int:
        return self._cluster_size * table_entries_needed(
            size=size, granularity=entry.granularity, cluster_size=self._cluster_size
        )

    def _check_room(self, n_bytes: int, entry: BitmapEntry) -> None:
        """``n_bytes``: of all bitmaps up to ``entry``."""
        if n_bytes > MAX_BITMAP_BYTES:
            detail = f"with granules of {entry.granularity} bytes takes all bitmaps above {MAX_BITMAP_BYTES} bytes"
            raise FormatError("bitmap", None, detail)

    def _warn(self, entry: BitmapEntry, error: Exception) -> None:
        name = self._storage.name
        self._n_warnings += 1
        if self._n_warnings > _MAX_WARNINGS:
            if self._n_warnings == _MAX_WARNINGS + 1:
                log.warning("%s: more of its bitmaps can't be kept and are marked as inconsistent", name)
            return
        log.warning("%s: bitmap %s can't be kept and is marked as inconsistent: %s", name, shown_name(entry), error)

    async def store(self, write_back: WriteBack, size: int) -> None:
        """Rule 3, for a disk that now has ``size`` bytes. Nothing may write after this has begun. Failures are
        logged: what could not be stored stays in_use."""
        storer = BitmapStorer(
            self._storage,
            cluster_size=self._cluster_size,
            directory_offset=self._directory_offset,
            allocator=self._allocator,
            metadata=self._metadata,
        )
        await storer.store(self._kept, self._directory, self._entries, write_back, size)

    async def require_own(self, host_offset: int, n_bytes: int, what: str) -> None:
        """Raises CorruptImageError unless the bytes are in clusters with a count of 1 that hold no other metadata."""
        self._metadata.check(host_offset, n_bytes, what)
        cluster_size = self._cluster_size
        for cluster in range(host_offset // cluster_size, divide_up(host_offset + n_bytes, cluster_size)):
            count = await self._allocator.refcount(cluster)
            if count != 1:
                raise CorruptImageError(what, cluster * cluster_size, f"its cluster has refcount {count}, expected 1")
