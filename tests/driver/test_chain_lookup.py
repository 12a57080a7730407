"""The look-up of a range through a chain: the same as cluster by cluster, and no entry counted twice."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import cast

import pytest

from qcowfuse.driver.layers.mapping import ChainLookup, Layer
from qcowfuse.driver.layers.table_cache import L2Slice
from qcowfuse.format.entries import ClusterKind
from qcowfuse.format.extents import MISS, Extent, Run

CLUSTER = 512
_SLICE = 16


class FakeLayer:
    """Clusters of ``kinds``; data lies at ten times its guest offset. ``n_counted``: entries that were looked at, 16
    of which are in a slice. One that is not in ``loaded`` is missing."""

    def __init__(self, kinds: Sequence[ClusterKind], size: int, loaded: set[int]) -> None:
        self.kinds = kinds
        self.size = size
        self.loaded = loaded
        self.n_counted = 0

    def lookup(self, guest_offset: int, n_bytes: int) -> Run:
        """See Layer."""
        if guest_offset // CLUSTER // _SLICE not in self.loaded:
            return Run(MISS, 0, 0)
        return self.lookup_in(None, guest_offset, n_bytes)

    def lookup_in(self, slice_: L2Slice | None, guest_offset: int, n_bytes: int) -> Run:
        """See Layer."""
        first = index = guest_offset // CLUSTER
        end = guest_offset + n_bytes
        kind = self.kinds[first]
        while index * CLUSTER < end and self.kinds[index] is kind and index // _SLICE == first // _SLICE:
            index += 1
        self.n_counted += index - first
        value = guest_offset * 10 if kind is ClusterKind.DATA else 0
        covered = n_bytes if kind is not ClusterKind.DATA else CLUSTER - guest_offset % CLUSTER
        return Run(kind, value, min(n_bytes, index * CLUSTER - guest_offset, covered))


def by_cluster(layers: Sequence[FakeLayer], guest_offset: int, n_bytes: int, first_layer: int) -> list[Extent]:
    """What holds each piece of a cluster, neighbours with nothing in them joined."""
    extents: list[Extent] = []
    position, end = guest_offset, guest_offset + n_bytes
    while position < end:
        stop = min(end, (position // CLUSTER + 1) * CLUSTER)
        found = Extent(ClusterKind.ZERO, -1, 0, position, stop - position)
        for number in range(first_layer, len(layers)):
            layer = layers[number]
            if position >= layer.size:
                break
            if stop > layer.size:
                stop = layer.size
                found = found._replace(n_bytes=stop - position)
            kind = layer.kinds[position // CLUSTER]
            if kind is not ClusterKind.UNALLOCATED:
                if kind is ClusterKind.DATA:
                    found = Extent(kind, number, position * 10, position, stop - position)
                break
        if extents and found.kind == extents[-1].kind == ClusterKind.ZERO:
            extents[-1] = extents[-1]._replace(n_bytes=extents[-1].n_bytes + found.n_bytes)
        else:
            extents.append(found)
        position = stop
    return extents


def found_by(layers: Sequence[FakeLayer], guest_offset: int, n_bytes: int, first_layer: int) -> list[Extent]:
    """By a look-up that loads what is missing."""
    lookup = ChainLookup(cast(Sequence[Layer], layers), guest_offset, n_bytes, first_layer=first_layer)
    missing = lookup.proceed()
    while missing is not None:
        cast(FakeLayer, missing).loaded.add(lookup.position // CLUSTER // _SLICE)
        missing = lookup.proceed(cast(L2Slice, object()))
    return [extent if extent.kind != ClusterKind.ZERO else extent._replace(layer=-1) for extent in lookup.extents]


@pytest.mark.parametrize("seed", range(4))
def test_a_range_is_found_as_its_clusters_are(seed: int) -> None:
    """Chains of any shape, layers that end early and inside of a cluster, slices that are loaded on the way."""
    chooser = random.Random(seed)
    kinds = [ClusterKind.UNALLOCATED, ClusterKind.ZERO, ClusterKind.DATA]
    for _ in range(60):
        n_clusters = chooser.choice([5, 40, 100])
        layers: list[FakeLayer] = []
        for _ in range(chooser.choice([1, 2, 3, 7])):
            weights = chooser.choice([[20, 1, 1], [1, 1, 1], [3, 0, 1], [1, 0, 0]])
            loaded = set(chooser.sample(range(7), chooser.randrange(8)))
            size = n_clusters * CLUSTER - (chooser.randrange(n_clusters * CLUSTER // 2) if layers else 0)
            layers.append(FakeLayer(chooser.choices(kinds, weights, k=n_clusters), size, loaded))
        for _ in range(6):
            first_layer = chooser.randrange(len(layers))
            size = layers[first_layer].size
            start = chooser.randrange(size)
            n_bytes = chooser.randint(1, size - start)
            expected = by_cluster(layers, start, n_bytes, first_layer)
            assert found_by(layers, start, n_bytes, first_layer) == expected


def test_a_run_is_counted_once() -> None:
    """Every other cluster of the lowest of eight layers: what lies above is not asked again for each."""
    n_clusters = 1024
    empty = [ClusterKind.UNALLOCATED] * n_clusters
    layers = [FakeLayer(empty, n_clusters * CLUSTER, set(range(64))) for _ in range(7)]
    layers.append(FakeLayer([ClusterKind.DATA, ClusterKind.ZERO] * 512, n_clusters * CLUSTER, set(range(64))))
    assert len(found_by(layers, 0, n_clusters * CLUSTER, 0)) == n_clusters
    assert [layer.n_counted for layer in layers] == [n_clusters] * 8
