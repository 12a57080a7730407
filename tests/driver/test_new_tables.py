"""New L2 tables that are made at once: nothing read for them, the same image as by waiting, and what errors leave."""

from __future__ import annotations

import errno
import random
import sys
from dataclasses import replace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qcowfuse.driver.layers import table_cache
from qcowfuse.driver.options import L2CacheSize
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.errors import CorruptImageError
from tests.support.checker import check_image_bytes
from tests.support.damage import COPIED, Tables
from tests.support.faults import FaultyStorage, Hold, Operation
from tests.support.images import (
    TOP,
    ImageSpec,
    build_image,
    open_memory_image,
    qemu_check,
    qemu_read,
    written_at_once,
)
from tests.support.limited_space import LimitedStorage, Room
from tests.support.memory_storage import MemoryStorage
from tests.support.old_bytes import UsedFile
from tests.support.scenarios import Fault, Scenario, run_scenario

KIB = 1 << 10
SPECS = {
    "standard": ImageSpec(),
    "version 2": ImageSpec(version=2),
    "version 1": ImageSpec(version=1),
    "version 1, tables larger than clusters": ImageSpec(version=1, l2_bits=8, size=512 * KIB),
    "extended": ImageSpec(cluster_size=16 * KIB, size=36 << 20, extended_l2=True),
    "encrypted": ImageSpec(size=256 * KIB, encryption="luks"),
    "over a backing file": ImageSpec(backing="raw", backing_size=100 * KIB),
    "clusters of 4 KiB": ImageSpec(cluster_size=4096, size=8 << 20),
}
"""Images whose tables map 32 KiB of the disk, or 2 MiB, or 16 MiB."""


def table_bytes(spec: ImageSpec) -> int:
    """What one table maps."""
    n_entries = 1 << spec.l2_bits if spec.version == 1 else spec.cluster_size // (16 if spec.extended_l2 else 8)
    return n_entries * spec.cluster_size


class Opened:
    """An image that has been written to once, at its start, with what reaches its file."""

    def __init__(self, image: QcowImage, storage: FaultyStorage, memory: MemoryStorage) -> None:
        self.image = image
        self.storage = storage
        self.memory = memory

    def kinds(self) -> list[str]:
        """Of the operations since the last time."""
        found: list[str] = [operation.kind for operation in self.storage.operations]
        self.storage.operations.clear()
        return found

    def write(self, offset: int, data: bytes) -> bool:
        """See :func:`~tests.support.images.written_at_once`."""
        return written_at_once(self.image, offset, data)


async def opened(spec: ImageSpec, *, inline: bool = True, cache: L2CacheSize | None = None) -> Opened:
    built = build_image(spec)
    files = {path: MemoryStorage(part) for path, part in built.files.items()}
    made: list[FaultyStorage] = []

    def wrap(inner: MemoryStorage) -> FaultyStorage:
        made.append(FaultyStorage(inner, inline=inline))
        return made[0]

    image = await open_memory_image(files, wrap=wrap, cache=cache)
    await image.write(0, b"begin")
    made[0].operations.clear()
    return Opened(image, made[0], files[TOP])


@pytest.mark.parametrize("kind", SPECS)
async def test_a_table_is_made_at_once(kind: str) -> None:
    """One write for it and one for the data; nothing is read, and nothing waits. QEMU reads the outcome."""
    spec = SPECS[kind]
    disk = await opened(spec)
    # Above the backing file a cluster of which only a part is written is copied, and that waits.
    first = spec.backing_size // table_bytes(spec) + 1
    places = range(first * table_bytes(spec), spec.size, table_bytes(spec))[:4]
    assert len(places) >= 2
    for place in places:
        assert disk.write(place, b"x" * 1024)
        assert disk.kinds() == ["write", "write"], "the table, and the cluster"
        assert disk.write(place + 4 * spec.cluster_size, b"y" * 512)
        assert disk.kinds() == ["write"]
    read = bytes(await disk.image.read(0, spec.size))
    for place in places:
        assert read[place : place + 1024] == b"x" * 1024
    await disk.image.aclose()
    assert check_image_bytes(bytes(disk.memory.data)).exit_code == 0
    files = {**build_image(spec).files, TOP: bytes(disk.memory.data)}
    if spec.version > 1:
        assert qemu_check(files)[0] == 0
    if not spec.encryption:
        assert qemu_read(files, format_name="qcow" if spec.version == 1 else "qcow2") == read


