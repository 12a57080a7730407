"""Space goes back to the file system after the barrier, and never under a cluster that is in use again."""

from __future__ import annotations

import trio

from qcowfuse.storage.base import Storage
from tests.support.checker import check_image_bytes
from tests.support.forwarding import ForwardingStorage
from tests.support.images import TOP, ImageSpec, build_image, open_memory_image
from tests.support.memory_storage import MemoryStorage

KIB = 1 << 10
CLUSTER = 4096


class HeldPunches(ForwardingStorage):
    """Notes what happens in order; punches wait for :attr:`may_punch`."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.events: list[tuple[str, int, int]] = []
        self.reached = trio.Event()
        self.may_punch = trio.Event()

    async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
        """Wait first."""
        self.events.append(("punch begins", host_offset, n_bytes))
        self.reached.set()
        await self.may_punch.wait()
        await super().punch_hole(host_offset, n_bytes, in_use=in_use)
        self.events.append(("punched", host_offset, n_bytes))

    async def flush(self) -> None:
        """Note it."""
        await super().flush()
        self.events.append(("flushed", 0, 0))


async def test_a_cluster_that_is_being_punched_is_not_used_again() -> None:
    """Writers get other clusters while the hole is made; afterwards these are taken, and keep their data."""
    built = build_image(ImageSpec(cluster_size=CLUSTER, fill=1.0, size=256 * KIB))
    memory = MemoryStorage(built.top, suspend=True)
    held: list[HeldPunches] = []

    def wrap(inner: MemoryStorage) -> Storage:
        held.append(HeldPunches(inner))
        return held[0]

    image = await open_memory_image({**built.files, TOP: memory}, wrap=wrap)
    storage = held[0]
    await image.write_zeroes(0, 8 * CLUSTER, unmap=True)
    assert not storage.events, "nothing is given back before a flush"
    end_before = len(memory.data)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.flush)
        await storage.reached.wait()
        assert [event[0] for event in storage.events].count("flushed") >= 2, "punched before the unlink was durable"
        (_, punched_from, n_punched), *_ = [event for event in storage.events if event[0] == "punch begins"]
        for number in range(4):
            await image.write(number * CLUSTER, bytes([number + 1]) * CLUSTER)
        taken = memory.data.find(b"\x01" * CLUSTER)
        assert taken >= end_before, "a cluster was used under the hole"
        assert not punched_from <= taken < punched_from + n_punched
        storage.may_punch.set()
    for number in range(4, 8):
        await image.write(number * CLUSTER, bytes([number + 1]) * CLUSTER)
    reused = memory.data.find(b"\x05" * CLUSTER)
    assert punched_from <= reused < punched_from + n_punched, "the space is not used again"
    expected = b"".join(bytes([number + 1]) * CLUSTER for number in range(8)) + built.contents[8 * CLUSTER :]
    assert bytes(await image.read(0, image.size)) == expected
    await image.aclose()
    assert bytes(memory.data[reused : reused + CLUSTER]) == b"\x05" * CLUSTER
    assert check_image_bytes(memory.data).exit_code == 0


async def test_a_reader_in_flight_holds_the_punch_back() -> None:
    """A read that began before the discard gets the old bytes, however many flushes come in between."""
    built = build_image(ImageSpec(cluster_size=CLUSTER, fill=1.0, size=256 * KIB))
    memory = MemoryStorage(built.top, suspend=True)
    reading, may_read = trio.Event(), trio.Event()
    punched: list[int] = []

    class SlowReads(ForwardingStorage):
        async def pread(self, host_offset: int, n_bytes: int) -> bytes:
            if n_bytes == CLUSTER // 2:
                reading.set()
                await may_read.wait()
            return bytes(await super().pread(host_offset, n_bytes))

        async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
            punched.append(host_offset)
            await super().punch_hole(host_offset, n_bytes, in_use=in_use)

    image = await open_memory_image({**built.files, TOP: memory}, wrap=SlowReads)
    found: list[bytes] = []

    async def read() -> None:
        found.append(bytes(await image.read(0, CLUSTER // 2)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await reading.wait()
        await image.write_zeroes(0, CLUSTER, unmap=True)
        await image.flush()
        await image.flush()
        assert not punched
        may_read.set()
    assert found == [built.contents[: CLUSTER // 2]]
    await image.flush()
    assert len(punched) == 1
    await image.aclose()
    assert check_image_bytes(memory.data).exit_code == 0


async def test_a_cluster_with_another_reference_is_not_punched() -> None:
    """What a snapshot still has keeps its bytes."""
    built = build_image(ImageSpec(cluster_size=CLUSTER, fill=1.0, size=256 * KIB, snapshot=True))
    memory = MemoryStorage(built.top)
    punched: list[int] = []

    class Noting(ForwardingStorage):
        async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
            punched.append(host_offset)
            await super().punch_hole(host_offset, n_bytes, in_use=in_use)

    image = await open_memory_image({**built.files, TOP: memory}, wrap=Noting)
    await image.write_zeroes(0, 128 * KIB, unmap=True)
    await image.aclose()
    assert not punched
    assert check_image_bytes(memory.data).exit_code == 0
