"""What was decoded of compressed clusters: buffers of one cluster or a run of them, least recently used first out.

1. A buffer stays whole: it is counted with all of its bytes until it goes, and goes with all of its clusters. So
   what the cache holds is bounded whichever clusters of a run are asked for again.
2. The key is the layer and the L2 entry.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from ...buffer import Buffer

CACHE_BYTES = 32 << 20
MIN_RUNS = 4

Key = tuple[int, int]


class _Run:
    __slots__ = ("buffer", "keys")

    def __init__(self, buffer: Buffer, keys: Sequence[Key]) -> None:
        self.buffer = buffer
        self.keys = keys


class Decoded(NamedTuple):
    """A cluster, or the first ``n_bytes`` of it, at byte ``start`` of ``buffer``."""

    buffer: Buffer
    start: int
    n_bytes: int
    run: object


class DecodedCache:
    """The clusters by key. ``used`` is what all buffers hold, in bytes."""

    def __init__(self) -> None:
        self._clusters: dict[Key, Decoded] = {}
        self._runs: OrderedDict[object, _Run] = OrderedDict()
        self.used = 0
        self.find = self._clusters.get

    def __len__(self) -> int:
        return len(self._clusters)

    def buffer_sizes(self) -> list[int]:
        """Bytes of each buffer, the least recently used one first."""
        return [len(run.buffer) for run in self._runs.values()]

    def has(self, key: Key, n_bytes: int) -> bool:
        """Whether at least ``n_bytes`` of the cluster are here. The cluster does not count as used."""
        cluster = self._clusters.get(key)
        return cluster is not None and cluster.n_bytes >= n_bytes

    def get(self, key: Key, n_bytes: int) -> Decoded | None:
        """The cluster, if at least ``n_bytes`` of it are here."""
        cluster = self._clusters.get(key)
        if cluster is None or cluster.n_bytes < n_bytes:
            return None
        self._runs.move_to_end(cluster.run)
        return cluster

    def touch(self, cluster: Decoded) -> None:
        """Note that a cluster which was found is used."""
        self._runs.move_to_end(cluster.run)

    def insert(self, keys: Sequence[Key], buffer: Buffer) -> list[Decoded]:
        """Keep clusters that lie in ``buffer`` back to back, each as long as the others."""
        run = _Run(buffer, keys)
        n_bytes = len(buffer) // len(keys)
        result = []
        for number, key in enumerate(keys):
            old = self._clusters.get(key)
            if old is not None:
                assert isinstance(old.run, _Run)
                if len(old.run.keys) == 1:
                    self._drop(old.run)
            cluster = self._clusters[key] = Decoded(buffer, number * n_bytes, n_bytes, run)
            result.append(cluster)
        self._runs[run] = run
        self.used += len(buffer)
        while self.used > CACHE_BYTES and len(self._runs) > MIN_RUNS:
            self._drop(next(iter(self._runs.values())))
        return result

    def _drop(self, run: _Run) -> None:
        del self._runs[run]
        self.used -= len(run.buffer)
        for key in run.keys:
            cluster = self._clusters.get(key)
            if cluster is not None and cluster.run is run:
                del self._clusters[key]
