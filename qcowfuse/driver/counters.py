"""What an open image says about itself in numbers, by dotted name."""

from __future__ import annotations

from collections.abc import Sequence

from ..storage.base import Storage
from .layers.table_cache import TableCache
from .reading.decompression import DecodedClusters


def counters_of(
    cache: TableCache, decoded: DecodedClusters, storages: Sequence[Storage], states: dict[str, bool]
) -> dict[str, int]:
    """Counters of the caches, ``states`` of the image as 0 or 1, and the accesses to all its files together."""
    counters = {
        "l2_cache.budget_bytes": cache.budget,
        "l2_cache.used_bytes": cache.used,
        "l2_cache.slices": len(cache.slices),
        "l2_cache.hits": cache.hits,
        "l2_cache.misses": cache.misses,
        "l2_cache.evictions": cache.evictions,
        "l2_cache.write_backs": cache.write_backs,
        "decoded_clusters.hits": decoded.hits,
        "decoded_clusters.misses": decoded.misses,
    }
    for name, is_so in states.items():
        counters[f"image.{name}"] = int(is_so)
    for storage in storages:
        for name, value in storage.counters.as_dict().items():
            counters[f"backend.{name}"] = counters.get(f"backend.{name}", 0) + value
    return counters
