"""Reads that meet compressed clusters: one door for a range in one cluster, one for any other.

1. What is decoded already is handed out as it lies in its buffer, without a copy.
2. Each read is noted once, and reads that go on where others ended have the next clusters decoded ahead. Reads of
   plain data know nothing of it.
3. A read that follows no other has its cluster decoded only as far as it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ...buffer import Buffer
from ...errors import CorruptImageError
from ...format.entries import ClusterKind
from ...format.extents import Extent
from ..layers.mapping import Layer, Mapping, Missing, lookup_chain
from ..layers.table_cache import L2Slice, TableCache
from ..pending import PendingRead, RequestGuard
from .decoded_cache import Decoded, Key
from .decoding import ClusterRequest, CompressedSource
from .decompression import DecodedClusters
from .demand import Demands
from .fetching import Fetcher
from .read_ahead import ReadAhead, SequentialReads


class CompressedReads:
    """Reads from ``layers`` (the top one first). ``sources`` has None for layers without compressed clusters."""

    def __init__(
        self,
        layers: Sequence[Layer],
        sources: Sequence[CompressedSource | None],
        cache: TableCache,
        fetcher: Fetcher,
        guard: RequestGuard,
    ) -> None:
        self.sources = tuple(sources)
        self.decoded = DecodedClusters()
        self.ahead = ReadAhead(self.decoded)
        self._demands = Demands(self.decoded)
        self._sequential = SequentialReads()
        self._layers = tuple(layers)
        self._cache = cache
        self._fetcher = fetcher
        self._guard = guard
        # Where one word tells all of a cluster, compressed clusters ahead are found without look-ups.
        top = layers[0]
        self._top = top if isinstance(top, Mapping) and not top.entry_format.is_extended else None

    def start_in(
        self, slice_: L2Slice, index: int, guest_offset: int, n_bytes: int, is_alone: Callable[[], bool]
    ) -> Buffer | PendingRead | None:
        """The bytes of a range of the top layer that begins in the compressed cluster at ``index`` of a slice; None
        where it goes on in clusters that are not all decoded. Raises FormatError, OSError."""
        source = self.sources[0]
        assert source is not None
        cluster_size = source.cluster_size
        in_cluster = guest_offset & cluster_size - 1
        end = in_cluster + n_bytes
        cache = self._cache
        if end <= cluster_size:
            cache.hits += 1
            if slice_ is not cache.newest:
                cache.touch(slice_)
            return self._start_single(0, slice_.entries[index], source, guest_offset, n_bytes, is_alone)
        n_clusters = -(-end // cluster_size)
        if index + n_clusters > len(slice_.entries):
            return None
        parts = self.decoded.get_all(0, slice_.entries[index : index + n_clusters], cluster_size)
        if parts is None:
            return None
        cache.hits += 1
        if slice_ is not cache.newest:
            cache.touch(slice_)
        self._look_ahead(guest_offset, n_bytes)
        views = [memoryview(buffer)[first:last] for buffer, first, last in parts]
        views[0] = views[0][in_cluster:]
        views[-1] = views[-1][: len(views[-1]) - (n_clusters * cluster_size - end)]
        return views[0] if len(views) == 1 else b"".join(views)

    def start(
        self, extents: Sequence[Extent], guest_offset: int, n_bytes: int, is_alone: Callable[[], bool]
    ) -> Buffer | PendingRead:
        """The bytes of extents of which some are compressed. Raises FormatError, OSError."""
        if len(extents) == 1:
            extent = extents[0]
            source = self._source_of(extent)
            return self._start_single(extent.layer, extent.value, source, guest_offset, n_bytes, is_alone)
        self._look_ahead(guest_offset, n_bytes)
        data = self._try_join(extents)
        if data is None:
            return PendingRead(self._guard, partial(self._load_all, extents, guest_offset, n_bytes))
        return data

    async def aclose(self) -> None:
        """End what goes on in the background; before the storages are closed. Idempotent."""
        await self.ahead.aclose()
        self.decoded.close()

    def _start_single(
        self,
        layer: int,
        entry: int,
        source: CompressedSource,
        guest_offset: int,
        n_bytes: int,
        is_alone: Callable[[], bool],
    ) -> Buffer | PendingRead:
        cluster_size = source.cluster_size
        in_cluster = guest_offset & cluster_size - 1
        end = in_cluster + n_bytes
        cluster = self.decoded.get(layer, entry, end)
        if cluster is None:
            # Reads that follow may go on with the cluster; also where this one begins with it.
            is_more_wanted = not in_cluster or self._sequential.is_expected(guest_offset)
            wanted = ClusterRequest(layer, entry, source, cluster_size if is_more_wanted else end)
            self._look_ahead(guest_offset, n_bytes)
            cluster = self.decoded.try_decode(wanted, is_alone)
            if cluster is None:
                return PendingRead(self._guard, partial(self._load_single, wanted, in_cluster, end))
        else:
            self._look_ahead(guest_offset, n_bytes)
        return memoryview(cluster.buffer)[cluster.start + in_cluster : cluster.start + end]

    async def _load_single(self, wanted: ClusterRequest, start: int, end: int) -> Buffer:
        cluster = await self._demands.load(wanted)
        return memoryview(cluster.buffer)[cluster.start + start : cluster.start + end]

    def _try_join(self, extents: Sequence[Extent]) -> Buffer | None:
        """The bytes of several extents, if all compressed ones are decoded and the others at hand."""
        pieces = _Pieces()
        find, n_found = self.decoded.cache.get, 0
        for extent in extents:
            if extent.kind == ClusterKind.COMPRESSED:
                mask = self._source_of(extent).cluster_size - 1
                cluster = find((extent.layer, extent.value), (extent.guest_offset & mask) + extent.n_bytes)
                if cluster is None:
                    return None
                n_found += 1
                pieces.add(cluster, extent, mask)
            else:
                data = bytearray(extent.n_bytes)
                if not self._fetcher.try_fetch(extent, memoryview(data)):
                    return None
                pieces.add_whole(data)
        self.decoded.hits += n_found
        return pieces.joined()

    async def _load_all(self, extents: Sequence[Extent], guest_offset: int, n_bytes: int) -> Buffer:
        clusters: dict[Key, Decoded] = await self.decoded.load(
            wanted for extent in extents for wanted in self._wanted(extent)
        )
        if all(extent.kind == ClusterKind.COMPRESSED for extent in extents):
            pieces = _Pieces()
            for extent in extents:
                pieces.add(clusters[extent.layer, extent.value], extent, self._source_of(extent).cluster_size - 1)
            return pieces.joined()
        buffer = bytearray(n_bytes)
        view = memoryview(buffer)
        waiting: list[tuple[Extent, memoryview]] = []
        for extent in extents:
            start = extent.guest_offset - guest_offset
            part = view[start : start + extent.n_bytes]
            if extent.kind == ClusterKind.COMPRESSED:
                pieces = _Pieces()
                pieces.add(clusters[extent.layer, extent.value], extent, self._source_of(extent).cluster_size - 1)
                part[:] = pieces.joined()
            elif not self._fetcher.try_fetch(extent, part):
                waiting.append((extent, part))
        await self._fetcher.fetch_all(waiting)
        return buffer

    def _look_ahead(self, guest_offset: int, n_bytes: int) -> None:
        start, end = self._sequential.note(guest_offset, n_bytes)
        end = min(end, self._layers[0].size)
        if start < end:
            self.ahead.decode(self._compressed_in(start, end))

    def _compressed_in(self, start: int, end: int) -> Iterator[ClusterRequest]:
        """The compressed clusters of a guest range, as far as the tables are in memory."""
        source = self.sources[0]
        found = None if self._top is None else self._top.locate(start, end - start)
        if found is not None and source is not None:
            slice_, index = found
            entries = slice_.entries[
                index : index + -(-(end - (start & -source.cluster_size)) // source.cluster_size)
            ]
            compressed = source.entry_format.compressed
            if all(entry & compressed for entry in entries):
                for entry in entries:
                    yield ClusterRequest(0, entry, source, source.cluster_size)
                return
        try:
            extents = lookup_chain(self._layers, start, end - start)
        except (Missing, CorruptImageError):
            return
        for extent in extents:
            yield from self._wanted(extent)

    def _wanted(self, extent: Extent) -> Iterator[ClusterRequest]:
        if extent.kind == ClusterKind.COMPRESSED:
            source = self._source_of(extent)
            yield ClusterRequest(extent.layer, extent.value, source, source.cluster_size)

    def _source_of(self, extent: Extent) -> CompressedSource:
        source = self.sources[extent.layer]
        assert source is not None
        return source


class _Pieces:
    """The bytes of a reply; what lies back to back in one buffer is handed out as it is."""

    __slots__ = ("_buffer", "_end", "_parts", "_start")

    def __init__(self) -> None:
        self._parts: list[Buffer] = []
        self._buffer: Buffer = b""
        self._start = self._end = 0

    def add(self, cluster: Decoded, extent: Extent, cluster_mask: int) -> None:
        """The part of a decoded cluster that an extent names."""
        start = cluster.start + (extent.guest_offset & cluster_mask)
        if cluster.buffer is not self._buffer or start != self._end:
            self._finish()
            self._buffer, self._start = cluster.buffer, start
        self._end = start + extent.n_bytes

    def add_whole(self, data: Buffer) -> None:
        """Bytes from elsewhere."""
        self._finish()
        self._parts.append(data)

    def joined(self) -> Buffer:
        """All of them."""
        self._finish()
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)

    def _finish(self) -> None:
        if self._end > self._start:
            self._parts.append(memoryview(self._buffer)[self._start : self._end])
        self._buffer, self._start, self._end = b"", 0, 0
