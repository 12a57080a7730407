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
from .decoded import CompressedSource, DecodedClusters, Key, SequentialReads, Wanted
from .mapping import Layer, Missing, lookup_chain
from .quick_read import QuickReader
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
        self._try_read_quickly = QuickReader(layers, cache).try_read

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
        data = self._try_read_quickly(guest_offset, n_bytes)
        if data is not None:
            return data
        try:
            extents = lookup_chain(self.layers, guest_offset, n_bytes)
        except Missing:
            return None
        if len(extents) == 1 and extents[0].kind == ClusterKind.DATA:
            extent = extents[0]
            return self._data[extent.layer].try_pread(extent.value, n_bytes)
        if any(extent.kind == ClusterKind.COMPRESSED for extent in extents):
            return self._try_compressed(extents, guest_offset, n_bytes)
        buffer = bytearray(n_bytes)
        view = memoryview(buffer)
        for extent in extents:
            start = extent.guest_offset - guest_offset
            if not self._try_fetch(extent, view[start : start + extent.n_bytes]):
                return None
        return buffer

    async def read(self, guest_offset: int, n_bytes: int, *, alone: bool = False) -> Buffer:
        """The bytes. ``alone``: nobody else waits for an answer now. Raises OSError, FormatError,
        CorruptImageError."""
        extents = await self.lookup(guest_offset, n_bytes)
        if len(extents) == 1 and extents[0].kind == ClusterKind.DATA:
            extent = extents[0]
            storage = self._data[extent.layer]
            data = storage.try_pread(extent.value, n_bytes)
            return await storage.pread(extent.value, n_bytes) if data is None else data
        clusters: dict[Key, bytes] = {}
        if any(extent.kind == ClusterKind.COMPRESSED for extent in extents):
            clusters = await self._load_compressed(extents, guest_offset, n_bytes, alone=alone)
            if len(extents) == 1:
                return _part(clusters[extents[0].layer, extents[0].value], extents[0], self._cluster_mask(extents[0]))
        buffer = bytearray(n_bytes)
        view = memoryview(buffer)
        waiting: list[tuple[Extent, memoryview]] = []
        for extent in extents:
            start = extent.guest_offset - guest_offset
            part = view[start : start + extent.n_bytes]
            if extent.kind == ClusterKind.COMPRESSED:
                part[:] = _part(clusters[extent.layer, extent.value], extent, self._cluster_mask(extent))
            elif not self._try_fetch(extent, part):
                waiting.append((extent, part))
        if len(waiting) == 1:
            await self._fetch(*waiting[0])
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

    def _try_compressed(self, extents: Sequence[Extent], guest_offset: int, n_bytes: int) -> Buffer | None:
        """The bytes of extents of which some are compressed, if all are decoded and at hand."""
        parts: list[Buffer] = []
        for extent in extents:
            if extent.kind == ClusterKind.COMPRESSED:
                mask = self._cluster_mask(extent)
                end = (extent.guest_offset & mask) + extent.n_bytes
                cluster = self.decoded.get(extent.layer, extent.value, end)
                if cluster is None:
                    return None
                parts.append(_part(cluster, extent, mask))
            else:
                data = bytearray(extent.n_bytes)
                if not self._try_fetch(extent, memoryview(data)):
                    return None
                parts.append(data)
        self._look_ahead(guest_offset, n_bytes)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _load_compressed(
        self, extents: Sequence[Extent], guest_offset: int, n_bytes: int, *, alone: bool
    ) -> dict[Key, bytes]:
        """The decoded clusters of all compressed extents."""
        self._look_ahead(guest_offset, n_bytes)
        if len(extents) > 1:
            return await self.decoded.load(wanted for extent in extents for wanted in self._wanted(extent))
        extent = extents[0]
        (wanted,) = self._wanted(extent)
        mask = wanted.source.cluster_size - 1
        in_cluster = guest_offset & mask
        if self._sequential.is_random and in_cluster:
            # The next read will be somewhere else. (One that begins with a cluster may go on with it.)
            wanted = wanted._replace(n_bytes=in_cluster + n_bytes)
        cluster = self.decoded.try_decode(wanted) if alone else None
        if cluster is not None:
            return {(extent.layer, extent.value): cluster}
        return await self.decoded.load((wanted,))

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
            yield from self._wanted(extent)

    def _wanted(self, extent: Extent) -> Iterator[Wanted]:
        if extent.kind == ClusterKind.COMPRESSED:
            source = self._sources[extent.layer]
            assert source is not None
            yield Wanted(extent.layer, extent.value, source, source.cluster_size)

    def _cluster_mask(self, extent: Extent) -> int:
        source = self._sources[extent.layer]
        assert source is not None
        return source.cluster_size - 1

    def _try_fetch(self, extent: Extent, part: memoryview) -> bool:
        """Fill ``part`` with an extent that is not compressed, if that can be done at once."""
        if extent.kind == ClusterKind.DATA:
            return self._data[extent.layer].try_pread_into(extent.value, part)
        if extent.kind == ClusterKind.ENCRYPTED:
            encrypted = self._encrypted[extent.layer]
            assert encrypted is not None
            return encrypted.try_read_into(extent.value, extent.guest_offset, part)
        return True

    async def _fetch(self, extent: Extent, part: memoryview) -> None:
        if extent.kind == ClusterKind.DATA:
            await self._data[extent.layer].pread_into(extent.value, part)
            return
        encrypted = self._encrypted[extent.layer]
        assert encrypted is not None
        await encrypted.read_into(extent.value, extent.guest_offset, part)

    async def _fetch_noting(self, extent: Extent, part: memoryview, errors: list[Exception]) -> None:
        try:
            await self._fetch(extent, part)
        except (OSError, QcowFuseError) as error:
            errors.append(error)


def _part(cluster: bytes, extent: Extent, cluster_mask: int) -> memoryview:
    in_cluster = extent.guest_offset & cluster_mask
    return memoryview(cluster)[in_cluster : in_cluster + extent.n_bytes]
