"""The host clusters of a writable image: an allocator, and what nothing may be written on top of."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ...consistency.lost_end import first_free_v1, refuse_lost_end
from ...format.entries import EntryFormat, Table
from ...format.header import Qcow1Header, Qcow2Header
from ...storage.base import Storage
from ...tables.refcount_table import read_refcount_table
from .allocation import Allocator
from .append_allocation import AppendAllocator
from .guarded_clusters import MetadataClusters, find_metadata
from .refcount_allocation import RefcountAllocator

if TYPE_CHECKING:
    from .unguarded import UnguardedClusters


class HostClusters(NamedTuple):
    """``unguarded`` has to begin before the first cluster is taken; None in version 1, which counts nothing."""

    allocator: Allocator
    metadata: MetadataClusters
    unguarded: UnguardedClusters | None


async def load_host_clusters(
    path: str, storage: Storage, header: Qcow1Header | Qcow2Header, *, entry_format: EntryFormat, l1_table: Table
) -> HostClusters:
    """Raises ImageUsageError where the file has lost its end, FormatError, CorruptImageError, OSError."""
    if isinstance(header, Qcow1Header):
        await refuse_lost_end(path, storage, header, l1_table=l1_table)
        from .guarded_clusters_v1 import find_metadata_v1

        metadata = find_metadata_v1(storage, header, entry_format=entry_format, l1_table=l1_table)
        first_free = max(metadata.end, first_free_v1(storage, header))
        return HostClusters(AppendAllocator(storage, 1 << header.cluster_bits, first_free=first_free), metadata, None)
    from .unguarded import UnguardedClusters

    table = await read_refcount_table(storage, header)
    await refuse_lost_end(path, storage, header, l1_table=l1_table, refcount_table=table)
    known = await find_metadata(storage, header, l1_table=l1_table, refcount_table=table)
    allocator = RefcountAllocator(
        storage,
        metadata=known,
        cluster_bits=header.cluster_bits,
        refcount_order=header.refcount_order,
        table=table,
        table_offset=header.refcount_table_offset,
    )
    unguarded = UnguardedClusters(
        storage, header, entry_format=entry_format, l1_table=l1_table, refcount_table=table, allocator=allocator
    )
    return HostClusters(allocator, known, unguarded)
