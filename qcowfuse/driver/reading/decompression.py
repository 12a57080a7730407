"""Compressed clusters: read, decode, keep the last few decoded, and decode ahead of sequential readers.

1. A cluster is decoded once however many wait for it, and again only when it has fallen out of the cache, or when
   only its start was decoded for a read that seemed to be a random one.
2. The key is the layer and the L2 entry. An entry names its bytes in the image file, and as long as anything
   refers to them they don't change; nobody asks for an entry that is no longer linked.
3. Decoding runs in as many threads as there are processors, for the libraries release the interpreter lock; several
   clusters at a time, since a hop to a thread costs as much as decoding one. Those of one read, and those decoded
   ahead, come out in one buffer, in their order, so that a read of them need not put them together. Single clusters
   that several reads want at the same time are decoded together too, each into a buffer of its own.
4. Where a hop would cost more than it gives, decoding is done on the spot: clusters that are small; and single ones
   of the usual size that are packed with zstd, or wanted alone, or where there are no more than two processors.
5. What is done ahead, or for several reads, is done by a few system tasks of trio, which live only while there is
   something queued: nobody has to open a nursery for them. An error ahead is silent, for whoever wants the cluster
   meets it again. :meth:`DecodedClusters.aclose` cancels what is done ahead and waits until that has ended.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import trio

from ...buffer import Buffer
from ...errors import QcowFuseError
from ...format.compression import (
    CompressedCluster,
    decompress_cluster,
    decompress_clusters,
    decompress_start,
    require_decoder,
)
from ...format.entries import EntryFormat
from ...format.header_fields import COMPRESSION_DEFLATE, COMPRESSION_ZSTD
from ...storage.base import Storage
from ...storage.workers import WorkerPool
from .decoded_cache import Decoded, DecodedCache, Key

AHEAD_BYTES = 6 << 20
"""Guest bytes that are decoded ahead of one reader; a whole number of times in the cache, for several readers."""
_RUN_BYTES = 1 << 20
"""Guest bytes that one thread decodes in one go for one reader."""
_MIN_RUN_BYTES = 256 << 10
"""The same, where a read waits for them and other threads may help."""
_BATCH_BYTES = 512 << 10
"""Guest bytes that one thread decodes in one go for different readers."""
_INLINE_BYTES = 16 << 10
_INLINE_ALONE_BYTES = 64 << 10
_MAX_QUEUED = AHEAD_BYTES // _INLINE_BYTES
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


class ClusterRequest(NamedTuple):
    """A cluster, of which the first ``n_bytes`` are wanted."""

    layer: int
    entry: int
    source: CompressedSource
    n_bytes: int


class PendingCluster:
    """A single cluster that a read waits for; without an outcome at the end it must be asked for again."""

    __slots__ = ("done", "outcome", "wanted")

    def __init__(self, wanted: ClusterRequest) -> None:
        self.wanted = wanted
        self.done = trio.Event()
        self.outcome: Decoded | Exception | None = None


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

    def is_expected(self, guest_offset: int) -> bool:
        """Whether a read there would follow another one."""
        return any(-_SLACK <= guest_offset - stream.end <= _SLACK for stream in self._streams)

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
        if stream.streak < _MIN_STREAK or start - end > AHEAD_BYTES - _RUN_BYTES:
            return end, end
        stream.ahead_end = end + AHEAD_BYTES
        return start, stream.ahead_end


class DecodedClusters:
    """A small cache of decoded clusters for one chain. ``misses`` counts the clusters that were decoded."""

    def __init__(self) -> None:
        self._cache = DecodedCache()
        self._decoding: dict[Key, trio.Event] = {}
        self._n_threads = len(os.sched_getaffinity(0))
        self._pool: WorkerPool | None = None
        self._ahead: deque[ClusterRequest] = deque()
        self._demands: deque[PendingCluster] = deque()
        self._runners: dict[trio.CancelScope, trio.Event] = {}
        self._n_ahead_runners = 0
        self._spaces: list[bytearray] = []
        self._is_collecting = False
        self._free_threads = trio.Semaphore(self._n_threads)
        self._closed = False
        self.hits = 0
        self.misses = 0

    def get(self, layer: int, entry: int, n_bytes: int) -> Decoded | None:
        """The decoded cluster, or its start of at least ``n_bytes``, if it is in memory."""
        cluster = self._cache.get((layer, entry), n_bytes)
        if cluster is not None:
            self.hits += 1
        return cluster

    def get_all(self, layer: int, entries: Iterable[int], cluster_size: int) -> list[tuple[Buffer, int, int]] | None:
        """Whole clusters, if all are in memory: as few parts of buffers (each with its start and end) as it takes."""
        find = self._cache.find
        parts: list[tuple[Buffer, int, int]] = []
        buffer: Buffer | None = None
        start = end = n_found = 0
        for entry in entries:
            cluster = find((layer, entry))
            if cluster is None or cluster[2] != cluster_size:
                return None
            n_found += 1
            if cluster[0] is buffer and cluster[1] == end:
                end += cluster[2]
                continue
            if buffer is not None:
                parts.append((buffer, start, end))
            self._cache.touch(cluster)
            buffer, start, end, _ = cluster
            end += start
        if buffer is not None:
            parts.append((buffer, start, end))
        self.hits += n_found
        return parts

    def try_decode(self, wanted: ClusterRequest, *, may_block_loop: bool) -> Decoded | None:
        """At least ``n_bytes`` of a cluster, decoded on the spot; None where that takes too long (unless it is wanted
        ``may_block_loop``), or something to wait for. Raises FormatError for data that does not decode, OSError."""
        layer, entry, source, n_bytes = wanted
        cluster_size = source.cluster_size
        key = layer, entry
        if cluster_size > (_INLINE_ALONE_BYTES if may_block_loop else _INLINE_BYTES) or key in self._decoding:
            return None
        data = _try_read(wanted)
        if data is None:
            return None
        self.misses += 1
        cluster = _decode(data, source.compression_type, cluster_size, n_bytes)
        return self._cache.insert((key,), cluster)[0]

    def try_decode_quickly(self, wanted: ClusterRequest) -> Decoded | None:
        """The same where it takes no longer than to hand the work to a thread and back, whoever else waits; or not
        much longer, where this thread and the client keep the only two processors busy."""
        is_quick = wanted.source.compression_type == COMPRESSION_ZSTD or self._n_threads <= 2
        return self.try_decode(wanted, may_block_loop=True) if is_quick else None

    async def load_single(self, wanted: ClusterRequest) -> Decoded:
        """At least ``n_bytes`` of a cluster that is not in memory; what others want is decoded with it. Raises as
        ``load``."""
        key = wanted[:2]
        while True:
            if key in self._decoding:
                await self._decoding[key].wait()
            elif self._closed:
                return (await self._decode_all({key: wanted}))[key]
            else:
                demanded = await self._demand(wanted)
                if demanded is not None:
                    return demanded
            cluster = self.get(*key, wanted.n_bytes)
            if cluster is not None:
                return cluster

    async def load(self, clusters: Iterable[ClusterRequest]) -> dict[Key, Decoded]:
        """At least ``n_bytes`` of each cluster; those that nobody decodes yet are decoded together.

        Raises FormatError for data that does not decode, OSError.
        """
        result: dict[Key, Decoded] = {}
        clusters = list(clusters)
        while True:
            missing: dict[Key, ClusterRequest] = {}
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

    def decode_ahead(self, clusters: Iterable[ClusterRequest]) -> None:
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
        if not self._ahead:
            return
        # Twice as many as threads: when a job ends the next one is there, even if this thread has to wait its turn.
        n_jobs = -(-len(self._ahead) * self._ahead[0].source.cluster_size // _RUN_BYTES)
        for _ in range(min(n_jobs, 2 * self._n_threads - self._n_ahead_runners)):
            self._n_ahead_runners += 1
            scope = trio.CancelScope()
            self._runners[scope] = trio.Event()
            trio.lowlevel.spawn_system_task(self._run_ahead, scope, name="qcowfuse decode ahead")

    async def aclose(self) -> None:
        """Stop decoding ahead, and give up the threads. Idempotent."""
        self._closed = True
        self._ahead.clear()
        self._spaces.clear()
        with trio.CancelScope(shield=True):
            for scope, ended in list(self._runners.items()):
                scope.cancel()
                await ended.wait()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.release()

    def _is_here(self, wanted: ClusterRequest) -> bool:
        key = wanted[:2]
        return key in self._decoding or self._cache.has(key, wanted.n_bytes)

    async def _run_ahead(self, scope: trio.CancelScope) -> None:
        space = self._spaces.pop() if self._spaces else bytearray(_RUN_BYTES)
        try:
            with scope:
                while self._ahead:
                    batch: dict[Key, ClusterRequest] = {}
                    n_bytes = 0
                    while self._ahead and n_bytes < _RUN_BYTES:
                        wanted = self._ahead.popleft()
                        if not self._is_here(wanted):
                            batch[wanted[:2]] = wanted
                            n_bytes += wanted.source.cluster_size
                    if not batch:
                        continue
                    try:
                        await self._decode_all(batch, space=space)
                    except (OSError, QcowFuseError):
                        pass
                    except Exception:  # a bug; but nothing may leave a system task, that would end the program
                        log.exception("decoding ahead failed")
        finally:
            self._n_ahead_runners -= 1
            self._spaces.append(space)
            self._runners.pop(scope).set()

    async def _demand(self, wanted: ClusterRequest) -> Decoded | None:
        """One cluster, decoded together with what other reads want now. None: ask again. Raises as ``load``."""
        demand = PendingCluster(wanted)
        self._decoding[wanted[:2]] = demand.done
        self._demands.append(demand)
        if not self._is_collecting:
            self._is_collecting = True
            trio.lowlevel.spawn_system_task(self._collect_demands, name="qcowfuse decode")
        await demand.done.wait()
        if isinstance(demand.outcome, Exception):
            raise demand.outcome
        return demand.outcome

    async def _collect_demands(self) -> None:
        """Hand what is demanded to threads, as much at a time as comes in before one is free."""
        try:
            while self._demands:
                await self._free_threads.acquire()
                n_max = max(1, _BATCH_BYTES // self._demands[0].wanted.source.cluster_size)
                n_seen = 0
                while n_seen < len(self._demands) < n_max:
                    n_seen = len(self._demands)
                    await trio.lowlevel.checkpoint()
                batch = [self._demands.popleft() for _ in range(min(n_max, len(self._demands)))]
                trio.lowlevel.spawn_system_task(self._decode_demands, batch, name="qcowfuse decode")
        finally:
            self._is_collecting = False
            self._give_up(self._demands)
            self._demands.clear()

    def _give_up(self, demands: Iterable[PendingCluster]) -> None:
        for demand in demands:
            del self._decoding[demand.wanted[:2]]
            demand.done.set()

    async def _decode_demands(self, batch: Sequence[PendingCluster]) -> None:
        """Read and decode single clusters; an error is the outcome of its own cluster."""
        self.misses += len(batch)
        try:
            jobs: dict[int, _Job] = {}
            wanted_by: dict[Key, PendingCluster] = {demand.wanted[:2]: demand for demand in batch}
            for demand, data in zip(batch, await _read_each([demand.wanted for demand in batch]), strict=True):
                if isinstance(data, Exception):
                    demand.outcome = data
                    continue
                job = jobs.setdefault(demand.wanted.layer, _Job(together=False))
                job.clusters.append(demand.wanted)
                job.packed.append(data)
            for job, outcomes in zip(jobs.values(), await self._run_jobs(list(jobs.values())), strict=True):
                assert isinstance(outcomes, list)
                for one, outcome in zip(job.clusters, outcomes, strict=True):
                    wanted_by[one[:2]].outcome = (
                        outcome if isinstance(outcome, Exception) else self._cache.insert((one[:2],), outcome)[0]
                    )
        except Exception as error:  # a bug: for each read to report
            for demand in batch:
                demand.outcome = error
        finally:
            self._free_threads.release()
            self._give_up(batch)

    async def _decode_all(
        self, missing: dict[Key, ClusterRequest], *, space: bytearray | None = None
    ) -> dict[Key, Decoded]:
        """Read and decode clusters that nobody else decodes. What can be decoded is kept even if another can't.
        With ``space`` to read into, one thread does it, and nobody waits."""
        self.misses += len(missing)
        event = trio.Event()
        for key in missing:
            self._decoding[key] = event
        result: dict[Key, Decoded] = {}
        error: Exception | None = None
        try:
            wanted = list(missing.values())
            run_bytes = _RUN_BYTES
            if space is None:
                n_bytes = sum(one.source.cluster_size for one in wanted)
                run_bytes = min(max(-(-n_bytes // self._n_threads), _MIN_RUN_BYTES), _RUN_BYTES)
            jobs = _split(wanted, await _read_all(wanted, space), run_bytes)
            for job, outcomes in zip(jobs, await self._run_jobs(jobs), strict=True):
                if isinstance(outcomes, list):
                    for one, outcome in zip(job.clusters, outcomes, strict=True):
                        if isinstance(outcome, Exception):
                            error = error or outcome
                        else:
                            result[one[:2]] = self._cache.insert((one[:2],), outcome)[0]
                else:
                    keys = [one[:2] for one in job.clusters]
                    result.update(zip(keys, self._cache.insert(keys, outcomes), strict=True))
        finally:
            for key in missing:
                del self._decoding[key]
            event.set()
        if error is not None:
            raise error
        return result

    async def _run_jobs(self, jobs: Sequence[_Job]) -> list[Outcomes]:
        if self._closed or all(job.source.cluster_size <= _INLINE_BYTES for job in jobs):
            return [job.run() for job in jobs]
        if self._pool is None:
            self._pool = WorkerPool(max_threads=self._n_threads).retain()
        return await self._pool.run_all(_Job.run, [(job,) for job in jobs])


_Outcome = Buffer | QcowFuseError
Outcomes = Buffer | list[_Outcome]
"""The clusters of a job in one buffer, or each cluster or error by itself."""


class _Job:
    """Clusters of one source that are decoded in one go, and come out in one buffer where they can."""

    __slots__ = ("clusters", "packed", "together")

    def __init__(self, *, together: bool) -> None:
        self.together = together
        self.clusters: list[ClusterRequest] = []
        self.packed: list[Buffer] = []

    @property
    def source(self) -> CompressedSource:
        return self.clusters[0].source

    def run(self) -> Outcomes:
        """Runs in a thread. An unexpected error is raised."""
        source = self.source
        cluster_size, compression_type = source.cluster_size, source.compression_type
        outcomes: list[_Outcome] = []
        if self.together or compression_type != COMPRESSION_DEFLATE:
            decoded = decompress_clusters(self.packed, compression_type, cluster_size)
            if self.together:
                whole = [one for one in decoded if not isinstance(one, QcowFuseError)]
                if len(whole) == len(decoded):
                    return whole[0] if len(whole) == 1 else b"".join(whole)
            # A buffer of its own for each, which goes with its cluster.
            outcomes.extend(bytes(one) if isinstance(one, memoryview) else one for one in decoded)
            return outcomes
        for wanted, packed in zip(self.clusters, self.packed, strict=True):
            try:
                outcomes.append(_decode(packed, compression_type, cluster_size, wanted.n_bytes))
            except QcowFuseError as error:
                outcomes.append(error)
        return outcomes


def _split(clusters: Sequence[ClusterRequest], packed: Sequence[Buffer], run_bytes: int) -> list[_Job]:
    """Jobs of at most ``run_bytes`` (but at least one cluster) of one source each, in the same order."""
    jobs: list[_Job] = []
    n_bytes = 0
    for wanted, data in zip(clusters, packed, strict=True):
        cluster_size = wanted.source.cluster_size
        if not jobs or n_bytes + cluster_size > run_bytes or wanted.source is not jobs[-1].source:
            jobs.append(_Job(together=True))
            n_bytes = 0
        n_bytes += cluster_size
        jobs[-1].clusters.append(wanted)
        jobs[-1].packed.append(data)
    return jobs


async def _read_each(clusters: Sequence[ClusterRequest]) -> list[Buffer | Exception]:
    """The packed bytes of each, or what is wrong with it."""
    result: list[Buffer | Exception] = [b""] * len(clusters)

    async def read(number: int, place: CompressedCluster, storage: Storage) -> None:
        try:
            result[number] = await storage.pread(place.host_offset, place.n_bytes)
        except OSError as error:
            result[number] = error

    async with trio.open_nursery() as nursery:
        for number, wanted in enumerate(clusters):
            try:
                place = wanted.source.entry_format.compressed_cluster(wanted.entry)
                data = wanted.source.storage.try_pread(place.host_offset, place.n_bytes)
            except (OSError, QcowFuseError) as error:
                result[number] = error
                continue
            if data is None:
                nursery.start_soon(read, number, place, wanted.source.storage)
            else:
                result[number] = data
    return result


async def _read_all(clusters: Sequence[ClusterRequest], space: bytearray | None) -> list[Buffer]:
    """The packed bytes of each. What lies back to back in one image file is read at once, into ``space`` if it
    fits: new memory for each would cost as much as reading."""
    places = [wanted.source.entry_format.compressed_cluster(wanted.entry) for wanted in clusters]
    storage = clusters[0].source.storage
    start = min(place.host_offset for place in places)
    end = max(place.host_offset + place.n_bytes for place in places)
    # Packed clusters share sectors, so that their lengths add up to more than they take.
    if end - start <= sum(place.n_bytes for place in places) and all(w.source.storage is storage for w in clusters):
        if space is not None and end - start <= len(space):
            view = memoryview(space)[: end - start]
            if not storage.try_pread_into(start, view):
                await storage.pread_into(start, view)
        else:
            data = storage.try_pread(start, end - start)
            view = memoryview(await storage.pread(start, end - start) if data is None else data)
        return [view[place.host_offset - start :][: place.n_bytes] for place in places]
    result: list[Buffer] = []
    for outcome in await _read_each(clusters):
        if isinstance(outcome, Exception):
            raise outcome
        result.append(outcome)
    return result


def _try_read(wanted: ClusterRequest) -> Buffer | None:
    where = wanted.source.entry_format.compressed_cluster(wanted.entry)
    return wanted.source.storage.try_pread(where.host_offset, where.n_bytes)


def _decode(data: Buffer, compression_type: int, cluster_size: int, n_bytes: int) -> bytes:
    """The cluster, or its first ``n_bytes`` where that is less work."""
    if n_bytes < cluster_size and compression_type == COMPRESSION_DEFLATE:
        start = decompress_start(data, n_bytes)
        if start is not None:
            return start
    return decompress_cluster(data, compression_type, cluster_size)
