"""Reads inside of one cluster of every layer, down a backing chain, without an object for each layer.

Most reads of a guest are small. What :func:`~qcowfuse.driver.layers.mapping.lookup_chain` finds out for any range in
any image is found here for the plain case: a few dictionary and array look-ups a layer. For a read of 4 KiB over one
backing file that is 2.6 us of processor time instead of 6.7 us (Python 3.11, images on tmpfs).

1. The answer is the same, or None: then the caller looks properly. None is the answer to everything that is not
   plain: compressed, encrypted and zero clusters, extended entries, data files, a table that is not in memory, a
   range that crosses a cluster or the end of a layer, a large read.
2. Nothing here waits or changes anything but the order and the counters of the L2 cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...buffer import Buffer
from ...format.geometry import MAX_CLUSTER_BITS
from ..image import LARGE_READ
from ..layers.mapping import Layer, Mapping, RawLayer
from ..layers.table_cache import LAYER_BITS, L2Slice, TableCache
from ..pending import PendingRead, PendingSource, RequestGuard

_ZEROES = memoryview(bytes(1 << MAX_CLUSTER_BITS))


class _Step(NamedTuple):
    """A layer. ``mapping`` has what changes when a disk grows; the rest is looked up once."""

    mapping: Mapping
    number: int
    slice_shift: int
    slice_mask: int
    cluster_bits: int
    cluster_size: int
    not_plain: int
    offset_mask: int
    l1_shift: int
    l1_mask: int


class QuickReader:
    """See the module docstring. Reaches down to the first layer that is not of the plain kind."""

    def __init__(self, layers: Sequence[Layer], cache: TableCache, guard: RequestGuard) -> None:
        self._cache = cache
        self._guard = guard
        self._steps: list[_Step] = []
        self._raw: RawLayer | None = None
        self._is_whole = False
        for number, layer in enumerate(layers):
            if isinstance(layer, RawLayer):
                self._raw = layer
                return
            if (
                not isinstance(layer, Mapping)
                or layer.entry_format.is_extended
                or layer.encrypted is not None
                or layer.data is not layer.storage
            ):
                return
            self._steps.append(
                _Step(
                    layer,
                    number,
                    layer.slice_shift,
                    layer.slice_mask,
                    layer.geometry.cluster_bits,
                    layer.geometry.cluster_size,
                    layer.entry_format.not_plain,
                    layer.entry_format.offset_mask,
                    layer.geometry.l1_shift,
                    layer.entry_format.l1_offset_mask,
                )
            )
        self._is_whole = True

    def start(self, guest_offset: int, n_bytes: int) -> Buffer | PendingRead | None:
        """The bytes, or None (rule 1). Raises OSError."""
        cache = self._cache
        slices = cache.slices
        end = guest_offset + n_bytes
        if n_bytes >= LARGE_READ:
            return None
        met: list[L2Slice] = []
        storage = None
        for step in self._steps:
            mapping, number, slice_shift, slice_mask, cluster_bits, cluster_size, not_plain, offset_mask, *_ = step
            in_cluster = guest_offset & cluster_size - 1
            if end > mapping.size or in_cluster + n_bytes > cluster_size:
                return None
            slice_ = slices.get(guest_offset >> slice_shift << LAYER_BITS | number)
            if slice_ is None:
                # Nothing at all may be asked for at the very end, where there is no entry.
                if not n_bytes or mapping.l1_table[guest_offset >> step.l1_shift] & step.l1_mask:
                    return None
                continue
            met.append(slice_)
            entry = slice_.entries[guest_offset >> cluster_bits & slice_mask]
            if entry & not_plain:
                return None
            host_offset = entry & offset_mask
            if host_offset:
                storage, host_offset = mapping.data, host_offset + in_cluster
                break
        else:
            if self._raw is not None:
                if end > self._raw.size:
                    return None
                storage, host_offset = self._raw.data, guest_offset
            elif not self._is_whole:
                return None
        cache.hits += len(met)
        for slice_ in met:
            cache.touch(slice_)
        if storage is None:
            return _ZEROES[:n_bytes]
        data = storage.try_pread(host_offset, n_bytes)
        return PendingSource(self._guard, storage, host_offset, n_bytes) if data is None else data
