"""From the layers of a chain, each open and unlocked, to the disk: what is written goes into the first of them.

1. What only some images need is imported here, when the header says that this one does, as in :mod:`.chain`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..consistency.lost_end import warn_of_lost_end
from ..format.entries import Table, entry_format
from ..format.extensions import EXTENSION_BITMAPS, find_extension
from ..format.geometry import Geometry
from ..format.header import Qcow1Header, Qcow2Header
from ..format.header_fields import AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA_FILE, INCOMPATIBLE_EXTENDED_L2
from ..storage.base import Storage
from ..tables.paged_table import PagedTable
from .layers.data_file import DataClusters, DataFileMapping, check_length, has_raw_data_file
from .layers.mapping import Layer, Mapping, RawLayer
from .layers.table_cache import TableCache
from .options import L2CacheSize, OpenOptions
from .qcow_image import QcowImage
from .reading.decoding import CompressedSource
from .writing.changes import WritableParts
from .writing.feature_bits import FeatureBits
from .writing.host_clusters import load_host_clusters
from .writing.refcount_allocation import RefcountAllocator

if TYPE_CHECKING:
    from .layers.encryption import EncryptedData
    from .writing.dirty_bitmaps import DirtyBitmaps

DEFAULT_L2_CACHE_BYTES = 32 << 20


class OpenedLayer:
    """A file of a chain, with what its header says. ``header`` None: a raw file; ``status`` None: no real file.

    ``data`` (the external data file) and ``encrypted`` are set when they are open.
    """

    __slots__ = ("data", "encrypted", "header", "l1_table", "path", "status", "storage")

    def __init__(
        self,
        path: str,
        storage: Storage,
        header: Qcow1Header | Qcow2Header | None,
        l1_table: Table | PagedTable,
        *,
        status: os.stat_result | None = None,
    ) -> None:
        self.path = path
        self.storage = storage
        self.header = header
        self.l1_table = l1_table
        self.data: Storage | None = None
        self.encrypted: EncryptedData | None = None
        self.status = status

    def with_table(self, header: Qcow1Header | Qcow2Header, l1_table: Table | PagedTable) -> OpenedLayer:
        """The same file, with another L1 table, which ``header`` describes."""
        layer = OpenedLayer(self.path, self.storage, header, l1_table, status=self.status)
        layer.data, layer.encrypted = self.data, self.encrypted
        return layer


async def assemble(opened: Sequence[OpenedLayer], options: OpenOptions) -> QcowImage:
    """The disk of a chain. Raises ImageUsageError, FormatError, OSError."""
    top = opened[0]
    path, header = top.path, top.header
    assert header is not None
    cache = TableCache(0)
    layers: list[Layer] = []
    sources: list[CompressedSource | None] = []
    for number, layer in enumerate(opened):
        if layer.header is None:
            layers.append(RawLayer(layer.storage))
            sources.append(None)
            continue
        mapping = _mapping_of(number, layer, cache)
        is_written = number == 0 and not options.read_only
        if not is_written:
            mask = mapping.entry_format.l1_offset_mask
            warn_of_lost_end(layer.path, layer.storage, layer.header, layer.l1_table, mask)
        if layer.data is not None and isinstance(layer.header, Qcow2Header):
            await check_length(layer.path, layer.header, mapping, writable=is_written)
        layers.append(mapping)
        compression = layer.header.compression_type if isinstance(layer.header, Qcow2Header) else 0
        sources.append(CompressedSource(layer.storage, mapping.entry_format, compression))
    top_mapping = layers[0]
    assert isinstance(top_mapping, Mapping)
    below = [layer.geometry for layer in layers[1:] if isinstance(layer, Mapping)]
    cache.budget = _cache_budget(top_mapping.geometry, below, options.l2_cache_size)
    return QcowImage(
        path=path,
        format_name="qcow" if isinstance(header, Qcow1Header) else "qcow2",
        layers=layers,
        sources=sources,
        cache=cache,
        storages=[storage for layer in opened for storage in (layer.storage, layer.data) if storage is not None],
        parts=None if options.read_only else await _writable_parts(path, top, top_mapping, below, options),
    )


async def _writable_parts(
    path: str, top: OpenedLayer, mapping: Mapping, below: Sequence[Geometry], options: OpenOptions
) -> WritableParts:
    header = top.header
    assert header is not None
    assert not isinstance(top.l1_table, PagedTable)
    allocator, metadata, unguarded = await load_host_clusters(
        path, top.storage, header, entry_format=mapping.entry_format, l1_table=top.l1_table
    )
    bitmaps: DirtyBitmaps | None = None
    if isinstance(allocator, RefcountAllocator) and isinstance(header, Qcow2Header) and _may_have_bitmaps(header):
        from .writing.dirty_bitmaps import load_kept_bitmaps

        bitmaps = await load_kept_bitmaps(
            top.storage, header, size=mapping.size, allocator=allocator, metadata=metadata
        )
    data_clusters: DataClusters | None = None
    if top.data is not None:
        cluster_size = 1 << header.cluster_bits
        data_clusters = DataClusters(top.data, cluster_size=cluster_size, is_raw=has_raw_data_file(header))
    return WritableParts(
        allocator=allocator,
        metadata=metadata,
        l1_table_offset=header.l1_table_offset,
        feature_bits=_feature_bits_of(top, header, kept_autoclear=0 if bitmaps is None else AUTOCLEAR_BITMAPS),
        bitmaps=bitmaps,
        unguarded=unguarded,
        data_clusters=data_clusters,
        discard=options.discard,
        detect_zeroes=options.detect_zeroes,
        cache_budget=lambda geometry: _cache_budget(geometry, below, options.l2_cache_size),
        grow_refusal=_grow_refusal(header),
    )


def _may_have_bitmaps(header: Qcow2Header) -> bool:
    return find_extension(header.extensions, EXTENSION_BITMAPS) is not None


def _grow_refusal(header: Qcow1Header | Qcow2Header) -> str | None:
    """Why this image cannot grow."""
    if isinstance(header, Qcow2Header) and header.version == 2 and header.n_snapshots:
        # A snapshot has no size of its own in version 2; going back to one would find another disk.
        return "an image of version 2 that has internal snapshots cannot be resized"
    return None


def _mapping_of(number: int, layer: OpenedLayer, cache: TableCache) -> Mapping:
    header = layer.header
    assert header is not None
    if isinstance(header, Qcow1Header):
        entries = entry_format(1, header.cluster_bits)
    else:
        is_extended = bool(header.incompatible_features & INCOMPATIBLE_EXTENDED_L2)
        entries = entry_format(
            header.version, header.cluster_bits, is_extended=is_extended, has_data_file=layer.data is not None
        )
    kind = Mapping if layer.data is None else DataFileMapping
    return kind(
        layer=number,
        geometry=geometry_of(header),
        entry_format=entries,
        l1_table=layer.l1_table,
        storage=layer.storage,
        cache=cache,
        data=layer.data,
        encrypted=layer.encrypted,
    )


def geometry_of(header: Qcow1Header | Qcow2Header) -> Geometry:
    size = header.virtual_size
    if isinstance(header, Qcow1Header):
        return Geometry(cluster_bits=header.cluster_bits, l2_bits=header.l2_bits, size=size)
    words = 2 if header.incompatible_features & INCOMPATIBLE_EXTENDED_L2 else 1
    return Geometry(
        cluster_bits=header.cluster_bits, l2_bits=header.cluster_bits - words - 2, size=size, words_per_entry=words
    )


def _feature_bits_of(
    layer: OpenedLayer, header: Qcow1Header | Qcow2Header, *, kept_autoclear: int
) -> FeatureBits | None:
    if isinstance(header, Qcow1Header) or header.version < 3:
        return None
    return FeatureBits(
        layer.storage,
        incompatible=header.incompatible_features,
        autoclear=header.autoclear_features,
        kept_autoclear=kept_autoclear | (AUTOCLEAR_RAW_DATA_FILE if has_raw_data_file(header) else 0),
    )


def _cache_budget(geometry: Geometry, below: Sequence[Geometry], wanted: L2CacheSize | None) -> int:
    """Bytes of L2 entries to keep, for the image and the layers below it."""
    if wanted is None:
        whole_disk = sum(layer.n_l1_entries * layer.l2_table_size for layer in (geometry, *below))
        return max(min(whole_disk, DEFAULT_L2_CACHE_BYTES), 4 * geometry.slice_size)
    if wanted.n_tables is not None:
        return wanted.n_tables * geometry.l2_table_size
    return wanted.n_bytes or 0
