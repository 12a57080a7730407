"""New clusters of an external data file that are written at once: the outcome of waiting, and what errors leave."""

from __future__ import annotations

import errno
import random
from collections.abc import Sequence
from typing import Literal

import pytest

from qcowfuse.buffer import Buffer
from qcowfuse.driver.pending import PendingPlace
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.storage.base import of_whole_pages
from tests.support.checker import check_image_bytes
from tests.support.faults import Check, FaultyStorage
from tests.support.images import (
    DATA,
    TOP,
    ImageSpec,
    build_image,
    open_memory_image,
    qemu_check,
    qemu_read,
    written_at_once,
)
from tests.support.memory_storage import MemoryStorage

KIB = 1 << 10
CLUSTER = 4096
SPECS = {
    "plain": ImageSpec(size=64 * KIB, cluster_size=CLUSTER, fill=0.5, data_file="plain"),
    "raw": ImageSpec(size=64 * KIB, cluster_size=CLUSTER, fill=0.5, data_file="raw"),
    "over a backing file": ImageSpec(
        size=64 * KIB, cluster_size=CLUSTER, data_file="plain", backing="raw", backing_size=32 * KIB
    ),
    "extended": ImageSpec(size=256 * KIB, cluster_size=16 * KIB, extended_l2=True, data_file="plain"),
    "extended, raw": ImageSpec(size=256 * KIB, cluster_size=16 * KIB, extended_l2=True, fill=0.5, data_file="raw"),
}
"""Each has one L2 table. QEMU links every cluster of a disk with a raw data file: new ones are there only when it has
grown."""


class Disk:
    """An image with a data file, grown to twice its size; the new half has a table, and a cluster at either end."""

    def __init__(
        self, spec: ImageSpec, image: QcowImage, storages: dict[str, FaultyStorage], memory: dict[str, MemoryStorage]
    ) -> None:
        self.spec = spec
        self.image = image
        self.storages = storages
        self.memory = memory

    def fail(self, check: Check | None) -> None:
        """Let it say which operations on either file fail."""
        for storage in self.storages.values():
            storage.check = check

    def writes_to(self, path: str) -> list[tuple[int, int]]:
        """Offset and length of the writes since the last time."""
        operations = self.storages[path].operations
        found = [(operation.host_offset, operation.n_bytes) for operation in operations if operation.kind == "write"]
        operations.clear()
        return found

    def write(self, offset: int, data: bytes) -> bool:
        """See :func:`~tests.support.images.written_at_once`."""
        return written_at_once(self.image, offset, data)

    async def close(self) -> dict[str, bytes]:
        """The files that are left, which both checkers find sound."""
        await self.image.aclose()
        files = {**build_image(self.spec).files, **{path: bytes(part.data) for path, part in self.memory.items()}}
        report = check_image_bytes(files[TOP])
        assert (report.exit_code, report.leaks) == (0, 0)
        assert qemu_check(files)[0] == 0
        return files


async def opened(
    spec: ImageSpec, *, inline: bool = True, kinds: dict[str, type[MemoryStorage]] | None = None
) -> Disk:
    """What lies in places that nothing links is no zeroes, but for a raw data file: growing links what is there."""
    built = build_image(spec)
    memory = {path: (kinds or {}).get(path, MemoryStorage)(built.files[path], name=path) for path in (TOP, DATA)}
    data = memory[DATA].data
    data[:] = data[: spec.size].ljust(spec.size, b"\0") + (b"\xee" * spec.size if spec.data_file == "plain" else b"")
    storages: dict[str, FaultyStorage] = {}

    def wrap(inner: MemoryStorage) -> FaultyStorage:
        return storages.setdefault(inner.name, FaultyStorage(inner, inline=inline))

    image = await open_memory_image({**built.files, **memory}, wrap=wrap, wrap_data=wrap)
    await image.grow(2 * spec.size)
    await image.write(spec.size, b"begin")
    await image.write(2 * spec.size - 512, b"end")  # no place before it is known to be a hole
    for storage in storages.values():
        storage.operations.clear()
    return Disk(spec, image, storages, memory)


