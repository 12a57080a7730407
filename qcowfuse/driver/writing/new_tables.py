"""New L2 tables: for a part of the disk that has none yet, and copies of those that are shared with a snapshot.

1. A table is written whole before memory links it; on disk it is linked by the next flush (rule R4).
2. One at a time is made by waiting; a task that waited for that looks again. Others are made at once meanwhile, but
   for that very table.
3. An empty table is made in one step without an await where nothing has to be waited for: its L1 entry and its
   clusters are at hand, the storage writes at once, and the cache has room for what becomes dirty. Its slice is in
   memory then, and is not read back.
"""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable

import trio

from ...buffer import Buffer
from ...format.geometry import MAX_CLUSTER_BITS
from ..layers.host_run import HostRun
from ..layers.mapping import Mapping
from ..layers.table_cache import L2Slice, TableCache
from .allocation import Allocator
from .guarded_clusters import MetadataClusters
from .write_back import WriteBack

ZEROES = memoryview(bytes(1 << MAX_CLUSTER_BITS))


class NewTables:
    """Of the top layer, which ``mapping`` maps. ``give_back`` is for clusters that were not linked after all."""

    def __init__(
        self,
        *,
        mapping: Mapping,
        cache: TableCache,
        allocator: Allocator,
        metadata: MetadataClusters,
        write_back: WriteBack,
        give_back: Callable[[HostRun], Awaitable[None]],
    ) -> None:
        self._mapping = mapping
        self._cache = cache
        self._allocator = allocator
        self._space = allocator.space
        self._metadata = metadata
        self._write_back = write_back
        self._give_back = give_back
        self._storage = mapping.storage
        self._lock = trio.Lock()
        self._making = -1
        self._writes_at_once = True

    def owns(self, l1_index: int) -> bool:
        """Whether there is a table that this image owns alone."""
        entry_format = self._mapping.entry_format
        entry = self._mapping.l1_table[l1_index]
        return bool(entry & entry_format.l1_offset_mask) and entry & entry_format.copied == entry_format.copied

    async def make(self, l1_index: int) -> None:
        """Have a table that this image owns alone. Raises OSError, CorruptImageError."""
        async with self._lock:
            if not self.owns(l1_index):
                self._making = l1_index
                try:
                    await self._make(l1_index)
                finally:
                    self._making = -1

    def try_make(self, guest_offset: int) -> L2Slice | None:
        """A table where there is none, by rule 3: its slice for ``guest_offset``, pinned. None where that has to be
        waited for. Raises OSError, CorruptImageError."""
        mapping, space = self._mapping, self._space
        l1_index, key = mapping.l1_index(guest_offset), mapping.key(guest_offset)
        if (
            not self._writes_at_once
            or mapping.l1_table[l1_index]
            or self._making == l1_index
            or self._metadata.shared
            or space.has_reserve
            or not self._write_back.has_link_space(l1_index)
            or not self._cache.has_room_for_new(key)
        ):
            return None
        self._write_back.check_link(l1_index)
        table_size = mapping.geometry.l2_table_size
        n_clusters = self._n_clusters
        run = self._allocator.try_allocate(n_clusters)
        if run is None:
            return None
        is_written = False
        self._metadata.add(run.host_offset, table_size)
        try:
            if run.n_clusters == n_clusters:
                is_written = self._writes_at_once = self._storage.try_pwritev(run.host_offset, [ZEROES[:table_size]])
        finally:
            if not is_written:
                self._metadata.discard(run.host_offset, table_size)
                self._allocator.give_back(run)
        if not is_written:
            return None
        space.note_written(run.host_offset, table_size)
        self._write_back.link_table(l1_index, run.host_offset)
        entries = array("Q", bytes(mapping.geometry.slice_size))
        slice_ = L2Slice(key, guest_offset >> mapping.slice_shift, l1_index, entries)
        slice_.has_space = True
        self._cache.insert(slice_)
        return slice_

    @property
    def _n_clusters(self) -> int:
        """One, but for version 1 with tables larger than clusters."""
        geometry = self._mapping.geometry
        return -(-geometry.l2_table_size // geometry.cluster_size)

    async def _make(self, l1_index: int) -> None:
        """A new table, empty or a copy of one that is shared; linked in memory, on disk by the next flush."""
        mapping = self._mapping
        table_size = mapping.geometry.l2_table_size
        await self._write_back.secure_link(l1_index)
        self._write_back.check_link(l1_index)
        old = mapping.entry_format.l1_host_offset(mapping.l1_table[l1_index])
        if old:
            self._metadata.check_own(old, table_size, "L2 table")
        run = await self._allocator.allocate(self._n_clusters)
        assert run.n_clusters == self._n_clusters
        try:
            self._metadata.add(run.host_offset, table_size)
            contents: Buffer = ZEROES[:table_size]
            if old:
                contents = await self._storage.pread(old, table_size)
            if not self._storage.try_pwritev(run.host_offset, [contents]):
                await self._storage.pwritev(run.host_offset, [contents])
        except BaseException:
            self._metadata.discard(run.host_offset, table_size)
            await self._give_back(run)
            raise
        self._space.note_written(run.host_offset, table_size)
        self._write_back.link_table(l1_index, run.host_offset)
        if old:
            self._write_back.unlink_cluster(HostRun(old, 1))
            self._metadata.discard(old, table_size)
