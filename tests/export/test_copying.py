"""Copies between files of a mount: the right bytes, holes that stay holes, bounds, short counts, what is refused."""

from __future__ import annotations

import errno
import os
import random

import pytest
import trio
from pyfuse3 import FUSEError

from qcowfuse.driver.image import Image
from qcowfuse.fuse import copying
from qcowfuse.fuse.attributes import Ownership
from qcowfuse.fuse.copying import MOST_DATA, PIECE
from qcowfuse.fuse.operations import Operations
from qcowfuse.fuse.seeking import never
from qcowfuse.storage.base import Storage
from tests.support.faults import FaultyStorage, fail_at
from tests.support.images import ImageSpec, build_image, open_memory_image, qemu_check, qemu_read
from tests.support.memory_image import MemoryImage
from tests.support.memory_storage import MemoryStorage

KIB, MIB = 1 << 10, 1 << 20
SPECS = {
    "v1": ImageSpec(version=1, cluster_size=4096, fill=0.5),
    "v2": ImageSpec(version=2, fill=0.5),
    "zeroes": ImageSpec(fill=0.5, zeroes=True),
    "extended L2": ImageSpec(cluster_size=16384, extended_l2=True, fill=0.5, zeroes=True),
    "compressed": ImageSpec(cluster_size=65536, compression="zstd", fill=0.7),
    "LUKS": ImageSpec(encryption="luks", fill=0.5, zeroes=True),
    "overlay": ImageSpec(backing="qcow2", backing_size=150_000, fill=0.3),
    "snapshot": ImageSpec(snapshot=True, fill=0.5),
    "data file": ImageSpec(data_file="raw", fill=0.5),
}


def operations_of(image: Image) -> Operations:
    return Operations(image, file_name=b"disk", ownership=Ownership(0, 0, 0o600), mtime_ns=0)


async def errno_of_copy(
    target: Operations, source: Operations, source_off: int, off: int, n_bytes: int, flags: int = 0
) -> int:
    with pytest.raises(FUSEError) as caught:
        await target.copies.copy_from(source.copies, source_off, off, n_bytes, flags, never)
    return caught.value.errno


async def copy(source: Image, target: Image, source_off: int, off: int, n_bytes: int) -> None:
    """As a caller does that gets short counts."""
    into, from_ = operations_of(target).copies, operations_of(source).copies
    while n_bytes:
        n_done = await into.copy_from(from_, source_off, off, n_bytes, 0, never)
        assert 0 < n_done <= n_bytes
        source_off, off, n_bytes = source_off + n_done, off + n_done, n_bytes - n_done


