"""Small reads down a chain: the same bytes and counters as by the long way, and no answer for what is not plain."""

from __future__ import annotations

import random

import pytest

from qcowfuse.driver.layers.mapping import lookup_chain
from qcowfuse.driver.options import L2CacheSize
from qcowfuse.driver.pending import PendingRead
from qcowfuse.driver.qcow_image import QcowImage
from tests.support.images import TOP, BuiltImage, ImageSpec, build_image, open_memory_image
from tests.support.starting import read_at_once

KIB = 1 << 10
SPECS = {
    "plain": ImageSpec(cluster_size=4096, size=512 * KIB, fill=0.5),
    "v1": ImageSpec(version=1, cluster_size=4096, size=512 * KIB, fill=0.5),
    "zeroes": ImageSpec(cluster_size=4096, size=512 * KIB, fill=0.8, zeroes=True),
    "over-raw": ImageSpec(cluster_size=4096, size=512 * KIB, fill=0.3, backing="raw", backing_size=300 * KIB),
    "over-qcow2": ImageSpec(cluster_size=512, size=512 * KIB, fill=0.3, backing="qcow2", backing_size=300 * KIB),
    "compressed": ImageSpec(cluster_size=4096, fill=0.6, compression="zlib"),
    "extended": ImageSpec(cluster_size=16 * KIB, size=512 * KIB, fill=0.5, extended_l2=True),
}


async def opened(built: BuiltImage) -> QcowImage:
    """The image, with all its tables in memory."""
    cache = L2CacheSize(n_bytes=1 << 20)
    image = await open_memory_image({**built.files, TOP: built.top}, read_only=True, cache=cache)
    await image.read(0, image.size)
    return image


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
async def test_same_bytes_as_by_the_long_way(spec: ImageSpec) -> None:
    """Wherever there is a quick answer it is the right one, at any offset and length, at the ends of layers too."""
    built = build_image(spec)
    image = await opened(built)
    quick = image.reader.start_quickly
    chooser = random.Random(1)
    n_answers = 0
    for _ in range(3000):
        n_bytes = chooser.choice([1, 511, 512, 4096, 5000])
        start = chooser.randrange(image.size - n_bytes + 1)
        start = chooser.choice([start, start & ~511, min(300 * KIB - 256, image.size - n_bytes)])
        data = quick(start, n_bytes)
        if data is not None:
            n_answers += 1
            assert not isinstance(data, PendingRead)
            assert bytes(data) == built.contents[start : start + n_bytes]
    assert read_at_once(image, image.size, 0) == b""
    assert (n_answers > 0) is (spec.extended_l2 is False)
    await image.aclose()


async def test_hits_are_counted_as_by_the_long_way() -> None:
    """Each table that is looked at is one hit, whichever way a read goes."""
    image = await opened(build_image(SPECS["over-qcow2"]))
    cache = image.cache
    n_answers = 0
    for start in range(0, 200 * KIB, 512):
        before = cache.hits
        if image.reader.start_quickly(start, 512) is None:  # its table has left the cache
            continue
        n_answers += 1
        quick = cache.hits - before
        lookup_chain(image.layers, start, 512)
        assert cache.hits - before == 2 * quick
    assert n_answers > 20
    await image.aclose()
