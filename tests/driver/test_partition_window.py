"""A partition as a disk: what is done through the window is done to the partition, and to nothing else."""

from __future__ import annotations

import errno
import random

import pytest

from qcowfuse.driver.partition_window import PartitionWindow, open_partition, read_partition_table
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.errors import ImageUsageError, OutOfRangeError
from qcowfuse.partitions.values import Partition
from tests.support import battery
from tests.support.images import TOP, ImageSpec, build_image, open_memory_image, qemu_check, qemu_read
from tests.support.memory_image import MemoryImage
from tests.support.memory_storage import MemoryStorage
from tests.support.partition_tables import Entry, gpt_disk, mbr_disk

KIB = 1 << 10
START, N_BYTES = 40 * KIB + 512, 100 * KIB + 1536
SPECS = {
    "v3": ImageSpec(fill=0.5, zeroes=True),
    "v3 64k": ImageSpec(cluster_size=65536, fill=0.5),
    "v2": ImageSpec(version=2, fill=0.5),
    "v1": ImageSpec(version=1, fill=0.5),
    "extended": ImageSpec(size=512 * KIB, cluster_size=16384, extended_l2=True, fill=0.4, zeroes=True),
    "backing": ImageSpec(cluster_size=4096, fill=0.3, backing="qcow2", backing_size=200 * KIB),
    "data file": ImageSpec(cluster_size=4096, fill=0.5, data_file="plain"),
    "encrypted": ImageSpec(cluster_size=4096, fill=0.5, encryption="luks"),
}


def window_of(image: QcowImage | MemoryImage, start: int = START, n_bytes: int = N_BYTES) -> PartitionWindow:
    return PartitionWindow(image, Partition(2, start, n_bytes, "83", "Linux"))


@pytest.mark.parametrize("spec", SPECS)
async def test_the_window_is_the_partition_and_nothing_else(spec: str) -> None:
    """Random reads, writes, zeroes, discards and allocations by the window: the partition is what a model says, and
    all around it is what it was; QEMU agrees."""
    built = build_image(SPECS[spec])
    memory = MemoryStorage(built.top)
    image = await open_memory_image({**built.files, TOP: memory})
    window = window_of(image)
    assert (window.size, window.format_name) == (N_BYTES, f"{image.format_name}, partition 2")
    disk = bytearray(built.contents)
    chooser = random.Random(spec)
    for _ in range(150):
        at = chooser.randrange(N_BYTES)
        n_bytes = chooser.randint(1, min(N_BYTES - at, 9000))
        if chooser.random() < 0.1:
            at = N_BYTES - n_bytes
        data = chooser.randbytes(n_bytes)
        match chooser.randrange(6):
            case 0:
                await battery.write(window, at, data)
            case 1:
                await window.write(at, data)
            case 2 | 3 as kind:
                data = bytes(n_bytes)
                await window.write_zeroes(at, n_bytes, unmap=kind == 2)
            case 4:
                await window.allocate(at, n_bytes)
                continue
            case _:
                assert await battery.read(window, at, n_bytes) == disk[START + at : START + at + n_bytes]
                continue
        disk[START + at : START + at + n_bytes] = data
    await window.flush()
    assert bytes(await image.read(0, image.size)) == disk
    await window.aclose()
    after = {**built.files, TOP: bytes(memory.data)}
    if SPECS[spec].data_file is None:  # the test has no way to the bytes of that file
        assert qemu_read(after, format_name="qcow" if SPECS[spec].version == 1 else "qcow2") == disk
    if SPECS[spec].version > 1:
        assert qemu_check(after)[0] == 0


