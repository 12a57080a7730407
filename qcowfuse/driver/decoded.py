"""Compressed clusters: read, decode, and keep the last few decoded.

1. A cluster is decoded once however many wait for it, and again only when it has fallen out of the cache.
2. The key is the layer and the L2 entry. An entry names its bytes in the image file, and as long as anything
   refers to them they don't change; nobody asks for an entry that is no longer linked.
3. Decoding runs in a worker thread where a cluster is large enough to be worth the hop: both libraries release
   the interpreter lock.
"""

from __future__ import annotations

from collections import OrderedDict

import trio

from ..format.compression import decompress_cluster
from ..format.entries import EntryFormat
from ..storage.base import Storage

CACHE_BYTES = 8 << 20
MIN_CLUSTERS = 4
_INLINE_BYTES = 16 << 10


class CompressedSource:
    """What has to be known of a layer to decode its clusters."""

    __slots__ = ("compression_type", "entry_format", "storage")

    def __init__(self, storage: Storage, entry_format: EntryFormat, compression_type: int) -> None:
        self.storage = storage
        self.entry_format = entry_format
        self.compression_type = compression_type


class DecodedClusters:
    """A small LRU cache of decoded clusters for one chain."""

    def __init__(self) -> None:
        self._clusters: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._used = 0
        self._decoding: dict[tuple[int, int], trio.Event] = {}
        self.hits = 0
        self.misses = 0

    def get(self, layer: int, entry: int) -> bytes | None:
        """The decoded cluster, if it is in memory."""
        cluster = self._clusters.get((layer, entry))
        if cluster is not None:
            self.hits += 1
            self._clusters.move_to_end((layer, entry))
        return cluster

    async def load(self, layer: int, entry: int, source: CompressedSource) -> bytes:
        """The decoded cluster. Raises FormatError for data that does not decode, OSError."""
        key = (layer, entry)
        while True:
            cluster = self.get(layer, entry)
            if cluster is not None:
                return cluster
            decoding = self._decoding.get(key)
            if decoding is None:
                break
            await decoding.wait()
        self.misses += 1
        self._decoding[key] = event = trio.Event()
        try:
            cluster = await _decode(entry, source)
            self._insert(key, cluster)
        finally:
            del self._decoding[key]
            event.set()
        return cluster

    def _insert(self, key: tuple[int, int], cluster: bytes) -> None:
        self._clusters[key] = cluster
        self._used += len(cluster)
        while self._used > CACHE_BYTES and len(self._clusters) > MIN_CLUSTERS:
            _, dropped = self._clusters.popitem(last=False)
            self._used -= len(dropped)


async def _decode(entry: int, source: CompressedSource) -> bytes:
    where = source.entry_format.compressed_cluster(entry)
    data = source.storage.try_pread(where.host_offset, where.n_bytes)
    if data is None:
        data = await source.storage.pread(where.host_offset, where.n_bytes)
    cluster_size = 1 << source.entry_format.cluster_bits
    if cluster_size <= _INLINE_BYTES:
        return decompress_cluster(data, source.compression_type, cluster_size)
    return await trio.to_thread.run_sync(decompress_cluster, data, source.compression_type, cluster_size)
