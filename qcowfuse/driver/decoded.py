"""Compressed clusters: read, decode, keep the last few decoded, and decode ahead of sequential readers.

1. A cluster is decoded once however many wait for it, and again only when it has fallen out of the cache, or when
   only its start was decoded for a read that seemed to be a random one.
2. The key is the layer and the L2 entry. An entry names its bytes in the image file, and as long as anything
   refers to them they don't change; nobody asks for an entry that is no longer linked.
3. Decoding runs in as many threads as there are processors, for the libraries release the interpreter lock; a few
   clusters at a time, since a hop to a thread costs as much as decoding one. Where it would cost more than it gives,
   it is done on the spot: clusters that are small, and clusters of the usual size that are wanted alone.
4. Decoding ahead is done by at most that many system tasks of trio, which live only while there is something
   queued: nobody has to open a nursery for them, and the request that set them off need not wait for them. An error
   there is silent, for whoever wants the cluster meets it again. :meth:`DecodedClusters.aclose` cancels them and
   waits until they have ended.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import trio

from ..errors import QcowFuseError
from ..format.compression import decompress_cluster, decompress_start, require_decoder
from ..format.entries import EntryFormat
from ..format.header import COMPRESSION_DEFLATE
from ..storage.base import Buffer, Storage
from ..storage.workers import WorkerPool

CACHE_BYTES = 32 << 20
MIN_CLUSTERS = 4
AHEAD_BYTES = 2 << 20
"""Guest bytes that are decoded ahead of one reader; a whole number of times in the cache, for several readers."""
_BATCH_BYTES = 256 << 10
"""Guest bytes that one thread decodes in one go."""
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

    __slots__ = ("cluster_size", "compression_type", "entry_format", "storage")

    def __init__(self, storage: Storage, entry_format: EntryFormat, compression_type: int) -> None:
        self.storage = storage
        self.entry_format = entry_format
        self.compression_type = compression_type
        self.cluster_size = 1 << entry_format.cluster_bits
        require_decoder(compression_type)


class Wanted(NamedTuple):
    """A cluster, of which the first ``n_bytes`` are wanted."""

    layer: int
    entry: int
    source: CompressedSource
    n_bytes: int


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
        self.is_random = False
        """Whether the last read that was noted follows no other."""

    def note(self, guest_offset: int, n_bytes: int) -> tuple[int, int]:
        """A read was asked for; start and end of the guest range to make ready now, empty most of the time."""
        end = guest_offset + n_bytes
        streams = self._streams
        stream = next((s for s in streams if -_SLACK <= guest_offset - s.end <= _SLACK), None)
        self.is_random = stream is None
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


Key = tuple[int, int]


class DecodedClusters:
    """A small LRU cache of decoded clusters for one chain. ``misses`` counts the clusters that were decoded."""

    def __init__(self) -> None:
        self._clusters: OrderedDict[Key, bytes] = OrderedDict()
        self._used = 0
        self._decoding: dict[Key, trio.Event] = {}
        self._n_threads = len(os.sched_getaffinity(0))
        self._pool: WorkerPool | None = None
        self._ahead: deque[Wanted] = deque()
        self._runners: dict[trio.CancelScope, trio.Event] = {}
        self._closed = False
        self.hits = 0
        self.misses = 0

    def get(self, layer: int, entry: int, n_bytes: int) -> bytes | None:
        """The decoded cluster, or its start of at least ``n_bytes``, if it is in memory."""
        cluster = self._clusters.get((layer, entry))
        if cluster is None or len(cluster) < n_bytes:
            return None
        self.hits += 1
        self._clusters.move_to_end((layer, entry))
        return cluster

    def try_decode(self, wanted: Wanted) -> bytes | None:
        """At least ``n_bytes`` of a cluster, decoded on the spot; None where that takes too long, or something to
        wait for. Raises FormatError for data that does not decode, OSError."""
        layer, entry, source, n_bytes = wanted
        cluster_size = source.cluster_size
        if cluster_size > _INLINE_ALONE_BYTES or (layer, entry) in self._decoding:
            return None
        data = _try_read(wanted)
        if data is None:
            return None
        self.misses += 1
        cluster = _decode(data, source.compression_type, cluster_size, n_bytes)
        self._insert((layer, entry), cluster)
        return cluster

    async def load(self, clusters: Iterable[Wanted]) -> dict[Key, bytes]:
        """At least ``n_bytes`` of each cluster; those that nobody decodes yet are decoded together.

        Raises FormatError for data that does not decode, OSError.
        """
        result: dict[Key, bytes] = {}
        clusters = list(clusters)
        while True:
            missing: dict[Key, Wanted] = {}
            in_progress: trio.Event | None = None
            for wanted in clusters:
                key = wanted[:2]
                if key in result:
                    continue
                cluster = self.get(*key, wanted.n_bytes)
                if cluster is not None:
                    result[key] = cluster
                elif key in self._decoding:
                    in_progress = self._decoding[key]
                else:
                    missing[key] = wanted
            if missing:
                result.update(await self._decode_all(missing))
            elif in_progress is not None:
                await in_progress.wait()
            else:
                return result

    def decode_ahead(self, clusters: Iterable[Wanted]) -> None:
        """Have clusters decoded in the background, first come, first served.

        Those that are there already cost nothing. Small ones, which no thread would decode, and those for which
        there is no room in the queue are left to whoever reads them.
        """
        if self._closed:
            return
        for wanted in clusters:
            if len(self._ahead) >= _MAX_QUEUED or wanted.source.cluster_size <= _INLINE_BYTES:
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
        key = wanted[:2]
        return key in self._decoding or len(self._clusters.get(key, b"")) >= wanted.n_bytes

    async def _run_ahead(self, scope: trio.CancelScope) -> None:
        try:
            with scope:
                while self._ahead:
                    batch: dict[Key, Wanted] = {}
                    n_bytes = 0
                    while self._ahead and n_bytes < _BATCH_BYTES:
                        wanted = self._ahead.popleft()
                        if not self._is_here(wanted):
                            batch[wanted[:2]] = wanted
                            n_bytes += wanted.source.cluster_size
                    if not batch:
                        continue
                    try:
                        await self._decode_all(batch)
                    except (OSError, QcowFuseError):
                        pass
                    except Exception:  # a bug; but nothing may leave a system task, that would end the program
                        log.exception("decoding ahead failed")
        finally:
            self._runners.pop(scope).set()

    def _insert(self, key: Key, cluster: bytes) -> None:
        self._used += len(cluster) - len(self._clusters.pop(key, b""))
        self._clusters[key] = cluster
        while self._used > CACHE_BYTES and len(self._clusters) > MIN_CLUSTERS:
            _, dropped = self._clusters.popitem(last=False)
            self._used -= len(dropped)

    async def _decode_all(self, missing: dict[Key, Wanted]) -> dict[Key, bytes]:
        """Read and decode clusters that nobody else decodes. What can be decoded is kept even if another can't."""
        self.misses += len(missing)
        event = trio.Event()
        for key in missing:
            self._decoding[key] = event
        result: dict[Key, bytes] = {}
        error: Exception | None = None
        try:
            for key, outcome in zip(missing, await self._outcomes(list(missing.values())), strict=True):
                if isinstance(outcome, bytes):
                    self._insert(key, outcome)
                    result[key] = outcome
                else:
                    error = error or outcome
        finally:
            for key in missing:
                del self._decoding[key]
            event.set()
        if error is not None:
            raise error
        return result

    async def _outcomes(self, missing: list[Wanted]) -> list[bytes | Exception]:
        jobs: list[list[_Job]] = []
        n_bytes = 0
        for wanted, data in zip(missing, await _read_all(missing), strict=True):
            cluster_size = wanted.source.cluster_size
            if not jobs or n_bytes + cluster_size > _BATCH_BYTES:
                jobs.append([])
                n_bytes = 0
            n_bytes += cluster_size
            jobs[-1].append((data, wanted.source.compression_type, cluster_size, wanted.n_bytes))
        if self._closed or all(job[2] <= _INLINE_BYTES for batch in jobs for job in batch):
            return [outcome for batch in jobs for outcome in _decode_batch(batch)]
        if self._pool is None:
            self._pool = WorkerPool(max_threads=self._n_threads).retain()
        outcomes = await self._pool.run_all(_decode_batch, [(batch,) for batch in jobs])
        return [outcome for batch in outcomes for outcome in batch]