@pytest.mark.parametrize("inline", [True, False])
async def test_nothing_outside_is_ever_reached(inline: bool) -> None:
    """Each call with each place that is not wholly inside: refused at the start, and when awaited."""
    image = MemoryImage(1 << 20, inline=inline)
    image.data[:] = b"x" * len(image.data)
    window = window_of(image)
    huge = (1 << 64) - 512
    places = [(-1, 1), (-512, 1024), (N_BYTES, 1), (N_BYTES - 1, 2), (0, N_BYTES + 1), (huge, 512), (-START, 512)]
    for at, n_bytes in places:
        data = bytes(n_bytes)
        with pytest.raises(OutOfRangeError):
            window.start_read(at, n_bytes)
        with pytest.raises(OutOfRangeError):
            window.start_write(at, data)
        for call in (
            window.read(at, n_bytes),
            window.write(at, data),
            window.write_zeroes(at, n_bytes, unmap=True),
            window.allocate(at, n_bytes),
            window.find_extent(at, n_bytes),
        ):
            with pytest.raises(OutOfRangeError):
                await call
    with pytest.raises(OutOfRangeError):
        await window.read(0, -1)
    assert image.data == b"x" * len(image.data)


async def test_a_partition_cannot_grow() -> None:
    """What is behind it belongs to others."""
    with pytest.raises(OSError, match="cannot grow") as caught:
        await window_of(MemoryImage()).grow(1 << 21)
    assert caught.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("spec", ["v3", "v3 64k", "extended", "backing"])
async def test_extents_and_what_is_allocated_are_those_of_the_partition(spec: str) -> None:
    """By a walk over the extents of all of the disk, cut at the edges; and after writes and discards."""
    built = build_image(SPECS[spec])
    image = await open_memory_image({**built.files, TOP: MemoryStorage(built.top)})
    window = window_of(image)

    async def data_bytes() -> int:
        at, n_data = 0, 0
        while at < N_BYTES:
            is_data, n_bytes = await window.find_extent(at, N_BYTES - at)
            for sector in range(at, at + n_bytes, 512):
                assert await image.find_extent(START + sector, 512) == (is_data, 512)
            n_data += n_bytes if is_data else 0
            at += n_bytes
        return n_data

    await window.count_allocated()
    assert window.allocated_bytes() == await data_bytes()
    await window.write(60 * KIB, b"x" * 30000)
    await window.write_zeroes(0, N_BYTES // 2, unmap=True)
    # Clusters at the edges are counted whole where they are the window's in part.
    assert abs(window.allocated_bytes() - await data_bytes()) <= 2 * SPECS[spec].cluster_size
    await window.aclose()


async def test_a_count_during_which_something_is_written_is_never_too_low() -> None:
    """What was written before the walk came there, and what it has passed already, is in the count."""

    class Busy(MemoryImage):
        n_looks = 0

        async def find_extent(self, guest_offset: int, n_bytes: int, *, keep: bool = True) -> tuple[bool, int]:
            found = await super().find_extent(guest_offset, n_bytes, keep=keep)
            self.n_looks += 1
            if self.n_looks % 3 == 0:  # the cluster that has just been passed; other ones in each attempt
                place = guest_offset // self.cluster_size * self.cluster_size
                if not any(self.data[place : place + self.cluster_size]):
                    self.data[place] = 1
                    self.allocated += self.cluster_size
            return found

    image = Busy(1 << 20, cluster_size=4096)
    window = window_of(image, 0, 1 << 19)
    await window.count_allocated()
    true = sum(4096 for place in range(0, 1 << 19, 4096) if any(image.data[place : place + 4096]))
    assert true > 0
    assert window.allocated_bytes() >= true


async def test_partitions_are_opened_by_what_the_table_says() -> None:
    """By number and label of a GPT, and of an MBR; a refusal names the image and leaves it open."""
    image = MemoryImage(512 * 4096)
    image.data[:] = gpt_disk(4096, [Entry(100, 199, "root"), Entry(190, 300, "bad")])
    table = await read_partition_table(image)
    assert [partition.number for partition in table.partitions] == [1, 2]
    with pytest.raises(ImageUsageError, match=r"memory.qcow2: partition 2 can't be used: it lies over partition 1"):
        await open_partition(image, "bad")
    assert image.n_closes == 0
    image.data[:] = mbr_disk(4096, [(0, 0x83, 100, 100), (0, 0x83, 300, 50)])
    window = await open_partition(image, "2")
    await window.write(0, b"here")
    assert image.data[300 * 512 : 300 * 512 + 4] == b"here"
    assert window.size == 50 * 512
    await window.aclose()
    assert image.n_closes == 1