@pytest.mark.parametrize("kind", SPECS)
async def test_copies_in_every_kind_of_image(kind: str) -> None:
    """Within a disk, and into it from a disk with data and holes in other places; QEMU reads what is expected."""
    built = build_image(SPECS[kind])
    memory = {path: MemoryStorage(data, writable=True, name=path) for path, data in built.files.items()}
    image = await open_memory_image(memory)
    other = MemoryImage(300_000, cluster_size=8192)
    chooser = random.Random(7)
    for start in range(0, other.size, 3 * 8192):
        other.data[start : start + 8192] = chooser.randbytes(len(other.data[start : start + 8192]))
    expected = bytearray(built.contents)
    for number in range(12):
        n_bytes = chooser.choice((1, 4096, 70_000, 100_000))
        off = chooser.randrange(image.size - n_bytes)
        if number % 2:
            source_off = chooser.randrange(other.size - n_bytes)
            expected[off : off + n_bytes] = other.data[source_off : source_off + n_bytes]
            await copy(other, image, source_off, off, n_bytes)
        else:
            n_bytes = min(n_bytes, image.size // 2)
            source_off = off % (image.size // 2 - n_bytes + 1) + (0 if off >= image.size // 2 else image.size // 2)
            off = min(off, image.size - n_bytes, image.size // 2 - n_bytes if off < image.size // 2 else image.size)
            expected[off : off + n_bytes] = expected[source_off : source_off + n_bytes]
            await copy(image, image, source_off, off, n_bytes)
        assert bytes(await image.read(0, image.size)) == expected
    await image.aclose()
    files = {path: bytes(storage.data) for path, storage in memory.items()}
    if kind == "v1":
        assert qemu_read(files, format_name="qcow") == expected
        return
    code, output = qemu_check(files)
    assert code == 0, output
    assert qemu_read(files) == expected


async def test_holes_take_no_space_and_are_not_read() -> None:
    """Clusters that hold nothing are made of nothing, and what they replace gives its space back."""
    spec = ImageSpec(cluster_size=4096, size=2 * MIB)
    image = await open_memory_image(build_image(spec).files)
    await image.write(0, b"x" * MIB)
    await image.count_allocated()
    assert image.allocated_bytes() == MIB
    before = image.statistics()
    await copy(image, image, MIB, MIB + 512 * KIB, 256 * KIB)
    assert image.allocated_bytes() == MIB
    await copy(image, image, MIB, 0, 512 * KIB)
    assert image.allocated_bytes() == MIB // 2
    after = image.statistics()
    assert after["backend.read_bytes"] - before["backend.read_bytes"] < 64 * KIB
    assert bytes(await image.read(0, MIB)) == bytes(MIB // 2) + b"x" * (MIB // 2)
    await image.aclose()


async def test_one_request_copies_a_bounded_part() -> None:
    """Pieces end at round places of the target; zeroes don't count. The caller asks again."""
    source, target = MemoryImage(40 * MIB), MemoryImage(64 * MIB)
    source.data[: 24 * MIB] = os.urandom(MIB) * 24
    pieces: list[tuple[int, int]] = []
    write = target.write

    async def note(guest_offset: int, data: bytes) -> None:
        pieces.append((guest_offset, len(data)))
        await write(guest_offset, data)

    async def note_zeroes(guest_offset: int, n_bytes: int, *, unmap: bool) -> None:
        assert unmap, "as a hole is punched"
        await write(guest_offset, bytes(n_bytes))

    target.write = note  # type: ignore[method-assign, assignment]
    target.write_zeroes = note_zeroes  # type: ignore[method-assign]
    into, from_ = operations_of(target).copies, operations_of(source).copies
    n_done = await into.copy_from(from_, 5, 1000, 30 * MIB, 0, never)
    assert MOST_DATA <= n_done < MOST_DATA + PIECE
    assert all(offset // PIECE == (offset + n_bytes - 1) // PIECE for offset, n_bytes in pieces)
    rest = 30 * MIB - n_done
    assert await into.copy_from(from_, 5 + n_done, 1000 + n_done, rest, 0, never) == rest
    assert target.data[1000 : 1000 + 30 * MIB] == source.data[5 : 5 + 30 * MIB]
    assert not any(target.data[:1000])
    assert not any(target.data[1000 + 30 * MIB :])


async def test_a_signal_ends_a_copy_after_a_piece() -> None:
    """With a short count, of one piece at least."""
    image = MemoryImage(8 * MIB, inline=False)
    image.data[: 4 * MIB] = b"y" * (4 * MIB)
    copies = operations_of(image).copies
    n_done = await copies.copy_from(copies, 0, 4 * MIB, 4 * MIB, 0, lambda: True)
    assert 0 < n_done <= PIECE
    assert image.data[4 * MIB :] == b"y" * n_done + bytes(4 * MIB - n_done)


async def test_what_is_refused() -> None:
    """Nothing is changed. What reaches past an end is left to the kernel, which reads and writes."""
    image, other = MemoryImage(MIB), MemoryImage(2 * MIB, read_only=True)
    image.data[:] = b"z" * MIB
    target, source = operations_of(image), operations_of(other)
    assert await errno_of_copy(target, source, 0, 0, 4096, 1) == errno.EINVAL
    assert await errno_of_copy(target, source, -1, 0, 4096) == errno.EINVAL
    assert await errno_of_copy(target, source, 0, -1, 4096) == errno.EINVAL
    assert await errno_of_copy(source, target, 0, 0, 4096) == errno.EROFS
    assert await errno_of_copy(target, source, 0, MIB, 4096) == errno.EOPNOTSUPP
    assert await errno_of_copy(target, source, 2 * MIB, 0, 4096) == errno.EOPNOTSUPP
    assert await errno_of_copy(target, source, 1 << 62, 0, 1 << 63) == errno.EOPNOTSUPP
    assert await errno_of_copy(target, source, 0, 0, 0) == errno.EOPNOTSUPP
    assert image.data == b"z" * MIB
    assert await target.copies.copy_from(source.copies, 0, MIB - 100, 4096, 0, never) == 100
    assert image.data == b"z" * (MIB - 100) + bytes(100)
    assert await target.copies.copy_from(source.copies, 2 * MIB - 50, 0, 4096, 0, never) == 50
    assert image.data[:51] == bytes(50) + b"z"


@pytest.mark.parametrize("is_data", [True, False], ids=["data", "holes"])
async def test_a_close_makes_a_copy_durable(is_data: bool) -> None:
    """Like whatever else has changed the file; the next close has nothing to do."""
    source, target = MemoryImage(MIB), MemoryImage(MIB)
    source.data[:] = bytes([is_data]) * MIB
    into = operations_of(target)
    handle = into.opens.open(os.O_RDWR)
    for n_flushes in (1, 2):
        await into.copies.copy_from(operations_of(source).copies, 0, 0, 4096, 0, never)
        for _ in range(2):
            await into.flush(handle)
            assert target.n_flushes == n_flushes


async def test_a_failure_ends_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once with an error; later with a short count, and the error when the caller asks for the rest. The kernel is
    made to forget what it knows of the file, for a part may be done."""
    forgotten: list[bool] = []
    source, target = MemoryImage(8 * MIB), MemoryImage(8 * MIB)
    source.data[:] = b"s" * source.size
    into, from_ = operations_of(target), operations_of(source)
    monkeypatch.setattr(into.sizes, "is_wrong", lambda *, forgets: forgotten.append(forgets))
    source.failure = OSError(errno.EIO, "Input/output error")
    assert await errno_of_copy(into, from_, 0, 0, MIB) == errno.EIO
    assert forgotten == [True]
    source.failure = None
    write = target.write

    async def fail_behind(guest_offset: int, data: bytes) -> None:
        if guest_offset >= 3 * MIB:
            raise OSError(errno.ENOSPC, "No space left on device")
        await write(guest_offset, data)

    target.write = fail_behind  # type: ignore[method-assign, assignment]
    assert await into.copies.copy_from(from_.copies, 0, MIB, 4 * MIB, 0, never) == 2 * MIB
    assert forgotten == [True, True]
    assert await errno_of_copy(into, from_, 2 * MIB, 3 * MIB, 2 * MIB) == errno.ENOSPC
    assert target.data == bytes(MIB) + b"s" * 2 * MIB + bytes(5 * MIB)
    assert into.gate.n_slow == 0


async def test_a_cancelled_copy_lets_the_kernel_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending in the middle, too."""
    image = MemoryImage(8 * MIB)
    image.data[:] = b"c" * image.size
    operations = operations_of(image)
    forgotten: list[bool] = []
    monkeypatch.setattr(operations.sizes, "is_wrong", lambda *, forgets: forgotten.append(forgets))
    with trio.CancelScope() as scope:
        scope.cancel()
        await operations.copies.copy_from(operations.copies, 0, 4 * MIB, MIB, 0, never)
    assert scope.cancelled_caught
    assert forgotten == [True]


@pytest.mark.parametrize("spec", [SPECS["zeroes"], SPECS["overlay"]], ids=["zeroes", "overlay"])
async def test_the_nth_operation_fails(spec: ImageSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all behind it: each byte is what it was or what was copied; a second try does it all, without damage."""
    monkeypatch.setattr(copying, "PIECE", 16 * KIB)
    built = build_image(spec)
    start, n_bytes = 128 * KIB - 700, 100 * KIB + 123
    n_failed = number = n_operations = 0
    for number in range(0, 400, 5):
        memory = {path: MemoryStorage(data, writable=True, name=path) for path, data in built.files.items()}
        made: list[FaultyStorage] = []

        def wrap(inner: MemoryStorage) -> Storage:
            made.append(FaultyStorage(inner, inline=True))  # noqa: B023
            return made[-1]  # noqa: B023

        image = await open_memory_image(memory, wrap=wrap)
        first = len(made[0].operations)
        made[0].check = fail_at(first + number, code=errno.ENOSPC, for_ever=True)
        copies = operations_of(image).copies
        source_off, off, n_left = 0, start, n_bytes
        errors: set[int] = set()
        while n_left:
            try:
                n_done = await copies.copy_from(copies, source_off, off, n_left, 0, never)
            except FUSEError as exc:
                errors.add(exc.errno)
                made[0].check = None
                now = bytes(await image.read(start, n_bytes))
                assert all(
                    byte in (old, new)
                    for byte, old, new in zip(now, built.contents[start:], built.contents, strict=False)
                )
            else:
                source_off, off, n_left = source_off + n_done, off + n_done, n_left - n_done
        made[0].check = None
        n_operations = len(made[0].operations) - first
        await image.flush()
        await image.aclose()
        expected = bytearray(built.contents)
        expected[start : start + n_bytes] = built.contents[:n_bytes]
        assert errors <= {errno.ENOSPC}
        n_failed += bool(errors)
        if errors:
            files = {path: bytes(storage.data) for path, storage in memory.items()}
            code, output = qemu_check(files)
            assert code == 0, output
            assert qemu_read(files) == expected
        if number > n_operations:
            break
    assert n_failed > 4
    assert number > n_operations, "there are more operations than were tried"
