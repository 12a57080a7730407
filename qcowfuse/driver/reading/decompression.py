"""Compressed clusters, decoded: on the spot or in threads, each once, and the last few kept.

1. A cluster is decoded once however many wait for it, and again only when it has fallen out of the cache, or when
   only its start was decoded for a read that seemed to be a random one.
2. The key is the layer and the L2 entry. An entry names its bytes in the image file, and as long as anything
   refers to them they don't change; nobody asks for an entry that is no longer linked.
3. Decoding runs in as many threads as there are processors, several clusters at a time, since a hop to a thread costs
   as much as decoding one.
4. Where a hop would cost more than it gives, decoding is done on the spot: clusters that are small; and single ones
   of the usual size that are packed with zstd, or wanted alone, or where there are no more than two processors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

import trio

from ...buffer import Buffer
from ...format.header_fields import COMPRESSION_ZSTD
from ...storage.workers import WorkerPool
from .decoded_cache import Decoded, DecodedCache, Key
from .decoding import ClusterRequest, Job, Outcomes, decode, read_all, split_into_jobs, try_read_packed

RUN_BYTES = 1 << 20
"""Guest bytes that one thread decodes in one go for one reader."""
_MIN_RUN_BYTES = 256 << 10
"""The same, where a read waits for them and other threads may help."""
INLINE_BYTES = 16 << 10
_INLINE_ALONE_BYTES = 64 << 10


class DecodedClusters:
    """The decoded clusters of one chain. ``misses`` counts the clusters that were decoded; ``decoding`` has those
    that are being decoded now, and the events that tell when that is over."""

    def __init__(self) -> None:
        self.cache = DecodedCache()
        self.decoding: dict[Key, trio.Event] = {}
        self.n_threads = len(os.sched_getaffinity(0))
        self.closed = False
        self.hits = 0
        self.misses = 0
        self._pool: WorkerPool | None = None

    def get(self, layer: int, entry: int, n_bytes: int) -> Decoded | None:
        """The decoded cluster, or its start of at least ``n_bytes``, if it is in memory."""
        cluster = self.cache.get((layer, entry), n_bytes)
        if cluster is not None:
            self.hits += 1
        return cluster

    def get_all(self, layer: int, entries: Iterable[int], cluster_size: int) -> list[tuple[Buffer, int, int]] | None:
        """Whole clusters, if all are in memory: as few parts of buffers (each with its start and end) as it takes."""
        find = self.cache.find
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
            self.cache.touch(cluster)
            buffer, start, end, _ = cluster
            end += start
        if buffer is not None:
            parts.append((buffer, start, end))
        self.hits += n_found
        return parts

    def try_decode(self, wanted: ClusterRequest, is_alone: Callable[[], bool]) -> Decoded | None:
        """At least ``n_bytes`` of a cluster that is not in memory, decoded on the spot; None where that takes too
        long (rule 4), or something to wait for. ``is_alone`` is asked once at most. Raises FormatError for data that
        does not decode, OSError."""
        layer, entry, source, n_bytes = wanted
        cluster_size = source.cluster_size
        key = layer, entry
        if cluster_size > _INLINE_ALONE_BYTES or key in self.decoding:
            return None
        is_quick = cluster_size <= INLINE_BYTES or source.compression_type == COMPRESSION_ZSTD or self.n_threads <= 2
        if not is_quick and not is_alone():
            return None
        data = try_read_packed(wanted)
        if data is None:
            return None
        self.misses += 1
        return self.cache.insert((key,), decode(data, source.compression_type, cluster_size, n_bytes))[0]

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
                elif key in self.decoding:
                    in_progress = self.decoding[key]
                else:
                    missing[key] = wanted
            if missing:
                result.update(await self.decode_all(missing))
            elif in_progress is not None:
                await in_progress.wait()
            else:
                return result

    def is_here(self, wanted: ClusterRequest) -> bool:
        """Whether a cluster is in memory or is being decoded."""
        key = wanted[:2]
        return key in self.decoding or self.cache.has(key, wanted.n_bytes)

    def keep(self, wanted: ClusterRequest, data: Buffer) -> Decoded:
        """Take in one cluster, or its start, in a buffer of its own."""
        return self.cache.insert((wanted[:2],), data)[0]

    async def decode_all(
        self, missing: dict[Key, ClusterRequest], *, space: bytearray | None = None
    ) -> dict[Key, Decoded]:
        """Read and decode clusters that nobody else decodes. What can be decoded is kept even if another can't.
        With ``space`` to read into, one thread does it, and nobody waits."""
        self.misses += len(missing)
        event = trio.Event()
        for key in missing:
            self.decoding[key] = event
        result: dict[Key, Decoded] = {}
        error: Exception | None = None
        try:
            wanted = list(missing.values())
            run_bytes = RUN_BYTES
            if space is None:
                n_bytes = sum(one.source.cluster_size for one in wanted)
                run_bytes = min(max(-(-n_bytes // self.n_threads), _MIN_RUN_BYTES), RUN_BYTES)
            jobs = split_into_jobs(wanted, await read_all(wanted, space), run_bytes)
            for job, outcomes in zip(jobs, await self.run_jobs(jobs), strict=True):
                if isinstance(outcomes, list):
                    for one, outcome in zip(job.clusters, outcomes, strict=True):
                        if isinstance(outcome, Exception):
                            error = error or outcome
                        else:
                            result[one[:2]] = self.keep(one, outcome)
                else:
                    keys = [one[:2] for one in job.clusters]
                    result.update(zip(keys, self.cache.insert(keys, outcomes), strict=True))
        finally:
            for key in missing:
                del self.decoding[key]
            event.set()
        if error is not None:
            raise error
        return result

    async def run_jobs(self, jobs: Sequence[Job]) -> list[Outcomes]:
        """What comes out of each job, decoded in threads where that is worth it."""
        if self.closed or all(job.source.cluster_size <= INLINE_BYTES for job in jobs):
            return [job.run() for job in jobs]
        if self._pool is None:
            self._pool = WorkerPool(max_threads=self.n_threads).retain()
        return await self._pool.run_all(Job.run, [(job,) for job in jobs])

    def close(self) -> None:
        """Give up the threads; from now on whatever is decoded is decoded on the spot. Idempotent."""
        self.closed = True
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.release()
