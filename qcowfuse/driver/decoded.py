"""Compressed clusters: read, decode, keep the last few decoded, and decode ahead of sequential readers.

1. A cluster is decoded once however many wait for it, and again only when it has fallen out of the cache.
2. The key is the layer and the L2 entry. An entry names its bytes in the image file, and as long as anything
   refers to them they don't change; nobody asks for an entry that is no longer linked.
3. Decoding runs in as many threads as there are processors, for the libraries release the interpreter lock. Where
   a hop would cost more than it gives, it is done on the spot: clusters that are small, and clusters of the usual
   size that are wanted alone.
4. Decoding ahead is done by at most that many system tasks of trio, which live only while there is something
   queued: nobody has to open a nursery for them, and the request that set them off need not wait for them. An error
   there is silent, for whoever wants the cluster meets it again. :meth:`DecodedClusters.aclose` cancels them and
   waits until they have ended.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import NamedTuple

import trio

from ..errors import QcowFuseError
from ..format.compression import decompress_cluster
from ..format.entries import EntryFormat
from ..storage.base import Storage
from ..storage.workers import WorkerPool

CACHE_BYTES = 8 << 20
MIN_CLUSTERS = 4
AHEAD_BYTES = 2 << 20
"""Guest bytes that are decoded ahead of one reader; a whole number of times in the cache, for several readers."""
_INLINE_BYTES = 16 << 10
_INLINE_ALONE_BYTES = 64 << 10
_MAX_QUEUED = 2 * AHEAD_BYTES // (2 * _INLINE_BYTES)
_MAX_STREAMS = 4
_SLACK = 256 << 10
"""Bytes by which a sequential reader's requests may be off: the kernel's read-ahead sends several at a time."""
_MIN_STREAK = 2

log = logging.getLogger(__name__)


class CompressedSource:
    """What has to be known of a layer to decode its clusters."""

    __slots__ = ("compression_type", "entry_format", "storage")

    def __init__(self, storage: Storage, entry_format: EntryFormat, compression_type: int) -> None:
        self.storage = storage
        self.entry_format = entry_format
        self.compression_type = compression_type


class Wanted(NamedTuple):
    """A cluster to decode ahead."""

    layer: int
    entry: int
    source: CompressedSource


class _Stream:
    __slots__ = ("ahead_end", "end", "streak")

    def __init__(self, end: int) -> None:
        self.end = end
        self.ahead_end = 0
        self.streak = 0


class SequentialReads:
    """Tells from the reads so far what will be read next; the last few readers are told apart."""

    def __init__(self) -> None:
        self._streams: list[_Stream] = []

    def note(self, guest_offset: int, n_bytes: int) -> tuple[int, int]:
        """A read was asked for; start and end of the guest range to make ready now, empty most of the time."""
        end = guest_offset + n_bytes
        streams = self._streams
        stream = next((s for s in streams if -_SLACK <= guest_offset - s.end <= _SLACK), None)
        if stream is None:
            streams.insert(0, _Stream(end))
            del streams[_MAX_STREAMS:]
            return end, end
        if stream is not streams[0]:
            streams.remove(stream)
            streams.insert(0, stream)
        if end <= stream.end:
            return end, end
        stream.end = end
        stream.streak += 1
        start = max(end, stream.ahead_end)
        if stream.streak < _MIN_STREAK or start - end > AHEAD_BYTES // 2:
            return end, end
        stream.ahead_end = end + AHEAD_BYTES
        return start, stream.ahead_end


class DecodedClusters:
    """A small LRU cache of decoded clusters for one chain. ``misses`` counts the clusters that were decoded."""

    def __init__(self) -> None:
        self._clusters: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._used = 0
        self._decoding: dict[tuple[int, int], trio.Event] = {}
        self._n_threads = len(os.sched_getaffinity(0))
        self._pool: WorkerPool | None = None
        self._ahead: deque[Wanted] = deque()
        self._runners: dict[trio.CancelScope, trio.Event] = {}
        self._closed = False
        self.hits = 0
        self.misses = 0

    def get(self, layer: int, entry: int) -> bytes | None:
        """The decoded cluster, if it is in memory."""
        cluster = self._clusters.get((layer, entry))
        if cluster is not None:
            self.hits += 1
            self._clusters.move_to_end((layer, entry))
        return cluster

    async def load(self, layer: int, entry: int, source: CompressedSource, *, alone: bool = False) -> bytes:
        """The decoded cluster; ``alone``: the caller wants no other one at the same time.

        Raises FormatError for data that does not decode, OSError.
        """
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
            cluster = await self._decode(entry, source, _INLINE_ALONE_BYTES if alone else _INLINE_BYTES)
            self._insert(key, cluster)
        finally:
            del self._decoding[key]
            event.set()
        return cluster

    def decode_ahead(self, clusters: Iterable[Wanted]) -> None:
        """Have clusters decoded in the background, first come, first served.

        Those that are there already cost nothing. Small ones, which no thread would decode, and those for which
        there is no room in the queue are left to whoever reads them.
        """
        if self._closed:
            return
        for wanted in clusters:
            if len(self._ahead) >= _MAX_QUEUED or 1 << wanted.source.entry_format.cluster_bits <= _INLINE_BYTES:
                break
            if not self._is_here(wanted):
                self._ahead.append(wanted)
        for _ in range(min(len(self._ahead), self._n_threads) - len(self._runners)):
            scope = trio.CancelScope()
            self._runners[scope] = trio.Event()
            trio.lowlevel.spawn_system_task(self._run_ahead, scope, name="qcowfuse decode ahead")

    async def aclose(self) -> None:
        """Stop decoding ahead, and give up the threads. Idempotent."""
        self._closed = True
        self._ahead.clear()
        with trio.CancelScope(shield=True):
            for scope, ended in list(self._runners.items()):
                scope.cancel()
                await ended.wait()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.release()

    def _is_here(self, wanted: Wanted) -> bool:
        key = (wanted.layer, wanted.entry)
        return key in self._clusters or key in self._decoding

    async def _run_ahead(self, scope: trio.CancelScope) -> None:
        try:
            with scope:
                while self._ahead:
                    wanted = self._ahead.popleft()
                    if self._is_here(wanted):
                        continue
                    try:
                        await self.load(*wanted)
                    except (OSError, QcowFuseError):
                        pass
                    except Exception:  # a bug; but nothing may leave a system task, that would end the program
                        log.exception("decoding ahead failed")
        finally:
            self._runners.pop(scope).set()

    def _insert(self, key: tuple[int, int], cluster: bytes) -> None:
        self._clusters[key] = cluster
        self._used += len(cluster)
        while self._used > CACHE_BYTES and len(self._clusters) > MIN_CLUSTERS:
            _, dropped = self._clusters.popitem(last=False)
            self._used -= len(dropped)

    async def _decode(self, entry: int, source: CompressedSource, max_inline: int) -> bytes:
        where = source.entry_format.compressed_cluster(entry)
        data = source.storage.try_pread(where.host_offset, where.n_bytes)
        if data is None:
            data = await source.storage.pread(where.host_offset, where.n_bytes)
        cluster_size = 1 << source.entry_format.cluster_bits
        if cluster_size <= max_inline or self._closed:
            return decompress_cluster(data, source.compression_type, cluster_size)
        if self._pool is None:
            self._pool = WorkerPool(max_threads=self._n_threads).retain()
        return await self._pool.run(decompress_cluster, data, source.compression_type, cluster_size)
