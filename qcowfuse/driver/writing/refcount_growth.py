"""Room for more refcounts: a new block where a range of clusters has none, and a larger refcount table.

1. All that a flush will have to write has its space set aside before anything changes (``SpaceMissing``).
2. A table that grows is moved behind everything, with the blocks that describe it; the old one's clusters are free
   once the header names the new one.
"""

from __future__ import annotations

import errno
from array import array

from ...format.entries import MAX_HOST_OFFSET
from ...format.geometry import WORD_SIZE, divide_up
from ...format.header_fields import MAX_REFCOUNT_TABLE_SIZE
from ..layers.host_run import HostRun
from .allocation import SpaceMissing
from .guarded_clusters import MetadataClusters
from .metadata_space import MetadataSpace
from .refcount_blocks import RefcountBlocks


class RefcountGrowth:
    """``high_water``: the end, in bytes of the image file called ``name``, of all that was ever in use there."""

    def __init__(
        self,
        name: str,
        blocks: RefcountBlocks,
        *,
        cluster_bits: int,
        metadata: MetadataClusters,
        space: MetadataSpace,
        high_water: int,
    ) -> None:
        self.high_water = high_water
        self.unlinked: list[HostRun] = []
        self._name = name
        self._blocks = blocks
        self._cluster_bits = cluster_bits
        self._metadata = metadata
        self._space = space

    def require_space(self, *places: tuple[int, int]) -> None:
        """Raises SpaceMissing unless all ``places`` (host offset, bytes) have their space."""
        missing = [place for place in places if not self._space.has(*place)]
        if missing:
            raise SpaceMissing(missing)

    def add_block(self, block_index: int, cluster: int) -> None:
        """A new block for a range that has none, in that range's ``cluster``, which it marks as used."""
        cluster_size = 1 << self._cluster_bits
        self._metadata.check_own(self._blocks.table_offset, len(self._blocks.table) * WORD_SIZE, "refcount table")
        self._metadata.check(cluster * cluster_size, cluster_size, "a new refcount block")
        self.require_space((cluster * cluster_size, cluster_size), self._blocks.table_part(block_index, 1))
        self._metadata.add(cluster * cluster_size, cluster_size)
        index = cluster % self._blocks.per_block
        self._blocks.add(block_index, cluster << self._cluster_bits, index, index + 1)
        self.high_water = max(self.high_water, (cluster + 1) << self._cluster_bits)

    def grow_table(self, needed_index: int) -> None:
        """Move the refcount table to a larger place behind everything, with the blocks that describe it."""
        cluster_size = 1 << self._cluster_bits
        entries_per_cluster = cluster_size // WORD_SIZE
        first_block = max(self._first_unused_block(), needed_index)
        start = first_block * self._blocks.per_block
        n_table = n_blocks = 1
        while True:
            entries = max(first_block + n_blocks, len(self._blocks.table) * 3 // 2)
            wanted_table = divide_up(entries, entries_per_cluster)
            wanted_blocks = divide_up(wanted_table + n_blocks, self._blocks.per_block)
            if wanted_table <= n_table and wanted_blocks <= n_blocks:
                break
            n_table, n_blocks = max(n_table, wanted_table), max(n_blocks, wanted_blocks)
        if n_table * cluster_size > MAX_REFCOUNT_TABLE_SIZE:
            raise OSError(errno.ENOSPC, "the image's refcount table cannot grow beyond 8 MiB", self._name)
        self._metadata.check(start * cluster_size, (n_table + n_blocks) * cluster_size, "a larger refcount table")
        self.require_space((start * cluster_size, (n_table + n_blocks) * cluster_size))
        self._metadata.add(start * cluster_size, (n_table + n_blocks) * cluster_size)
        old = HostRun(self._blocks.table_offset, divide_up(len(self._blocks.table) * WORD_SIZE, cluster_size))
        self._blocks.table.extend(
            array("Q", bytes(WORD_SIZE * (n_table * entries_per_cluster - len(self._blocks.table))))
        )
        self._add_blocks_behind(first_block, n_blocks, n_table, with_table=True)
        self._blocks.move_table(start << self._cluster_bits)
        self.unlinked.append(old)
        self._metadata.discard(old.host_offset, old.n_clusters * cluster_size)

    def allocate_behind(self, n_clusters: int) -> HostRun:
        """Contiguous clusters behind everything, and behind them the new blocks that describe both."""
        n_blocks = 1
        while n_blocks * self._blocks.per_block < n_clusters + n_blocks:
            n_blocks = divide_up(n_clusters + n_blocks, self._blocks.per_block)
        while (first_block := self._first_unused_block()) + n_blocks > len(self._blocks.table):
            self.grow_table(first_block + n_blocks - 1)
        host_offset = first_block * self._blocks.per_block << self._cluster_bits
        n_bytes = n_clusters << self._cluster_bits
        if host_offset + n_bytes + (n_blocks << self._cluster_bits) > MAX_HOST_OFFSET:
            raise OSError(errno.ENOSPC, "the image file cannot take another table", self._name)
        blocks = (host_offset + n_bytes, n_blocks << self._cluster_bits)
        self.require_space(blocks, self._blocks.table_part(first_block, n_blocks))
        self._metadata.add(*blocks)
        self._add_blocks_behind(first_block, n_blocks, n_clusters, with_table=False)
        return HostRun(host_offset, n_clusters)

    def _first_unused_block(self) -> int:
        """The first range of clusters that has no refcount block and lies, with all that follow, behind the file."""
        used = len(self._blocks.table)
        while used and not self._blocks.has(used - 1):
            used -= 1
        # Not the file's size: that grows with space that is set aside, before anything is there.
        return max(used, divide_up(divide_up(self.high_water, 1 << self._cluster_bits), self._blocks.per_block))

    def _add_blocks_behind(self, first_block: int, n_blocks: int, n_clusters: int, *, with_table: bool) -> None:
        """New blocks for the ranges from ``first_block`` on, behind ``n_clusters`` that are taken there as well."""
        start = first_block * self._blocks.per_block
        for number in range(n_blocks):
            in_use = min(max(n_clusters + n_blocks - number * self._blocks.per_block, 0), self._blocks.per_block)
            host_offset = (start + n_clusters + number) << self._cluster_bits
            self._blocks.add(first_block + number, host_offset, 0, in_use, with_table=with_table)
        self.high_water = max(self.high_water, (start + n_clusters + n_blocks) << self._cluster_bits)
