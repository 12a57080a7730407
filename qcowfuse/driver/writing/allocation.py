"""What the write path and write-back need of whatever hands out host clusters: the face of all allocators.

Two have it: :class:`~.refcount_allocation.RefcountAllocator` for QCOW2, and
:class:`~.append_allocation.AppendAllocator` for version 1, which has no refcounts and only ever grows.

1. Taking and giving back are plain functions on memory. A refcount block that is needed and not in memory is asked
   for by :class:`BlockMissing`, loaded by the awaiting caller, and the step is done again from its start. So is space
   of the file system for what a flush will have to write, by :class:`SpaceMissing`, before anything changes.
2. A count in memory is never lower than the references that the image file may hold at that moment: counts are
   raised before a link and lowered after the unlink is durable (R1, R3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from ..layers.host_run import HostRun
from .metadata_space import MetadataSpace

CLUSTERS_AT_ONCE = 4096


class MetadataWrite(NamedTuple):
    """Bytes for one place of the image file."""

    host_offset: int
    data: bytes


class DirtyRefcounts(NamedTuple):
    """What :meth:`take_dirty` hands out: ``blocks`` first, then (when they are durable) ``table``, which is
    empty unless blocks were added. ``moved_table``: a grown table to be written with the blocks; ``table`` then
    is the header field that points at it."""

    blocks: list[MetadataWrite]
    moved_table: list[MetadataWrite]
    table: list[MetadataWrite]


class BlockMissing(Exception):  # noqa: N818 - not an error: the answer "load this first"
    """The refcount block ``block_index`` has to be loaded."""

    def __init__(self, block_index: int) -> None:
        self.block_index = block_index


class SpaceMissing(Exception):  # noqa: N818 - as above: "set space aside first"
    """``places`` (host offset, bytes) of the image file need space that is their own."""

    def __init__(self, places: list[tuple[int, int]]) -> None:
        self.places = places


def merged(runs: list[HostRun], cluster_size: int) -> list[HostRun]:
    """The same clusters, each as often, in as few runs as that takes."""
    result: list[HostRun] = []
    for run in sorted(runs):
        last = result[-1] if result else None
        if last is not None and last.host_offset + last.n_clusters * cluster_size == run.host_offset:
            result[-1] = HostRun(last.host_offset, last.n_clusters + run.n_clusters)
        else:
            result.append(HostRun(run.host_offset, run.n_clusters))
    return result


def in_parts(run: HostRun, cluster_size: int) -> Iterator[HostRun]:
    """The same clusters, as runs that are given back while nobody waits too long."""
    host_offset, n_left, _ = run
    while n_left > CLUSTERS_AT_ONCE:
        yield HostRun(host_offset, CLUSTERS_AT_ONCE)
        host_offset += CLUSTERS_AT_ONCE * cluster_size
        n_left -= CLUSTERS_AT_ONCE
    yield HostRun(host_offset, n_left)


class Allocator(Protocol):
    """What the write path and the ordering rules need of host cluster management."""

    @property
    def space(self) -> MetadataSpace:
        """Which metadata of the image file has its space."""

    async def allocate(self, n_clusters: int) -> HostRun:
        """Take 1 to ``n_clusters`` contiguous clusters. Raises OSError, CorruptImageError."""

    def try_allocate(self, n_clusters: int) -> HostRun | None:
        """:meth:`allocate` where nothing has to be read for it, else None."""

    def give_back(self, run: HostRun) -> None:
        """Undo a :meth:`try_allocate`, before anything else has happened."""

    async def allocate_exactly(self, n_clusters: int) -> HostRun:
        """Take ``n_clusters`` contiguous clusters, for a table. Raises as :meth:`allocate`."""

    async def release(self, runs: list[HostRun], *, punch: bool = False) -> None:
        """Lower the count of every cluster in the runs by one. All or, on an exception, a part.

        ``punch``: the space of clusters that become free is given back to the file system, before they do.
        """

    def take_dirty(self) -> DirtyRefcounts:
        """Everything that the image file lacks, in one step; from now on it counts as written."""

    def put_back(self) -> None:
        """What :meth:`take_dirty` handed out last could not be written: it is dirty again."""

    def written(self) -> None:
        """What :meth:`take_dirty` handed out last has been written: it may be read back from the file."""

    def take_unlinked(self) -> list[HostRun]:
        """Clusters of moved structures that are free once the last :meth:`take_dirty` is durable."""

    @property
    def is_dirty(self) -> bool:
        """Whether :meth:`take_dirty` would hand out anything."""

    def dirty_bytes(self) -> int:
        """How much that would be, at most."""
