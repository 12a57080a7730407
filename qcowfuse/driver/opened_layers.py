"""From the files of a chain, each open and unlocked, to its layers: where the bytes of the disk lie.

1. Here is no more than reading the tables takes; what the disk is made of comes with :mod:`.assembly`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..consistency.lost_end import warn_of_lost_end
from ..format.entries import Table, entry_format
from ..format.geometry import Geometry
from ..format.header import Qcow1Header, Qcow2Header
from ..format.header_fields import INCOMPATIBLE_EXTENDED_L2
from ..storage.base import Storage
from ..tables.paged_table import PagedTable
from .layers.data_file import DataFileMapping, check_length
from .layers.mapping import Layer, Mapping, RawLayer
from .layers.table_cache import TableCache
from .options import L2CacheSize, OpenOptions

if TYPE_CHECKING:
    from .layers.encryption import EncryptedData

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


async def layers_of(opened: Sequence[OpenedLayer], options: OpenOptions) -> tuple[list[Layer], TableCache]:
    """The layers, and the cache of their L2 slices. Raises ImageUsageError, FormatError, OSError."""
    cache = TableCache(0)
    layers: list[Layer] = []
    for number, layer in enumerate(opened):
        if layer.header is None:
            layers.append(RawLayer(layer.storage))
            continue
        mapping = _mapping_of(number, layer, cache)
        is_written = number == 0 and not options.read_only
        if not is_written:
            mask = mapping.entry_format.l1_offset_mask
            warn_of_lost_end(layer.path, layer.storage, layer.header, layer.l1_table, mask)
        if layer.data is not None and isinstance(layer.header, Qcow2Header):
            await check_length(layer.path, layer.header, mapping, writable=is_written)
        layers.append(mapping)
    top = layers[0]
    assert isinstance(top, Mapping)
    cache.budget = cache_budget(top.geometry, geometries_below(layers), options.l2_cache_size)
    return layers, cache


def geometries_below(layers: Sequence[Layer]) -> list[Geometry]:
    """Of the layers with tables below the first one."""
    return [layer.geometry for layer in layers[1:] if isinstance(layer, Mapping)]


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
    """Sizes and shifts of the image with this header. Raises FormatError."""
    size = header.virtual_size
    if isinstance(header, Qcow1Header):
        return Geometry(cluster_bits=header.cluster_bits, l2_bits=header.l2_bits, size=size)
    words = 2 if header.incompatible_features & INCOMPATIBLE_EXTENDED_L2 else 1
    return Geometry(
        cluster_bits=header.cluster_bits, l2_bits=header.cluster_bits - words - 2, size=size, words_per_entry=words
    )


def cache_budget(geometry: Geometry, below: Sequence[Geometry], wanted: L2CacheSize | None) -> int:
    """Bytes of L2 entries to keep, for the image and the layers below it."""
    if wanted is None:
        whole_disk = sum(layer.n_l1_entries * layer.l2_table_size for layer in (geometry, *below))
        return max(min(whole_disk, DEFAULT_L2_CACHE_BYTES), 4 * geometry.slice_size)
    if wanted.n_tables is not None:
        return wanted.n_tables * geometry.l2_table_size
    return wanted.n_bytes or 0
