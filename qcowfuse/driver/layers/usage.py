"""How many bytes of the virtual disk hold data: what ``du`` should say of the served file.

1. Data is what some layer of the chain has as a data or a compressed cluster; zero clusters and what no layer has are
   holes. Of a raw layer the share counts of which the host has blocks.
2. Counting reads every L2 table once, slice by slice and past the cache, so it may take a while on a large
   image; until it is done the answer is the size of the image file on the host.
3. Links made meanwhile are added when they lie in the part that is counted already.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from ...format.entries import ClusterKind
from ...format.extents import count_data
from ...format.presence import presence_run
from ...storage.base import Storage
from .holes import slice_entries
from .mapping import Layer, Mapping, RawLayer
from .range_claims import InFlightEpochs

_RUNS_AT_ONCE = 256


class Usage:
    """Allocated guest bytes of a chain, the top layer first."""

    def __init__(self, layers: Sequence[Layer], storage: Storage) -> None:
        self._layers = tuple(layers)
        self._storage = storage
        self._counted = 0
        self._counted_to = 0
        self._counting_to = 0
        self._changed = False
        self._is_counting = False

    @property
    def is_exact(self) -> bool:
        """Whether the counting is done."""
        return self._counted_to >= self._layers[0].size

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the virtual disk that hold data; an estimate until :meth:`count` has ended."""
        if self.is_exact:
            return self._counted
        return min(self._storage.allocated_bytes(), self._layers[0].size)

    def add(self, guest_offset: int, n_bytes: int) -> None:
        """A hole of ``n_bytes`` at ``guest_offset`` has been filled (negative: made)."""
        if guest_offset < self._counted_to:
            self._counted += n_bytes
        elif guest_offset < self._counting_to:
            self._changed = True

    async def count(self, epochs: InFlightEpochs) -> None:
        """Count everything that is not counted yet (after the disk has grown: the new part); nothing while another
        call does. Each look at tables on disk is an operation in flight. Raises OSError, FormatError."""
        if self._is_counting:
            return
        self._is_counting = True
        try:
            await self._count(epochs)
        finally:
            self._is_counting = False

    async def _count(self, epochs: InFlightEpochs) -> None:
        top = self._layers[0]
        assert isinstance(top, Mapping)
        while self._counted_to < top.size:
            start = self._counted_to
            end = min((start >> top.slice_shift) + 1 << top.slice_shift, top.size)
            await top.load_l1(start)
            self._counting_to = end = max(end, top.empty_until(start, top.size))
            self._changed = False
            epoch = epochs.enter()
            try:
                n_bytes = await self._count_range(0, start, end)
            finally:
                epochs.leave(epoch)
            if not self._changed:
                self._counted += n_bytes
                self._counted_to = end

    async def _count_range(self, number: int, start: int, end: int) -> int:
        """Data bytes of ``start`` to ``end`` as seen from layer ``number`` downwards."""
        if number == len(self._layers):
            return 0
        layer = self._layers[number]
        end = min(end, layer.size)
        if start >= end:
            return 0
        if isinstance(layer, RawLayer):
            share = min(layer.storage.allocated_bytes() / max(layer.size, 1), 1.0)
            return int((end - start) * share) // 512 * 512
        assert isinstance(layer, Mapping)
        total = 0
        holes: list[tuple[int, int]] = []
        position = start
        while position < end:
            await trio.lowlevel.checkpoint()
            await layer.load_l1(position)
            empty_until = layer.empty_until(position, end)
            if empty_until > position:
                holes.append((position, empty_until))
                position = empty_until
                continue
            slice_end = min((position >> layer.slice_shift) + 1 << layer.slice_shift, end)
            entries = await slice_entries(layer, position)
            n_entries = slice_end - position >> layer.geometry.cluster_bits
            if n_entries == 1 << layer.slice_bits:
                n_data = count_data(entries, layer.entry_format, needs_holes=number + 1 < len(self._layers))
                if n_data is not None:
                    total += n_data << layer.geometry.cluster_bits
                    position = slice_end
                    continue
            n_runs = 0
            while position < slice_end:
                n_runs += 1
                if n_runs % _RUNS_AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
                in_cluster = position & (layer.geometry.cluster_size - 1)
                kind, n_bytes, _ = presence_run(
                    entries, layer.entry_format, layer.index(position), in_cluster, slice_end - position
                )
                if kind is ClusterKind.UNALLOCATED:
                    holes.append((position, position + n_bytes))
                elif kind is ClusterKind.DATA:
                    total += n_bytes
                position += n_bytes
        if number + 1 < len(self._layers):
            for hole_start, hole_end in holes:
                total += await self._count_range(number + 1, hole_start, hole_end)
        return total
