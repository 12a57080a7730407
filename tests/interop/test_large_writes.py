"""Large writes when others wait: a thread may make those that go to one place, and QEMU reads what was written."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from qcowfuse.cli.img.create_options import parse_create_options
from qcowfuse.driver.chain import open_image
from qcowfuse.driver.image import LARGE_WRITE, Image
from qcowfuse.driver.options import DetectZeroes, OpenOptions
from qcowfuse.driver.partition_window import PartitionWindow
from qcowfuse.driver.pending import PendingPlace
from qcowfuse.partitions.values import Partition
from qcowfuse.tools.create import create_image
from tests.support import qemu
from tests.support.bitmaps import add_bitmap, qemu_dirty

MIB = 1 << 20
SIZE = 6 * MIB
KINDS = {
    "plain": ("qcow2", ""),
    "version 2": ("qcow2", "compat=0.10"),
    "clusters of 2 MiB": ("qcow2", "cluster_size=2M"),
    "extended": ("qcow2", "extended_l2=on,cluster_size=128k"),
    "data file": ("qcow2", "data_file=data.raw,data_file_raw=on"),
    "data file, clusters of 2 MiB": ("qcow2", "data_file=data.raw,cluster_size=2M"),
    "version 1": ("qcow", ""),
}


async def made_by_a_thread(image: Image, guest_offset: int, data: bytes) -> bool:
    """Whether a thread makes the write; if not, it is made all the same."""
    pending = image.start_write(guest_offset, data)
    if not isinstance(pending, PendingPlace):
        if pending is not None:
            await pending.finish()
        return False
    answered: list[bool] = []
    errors: list[Exception | None] = []
    ended = trio.Event()

    def end(error: Exception | None) -> None:
        errors.append(error)
        ended.set()

    assert pending.start_in_thread(lambda: answered.append(True), end)
    await ended.wait()
    assert (answered, errors) == ([True], [None])
    return True


def created(folder: Path, kind: str, *, size: int = SIZE) -> Path:
    """An image whose disk is full of data."""
    format_name, options = KINDS[kind]
    path = folder / "image"
    more = ["-o", options] if options else []
    qemu.must_run("qemu-img", "create", "-q", "-f", format_name, *more, str(path), str(size), cwd=folder)
    qemu.must_run("qemu-io", "-f", format_name, "-c", f"write -q -P 7 0 {size}", str(path), cwd=folder)
    return path


def check(path: Path, format_name: str, expected: bytes) -> None:
    """QEMU finds the image sound, and these bytes in it."""
    if format_name != "qcow":
        qemu.must_run("qemu-img", "check", "-q", "-f", format_name, str(path), cwd=path.parent)
    raw = path.with_name("read.raw")
    qemu.must_run("qemu-img", "convert", "-f", format_name, "-O", "raw", str(path), str(raw), cwd=path.parent)
    assert raw.read_bytes() == expected


@pytest.mark.parametrize("kind", KINDS)
async def test_a_large_write_in_place_is_made_by_a_thread(tmp_path: Path, kind: str) -> None:
    """At any offset; on the spot when nobody waits; and a small one, however many wait."""
    path = created(tmp_path, kind)
    expected = bytearray(b"\7" * SIZE)
    chooser = random.Random(3)

    def chosen(guest_offset: int, n_bytes: int) -> bytes:
        data = chooser.randbytes(n_bytes)
        expected[guest_offset : guest_offset + n_bytes] = data
        return data

    image = await open_image(str(path), OpenOptions())
    try:
        await image.read(0, SIZE)  # every table is in memory from now on
        assert not await made_by_a_thread(image, 0, chosen(0, MIB)), "the first write of all has more to do"
        small = image.start_write(0, chosen(0, 4096))
        takes_writes_at_once = small is None  # the file system that the test runs on
        if small is not None:
            await small.finish()
        for off, n_bytes in ((0, MIB), (2 * MIB + 512, LARGE_WRITE), (4 * MIB, MIB), (3 * MIB - 100, MIB)):
            on_the_spot = image.start_write(off, chosen(off, n_bytes), lambda: True)
            assert (on_the_spot is None) == takes_writes_at_once
            if on_the_spot is not None:
                await on_the_spot.finish()
            assert await made_by_a_thread(image, off, chosen(off, n_bytes))
            assert bytes(await image.read(off, n_bytes)) == expected[off : off + n_bytes]
        assert await made_by_a_thread(image, 0, chosen(0, LARGE_WRITE - 1)) == (not takes_writes_at_once)
        assert image.life.epochs.n_in_flight == 0
        counters = image.statistics()
        assert counters["backend.written_bytes"] >= MIB + 2 * (3 * MIB + LARGE_WRITE) + LARGE_WRITE - 1
        await image.flush()
    finally:
        await image.aclose()
    check(path, KINDS[kind][0], bytes(expected))


def overlay(path: Path, folder: Path) -> Path:
    """Nothing of it is allocated."""
    top = folder / "top"
    qemu.must_run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(path), str(top))
    return top


def with_snapshot(path: Path, _: Path) -> Path:
    """No cluster is owned alone."""
    qemu.must_run("qemu-img", "snapshot", "-c", "s", str(path))
    return path


def with_hole(path: Path, _: Path) -> Path:
    """In the middle of what is written."""
    qemu.must_run("qemu-io", "-c", f"discard {2 * MIB} 64k", str(path))
    return path


def with_zeroes(path: Path, _: Path) -> Path:
    """In the last cluster of what is written."""
    qemu.must_run("qemu-io", "-c", f"write -q -z {2 * MIB + LARGE_WRITE - 65536} 64k", str(path))
    return path


def in_pieces(path: Path, _: Path) -> Path:
    """What follows in the disk does not in the file."""
    qemu.must_run("qemu-io", "-c", f"discard {2 * MIB} 64k", "-c", f"discard {5 * MIB} 64k", str(path))
    for place in (5 * MIB, 2 * MIB):
        qemu.must_run("qemu-io", "-c", f"write -q -P 7 {place} 64k", str(path))
    return path


@pytest.mark.parametrize("change", [overlay, with_snapshot, with_hole, with_zeroes, in_pieces])
async def test_what_is_not_in_one_place_is_not_for_a_thread(
    tmp_path: Path, change: Callable[[Path, Path], Path]
) -> None:
    """Where clusters have to be found or linked, the write goes its usual way."""
    path = change(created(tmp_path, "plain"), tmp_path)
    data = random.Random(4).randbytes(LARGE_WRITE)
    image = await open_image(str(path), OpenOptions())
    try:
        await image.write(5 * MIB + 512, b"\7")  # the first one of all
        expected = bytearray(bytes(await image.read(0, SIZE)))
        assert not await made_by_a_thread(image, 2 * MIB, data)
        expected[2 * MIB : 2 * MIB + LARGE_WRITE] = data
    finally:
        await image.aclose()
    check(path, "qcow2", bytes(expected))


async def test_the_cipher_has_its_turn(tmp_path: Path) -> None:
    """Encrypted data is never written as it is."""
    path = tmp_path / "image"
    options = parse_create_options("qcow2", ["encrypt.format=luks,encrypt.iter-time=1"], size=str(SIZE))
    await create_image(str(path), options, passphrase=bytearray(b"abc"))
    image = await open_image(str(path), OpenOptions(passphrase=lambda _: bytearray(b"abc")))
    try:
        await image.write(0, b"\7" * SIZE)
        assert not await made_by_a_thread(image, 0, b"s" * MIB)
    finally:
        await image.aclose()
    assert b"s" * 512 not in path.read_bytes()


@pytest.mark.parametrize("detect", [DetectZeroes.ON, DetectZeroes.UNMAP])
async def test_zeroes_are_looked_for_first(tmp_path: Path, detect: DetectZeroes) -> None:
    """A thread writes data, never zeroes that were not to be written."""
    path = created(tmp_path, "plain")
    image = await open_image(str(path), OpenOptions(detect_zeroes=detect))
    try:
        await image.write(0, b"\7" * MIB)
        assert not await made_by_a_thread(image, 0, bytes(MIB))
        assert await made_by_a_thread(image, MIB, b"\1" * MIB)
    finally:
        await image.aclose()
    check(path, "qcow2", bytes(MIB) + b"\1" * MIB + b"\7" * (SIZE - 2 * MIB))


async def test_a_bitmap_is_marked_before(tmp_path: Path) -> None:
    """A backup that goes by the bitmap copies what a thread has written."""
    path = created(tmp_path, "plain")
    add_bitmap(path, "b", 65536)
    image = await open_image(str(path), OpenOptions())
    try:
        await image.write(0, b"\7")
        assert await made_by_a_thread(image, 4 * MIB, b"\1" * LARGE_WRITE)
    finally:
        await image.aclose()
    check(path, "qcow2", b"\7" * 4 * MIB + b"\1" * LARGE_WRITE + b"\7" * (2 * MIB - LARGE_WRITE))
    assert qemu_dirty(path, "b") == [(0, 65536), (4 * MIB, LARGE_WRITE)]


async def test_a_partition_is_moved(tmp_path: Path) -> None:
    """What is written to it goes to its place in the disk, and never behind its end."""
    path = created(tmp_path, "plain")
    image = await open_image(str(path), OpenOptions())
    window = PartitionWindow(image, Partition(1, MIB, 2 * MIB, "83", "Linux"))
    try:
        await image.write(0, b"\7")
        assert await made_by_a_thread(window, MIB, b"\1" * MIB)
        with pytest.raises(Exception, match="of a partition of"):
            window.start_write(MIB + 512, b"\2" * MIB)
    finally:
        await window.aclose()
    check(path, "qcow2", b"\7" * 2 * MIB + b"\1" * MIB + b"\7" * 3 * MIB)


async def test_what_was_started_and_not_given_to_a_thread_is_finished(tmp_path: Path) -> None:
    """With the bytes that the caller hands in then."""
    path = created(tmp_path, "plain")
    image = await open_image(str(path), OpenOptions())
    try:
        await image.write(0, b"\7")
        pending = image.start_write(MIB, b"\1" * MIB)
        assert isinstance(pending, PendingPlace)
        pending.use(b"\2" * MIB)
        await pending.finish()
        image.start_write(2 * MIB, b"\3" * MIB).abandon()  # type: ignore[union-attr]
        assert image.life.epochs.n_in_flight == 0
    finally:
        await image.aclose()
    check(path, "qcow2", b"\7" * MIB + b"\2" * MIB + b"\7" * 4 * MIB)
