"""Host clusters of version 1, which has no refcounts: taken at the end of the file.

1. A run that is given back while it is the last one is taken again, whatever a failed write has left in it: a full
   disk must not cost the space of a partly written run at each try. It is not fresh then.
"""

from __future__ import annotations

import errno

from ...format.entries import MAX_HOST_OFFSET
from ...format.geometry import round_up
from ...storage.base import Storage
from ..layers.host_run import HostRun
from .allocation import DirtyRefcounts
from .metadata_space import MetadataSpace


class AppendAllocator:
    """Version 1: the next cluster is where the file ends, and nothing is ever given back."""

    is_dirty = False

    def __init__(self, storage: Storage, cluster_size: int, first_free: int = 0) -> None:
        """``first_free``: nothing is put before it, although the file may end there."""
        self.space = MetadataSpace(storage)
        self._storage = storage
        self._cluster_size = cluster_size
        self._end = first_free
        self._high_water = storage.size()
        self._unused_end = 0

    async def allocate(self, n_clusters: int) -> HostRun:
        """See Allocator."""
        if not self.space.is_ready:
            await self.space.prepare()
        return self._allocate(n_clusters)

    def try_allocate(self, n_clusters: int) -> HostRun | None:
        """See Allocator."""
        return self._allocate(n_clusters) if self.space.is_ready else None

    def _allocate(self, n_clusters: int) -> HostRun:
        size = self._storage.size()
        start = self._end if size <= self._unused_end else max(self._end, size)
        host_offset = round_up(start, self._cluster_size)
        if host_offset + n_clusters * self._cluster_size > MAX_HOST_OFFSET:
            raise OSError(errno.ENOSPC, "the image file cannot take another cluster", self._storage.name)
        is_fresh = host_offset >= self._high_water
        self._end = host_offset + n_clusters * self._cluster_size
        self._high_water = max(self._high_water, self._end)
        return HostRun(host_offset, n_clusters, is_fresh)

    async def allocate_exactly(self, n_clusters: int) -> HostRun:
        """See Allocator."""
        return await self.allocate(n_clusters)

    async def release(self, runs: list[HostRun], *, punch: bool = False) -> None:
        """The last clusters of the file can be taken again; others are lost, as they are in QEMU."""
        for run in runs:
            self.give_back(run)

    def give_back(self, run: HostRun) -> None:
        """See Allocator."""
        if run.host_offset + run.n_clusters * self._cluster_size == self._end >= self._storage.size():
            self._end = run.host_offset
            self._unused_end = self._storage.size()

    def dirty_bytes(self) -> int:
        """See Allocator."""
        return 0

    def take_dirty(self) -> DirtyRefcounts:
        """See Allocator."""
        return DirtyRefcounts([], [], [])

    def put_back(self) -> None:
        """See Allocator."""

    def written(self) -> None:
        """See Allocator."""

    def take_unlinked(self) -> list[HostRun]:
        """See Allocator."""
        return []