@pytest.mark.parametrize("kind", SPECS)
async def test_a_new_cluster_is_written_at_once(kind: str) -> None:
    """One write to the data file, of a whole cluster (subcluster) in its own place, and none to the image."""
    spec = SPECS[kind]
    disk = await opened(spec)
    grain = spec.cluster_size // 32 if spec.extended_l2 else spec.cluster_size
    places = range(spec.size + 2 * spec.cluster_size, 2 * spec.size, 3 * spec.cluster_size)
    assert len(places) >= 4
    for place in places:
        assert disk.write(place + 200, b"x" * 100)
        assert disk.writes_to(DATA) == [(place, grain)]
        assert disk.write(place + 300, b"y" * 100)
        assert disk.writes_to(DATA) == [(place + 300, 100)], "in place"
        assert not disk.writes_to(TOP)
    read = bytes(await disk.image.read(0, 2 * spec.size))
    for place in places:
        assert read[place : place + spec.cluster_size] == (bytes(200) + b"x" * 100 + b"y" * 100).ljust(
            spec.cluster_size, b"\0"
        )
    files = await disk.close()
    assert qemu_read(files) == read
    if spec.data_file == "raw":
        assert files[DATA] == read


@pytest.mark.parametrize("kind", SPECS)
async def test_the_outcome_is_that_of_waiting(kind: str) -> None:
    """Whatever is written, zeroed and flushed in between: the same disk, and the same bytes in both files."""
    outcomes = []
    for inline in (True, False):
        chooser = random.Random(3)
        disk = await opened(SPECS[kind], inline=inline)
        for _ in range(60):
            place = chooser.randrange(disk.image.size // 512) * 512
            n_bytes = min(chooser.choice([512, 3 * KIB, 40 * KIB]), disk.image.size - place)
            action = chooser.random()
            if action < 0.7:
                await disk.image.write(place, chooser.randbytes(n_bytes))
            elif action < 0.9:
                await disk.image.write_zeroes(place, n_bytes, unmap=action < 0.8)
            else:
                await disk.image.flush()
        read = bytes(await disk.image.read(0, disk.image.size))
        files = await disk.close()
        assert qemu_read(files) == read
        outcomes.append((read, files))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("kind", SPECS)
async def test_a_write_that_fails_in_the_middle(kind: str, code: int) -> None:
    """What arrived shows in a raw data file and is linked there; in another one the cluster reads as before. The next
    write succeeds, at once."""
    disk = await opened(SPECS[kind])
    spec, data = disk.spec, disk.memory[DATA].data
    place = spec.size + 4 * spec.cluster_size
    n_bytes = spec.cluster_size
    disk.fail(lambda operation: code if operation.kind == "write" else 0)
    with pytest.raises(OSError) as caught:
        disk.write(place, b"w" * n_bytes)
    assert caught.value.errno == code
    disk.fail(None)
    assert data[place : place + 512] == b"w" * 512, "the double writes a part before it fails"
    shown = bytes(await disk.image.read(place, n_bytes))
    assert shown == (bytes(data[place : place + n_bytes]) if spec.data_file == "raw" else bytes(n_bytes))
    assert disk.write(place + 600, b"v" * 100)
    assert bytes(await disk.image.read(place, n_bytes)) == shown[:600] + b"v" * 100 + shown[700:]
    read = bytes(await disk.image.read(0, disk.image.size))
    files = await disk.close()
    assert qemu_read(files) == read
    if spec.data_file == "raw":
        assert files[DATA] == read


class ReservedStorage(MemoryStorage):
    """On a file system that copies on write: space for metadata can be kept free, and is."""

    n_kept = 0

    async def keep_free(self, n_bytes: int) -> bool:
        """Note it."""
        self.n_kept = n_bytes
        return True


async def test_where_space_is_kept_free_a_write_waits() -> None:
    """Metadata may have to be written back before it becomes more; the first new cluster has the space kept."""
    disk = await opened(SPECS["plain"], kinds={TOP: ReservedStorage})
    top = disk.memory[TOP]
    assert isinstance(top, ReservedStorage)
    assert top.n_kept
    assert not disk.write(disk.spec.size + 4 * CLUSTER, b"x" * CLUSTER)
    assert not disk.writes_to(DATA)
    await disk.image.write(disk.spec.size + 4 * CLUSTER, b"x" * CLUSTER)
    await disk.close()


async def test_space_is_kept_free_where_all_tables_are_there() -> None:
    """A new cluster of a data file takes none of the image, but makes an L2 table that is there differ."""
    built = build_image(SPECS["plain"])
    memory = ReservedStorage(built.top)
    image = await open_memory_image({**built.files, TOP: memory})
    contents = await image.read(0, image.size)
    used, unused = (
        [place for place in range(0, image.size, CLUSTER) if any(contents[place : place + CLUSTER]) is is_used]
        for is_used in (True, False)
    )
    await image.write(used[0], b"x" * CLUSTER)
    assert not memory.n_kept, "in place"
    await image.write(unused[0], b"x" * CLUSTER)
    assert memory.n_kept
    await image.aclose()


class PatientStorage(MemoryStorage):
    """Writes no more than 8 KiB at once."""

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """Decline what is more."""
        return sum(map(len, buffers)) <= 8 * KIB and super().try_pwritev(host_offset, buffers)


class PagedStorage(MemoryStorage):
    """Writes nothing but whole pages at once, as a block device."""

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """Decline what is not."""
        return of_whole_pages(host_offset, sum(map(len, buffers))) and super().try_pwritev(host_offset, buffers)


@pytest.mark.parametrize("encryption", [None, "luks"])
async def test_parts_of_pages_wait_and_whole_ones_do_not(encryption: Literal["luks"] | None) -> None:
    """That a part of a page was declined says nothing about others. What is encrypted is never for any thread."""
    built = build_image(ImageSpec(size=256 * KIB, cluster_size=64 * KIB, encryption=encryption))
    memory = PagedStorage(built.top, name=TOP)
    image = await open_memory_image({**built.files, TOP: memory})
    await image.write(0, b"x" * 512)
    for place in (64 * KIB, 64 * KIB + 8 * KIB):  # a new cluster, and one in place
        part = image.start_write(place + 4096, b"p" * 512)
        if place & 64 * KIB - 1:
            # A thread would write it as it is.
            assert isinstance(part, PendingPlace) == (encryption is None)
            assert part is not None
        if part is not None:
            await part.finish()
        assert image.start_write(place, b"w" * 4096) is None
        assert bytes(await image.read(place, 4608)) == b"w" * 4096 + b"p" * 512
    await image.aclose()


@pytest.mark.parametrize("external", [True, False], ids=["data file", "image"])
async def test_only_what_is_too_long_waits(external: bool) -> None:
    """A storage that declines a long write is asked for shorter ones all the same, and not for that many again."""
    spec = ImageSpec(size=256 * KIB, cluster_size=CLUSTER, data_file="plain" if external else None)
    built = build_image(spec)
    path = DATA if external else TOP
    memory = PatientStorage(built.files[path], name=path)
    storages: list[FaultyStorage] = []

    def wrap(inner: MemoryStorage) -> FaultyStorage:
        storages.append(FaultyStorage(inner, inline=True))
        return storages[-1]

    image = await open_memory_image(
        {**built.files, path: memory}, wrap=None if external else wrap, wrap_data=wrap if external else None
    )
    await image.write(0, b"x" * 512)
    long = image.start_write(64 * KIB, b"l" * 12 * KIB)
    assert long is not None
    storages[0].operations.clear()
    again = image.start_write(96 * KIB, b"m" * 12 * KIB)
    assert again is not None
    assert not storages[0].operations
    assert image.start_write(128 * KIB, b"s" * 8 * KIB) is None
    await long.finish()
    await again.finish()
    assert bytes(await image.read(64 * KIB, 12 * KIB)) == b"l" * 12 * KIB
    await image.aclose()


async def test_zeroes_around_the_data_count_as_well() -> None:
    """Of a place that may hold anything a whole cluster is written: that is what may be too long."""
    spec = ImageSpec(size=256 * KIB, cluster_size=16 * KIB, data_file="plain")
    disk = await opened(spec, kinds={DATA: PatientStorage})
    assert not disk.write(spec.size + 4 * spec.cluster_size, b"x" * 512)
    assert not disk.writes_to(DATA), "it was asked for the first cluster, and is not asked again"
    assert disk.write(disk.image.size - 16 * KIB, b"x" * 512), "in place"
    await disk.close()
