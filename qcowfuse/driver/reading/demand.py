"""Single compressed clusters that several reads want at the same time, decoded together.

1. A hop to a thread costs as much as decoding a cluster; so what is asked for while no thread is free goes together,
   each cluster into a buffer of its own.
2. The work is done by system tasks of trio, which live only while something is wanted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import trio

from .decoded_cache import Decoded, Key
from .decoding import ClusterRequest, Job, read_each
from .decompression import DecodedClusters

_BATCH_BYTES = 512 << 10
"""Guest bytes that one thread decodes in one go for different readers."""


class PendingCluster:
    """A single cluster that a read waits for; without an outcome at the end it must be asked for again."""

    __slots__ = ("done", "outcome", "wanted")

    def __init__(self, wanted: ClusterRequest) -> None:
        self.wanted = wanted
        self.done = trio.Event()
        self.outcome: Decoded | Exception | None = None


class Demands:
    """The single clusters wanted now; decoded into ``decoded``."""

    def __init__(self, decoded: DecodedClusters) -> None:
        self._decoded = decoded
        self._demands: deque[PendingCluster] = deque()
        self._is_collecting = False
        self._free_threads = trio.Semaphore(decoded.n_threads)

    async def load(self, wanted: ClusterRequest) -> Decoded:
        """At least ``n_bytes`` of a cluster. Raises FormatError for data that does not decode, OSError."""
        key = wanted[:2]
        decoded = self._decoded
        while True:
            cluster = decoded.get(*key, wanted.n_bytes)
            if cluster is not None:
                return cluster
            if key in decoded.decoding:
                await decoded.decoding[key].wait()
            elif decoded.closed:
                return (await decoded.decode_all({key: wanted}))[key]
            else:
                demanded = await self._demand(wanted)
                if demanded is not None:
                    return demanded

    async def _demand(self, wanted: ClusterRequest) -> Decoded | None:
        """One cluster, decoded together with what other reads want now. None: ask again. Raises as ``load``."""
        demand = PendingCluster(wanted)
        self._decoded.decoding[wanted[:2]] = demand.done
        self._demands.append(demand)
        if not self._is_collecting:
            self._is_collecting = True
            trio.lowlevel.spawn_system_task(self._collect, name="qcowfuse decode")
        await demand.done.wait()
        if isinstance(demand.outcome, Exception):
            raise demand.outcome
        return demand.outcome

    async def _collect(self) -> None:
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
                trio.lowlevel.spawn_system_task(self._decode, batch, name="qcowfuse decode")
        finally:
            self._is_collecting = False
            self._give_up(self._demands)
            self._demands.clear()

    def _give_up(self, demands: Iterable[PendingCluster]) -> None:
        for demand in demands:
            del self._decoded.decoding[demand.wanted[:2]]
            demand.done.set()

    async def _decode(self, batch: Sequence[PendingCluster]) -> None:
        """Read and decode single clusters; an error is the outcome of its own cluster."""
        decoded = self._decoded
        decoded.misses += len(batch)
        try:
            jobs: dict[int, Job] = {}
            wanted_by: dict[Key, PendingCluster] = {demand.wanted[:2]: demand for demand in batch}
            for demand, data in zip(batch, await read_each([demand.wanted for demand in batch]), strict=True):
                if isinstance(data, Exception):
                    demand.outcome = data
                    continue
                job = jobs.setdefault(demand.wanted.layer, Job(together=False))
                job.clusters.append(demand.wanted)
                job.packed.append(data)
            for job, outcomes in zip(jobs.values(), await decoded.run_jobs(list(jobs.values())), strict=True):
                assert isinstance(outcomes, list)
                for one, outcome in zip(job.clusters, outcomes, strict=True):
                    wanted_by[one[:2]].outcome = (
                        outcome if isinstance(outcome, Exception) else decoded.keep(one, outcome)
                    )
        except Exception as error:  # a bug: for each read to report
            for demand in batch:
                demand.outcome = error
        finally:
            self._free_threads.release()
            self._give_up(batch)
