"""Where a chain holds data and where it reads as zeroes, found one slice at a time.

1. One call looks at one slice of each layer at most, or at a bounded run of L1 entries, and pins nothing. It answers
   for less than it was asked where that is all that one look tells.
2. After every few looks, counted over all calls, there is a checkpoint: a caller that asks again and again, for all
   of a large disk, keeps nobody waiting for longer than these looks take.
3. A slice that is in memory is the truth. One that is not is read past the cache, unless the caller comes back to it:
   a search through a large disk must not drive out what others need.
4. Raw layers are data throughout.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import trio

from ...format.entries import ClusterKind
from .mapping import Layer, Mapping
from .table_cache import LAYER_BITS

LOOKS_PER_CHECKPOINT = 8
"""A look takes 10 to 100 us where all of a slice is alike in an image that is read from memory, 0.8 ms at most."""


class HoleFinder:
    """Looks through ``layers``, the top one first."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._n_looks = 0

    async def find(self, guest_offset: int, n_bytes: int, *, keep: bool) -> tuple[bool, int]:
        """Whether there is data at ``guest_offset``, and for how many of ``n_bytes`` that holds, at least one.

        The caller has an operation in flight meanwhile. Raises CorruptImageError, OSError.
        """
        for layer in self._layers:
            if guest_offset >= layer.size:
                break
            n_bytes = min(n_bytes, layer.size - guest_offset)
            if not isinstance(layer, Mapping):
                return True, n_bytes
            self._n_looks += 1
            if self._n_looks % LOOKS_PER_CHECKPOINT == 0:
                await trio.lowlevel.checkpoint()
            await layer.load_l1(guest_offset)
            empty_until = layer.empty_until(guest_offset, guest_offset + n_bytes)
            if empty_until > guest_offset:
                n_bytes = empty_until - guest_offset
                continue
            entries = await slice_entries(layer, guest_offset, keep=keep)
            kind, n_bytes, _ = layer.presence(entries, guest_offset, n_bytes)
            if kind is not ClusterKind.UNALLOCATED:
                return kind is ClusterKind.DATA, n_bytes
        return False, n_bytes

    def try_find(self, guest_offset: int, n_bytes: int) -> tuple[bool, int, bool] | None:
        """:meth:`find` where all tables are in memory, else None; and whether a hole follows the data, or data the
        hole, for sure. Raises CorruptImageError."""
        is_followed = False
        for layer in self._layers:
            if guest_offset >= layer.size:
                break
            if guest_offset + n_bytes > layer.size:
                n_bytes = layer.size - guest_offset
                is_followed = False
            if not isinstance(layer, Mapping):
                return True, n_bytes, False
            slice_ = layer.cache.slices.get(guest_offset >> layer.slice_shift << LAYER_BITS | layer.layer)
            if slice_ is None:
                # Where the L1 entry is not in memory, neither is the slice.
                empty_until = layer.empty_until(guest_offset, guest_offset + n_bytes)
                if empty_until == guest_offset:
                    return None
                if empty_until < guest_offset + n_bytes:
                    n_bytes = empty_until - guest_offset
                    is_followed = False
                continue
            kind, n_alike, ends = layer.presence(slice_.entries, guest_offset, n_bytes)
            if kind is ClusterKind.DATA:
                # Behind it, too: what a layer does not have, one below may have.
                return True, n_alike, ends and layer is self._layers[-1]
            if n_alike < n_bytes:
                n_bytes, is_followed = n_alike, ends
            if kind is not ClusterKind.UNALLOCATED:
                return False, n_bytes, is_followed
        return False, n_bytes, is_followed


async def slice_entries(layer: Mapping, guest_offset: int, *, keep: bool = False) -> array[int]:
    """The entries of the slice that maps ``guest_offset``, through the cache or, without ``keep``, past it. Raises
    CorruptImageError, OSError."""
    key = layer.key(guest_offset)
    slice_ = layer.cache.slices.get(key)
    if slice_ is None and keep:
        slice_ = await layer.load(guest_offset)
        layer.cache.unpin(slice_)
    if slice_ is None:
        entries = (await layer.read_slice(guest_offset >> layer.slice_shift)).entries
        # The task that loaded the slice meanwhile may have changed it.
        slice_ = layer.cache.slices.get(key)
        if slice_ is None:
            return entries
    return slice_.entries
