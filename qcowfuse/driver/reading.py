"""Reading a guest range through a backing chain: look up, then fetch every extent.

1. ``try_read`` never waits: everything it needs is in memory and in the page cache, or it answers None.
2. One extent is handed through without a copy. Several are read into their slices of one ``bytearray``; those
   that can't be answered at once are fetched together.
3. What the chain does not hold is zeroes, and a fresh ``bytearray`` is zeroes already.
4. Reads that meet compressed clusters are noted, and those that go on where others ended have the next clusters
   decoded ahead. Reads of plain data know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import trio

from ..errors import CorruptImageError, QcowFuseError
from ..format.entries import ClusterKind
from ..format.extents import Extent
from ..storage.base import Buffer
from .decoded import CompressedSource, DecodedClusters, SequentialReads, Wanted
from .mapping import Layer, Missing, lookup_chain
from .table_cache import TableCache


class ChainReader:
    """Reads from ``layers`` (the top one first). ``sources`` has None for layers without compressed clusters."""

    def __init__(
        self, layers: Sequence[Layer], sources: Sequence[CompressedSource | None], cache: TableCache
    ) -> None:
        self.layers = tuple(layers)
        self.decoded = DecodedClusters()
        self._sequential = SequentialReads()
        self._sources = tuple(sources)
        self._cache = cache
        self._data = tuple(layer.data for layer in layers)
        self._encrypted = tuple(layer.encrypted for layer in layers)

    async def lookup(self, guest_offset: int, n_bytes: int, *, first_layer: int = 0) -> list[Extent]:
        """The extents of a range, loading what is missing. Raises OSError, CorruptImageError."""
        with ExitStack() as pins:
            while True:
                try:
                    return lookup_chain(self.layers, guest_offset, n_bytes, first_layer=first_layer)
                except Missing as missing:
                    pins.callback(self._cache.unpin, await missing.layer.load(missing.guest_offset))
                    self._cache.hits -= 1  # the look-up that follows belongs to the miss

    def try_read(self, guest_offset: int, n_bytes: int) -> Buffer | None:
        """The bytes if they can be had at once. Raises CorruptImageError, OSError."""
        try:
            extents = lookup_chain(self.layers, guest_offset, n_bytes)
        except Missing:
            return None
        if len(extents) == 1 and extents[0].kind == ClusterKind.DATA:
            extent = extents[0]
            return self._data[extent.layer].try_pread(extent.value, n_bytes)
        if len(extents) == 1 and extents[0].kind == ClusterKind.COMPRESSED:
            extent = extents[0]
            cluster = self.decoded.get(extent.layer, extent.value)
            if cluster is None:
                return None
            self._look_ahead(guest_offset, n_bytes)
            in_cluster = guest_offset & (len(cluster) - 1)
            return memoryview(cluster)[in_cluster : in_cluster + n_bytes]
        buffer = bytearray(n_bytes)
        view = memoryview(buffer)
        has_compressed = False
        for extent in extents:
            start = extent.guest_offset - guest_offset
            if not self._try_fetch(extent, view[start : start + extent.n_bytes]):
                return None
            has_compressed = has_compressed or extent.kind == ClusterKind.COMPRESSED
        if has_compressed:
            self._look_ahead(guest_offset, n_bytes)
        return buffer

    async def read(self, guest_offset: int, n_bytes: int) -> Buffer:
        """The bytes. Raises OSError, FormatError, CorruptImageError."""
        extents = await self.lookup(guest_offset, n_bytes)
        if len(extents) == 1 and extents[0].kind == ClusterKind.DATA:
            extent = extents[0]
            storage = self._data[extent.layer]
            data = storage.try_pread(extent.value, n_bytes)
            return await storage.pread(extent.value, n_bytes) if data is None else data
        buffer = bytearray(n_bytes)
        view = memoryview(buffer)
        waiting: list[tuple[Extent, memoryview]] = []
        if any(extent.kind == ClusterKind.COMPRESSED for extent in extents):
            self._look_ahead(guest_offset, n_bytes)
        for extent in extents:
            start = extent.guest_offset - guest_offset
            part = view[start : start + extent.n_bytes]
            if not self._try_fetch(extent, part):
                waiting.append((extent, part))
        if len(waiting) == 1:
            await self._fetch(*waiting[0], alone=True)
        elif waiting:
            errors: list[Exception] = []
            async with trio.open_nursery() as nursery:
                for extent, part in waiting:
                    nursery.start_soon(self._fetch_noting, extent, part, errors)
            if errors:
                raise errors[0]
        return buffer

    async def aclose(self) -> None:
        """End what goes on in the background; before the storages are closed. Idempotent."""
        await self.decoded.aclose()

    def _look_ahead(self, guest_offset: int, n_bytes: int) -> None:
        start, end = self._sequential.note(guest_offset, n_bytes)
        end = min(end, self.layers[0].size)
        if start < end:
            self.decoded.decode_ahead(self._compressed_in(start, end))

    def _compressed_in(self, start: int, end: int) -> Iterator[Wanted]:
        """The compressed clusters of a guest range, as far as the tables are in memory."""
        try:
            extents = lookup_chain(self.layers, start, end - start)
        except (Missing, CorruptImageError):
            return
        for extent in extents:
            source = self._sources[extent.layer] if extent.kind == ClusterKind.COMPRESSED else None
            if source is not None:
                yield Wanted(extent.layer, extent.value, source)

    def _try_fetch(self, extent: Extent, part: memoryview) -> bool:
        if extent.kind == ClusterKind.DATA:
            return self._data[extent.layer].try_pread_into(extent.value, part)
        if extent.kind == ClusterKind.COMPRESSED:
            cluster = self.decoded.get(extent.layer, extent.value)
            if cluster is None:
                return False
            _copy_part(cluster, extent, part)
        elif extent.kind == ClusterKind.ENCRYPTED:
            encrypted = self._encrypted[extent.layer]
            assert encrypted is not None
            return encrypted.try_read_into(extent.value, extent.guest_offset, part)
        return True

    async def _fetch(self, extent: Extent, part: memoryview, *, alone: bool = False) -> None:
        if extent.kind == ClusterKind.DATA:
            await self._data[extent.layer].pread_into(extent.value, part)
            return
        if extent.kind == ClusterKind.ENCRYPTED:
            encrypted = self._encrypted[extent.layer]
            assert encrypted is not None
            await encrypted.read_into(extent.value, extent.guest_offset, part)
            return
        source = self._sources[extent.layer]
        assert source is not None
        cluster = await self.decoded.load(extent.layer, extent.value, source, alone=alone)
        _copy_part(cluster, extent, part)

    async def _fetch_noting(self, extent: Extent, part: memoryview, errors: list[Exception]) -> None:
        try:
            await self._fetch(extent, part)
        except (OSError, QcowFuseError) as error:
            errors.append(error)


def _copy_part(cluster: bytes, extent: Extent, part: memoryview) -> None:
    in_cluster = extent.guest_offset & (len(cluster) - 1)
    part[:] = memoryview(cluster)[in_cluster : in_cluster + extent.n_bytes]
