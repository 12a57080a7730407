"""The work on compressed clusters: which bytes of which file they are, and how they become clusters.

1. Nothing here knows a cache or the readers that wait. Jobs run in threads: the libraries release the interpreter
   lock meanwhile.
2. Clusters of one job come out in one buffer, in their order, where they can: a read of them need not put them
   together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import trio

from ...buffer import Buffer
from ...errors import QcowFuseError
from ...format.compressed_entries import CompressedCluster
from ...format.compression import (
    decompress_cluster,
    decompress_clusters,
    decompress_start,
    require_decoder,
)
from ...format.entries import EntryFormat
from ...format.header_fields import COMPRESSION_DEFLATE
from ...storage.base import Storage


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


Outcome = Buffer | QcowFuseError
Outcomes = Buffer | list[Outcome]
"""The clusters of a job in one buffer, or each cluster or error by itself."""


class Job:
    """Clusters of one source that are decoded in one go, and come out in one buffer where they can."""

    __slots__ = ("clusters", "packed", "together")

    def __init__(self, *, together: bool) -> None:
        self.together = together
        self.clusters: list[ClusterRequest] = []
        self.packed: list[Buffer] = []

    @property
    def source(self) -> CompressedSource:
        """That of all clusters of the job."""
        return self.clusters[0].source

    def run(self) -> Outcomes:
        """Runs in a thread. An unexpected error is raised."""
        source = self.source
        cluster_size, compression_type = source.cluster_size, source.compression_type
        outcomes: list[Outcome] = []
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
                outcomes.append(decode(packed, compression_type, cluster_size, wanted.n_bytes))
            except QcowFuseError as error:
                outcomes.append(error)
        return outcomes


def split_into_jobs(clusters: Sequence[ClusterRequest], packed: Sequence[Buffer], run_bytes: int) -> list[Job]:
    """Jobs of at most ``run_bytes`` (but at least one cluster) of one source each, in the same order."""
    jobs: list[Job] = []
    n_bytes = 0
    for wanted, data in zip(clusters, packed, strict=True):
        cluster_size = wanted.source.cluster_size
        if not jobs or n_bytes + cluster_size > run_bytes or wanted.source is not jobs[-1].source:
            jobs.append(Job(together=True))
            n_bytes = 0
        n_bytes += cluster_size
        jobs[-1].clusters.append(wanted)
        jobs[-1].packed.append(data)
    return jobs


async def read_each(clusters: Sequence[ClusterRequest]) -> list[Buffer | Exception]:
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


async def read_all(clusters: Sequence[ClusterRequest], space: bytearray | None) -> list[Buffer]:
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
    for outcome in await read_each(clusters):
        if isinstance(outcome, Exception):
            raise outcome
        result.append(outcome)
    return result


def try_read_packed(wanted: ClusterRequest) -> Buffer | None:
    """The packed bytes of a cluster, if they can be read at once. Raises FormatError, OSError."""
    where = wanted.source.entry_format.compressed_cluster(wanted.entry)
    return wanted.source.storage.try_pread(where.host_offset, where.n_bytes)


def decode(data: Buffer, compression_type: int, cluster_size: int, n_bytes: int) -> bytes:
    """The cluster, or its first ``n_bytes`` where that is less work."""
    if n_bytes < cluster_size and compression_type == COMPRESSION_DEFLATE:
        start = decompress_start(data, n_bytes)
        if start is not None:
            return start
    return decompress_cluster(data, compression_type, cluster_size)
