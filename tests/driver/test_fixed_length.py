"""An image on what never changes its length, and holds anything where nothing was written: a block device."""

from __future__ import annotations

import errno
import random
import struct
from typing import Literal

import pytest

from tests.support.damage import COPIED, Tables
from tests.support.images import DATA, TOP, ImageSpec, build_image, open_memory_image, qemu_check, qemu_read
from tests.support.old_bytes import Device
from tests.support.oracle import DiskModel, first_difference

SIZE = 2 << 20


def with_noise(image: bytes, n_bytes: int) -> bytes:
    """The contents of a device of that length."""
    return image + random.Random(n_bytes).randbytes(n_bytes - len(image))


@pytest.mark.parametrize("suspend", [False, True])
@pytest.mark.parametrize(
    ("cluster_size", "refcount_bits", "n_bytes"),
    [(512, 64, 900 << 10), (512, 16, (700 << 10) + 256), (4096, 16, 1 << 20), (65536, 16, (20 << 16) + 512)],
)
async def test_writes_and_discards_until_it_is_full(
    cluster_size: int, refcount_bits: int, n_bytes: int, suspend: bool
) -> None:
    """Whatever finds no room says so and changes nothing; all else is read, and a discard makes room again."""
    built = build_image(ImageSpec(size=SIZE, cluster_size=cluster_size, refcount_bits=refcount_bits))
    device = Device(with_noise(built.top, n_bytes), suspend=suspend)
    image = await open_memory_image({TOP: device})
    model = DiskModel(bytes(SIZE))
    chooser = random.Random(cluster_size + refcount_bits)
    n_full = n_after = 0
    for number in range(400):
        place = chooser.randrange(SIZE >> 9) << 9
        length = min(chooser.choice((512, 4096, 20_480, 70_144)), SIZE - place)
        if number % 8 == 7:
            place = place // cluster_size * cluster_size
            length = min(max(length, 2 * cluster_size), SIZE - place)
            await image.write_zeroes(place, length, unmap=True)
            model.write(place, bytes(length))
        else:
            data = chooser.randbytes(length)
            try:
                await image.write(place, data)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                n_full += 1
                # Part of it may be there: what the disk says now is what it has to go on saying.
                model.write(place, bytes(await image.read(place, length)))
            else:
                model.write(place, data)
                n_after += bool(n_full)
        if number % 16 == 0:
            await image.flush()
            assert not first_difference(bytes(await image.read(0, SIZE)), model.data)
    assert n_full > 5
    assert n_after > 5
    assert device.n_discarded > 0
    assert not first_difference(bytes(await image.read(0, SIZE)), model.data)
    await image.aclose()
    assert len(device.data) == n_bytes
    files = {TOP: bytes(device.data)}
    code, said = qemu_check(files)
    assert code == 0, said
    assert not first_difference(qemu_read(files), model.data)


class GrowingDevice(Device):
    """Its length is what it was when it was asked for last."""

    def __init__(self, data: bytes, *, suspend: bool, name: str = "device") -> None:
        super().__init__(data, suspend=suspend, name=name)
        self.n_known = len(data)

    def size(self) -> int:
        """See Storage."""
        return self.n_known

    def refresh_size(self) -> None:
        """See Storage."""
        self.n_known = len(self.data)

    def enlarge(self, n_bytes: int) -> None:
        self.data += random.Random(n_bytes).randbytes(n_bytes)


@pytest.mark.parametrize("suspend", [False, True])
@pytest.mark.parametrize(("cluster_size", "refcount_bits"), [(512, 64), (4096, 16), (65536, 16)])
async def test_a_device_that_is_enlarged(cluster_size: int, refcount_bits: int, suspend: bool) -> None:
    """While it is in use and full: writing goes on, each time as far as there is room, also behind an odd end."""
    built = build_image(ImageSpec(size=SIZE, cluster_size=cluster_size, refcount_bits=refcount_bits))
    device = GrowingDevice(with_noise(built.top, 9 * 65536), suspend=suspend)
    image = await open_memory_image({TOP: device})
    model = DiskModel(bytes(SIZE))
    data = random.Random(cluster_size).randbytes(SIZE)

    async def fill() -> int:
        """Write from the beginning of the disk on; how many clusters could be written."""
        for place in range(0, SIZE, cluster_size):
            piece = data[place : place + cluster_size]
            try:
                await image.write(place, piece)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return place // cluster_size
            model.write(place, piece)
        return SIZE // cluster_size

    n_before = await fill()
    device.enlarge(cluster_size - 1)
    assert await fill() == n_before  # there is no whole cluster more
    device.enlarge(1 + 2 * 65536)
    n_then = await fill()
    assert n_before < n_then < SIZE // cluster_size
    await image.flush()
    device.enlarge(64 * 65536)
    assert await fill() == SIZE // cluster_size
    assert not first_difference(bytes(await image.read(0, SIZE)), model.data)
    await image.aclose()
    files = {TOP: bytes(device.data)}
    code, said = qemu_check(files)
    assert code == 0, said
    assert not first_difference(qemu_read(files), model.data)


