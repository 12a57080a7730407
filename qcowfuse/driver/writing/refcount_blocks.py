"""The refcount table and its blocks in memory: which are there, what the image file lacks of them, and their cache.

1. A new block, and a larger table, exist in memory only until :meth:`RefcountBlocks.take_dirty` hands them to
   write-back. A block describes its own cluster.
2. A block is dropped when others are needed more, but never while it is dirty or being written: read again too early,
   it would be the old one.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict

import trio

from ...errors import CorruptImageError
from ...format.entries import MAX_HOST_OFFSET, serialise_table
from ...format.geometry import SECTOR_WORDS, WORD_SIZE, round_up
from ...format.header_fields import REFCOUNT_TABLE_FIELD
from ...format.refcounts import (
    REFCOUNT_TABLE_OFFSET_MASK,
    empty_refcounts,
    entries_per_block,
    parse_refcounts,
    serialise_refcounts,
)
from ...storage.base import Storage, pread
from .allocation import BlockMissing, DirtyRefcounts, MetadataWrite
from .guarded_clusters import MetadataClusters
from .metadata_space import LEAST_WRITE

BLOCK_CACHE_BYTES = 8 << 20


class Block:
    """A refcount block in memory: its counts, and from where to where the image file lacks them."""

    __slots__ = ("counts", "dirty_end", "dirty_start", "has_space")

    def __init__(self, counts: array[int], *, has_space: bool = False) -> None:
        self.counts = counts
        self.has_space = has_space
        self.dirty_start = len(counts)
        self.dirty_end = 0

    def mark_dirty(self, start: int, end: int) -> None:
        """The counts ``start`` to ``end`` (exclusive) have changed."""
        self.dirty_start = min(self.dirty_start, start)
        self.dirty_end = max(self.dirty_end, end)


class RefcountBlocks:
    """``table`` is the refcount table as loaded, ``table_offset`` its place in the image file."""

    def __init__(
        self,
        storage: Storage,
        *,
        cluster_bits: int,
        refcount_order: int,
        table: array[int],
        table_offset: int,
        metadata: MetadataClusters,
    ) -> None:
        self.table = table
        self.table_offset = table_offset
        self.per_block = entries_per_block(cluster_bits, refcount_order)
        self._storage = storage
        self._metadata = metadata
        self._cluster_bits = cluster_bits
        self._order = refcount_order
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._dirty: set[int] = set()
        self._new_entries: set[int] = set()
        self._table_moved = False
        self._taken: tuple[list[tuple[int, int, int]], set[int], bool] = ([], set(), False)
        self._being_written: set[int] = set()
        self._load_lock = trio.Lock()

    @property
    def is_dirty(self) -> bool:
        """Whether :meth:`take_dirty` would hand out anything."""
        return bool(self._dirty or self._new_entries or self._table_moved)

    def dirty_bytes(self) -> int:
        """How much that would be, at most. A part of a table is taken for a block of any file system."""
        tables = len(self.table) * 8 if self._table_moved else len(self._new_entries) * LEAST_WRITE
        blocks = [self._blocks[block_index] for block_index in self._dirty]
        n_counts = sum(block.dirty_end - block.dirty_start for block in blocks)
        return (n_counts << self._order >> 3) + 2 * LEAST_WRITE * len(blocks) + tables

    def has(self, block_index: int) -> bool:
        """Whether there is such a block, in memory or not."""
        return block_index < len(self.table) and bool(self.table[block_index] & REFCOUNT_TABLE_OFFSET_MASK)

    def place(self, block_index: int) -> int:
        """The block's host offset."""
        return self.table[block_index] & REFCOUNT_TABLE_OFFSET_MASK

    def get(self, block_index: int) -> Block:
        """A block that is in memory. Raises BlockMissing."""
        block = self._blocks.get(block_index)
        if block is None:
            raise BlockMissing(block_index)
        return block

    async def load(self, block_index: int) -> None:
        """Have the block in memory. Raises OSError, CorruptImageError."""
        # One at a time: a second read of a block could end after the first was changed, written and dropped again.
        async with self._load_lock:
            if block_index not in self._blocks:
                await self._read(block_index)

    async def _read(self, block_index: int) -> None:
        cluster_size = 1 << self._cluster_bits
        host_offset = self.place(block_index)
        if host_offset & (cluster_size - 1) or host_offset >= MAX_HOST_OFFSET:
            raise CorruptImageError(
                "refcount table", self.table_offset + 8 * block_index, f"impossible entry {host_offset:#x}"
            )
        if host_offset >= self._storage.size():
            raise CorruptImageError("refcount block", host_offset, "lies past the end of the image file")
        self._metadata.check_own(host_offset, cluster_size, "refcount block")
        data = await pread(self._storage, host_offset, cluster_size)
        self._blocks[block_index] = block = Block(parse_refcounts(data, self._order))
        keep = max(4, BLOCK_CACHE_BYTES // (block.counts.itemsize * self.per_block))
        while len(self._blocks) > keep:
            for victim in self._blocks:
                if not (victim in self._dirty or victim in self._being_written or victim == block_index):
                    del self._blocks[victim]
                    break
            else:
                break

    def set_counts(self, block_index: int, block: Block, start: int, end: int, count: int) -> None:
        """Set the counts ``start`` to ``end`` (exclusive) of a block."""
        for index in range(start, end):
            block.counts[index] = count
        block.mark_dirty(start, end)
        self._dirty.add(block_index)

    def clear_counts(self, block_index: int, block: Block, start: int, end: int) -> None:
        """Set them to 0 at once."""
        counts = block.counts
        counts[start:end] = array(counts.typecode, bytes((end - start) * counts.itemsize))
        block.mark_dirty(start, end)
        self._dirty.add(block_index)

    def add(self, block_index: int, host_offset: int, start: int, end: int, *, with_table: bool = False) -> None:
        """A new block at ``host_offset``, in which the counts ``start`` to ``end`` are 1. ``with_table``: its entry
        goes out with a table that moves as a whole."""
        block = Block(empty_refcounts(self._cluster_bits, self._order), has_space=True)
        self._blocks[block_index] = block
        self.table[block_index] = host_offset
        if not with_table:
            self._new_entries.add(block_index)
        self.set_counts(block_index, block, start, end, 1)
        block.mark_dirty(0, self.per_block)

    def move_table(self, host_offset: int) -> None:
        """The table, which has grown, goes to another place."""
        self.table_offset = host_offset
        self._table_moved = True

    def table_part(self, first_block: int, n_blocks: int) -> tuple[int, int]:
        """Where the sectors of the table lie that name ``n_blocks`` blocks: host offset and bytes."""
        start = first_block // SECTOR_WORDS * SECTOR_WORDS
        end = min(round_up(first_block + n_blocks, SECTOR_WORDS), len(self.table))
        return self.table_offset + WORD_SIZE * start, WORD_SIZE * (end - start)

    def take_dirty(self) -> DirtyRefcounts:
        """Everything that the image file lacks, in one step; from now on it counts as written."""
        blocks: list[MetadataWrite] = []
        taken: list[tuple[int, int, int]] = []
        per_sector = max(4096 >> self._order, 1)
        for block_index in sorted(self._dirty):
            block = self._blocks[block_index]
            start = block.dirty_start // per_sector * per_sector
            end = min(round_up(block.dirty_end, per_sector), self.per_block)
            host_offset = self.place(block_index) + (start << self._order >> 3)
            blocks.append(MetadataWrite(host_offset, serialise_refcounts(block.counts, self._order, start, end)))
            taken.append((block_index, block.dirty_start, block.dirty_end))
            block.dirty_start, block.dirty_end = self.per_block, 0
        moved: list[MetadataWrite] = []
        table: list[MetadataWrite] = []
        if self._table_moved:
            moved.append(MetadataWrite(self.table_offset, serialise_table(self.table, 0, len(self.table))))
            n_clusters = len(self.table) * 8 >> self._cluster_bits
            pointer = self.table_offset.to_bytes(8, "big") + n_clusters.to_bytes(4, "big")
            table.append(MetadataWrite(REFCOUNT_TABLE_FIELD, pointer))
        else:
            for sector in sorted({index // SECTOR_WORDS for index in self._new_entries}):
                start = sector * SECTOR_WORDS
                end = min(start + SECTOR_WORDS, len(self.table))
                table.append(MetadataWrite(self.table_offset + 8 * start, serialise_table(self.table, start, end)))
        self._taken = (taken, self._new_entries, self._table_moved)
        self._being_written = self._dirty
        self._dirty = set()
        self._new_entries = set()
        self._table_moved = False
        return DirtyRefcounts(blocks, moved, table)

    def put_back(self) -> None:
        """What :meth:`take_dirty` handed out last could not be written: it is dirty again."""
        taken, new_entries, table_moved = self._taken
        for block_index, start, end in taken:
            self._blocks[block_index].mark_dirty(start, end)
            self._dirty.add(block_index)
        self._new_entries |= new_entries
        self._table_moved |= table_moved
        self._taken = ([], set(), False)
        self._being_written = set()

    def written(self) -> None:
        """What :meth:`take_dirty` handed out last has been written: it may be read back from the file."""
        self._taken = ([], set(), False)
        self._being_written = set()
