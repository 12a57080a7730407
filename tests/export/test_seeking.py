"""SEEK_DATA and SEEK_HOLE that are cut short: never wrong, and always further on."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowfuse.driver.image import Image
from qcowfuse.fuse import seeking
from qcowfuse.fuse.seeking import DATA_SECONDS, FREE_LOOKS, HOLE_SECONDS, NO_DATA, Seeker
from tests.export.test_operations import errno_from, serve
from tests.support.memory_image import MemoryImage

CLUSTER = 512


class Clock:
    """Seconds that pass with every look."""

    def __init__(self, step: float) -> None:
        self.now = 0.0
        self.step = step

    def __call__(self) -> float:
        return self.now


class Clusters:
    """As much of an image as a seeker asks for: ``data`` says of each cluster whether it holds data."""

    def __init__(self, data: bytes, clock: Clock) -> None:
        self.data = data
        self.cluster_size = CLUSTER
        self.size = len(data) * CLUSTER
        self.n_looks = 0
        self.kept: list[int] = []
        self.tells_more = True
        self._clock = clock

    async def find_extent(self, guest_offset: int, n_bytes: int, *, keep: bool = True) -> tuple[bool, int]:
        """One cluster at a time."""
        assert 0 < n_bytes <= self.size - guest_offset
        self.n_looks += 1
        self._clock.now += self._clock.step
        if keep:
            self.kept.append(guest_offset)
        number = guest_offset // CLUSTER
        return bool(self.data[number]), (number + 1) * CLUSTER - guest_offset

    def try_find_extent(self, guest_offset: int, n_bytes: int) -> tuple[bool, int, bool] | None:
        """One cluster at a time; 2 stands for one that has to be read."""
        assert 0 < n_bytes <= self.size - guest_offset
        self.n_looks += 1
        self._clock.now += self._clock.step
        number = guest_offset // CLUSTER
        if self.data[number] == 2:
            return None
        n_bytes = (number + 1) * CLUSTER - guest_offset
        following = self.data[number + 1 : number + 2]
        is_followed = self.tells_more and following in (b"\0", b"\1") and following[0] != self.data[number]
        return bool(self.data[number]), n_bytes, is_followed and guest_offset + n_bytes < self.size


def seeker_on(data: bytes, step: float) -> tuple[Seeker, Clusters]:
    clock = Clock(step)
    clusters = Clusters(data, clock)
    image: Image = clusters  # type: ignore[assignment]  # all that a seeker uses
    return Seeker(image, clock=clock), clusters


async def test_answers_are_exact_where_there_is_time() -> None:
    """From the middle of clusters, too; and one look ends the search where it begins with what is wanted."""
    seeker, clusters = seeker_on(bytes([0, 0, 1, 1, 0, 1]), 0)
    end = clusters.size
    assert await seeker.seek(5, end, os.SEEK_DATA) == 2 * CLUSTER
    assert await seeker.seek(2 * CLUSTER + 7, end, os.SEEK_DATA) == 2 * CLUSTER + 7
    assert await seeker.seek(2 * CLUSTER + 7, end, os.SEEK_HOLE) == 4 * CLUSTER
    assert await seeker.seek(7, end, os.SEEK_HOLE) == 7
    assert await seeker.seek(5 * CLUSTER, end, os.SEEK_HOLE) == end
    seeker, clusters = seeker_on(bytes(4), 0)
    assert await seeker.seek(0, clusters.size, os.SEEK_DATA) is None


async def test_only_the_first_table_of_a_search_is_worth_keeping() -> None:
    """The caller comes back to the place that it asked for, or to the one that it is told."""
    seeker, clusters = seeker_on(bytes(20) + b"\1", 0)
    await seeker.seek(3 * CLUSTER, clusters.size, os.SEEK_DATA)
    assert clusters.kept == [3 * CLUSTER]


async def test_few_looks_are_never_too_late() -> None:
    """On a machine that does nothing else for an hour, small images are answered exactly."""
    seeker, clusters = seeker_on(bytes(FREE_LOOKS - 2) + b"\1", 3600)
    assert await seeker.seek(0, clusters.size, os.SEEK_DATA) == (FREE_LOOKS - 2) * CLUSTER
    seeker, clusters = seeker_on(b"\1" * (FREE_LOOKS - 2) + b"\0", 3600)
    assert await seeker.seek(0, clusters.size, os.SEEK_HOLE) == (FREE_LOOKS - 2) * CLUSTER


async def test_a_late_search_for_data_goes_on_when_asked_again() -> None:
    """What was named early is no hole, and the next search begins behind it."""
    n_clusters = 5 * FREE_LOOKS
    seeker, clusters = seeker_on(bytes(n_clusters), DATA_SECONDS)
    first = await seeker.seek(0, clusters.size, os.SEEK_DATA)
    assert first == FREE_LOOKS * CLUSTER
    assert seeker.try_seek(first, clusters.size, os.SEEK_HOLE) is None
    assert await seeker.seek(first, clusters.size, os.SEEK_HOLE) == first + CLUSTER
    second = await seeker.seek(first + CLUSTER, clusters.size, os.SEEK_DATA)
    assert second == (2 * FREE_LOOKS + 1) * CLUSTER
    assert await seeker.seek(first - 1, clusters.size, os.SEEK_HOLE) == first - 1


async def test_what_was_named_early_may_be_data_by_now() -> None:
    """Then the hole is where the data ends, at the latest at the end of the file."""
    seeker, clusters = seeker_on(bytes(FREE_LOOKS + 1), DATA_SECONDS)
    named = await seeker.seek(0, clusters.size, os.SEEK_DATA)
    assert named == FREE_LOOKS * CLUSTER
    clusters.data = clusters.data[:-1] + b"\1"
    assert await seeker.seek(named, clusters.size, os.SEEK_HOLE) == clusters.size


async def test_a_late_search_for_a_hole_names_the_end() -> None:
    """No hole is claimed that was not seen."""
    seeker, clusters = seeker_on(b"\1" * (3 * FREE_LOOKS) + b"\0", HOLE_SECONDS / FREE_LOOKS / 2)
    assert await seeker.seek(0, clusters.size, os.SEEK_HOLE) == clusters.size
    assert clusters.n_looks == 2 * FREE_LOOKS


@pytest.mark.parametrize("step", [0, seeking._QUESTION_SECONDS])
async def test_a_signal_ends_a_search(step: float) -> None:
    """The question is asked now and then while looks are quick, after each look while they are slow."""
    asked = 0

    def is_interrupted() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    seeker, clusters = seeker_on(bytes(100), step)
    n_expected = 3 if step else 3 * seeking._LOOKS_PER_QUESTION
    assert await seeker.seek(0, clusters.size, os.SEEK_DATA, is_interrupted) == n_expected * CLUSTER
    asked = 0
    clusters.data = b"\1" * 100
    assert await seeker.seek(0, clusters.size, os.SEEK_HOLE, is_interrupted) == clusters.size


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), step=st.sampled_from([0.0, HOLE_SECONDS / 8, HOLE_SECONDS * 2]))
async def test_a_copy_of_all_data_misses_none(seed: int, step: float) -> None:
    """A program that goes from data to hole and on, over an image with long and short runs, is told of every cluster
    with data, whenever its searches are cut short, and needs few calls."""
    chooser = random.Random(seed)
    data = bytearray()
    while len(data) < 4 * FREE_LOOKS:
        data += bytes([chooser.randrange(2)]) * chooser.choice([1, 2, 30, FREE_LOOKS * 2])
    seeker, clusters = seeker_on(bytes(data), step)
    is_interrupted: Callable[[], bool] = lambda: chooser.random() < 0.05  # noqa: E731
    copied = bytearray(len(data))
    place, n_calls = 0, 0
    while place < clusters.size:
        start = await seeker.seek(place, clusters.size, os.SEEK_DATA, is_interrupted)
        n_calls += 1
        if start is None:
            break
        assert start >= place
        place = await seeker.seek(start, clusters.size, os.SEEK_HOLE, is_interrupted) or 0
        assert place > start
        copied[start // CLUSTER : -(-place // CLUSTER)] = b"\1" * (-(-place // CLUSTER) - start // CLUSTER)
    assert all(is_copied or not holds for is_copied, holds in zip(copied, data, strict=True))
    assert n_calls <= len(data) // 2 + 1
    if not step:
        return
    assert clusters.n_looks <= 3 * len(data)


async def test_a_few_looks_in_memory_tell_the_same() -> None:
    """Of every place, or nothing: where much would have to be looked at, or something read."""
    seeker, clusters = seeker_on(bytes([0, 1, 1, 0, 0, 1] + [0] * 20 + [1, 0]), 0)
    n_told = 0
    for off in range(0, clusters.size, CLUSTER // 2):
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            told = seeker.try_seek(off, clusters.size, whence)
            n_told += told is not None
            found = await seeker.seek(off, clusters.size, whence)
            assert told in (None, NO_DATA if found is None else found)
            clusters.tells_more = not clusters.tells_more
    assert n_told > clusters.size // CLUSTER
    assert seeker.try_seek(6 * CLUSTER, clusters.size, os.SEEK_DATA) is None
    assert seeker.try_seek(clusters.size - CLUSTER, clusters.size, os.SEEK_DATA) == NO_DATA
    seeker, clusters = seeker_on(bytes([0, 2, 1]), 0)
    assert seeker.try_seek(0, clusters.size, os.SEEK_DATA) is None
    assert seeker.try_seek(0, clusters.size, os.SEEK_HOLE) == 0


async def test_the_file_answers_like_that() -> None:
    """lseek of the served file; behind its end there is nothing to find."""
    image = MemoryImage(8 * CLUSTER, cluster_size=CLUSTER)
    image.data[3 * CLUSTER] = 1
    operations = serve(image)
    assert await operations.lseek(0, os.SEEK_DATA) == 3 * CLUSTER
    assert await operations.lseek(3 * CLUSTER, os.SEEK_HOLE) == 4 * CLUSTER
    assert await errno_from(operations.lseek(4 * CLUSTER, os.SEEK_DATA)) == errno.ENXIO
    assert await errno_from(operations.lseek(image.size, os.SEEK_HOLE)) == errno.ENXIO
    assert await errno_from(operations.lseek(0, os.SEEK_SET)) == errno.EINVAL
    assert operations.gate.n_slow == 0


def test_a_search_at_once_ends_where_looks_are_slow() -> None:
    """No other request is answered meanwhile. A first look is always made."""
    seeker, clusters = seeker_on(bytes([0, 0, 0, 0, 0, 1]), 0.015)
    assert seeker.try_seek(0, clusters.size, os.SEEK_DATA) is None
    assert clusters.n_looks == 2
    assert seeker.try_seek(4 * CLUSTER, clusters.size, os.SEEK_DATA) == 5 * CLUSTER
    assert seeker.try_seek(0, clusters.size, os.SEEK_HOLE) == 0


def test_a_walk_takes_one_look_for_each_place_where_data_begins_or_ends() -> None:
    """Where the image knows what follows, no look is made to see it."""
    seeker, clusters = seeker_on(bytes([0, 1] * 20), 0)
    place = 0
    for turn in range(39):
        found = seeker.try_seek(place, clusters.size, (os.SEEK_DATA, os.SEEK_HOLE)[turn % 2])
        assert found == (turn + 1) * CLUSTER
        place = found
    assert clusters.n_looks == 39
