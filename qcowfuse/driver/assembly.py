"""From the layers of a chain, each open and unlocked, to the disk: what is written goes into the first of them.

1. What only some images need is imported here, when the header says that this one does, as in :mod:`.chain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..format.extensions import EXTENSION_BITMAPS, find_extension
from ..format.geometry import Geometry
from ..format.header import Qcow1Header, Qcow2Header
from ..format.header_fields import AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA_FILE
from ..tables.paged_table import PagedTable
from .layers.data_file import DataClusters, has_raw_data_file
from .layers.mapping import Mapping
from .opened_layers import OpenedLayer, cache_budget, geometries_below, layers_of
from .options import OpenOptions
from .qcow_image import QcowImage
from .reading.decoding import CompressedSource
from .writing.changes import WritableParts
from .writing.feature_bits import FeatureBits
from .writing.host_clusters import load_host_clusters
from .writing.refcount_allocation import RefcountAllocator

if TYPE_CHECKING:
    from .writing.dirty_bitmaps import DirtyBitmaps


async def assemble(opened: Sequence[OpenedLayer], options: OpenOptions) -> QcowImage:
    """The disk of a chain. Raises ImageUsageError, FormatError, OSError."""
    top = opened[0]
    path, header = top.path, top.header
    assert header is not None
    layers, cache = await layers_of(opened, options)
    sources: list[CompressedSource | None] = []
    for layer, mapping in zip(opened, layers, strict=True):
        if layer.header is None or not isinstance(mapping, Mapping):
            sources.append(None)
            continue
        compression = layer.header.compression_type if isinstance(layer.header, Qcow2Header) else 0
        sources.append(CompressedSource(layer.storage, mapping.entry_format, compression))
    top_mapping = layers[0]
    assert isinstance(top_mapping, Mapping)
    below = geometries_below(layers)
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
        cache_budget=lambda geometry: cache_budget(geometry, below, options.l2_cache_size),
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
