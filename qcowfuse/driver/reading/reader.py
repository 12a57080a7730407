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

from ...buffer import Buffer
from ...errors import CorruptImageError, QcowFuseError
from ...format.entries import ClusterKind
from ...format.extents import Extent
from ..layers.mapping import Layer, Mapping, Missing, lookup_chain
from ..layers.table_cache import LAYER_BITS, L2Slice, TableCache
from .chain_reader import QuickReader
from .decoded_cache import Decoded, Key
from .decompression import ClusterRequest, CompressedSource, DecodedClusters, SequentialReads


class ChainReader:
    """Reads from ``layers`` (the top one first). ``sources`` has None for layers without compressed clusters."""

    def __init__(
        self, layers: Sequence[Layer], sources: Sequence[CompressedSource | None], cache: TableCache
    ) -> None:
        self.layers = tuple(layers)
        self.decoded = DecodedClusters()
        self._sequential = SequentialReads()
        self._noted: tuple[int, int, int] | None = None
        self._sources = tuple(sources)
        self._cache = cache
        self._data = tuple(layer.data for layer in layers)
        self._encrypted = tuple(layer.encrypted for layer in layers)
        self._try_read_quickly = QuickReader(layers, cache).try_read
        # Where one word tells all of a cluster, compressed clusters of the top layer are found without look-ups.
        top = layers[0]
        is_simple = isinstance(top, Mapping) and not top.entry_format.is_extended and top.encrypted is None
        self._top = top if isinstance(top, Mapping) and is_simple and top.data is top.storage else None
        self._compressed = 0 if self._sources[0] is None else self._sources[0].entry_format.compressed

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
        found = self._slice_of(guest_offset, n_bytes)
        if found is not None and found[0].entries[found[1]] & self._compressed:
            data, is_single = self._try_decoded(*found, guest_offset, n_bytes)
            if data is not None or is_single:
                return data
        n_hits = self._cache.hits
        data = self._try_read_extents(guest_offset, n_bytes)
        if data is None:
            self._cache.hits = n_hits  # read() will look it up again
        return data

    def _try_read_extents(self, guest_offset: int, n_bytes: int) -> Buffer | None:
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

    async def read(self, guest_offset: int, n_bytes: int, *, may_block_loop: bool = False) -> Buffer:
        """The bytes. ``may_block_loop``: nobody else waits for an answer now. Raises OSError, FormatError,
        CorruptImageError."""
        extents = await self.lookup(guest_offset, n_bytes)
        if len(extents) == 1 and extents[0].kind == ClusterKind.DATA:
            extent = extents[0]
            storage = self._data[extent.layer]
            data = storage.try_pread(extent.value, n_bytes)
            return await storage.pread(extent.value, n_bytes) if data is None else data
        clusters: dict[Key, Decoded] = {}
        if any(extent.kind == ClusterKind.COMPRESSED for extent in extents):
            clusters = await self._load_compressed(extents, guest_offset, n_bytes, may_block_loop=may_block_loop)
            if all(extent.kind == ClusterKind.COMPRESSED for extent in extents):
                pieces = _Pieces()
                for extent in extents:
                    pieces.add(clusters[extent.layer, extent.value], extent, self._cluster_mask(extent))
                return pieces.joined()
        buffer = bytearray(n_bytes)
        view = memoryview(buffer)
        waiting: list[tuple[Extent, memoryview]] = []
        for extent in extents:
            start = extent.guest_offset - guest_offset
            part = view[start : start + extent.n_bytes]
            if extent.kind == ClusterKind.COMPRESSED:
                pieces = _Pieces()
                pieces.add(clusters[extent.layer, extent.value], extent, self._cluster_mask(extent))
                part[:] = pieces.joined()
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

    def find_single(self, guest_offset: int, n_bytes: int) -> ClusterRequest | None:
        """The one compressed cluster of the top layer that a range lies in; None where it lies elsewhere or that
        takes longer to find out. Counts as a read: :meth:`read_single` must follow."""
        found = self._slice_of(guest_offset, n_bytes)
        source = self._sources[0]
        if found is None or source is None:
            return None
        slice_, index = found
        entry = slice_.entries[index]
        in_cluster = guest_offset & source.cluster_size - 1
        end = in_cluster + n_bytes
        if not entry & source.entry_format.compressed or end > source.cluster_size:
            return None
        noted, self._noted = self._noted, None
        if noted is not None and noted[:2] == (guest_offset, n_bytes):
            n_wanted = noted[2]
        else:
            n_wanted = source.cluster_size if self._is_more_wanted(guest_offset, in_cluster) else end
            self._look_ahead(guest_offset, n_bytes)
        return ClusterRequest(0, entry, source, n_wanted)

    def try_single(self, guest_offset: int, n_bytes: int) -> Buffer | None:
        """:meth:`find_single` and :meth:`read_single` in one, where nothing has to be waited for. Raises FormatError,
        OSError."""
        wanted = self.find_single(guest_offset, n_bytes)
        if wanted is None:
            return None
        cluster = self.decoded.try_decode(wanted, may_block_loop=True)
        if cluster is None:
            # It will be asked for again, and that is not another read.
            self._noted = guest_offset, n_bytes, wanted.n_bytes
            return None
        return _part_of(cluster, wanted, guest_offset, n_bytes)

    async def read_single(
        self, wanted: ClusterRequest, guest_offset: int, n_bytes: int, *, may_block_loop: bool
    ) -> Buffer:
        """The bytes of a range in the cluster ``wanted``. Otherwise like :meth:`read`."""
        cluster = self.decoded.try_decode(wanted, may_block_loop=may_block_loop)
        if cluster is None:
            cluster = await self.decoded.load_single(wanted)
        return _part_of(cluster, wanted, guest_offset, n_bytes)

    def _slice_of(self, guest_offset: int, n_bytes: int) -> tuple[L2Slice, int] | None:
        """The slice of the top layer that maps all of a range, and the index in it."""
        top = self._top
        if top is None or not n_bytes or guest_offset + n_bytes > top.size:
            return None
        shift = top.slice_shift
        slice_ = self._cache.slices.get(guest_offset >> shift << LAYER_BITS)
        if slice_ is None or guest_offset + n_bytes - 1 >> shift != guest_offset >> shift:
            return None
        return slice_, top.index(guest_offset)

    def _try_decoded(
        self, slice_: L2Slice, index: int, guest_offset: int, n_bytes: int
    ) -> tuple[Buffer | None, bool]:
        """The bytes of compressed clusters of the top layer that are all decoded, or of one that soon is; and whether
        it is one."""
        source = self._sources[0]
        assert source is not None
        cluster_size = source.cluster_size
        in_cluster = guest_offset & cluster_size - 1
        end = in_cluster + n_bytes
        if end <= cluster_size:
            entry = slice_.entries[index]
            cluster = self.decoded.get(0, entry, end)
            if cluster is None:
                n_wanted = cluster_size if self._is_more_wanted(guest_offset, in_cluster) else end
                try:
                    cluster = self.decoded.try_decode_quickly(ClusterRequest(0, entry, source, n_wanted))
                except (OSError, QcowFuseError):
                    return None, True  # read() meets it again
                if cluster is None:
                    return None, True
            data: Buffer = memoryview(cluster.buffer)[cluster.start + in_cluster : cluster.start + end]
        else:
            n_clusters = -(-end // cluster_size)
            parts = self.decoded.get_all(0, slice_.entries[index : index + n_clusters], cluster_size)
            if parts is None:
                return None, False
            views = [memoryview(buffer)[first:last] for buffer, first, last in parts]
            views[0] = views[0][in_cluster:]
            views[-1] = views[-1][: len(views[-1]) - (n_clusters * cluster_size - end)]
            data = views[0] if len(views) == 1 else b"".join(views)
        self._cache.hits += 1
        if slice_ is not self._cache.newest:
            self._cache.touch(slice_)
        self._look_ahead(guest_offset, n_bytes)
        return data, end <= cluster_size

    def _try_compressed(self, extents: Sequence[Extent], guest_offset: int, n_bytes: int) -> Buffer | None:
        """The bytes of extents of which some are compressed, if all are decoded and at hand."""
        pieces = _Pieces()
        for extent in extents:
            if extent.kind == ClusterKind.COMPRESSED:
                mask = self._cluster_mask(extent)
                end = (extent.guest_offset & mask) + extent.n_bytes
                cluster = self.decoded.get(extent.layer, extent.value, end)
                if cluster is None:
                    return None
                pieces.add(cluster, extent, mask)
            else:
                data = bytearray(extent.n_bytes)
                if not self._try_fetch(extent, memoryview(data)):
                    return None
                pieces.add_whole(data)
        self._look_ahead(guest_offset, n_bytes)
        return pieces.joined()

    async def _load_compressed(
        self, extents: Sequence[Extent], guest_offset: int, n_bytes: int, *, may_block_loop: bool
    ) -> dict[Key, Decoded]:
        """The decoded clusters of all compressed extents."""
        if len(extents) > 1:
            self._look_ahead(guest_offset, n_bytes)
            return await self.decoded.load(wanted for extent in extents for wanted in self._wanted(extent))
        extent = extents[0]
        (wanted,) = self._wanted(extent)
        in_cluster = guest_offset & wanted.source.cluster_size - 1
        if not self._is_more_wanted(guest_offset, in_cluster):
            wanted = wanted._replace(n_bytes=in_cluster + n_bytes)
        self._look_ahead(guest_offset, n_bytes)
        cluster = self.decoded.try_decode(wanted, may_block_loop=may_block_loop)
        if cluster is None:
            cluster = await self.decoded.load_single(wanted)
        return {(extent.layer, extent.value): cluster}

    def _is_more_wanted(self, guest_offset: int, in_cluster: int) -> bool:
        """Whether reads that follow may go on with the cluster; also where this one begins with a cluster."""
        return not in_cluster or self._sequential.is_expected(guest_offset)

    def _look_ahead(self, guest_offset: int, n_bytes: int) -> None:
        start, end = self._sequential.note(guest_offset, n_bytes)
        end = min(end, self.layers[0].size)
        if start < end:
            self.decoded.decode_ahead(self._compressed_in(start, end))

    def _compressed_in(self, start: int, end: int) -> Iterator[ClusterRequest]:
        """The compressed clusters of a guest range, as far as the tables are in memory."""
        found = self._slice_of(start, end - start)
        source = self._sources[0]
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
            extents = lookup_chain(self.layers, start, end - start)
        except (Missing, CorruptImageError):
            return
        for extent in extents:
            yield from self._wanted(extent)

    def _wanted(self, extent: Extent) -> Iterator[ClusterRequest]:
        if extent.kind == ClusterKind.COMPRESSED:
            source = self._sources[extent.layer]
            assert source is not None
            yield ClusterRequest(extent.layer, extent.value, source, source.cluster_size)

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


def _part_of(cluster: Decoded, wanted: ClusterRequest, guest_offset: int, n_bytes: int) -> memoryview:
    start = cluster.start + (guest_offset & wanted.source.cluster_size - 1)
    return memoryview(cluster.buffer)[start : start + n_bytes]
