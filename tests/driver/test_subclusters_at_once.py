"""Writes at once to clusters that an image owns already: subclusters, zero clusters, runs that are scattered.

1. What holds the order of such writes is in tests/crash: its images with extended entries are written at once there.
"""

from __future__ import annotations

import errno

import pytest

from tests.support.checker import check_image_bytes
from tests.support.faults import FaultyStorage
from tests.support.images import TOP, ImageSpec, build_image, open_memory_image, qemu_check, qemu_read
from tests.support.memory_storage import MemoryStorage
from tests.support.starting import write_at_once

KIB = 1 << 10
CLUSTER = 64 * KIB
SUBCLUSTER = CLUSTER // 32
EXTENDED = ImageSpec(size=8 * CLUSTER, cluster_size=CLUSTER, extended_l2=True)


class Disk:
    """An image in memory whose storage writes at once. ``expected`` is what the guest has written."""

    def __init__(self, spec: ImageSpec) -> None:
        self.spec = spec
        self.built = build_image(spec)
        self.memory = MemoryStorage(self.built.top)
        self.storage = FaultyStorage(self.memory, inline=True)
        self.expected = bytearray(self.built.contents)

    async def open(self) -> None:
        """Open it, and begin to write."""
        self.image = await open_memory_image({**self.built.files, TOP: self.memory}, wrap=lambda _: self.storage)
        await self.image.count_allocated()
        await self.image.write(self.spec.size - 512, b"e" * 512)
        self.expected[-512:] = b"e" * 512
        self.storage.operations.clear()

    def write(self, offset: int, data: bytes) -> list[int]:
        """Lengths of what was written to the file for it; none where it has to wait."""
        self.storage.operations.clear()
        if not write_at_once(self.image, offset, data):
            return []
        self.expected[offset : offset + len(data)] = data
        assert {operation.kind for operation in self.storage.operations} == {"write"}
        return [operation.n_bytes for operation in self.storage.operations]

    async def check(self) -> None:
        """The guest, QEMU and both checkers, after a close; and how much is allocated, as counted on the way."""
        assert bytes(await self.image.read(0, self.spec.size)) == self.expected
        n_allocated = self.image.allocated_bytes()
        await self.image.aclose()
        again = await open_memory_image({**self.built.files, TOP: bytes(self.memory.data)}, read_only=True)
        await again.count_allocated()
        assert again.allocated_bytes() == n_allocated
        await again.aclose()
        report = check_image_bytes(bytes(self.memory.data))
        assert (report.exit_code, report.leaks) == (0, 0)
        files = {**self.built.files, TOP: bytes(self.memory.data)}
        assert qemu_check(files)[0] == 0
        assert qemu_read(files) == self.expected


async def test_subclusters_of_a_cluster_that_is_there() -> None:
    """New ones are written whole, with zeroes around the data; those that are there just where the data is."""
    disk = Disk(EXTENDED)
    await disk.open()
    assert disk.write(100, b"a" * 100) == [100], "a fresh cluster"
    assert disk.write(5 * SUBCLUSTER + 100, b"b" * 100) == [SUBCLUSTER]
    assert disk.write(5 * SUBCLUSTER + 300, b"c" * 100) == [100]
    assert disk.write(4 * SUBCLUSTER + 100, b"d" * (3 * SUBCLUSTER)) == [100 + 3 * SUBCLUSTER + SUBCLUSTER - 100]
    assert disk.write(6 * SUBCLUSTER, b"f" * SUBCLUSTER) == [SUBCLUSTER]
    await disk.check()


async def test_what_lies_below_is_copied_by_the_way_that_waits() -> None:
    """A part of a subcluster over a backing file; a whole one needs nothing from there."""
    disk = Disk(
        ImageSpec(size=8 * CLUSTER, cluster_size=CLUSTER, extended_l2=True, backing="raw", backing_size=CLUSTER)
    )
    await disk.open()
    await disk.image.write(0, b"z" * SUBCLUSTER)
    disk.expected[:SUBCLUSTER] = b"z" * SUBCLUSTER
    assert not disk.write(3 * SUBCLUSTER + 100, b"a" * 100)
    assert disk.write(4 * SUBCLUSTER, b"b" * SUBCLUSTER) == [SUBCLUSTER]
    await disk.image.write(3 * SUBCLUSTER + 100, b"a" * 100)
    disk.expected[3 * SUBCLUSTER + 100 : 3 * SUBCLUSTER + 200] = b"a" * 100
    await disk.check()


async def test_zero_clusters_that_keep_their_place() -> None:
    """Written whole; and clusters in place that do not follow each other, one after the other."""
    disk = Disk(ImageSpec(size=256 * KIB, cluster_size=4 * KIB))
    await disk.open()
    for cluster in (5, 4, 3, 2):
        assert disk.write(cluster * 4 * KIB, b"x" * 4 * KIB) == [4 * KIB]
    assert disk.write(2 * 4 * KIB, b"y" * 16 * KIB) == [4 * KIB] * 4
    await disk.image.write_zeroes(2 * 4 * KIB, 8 * KIB, unmap=False)
    disk.expected[8 * KIB : 16 * KIB] = bytes(8 * KIB)
    assert disk.write(2 * 4 * KIB + 100, b"z" * 100) == [4 * KIB]
    assert disk.write(3 * 4 * KIB, b"w" * 512) == [4 * KIB]
    await disk.check()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
async def test_a_write_that_fails_keeps_the_cluster(code: int) -> None:
    """It reads as before, is still there once, and takes the next write."""
    disk = Disk(EXTENDED)
    await disk.open()
    assert disk.write(0, b"a" * SUBCLUSTER)
    disk.storage.check = lambda operation: code if operation.kind == "write" else 0
    for _ in range(3):
        with pytest.raises(OSError) as caught:
            disk.write(5 * SUBCLUSTER, b"b" * SUBCLUSTER)
        assert caught.value.errno == code
    disk.storage.check = None
    assert not any(await disk.image.read(SUBCLUSTER, 8 * SUBCLUSTER))
    assert disk.write(5 * SUBCLUSTER, b"c" * SUBCLUSTER) == [SUBCLUSTER]
    await disk.check()