@pytest.mark.parametrize("suspend", [False, True])
async def test_a_data_file_on_a_device_that_is_enlarged(suspend: bool) -> None:
    """What lies behind its old end is noise: new clusters there are zeroes around what was written."""
    cluster_size = 4096
    built = build_image(ImageSpec(size=SIZE, cluster_size=cluster_size, data_file="plain"))
    device = GrowingDevice(with_noise(b"", SIZE // 4), suspend=suspend, name=DATA)
    image = await open_memory_image({**built.files, DATA: device})
    with pytest.raises(OSError) as caught:
        await image.write(SIZE // 2, b"x" * 512)
    assert caught.value.errno == errno.ENOSPC
    device.enlarge(SIZE * 3 // 4)
    model = DiskModel(bytes(SIZE))
    for place in range(SIZE // 2, SIZE, 5 * cluster_size):
        await image.write(place + 1024, b"y" * 512)
        model.write(place + 1024, b"y" * 512)
    assert not first_difference(bytes(await image.read(0, SIZE)), model.data)
    await image.aclose()


@pytest.mark.parametrize("kind", ["plain", "raw"])
async def test_the_disk_grows_with_the_device_of_its_data_file(kind: Literal["plain", "raw"]) -> None:
    """Up to the device's new end and not further; a raw data file goes on with what is there, others with zeroes."""
    built = build_image(ImageSpec(size=SIZE, cluster_size=4096, data_file=kind))
    device = GrowingDevice(with_noise(built.files[DATA][:SIZE].ljust(SIZE, b"\0"), SIZE), suspend=True, name=DATA)
    image = await open_memory_image({**built.files, DATA: device})
    with pytest.raises(OSError) as caught:
        await image.grow(2 * SIZE)
    assert caught.value.errno == errno.EFBIG
    assert image.size == SIZE
    device.enlarge(2 * SIZE)
    await image.grow(2 * SIZE)
    behind = bytes(device.data[SIZE : 2 * SIZE]) if kind == "raw" else bytes(SIZE)
    assert not first_difference(bytes(await image.read(SIZE, SIZE)), behind)
    with pytest.raises(OSError) as caught:
        await image.grow(4 * SIZE)
    assert caught.value.errno == errno.EFBIG
    await image.write(2 * SIZE - 512, b"z" * 512)
    await image.aclose()


def small_clusters() -> bytes:
    """An image whose L1 table has as many clusters as a refcount block counts when the disk has 510 MiB."""
    return build_image(ImageSpec(size=SIZE, cluster_size=512, fill=0.2)).top


@pytest.mark.parametrize("size", [509 << 20, 511 << 20, 4 << 30])
async def test_a_table_that_no_refcount_block_counts_alone(size: int) -> None:
    """It goes behind all that is in use, where the blocks that count it lie behind it."""
    device = Device(with_noise(small_clusters(), 8 << 20), suspend=True)
    image = await open_memory_image({TOP: device})
    before = bytes(await image.read(0, SIZE))
    await image.grow(size)
    await image.write(size - 4096, b"x" * 4096)
    assert bytes(await image.read(size - 8192, 8192)) == bytes(4096) + b"x" * 4096
    assert not first_difference(bytes(await image.read(0, SIZE)), before)
    await image.aclose()
    code, said = qemu_check({TOP: bytes(device.data)})
    assert code == 0, said


async def test_a_device_that_has_no_room_for_such_a_table() -> None:
    """The disk stays as it is, and every cluster can be had."""
    device = Device(with_noise(small_clusters(), 1 << 20), suspend=True)
    image = await open_memory_image({TOP: device})
    with pytest.raises(OSError) as caught:
        await image.grow(8 << 30)
    assert caught.value.errno == errno.ENOSPC
    assert image.size == SIZE
    await image.write(SIZE - 4096, b"x" * 4096)
    await image.aclose()
    code, said = qemu_check({TOP: bytes(device.data)})
    assert code == 0, said


async def test_such_a_table_keeps_off_clusters_that_are_not_counted() -> None:
    """A damaged image on a device has data where its counts end: a large table goes behind that, too."""
    data = bytearray(with_noise(small_clusters(), 8 << 20))
    place = next(Tables(data).l2_entries())
    uncounted = 1 << 20
    struct.pack_into(">Q", data, place, COPIED | uncounted)
    device = Device(bytes(data), suspend=True)
    before = bytes(device.data[uncounted : uncounted + 512])
    image = await open_memory_image({TOP: device})
    await image.grow(6 << 30)
    await image.flush()
    assert bytes(device.data[uncounted : uncounted + 512]) == before
    assert image.size == 6 << 30
    await image.aclose()