async def _read_all(clusters: list[Wanted]) -> list[Buffer]:
    """The packed bytes of each. What lies back to back in one image file is read at once."""
    places = [wanted.source.entry_format.compressed_cluster(wanted.entry) for wanted in clusters]
    storage = clusters[0].source.storage
    start = min(place.host_offset for place in places)
    end = max(place.host_offset + place.n_bytes for place in places)
    # Packed clusters share sectors, so that their lengths add up to more than they take.
    if end - start <= sum(place.n_bytes for place in places) and all(w.source.storage is storage for w in clusters):
        data = storage.try_pread(start, end - start)
        view = memoryview(await storage.pread(start, end - start) if data is None else data)
        return [view[place.host_offset - start :][: place.n_bytes] for place in places]
    result: list[Buffer] = [b""] * len(clusters)

    errors: list[OSError] = []

    async def read(number: int, wanted: Wanted) -> None:
        place = places[number]
        try:
            result[number] = await wanted.source.storage.pread(place.host_offset, place.n_bytes)
        except OSError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for number, wanted in enumerate(clusters):
            data = _try_read(wanted)
            if data is None:
                nursery.start_soon(read, number, wanted)
            else:
                result[number] = data
    if errors:
        raise errors[0]
    return result


_Job = tuple[Buffer, int, int, int]


def _try_read(wanted: Wanted) -> Buffer | None:
    where = wanted.source.entry_format.compressed_cluster(wanted.entry)
    return wanted.source.storage.try_pread(where.host_offset, where.n_bytes)


def _decode(data: Buffer, compression_type: int, cluster_size: int, n_bytes: int) -> bytes:
    """The cluster, or its first ``n_bytes`` where that is less work."""
    if n_bytes < cluster_size and compression_type == COMPRESSION_DEFLATE:
        start = decompress_start(data, n_bytes)
        if start is not None:
            return start
    return decompress_cluster(data, compression_type, cluster_size)


def _decode_batch(jobs: Sequence[_Job]) -> list[bytes | Exception]:
    """Runs in a thread. An unexpected error is raised."""
    outcomes: list[bytes | Exception] = []
    for job in jobs:
        try:
            outcomes.append(_decode(*job))
        except QcowFuseError as error:
            outcomes.append(error)
    return outcomes