@pytest.mark.parametrize("kind", ["standard", "version 1", "extended", "over a backing file"])
@pytest.mark.parametrize("tiny", [False, True])
async def test_the_outcome_is_that_of_waiting(kind: str, tiny: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is written, zeroed and flushed in between: the same bytes, the same number of clusters, no leak; also
    where the cache holds hardly anything, so that dirty slices have to be written back first."""
    if tiny:
        monkeypatch.setattr(table_cache, "MIN_DIRTY_BYTES", 1024)
    spec, cache = SPECS[kind], L2CacheSize(n_tables=0 if tiny else 4)
    outcomes = []
    for inline in (False, True):
        chooser = random.Random(len(kind))
        disk = await opened(spec, inline=inline, cache=cache)
        for _ in range(60):
            place = chooser.randrange(spec.size // 512) * 512
            n_bytes = min(chooser.choice([512, 3 * KIB, 40 * KIB]), spec.size - place)
            action = chooser.random()
            if action < 0.7:
                await disk.image.write(place, chooser.randbytes(n_bytes))
            elif action < 0.9:
                await disk.image.write_zeroes(place, n_bytes, unmap=action < 0.8)
            else:
                await disk.image.flush()
        read = bytes(await disk.image.read(0, spec.size))
        await disk.image.aclose()
        report = check_image_bytes(bytes(disk.memory.data))
        assert (report.exit_code, report.leaks) == (0, 0)
        again = await open_memory_image({**build_image(spec).files, TOP: bytes(disk.memory.data)}, read_only=True)
        assert bytes(await again.read(0, spec.size)) == read
        await again.aclose()
        outcomes.append((read, len(disk.memory.data)))
    assert outcomes[0] == outcomes[1]


async def test_others_are_made_while_one_is_waited_for() -> None:
    """But not the same one: that would be linked twice."""
    disk = await opened(ImageSpec())
    hold = Hold(lambda operation: operation.kind == "write")
    disk.storage.gate = hold
    assert disk.image.changes is not None
    writer = disk.image.changes.writer_at_once
    disk.storage.inline, writer.too_long = False, 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.image.write, 100 * KIB, b"first")
        await wait_all_tasks_blocked()
        disk.storage.inline, writer.too_long = True, sys.maxsize
        assert disk.write(200 * KIB, b"second")
        assert not disk.write(100 * KIB + 512, b"third")
        hold.release()
    for place, data in ((100, b"first"), (200, b"second")):
        assert bytes(await disk.image.read(place * KIB, 512)) == data.ljust(512, b"\0")
    await disk.image.aclose()
    report = check_image_bytes(bytes(disk.memory.data))
    assert (report.exit_code, report.leaks) == (0, 0)


async def test_a_table_of_a_snapshot_is_not_made_at_once() -> None:
    """It is a copy, and what is copied has to be read."""
    spec = ImageSpec(fill=1.0, snapshot=True)
    disk = await opened(spec)
    assert not disk.write(100 * KIB, b"x" * 512)
    await disk.image.write(100 * KIB, b"x" * 512)
    assert bytes(await disk.image.read(100 * KIB, 1024))[:512] == b"x" * 512
    await disk.image.aclose()
    assert check_image_bytes(bytes(disk.memory.data)).exit_code == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
async def test_a_table_that_cannot_be_written(code: int) -> None:
    """The write fails and nothing is linked; the next one succeeds. Nothing is leaked."""

    def check(operation: Operation) -> int:
        return code if operation.kind == "write" else 0

    n_bytes = []
    for n_failures in (0, 3):
        disk = await opened(ImageSpec())
        disk.storage.check = check
        for _ in range(n_failures):
            with pytest.raises(OSError) as caught:
                disk.write(100 * KIB, b"x" * 512)
            assert caught.value.errno == code
        disk.storage.check = None
        assert not any(await disk.image.read(64 * KIB, 64 * KIB))
        assert disk.write(100 * KIB, b"x" * 512)
        await disk.image.aclose()
        report = check_image_bytes(bytes(disk.memory.data))
        assert (report.exit_code, report.leaks) == (0, 0)
        n_bytes.append(len(disk.memory.data))
    assert n_bytes[0] == n_bytes[1], "the clusters that were given back are taken"


async def test_a_storage_that_does_not_write_at_once() -> None:
    """The write is left to the way that waits, with nothing taken."""
    disk = await opened(ImageSpec())
    disk.storage.inline = False
    assert not disk.write(100 * KIB, b"x" * 512)
    assert not disk.kinds()
    disk.storage.inline = True
    assert not disk.write(200 * KIB, b"x" * 512), "it is not asked again"
    await disk.image.write(100 * KIB, b"y" * 512)
    await disk.image.aclose()
    report = check_image_bytes(bytes(disk.memory.data))
    assert (report.exit_code, report.leaks) == (0, 0)


@pytest.mark.parametrize("inline", [True, False], ids=["at-once", "awaited"])
async def test_a_new_table_is_guarded(inline: bool) -> None:
    """A damaged entry that points behind the end of the file, where the table is made, leads no data into it."""
    cluster = 4 * KIB
    memory = MemoryStorage(build_image(SPECS["clusters of 4 KiB"]).top)
    image = await open_memory_image({TOP: memory})
    await image.write(0, b"x" * cluster)
    await image.aclose()
    data = memory.data
    place = next(Tables(data).l2_entries())
    table = (-(-len(data) // cluster) + 2) * cluster
    data[place + 8 : place + 16] = (COPIED | table).to_bytes(8, "big")
    made: list[FaultyStorage] = []

    def wrap(inner: MemoryStorage) -> FaultyStorage:
        made.append(FaultyStorage(inner, inline=inline))
        return made[0]

    damaged = MemoryStorage(bytes(data))
    image = await open_memory_image({TOP: damaged}, wrap=wrap)
    await image.write(4 << 20, b"y" * cluster)  # in a table, too
    assert written_at_once(image, 2 << 20, b"z" * cluster) is inline
    if not inline:
        await image.write(2 << 20, b"z" * cluster)
    with pytest.raises(CorruptImageError):
        await image.write(cluster, b"w" * cluster)
    assert bytes(await image.read(2 << 20, cluster)) == b"z" * cluster
    assert bytes(damaged.data[table : table + cluster]) == bytes(cluster), "the new table, not linked yet"
    await image.aclose()


async def test_a_table_is_not_made_before_its_link_has_space() -> None:
    """The L1 table has a hole where the entry comes to lie. Whatever room there is: a write that succeeded, at once
    or not, can be flushed."""
    spec = ImageSpec(size=4 << 20)
    memory = MemoryStorage(build_image(spec).top)
    image = await open_memory_image({TOP: memory})
    await image.write(0, b"x" * 512)
    await image.aclose()
    n_accepted = 0
    for n_blocks in range(6):
        room = Room()
        image = await open_memory_image({TOP: LimitedStorage(memory.data, room)})
        await image.write(1024, b"y" * 512)
        room.limit = n_blocks
        place = 100 * 32 * KIB
        try:
            if not written_at_once(image, place, b"z" * 512):
                await image.write(place, b"z" * 512)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        else:
            n_accepted += 1
        await image.flush()
        await image.aclose()
    assert 0 < n_accepted < 6


async def test_dirty_tables_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what may be kept they are written back first, and that waits."""
    monkeypatch.setattr(table_cache, "MIN_DIRTY_BYTES", 2048)
    disk = await opened(ImageSpec(), cache=L2CacheSize(n_tables=0))
    at_once = [disk.write(number * 32 * KIB, b"x" * 512) for number in range(1, 8)]
    assert at_once == [True] * 4 + [False] * 3
    await disk.image.write(200 * KIB, b"y" * 512)
    assert disk.write(240 * KIB, b"x" * 512)
    await disk.image.aclose()
    assert check_image_bytes(bytes(disk.memory.data)).exit_code == 0


NEW_TABLES = tuple(
    ("write", (number * 7 % 8) * 32 * KIB + 512 * number, 1024, number) if number % 5 else ("flush",)
    for number in range(1, 24)
)


@pytest.mark.parametrize("spec", [ImageSpec(), replace(ImageSpec(), version=1), ImageSpec(refcount_bits=64)])
async def test_power_cuts_among_new_tables(spec: ImageSpec) -> None:
    """At any moment: no table without its contents, no byte lost that an fsync had promised."""
    outcome = await run_scenario(Scenario(spec, NEW_TABLES), n_states=120, n_qemu=1)
    assert not outcome.problems


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
async def test_each_operation_fails_once_among_new_tables(code: int) -> None:
    """The error is heard of, the rest goes on, and a close without an error leaves a consistent image."""
    spec = ImageSpec()
    steps = NEW_TABLES[:7]
    n_operations = (await run_scenario(Scenario(spec, steps), n_states=0)).n_operations
    assert n_operations > 20
    for number in range(n_operations):
        outcome = await run_scenario(Scenario(spec, steps, fault=Fault(number, code)), n_states=0)
        assert not outcome.problems, number


async def test_a_table_takes_a_cluster_with_old_bytes() -> None:
    """What was in a cluster that was given back is no entry of the table that takes it, on disk either: all of the
    table is written, not only the entries that change."""
    spec = SPECS["clusters of 4 KiB"]  # a table has eight sectors, which are written as they change
    built = build_image(spec)
    memory = UsedFile(built.top)
    image = await open_memory_image({**built.files, TOP: memory})
    await image.write(0, b"\xff" * 128 * KIB)
    await image.flush()
    await image.write_zeroes(0, 128 * KIB, unmap=True)
    await image.flush()
    await image.flush()
    n_before = len(memory.data)
    for place in range(table_bytes(spec), spec.size, table_bytes(spec)):
        await image.write(place, b"x" * 512)
    assert len(memory.data) == n_before, "clusters that were given back are taken"
    expected = b"".join(
        b"x" * 512 + bytes(table_bytes(spec) - 512) for _ in range(spec.size // table_bytes(spec) - 1)
    )
    await image.flush()
    assert qemu_read({TOP: memory.data})[table_bytes(spec) :] == expected, "after an fsync"
    await image.aclose()
    assert check_image_bytes(memory.data).exit_code == 0
    assert qemu_read({TOP: memory.data})[table_bytes(spec) :] == expected
