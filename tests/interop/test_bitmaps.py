"""Persistent dirty bitmaps: what we keep is what QEMU reads, bit for bit."""

from __future__ import annotations

import logging
import random
import struct
from pathlib import Path

import pytest

from qcowfuse.driver.chain import open_image
from qcowfuse.driver.layers.mapping import Mapping
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.driver.writing import changes
from qcowfuse.driver.writing import dirty_bitmaps as kept_bitmaps
from tests.support import qemu
from tests.support.bitmaps import (
    AUTO,
    IN_USE,
    Range,
    add_bitmap,
    bitmap_directory,
    granules_of,
    qemu_dirty,
    ranges_of,
    stored_bitmaps,
)

KIB, MIB = 1 << 10, 1 << 20
GRANULARITIES = {"g512": 512, "g4k": 4096, "g64k": 65536, "g2m": 2 << 20, "g2g": 1 << 31}


async def write(image: QcowImage, start: int, data: bytes) -> Range:
    """As the mount writes."""
    await image.write(start, data)
    return start, len(data)


async def change_at_random(image: QcowImage, chooser: random.Random, n_changes: int = 40) -> list[Range]:
    """Writes, discards and zeroes of any alignment; the ranges that they touched."""
    ranges = []
    for _ in range(n_changes):
        n_bytes = min(chooser.choice([1, 100, 4096, 5000, 70_000, 300_000]), image.size)
        start = chooser.randrange(image.size - n_bytes + 1)
        if chooser.random() < 0.7:
            ranges.append(await write(image, start, chooser.randbytes(n_bytes)))
        else:
            if chooser.random() < 0.5:  # whole clusters, so that it may be done at once
                n_whole = min(n_bytes, 20_000) // image.cluster_size * image.cluster_size
                start, n_bytes = start // image.cluster_size * image.cluster_size, n_whole or image.cluster_size
                n_bytes = min(n_bytes, image.size - start)
            unmap = chooser.random() < 0.5
            if not image.try_write_zeroes(start, n_bytes, unmap=unmap):
                await image.write_zeroes(start, n_bytes, unmap=unmap)
            ranges.append((start, n_bytes))
        if chooser.random() < 0.1:
            await image.flush()
    return ranges


def flags_of(path: Path) -> dict[str, list[str]]:
    """The flags by name, as ``qemu-img info`` shows them."""
    data = qemu.info(path, "qcow2")["format-specific"]["data"]
    return {bitmap["name"]: sorted(bitmap["flags"]) for bitmap in data.get("bitmaps", [])}


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=512",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=64k",
        "cluster_size=64k,extended_l2=on",
        "cluster_size=2M",
        "cluster_size=64k,lazy_refcounts=on",
    ],
)
async def test_qemu_sees_exactly_what_was_changed(tmp_path: Path, options: str) -> None:
    """Bitmaps of all granularities, over three sessions: bits add up, QEMU finds just the granules touched."""
    size = 33 * MIB + 5 * 512
    path = tmp_path / "a.qcow2"
    qemu.create(path, "qcow2", size, options=options)
    qemu.io(path, ["write -P 7 1M 3M", "write -P 8 20M 1M"])
    for name, granularity in GRANULARITIES.items():
        add_bitmap(path, name, granularity)
    add_bitmap(path, "disabled", 4096, enabled=False)
    qemu.io(path, ["write -P 9 5M 100k"])  # by QEMU: the enabled ones hear of it
    dirty: list[Range] = [(5 * MIB, 100 * KIB)]
    for session in range(3):
        image = await open_image(str(path))
        dirty += await change_at_random(image, random.Random(session))
        await image.aclose()
        assert qemu.check(path).clean
        assert flags_of(path) == {**{name: ["auto"] for name in GRANULARITIES}, "disabled": []}
        for name, granularity in GRANULARITIES.items():
            expected = ranges_of(granules_of(dirty, granularity), granularity, size)
            assert qemu_dirty(path, name) == expected, f"{name}, session {session}"
    assert qemu_dirty(path, "disabled") == []
    qemu.io(path, ["write -P 10 12M 64k"])  # and QEMU goes on with what we stored
    dirty.append((12 * MIB, 64 * KIB))
    assert qemu_dirty(path, "g64k") == ranges_of(granules_of(dirty, 65536), 65536, size)


async def test_a_long_range_is_marked_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits of a whole large disk are many megabytes, and others wait while they are set."""
    monkeypatch.setattr(changes, "MAX_MARKED", MIB)
    size = 9 * MIB + 5 * 512
    path = tmp_path / "a.qcow2"
    qemu.create(path, "qcow2", size, options="cluster_size=64k")
    qemu.io(path, ["write -P 7 1M 3M"])
    add_bitmap(path, "b", 4096)
    marked: list[int] = []
    mark = kept_bitmaps.DirtyBitmaps.mark

    def noting(bitmaps: kept_bitmaps.DirtyBitmaps, guest_offset: int, n_bytes: int) -> None:
        marked.append(n_bytes)
        mark(bitmaps, guest_offset, n_bytes)

    monkeypatch.setattr(kept_bitmaps.DirtyBitmaps, "mark", noting)
    image = await open_image(str(path))
    await image.write_zeroes(512, size - 512, unmap=True)
    assert not image.try_write_zeroes(0, size, unmap=True)
    assert image.try_write_zeroes(MIB, MIB, unmap=True)
    await image.aclose()
    assert max(marked) == MIB
    assert qemu.check(path).clean
    assert qemu_dirty(path, "b") == [(0, size)]


@pytest.mark.parametrize("raw", ["off", "on"])
async def test_bitmaps_beside_an_external_data_file(tmp_path: Path, raw: str) -> None:
    """Bitmaps lie in the image file and follow what is written to the data file."""
    path, size = tmp_path / "a.qcow2", 8 * MIB
    qemu.create(path, "qcow2", size, options=f"data_file={tmp_path}/data,data_file_raw={raw}")
    add_bitmap(path, "b", 512)
    add_bitmap(path, "c", 65536)
    dirty: list[Range] = []
    for session in range(2):
        image = await open_image(str(path))
        dirty += await change_at_random(image, random.Random(session), 20)
        await image.aclose()
        assert qemu.check(path).clean
        for name, granularity in (("b", 512), ("c", 65536)):
            assert qemu_dirty(path, name) == ranges_of(granules_of(dirty, granularity), granularity, size)
    assert qemu.info(path, "qcow2")["format-specific"]["data"]["data-file-raw"] is (raw == "on")


async def test_an_incremental_backup_by_the_bitmap_is_complete(tmp_path: Path) -> None:
    """A full copy, changes, then only the dirty extents copied over: the copy equals the disk."""
    path, copy, now = tmp_path / "a.qcow2", tmp_path / "copy.raw", tmp_path / "now.raw"
    qemu.create(path, "qcow2", 16 * MIB, options="cluster_size=4k")
    qemu.io(path, ["write -P 3 0 9M"])
    qemu.convert(path, copy, "raw", source_format="qcow2")
    add_bitmap(path, "b", 1024)
    for session in range(2):
        image = await open_image(str(path))
        await change_at_random(image, random.Random(100 + session), 60)
        await image.aclose()
    qemu.convert(path, now, "raw", source_format="qcow2")
    assert copy.read_bytes() != now.read_bytes()
    extents = qemu_dirty(path, "b")
    assert sum(n_bytes for _, n_bytes in extents) < 12 * MIB
    with copy.open("r+b") as target, now.open("rb") as source:
        for start, n_bytes in extents:
            source.seek(start)
            target.seek(start)
            target.write(source.read(n_bytes))
    assert copy.read_bytes() == now.read_bytes()


async def test_tables_of_many_entries_and_all_ones(tmp_path: Path) -> None:
    """A bitmap of many clusters: parts without a change have no cluster, parts all changed are all ones."""
    path = tmp_path / "a.qcow2"
    qemu.create(path, "qcow2", 64 * MIB, options="cluster_size=512")
    add_bitmap(path, "b", 512)  # 2 MiB a table entry
    image = await open_image(str(path))
    await image.write_zeroes(3 * MIB, 7 * MIB, unmap=True)  # half an entry, three whole ones
    ranges = [
        (3 * MIB, 7 * MIB),
        await write(image, 40 * MIB + 700, b"x" * 10),
        await write(image, 64 * MIB - 1, b"y"),
    ]
    await image.aclose()
    assert qemu.check(path).clean
    assert qemu_dirty(path, "b") == ranges_of(granules_of(ranges, 512), 512, 64 * MIB)
    table = stored_bitmaps(path.read_bytes())["b"].table
    clusters = {number for number, entry in enumerate(table) if entry > 1}
    assert clusters == {1, 20, 31}
    assert [number for number, entry in enumerate(table) if entry == 1] == [2, 3, 4]
    image = await open_image(str(path))
    await image.write_zeroes(0, 64 * MIB, unmap=True)
    await image.aclose()
    assert qemu.check(path).clean
    assert set(stored_bitmaps(path.read_bytes())["b"].table) == {1}
    assert qemu_dirty(path, "b") == [(0, 64 * MIB)]
    qemu.must_run("qemu-img", "bitmap", "--clear", path, "b")
    image = await open_image(str(path))
    await write(image, 512 * 5, b"z")
    await image.aclose()
    assert qemu_dirty(path, "b") == [(512 * 5, 512)]


async def test_the_last_part_of_an_odd_disk(tmp_path: Path) -> None:
    """A disk that ends inside a granule: its last bit can be set, and nothing behind it ever is."""
    size = 10 * MIB + 512 * 3
    path = tmp_path / "a.qcow2"
    qemu.create(path, "qcow2", size, options="cluster_size=512")
    add_bitmap(path, "b", 1024)
    image = await open_image(str(path))
    await image.write_zeroes(0, size, unmap=False)
    await image.aclose()
    stored = stored_bitmaps(path.read_bytes())["b"]
    assert stored.dirty == set(range(-(-size // 1024)))
    assert qemu_dirty(path, "b") == [(0, size)]


async def test_what_is_not_enabled_is_left_alone(tmp_path: Path) -> None:
    """Disabled bitmaps keep table, bits and flags; one that was in use stays so; the others are kept."""
    path = tmp_path / "a.qcow2"
    qemu.create(path, "qcow2", 8 * MIB)
    for name in ("a", "disabled", "broken"):
        add_bitmap(path, name, 65536)
    qemu.io(path, ["write 1M 64k"])
    qemu.must_run("qemu-img", "bitmap", "--disable", path, "disabled")
    _poke_flags(path, "broken", AUTO | IN_USE)
    before = stored_bitmaps(path.read_bytes())
    image = await open_image(str(path))
    await write(image, 3 * MIB, b"x" * 1000)
    await image.aclose()
    after = stored_bitmaps(path.read_bytes())
    assert after["disabled"] == before["disabled"]
    assert after["broken"] == before["broken"]
    assert after["a"].dirty == {16, 48}
    assert qemu.check(path).clean
    assert qemu_dirty(path, "disabled") == [(MIB, 65536)]
    assert flags_of(path) == {"a": ["auto"], "disabled": [], "broken": ["auto", "in-use"]}


def _poke_flags(path: Path, name: str, flags: int) -> None:
    data = bytearray(path.read_bytes())
    place = bitmap_directory(data)
    assert place is not None
    position = data.index(name.encode(), place[0], sum(place)) - 24
    data[position + 12 : position + 16] = flags.to_bytes(4, "big")
    path.write_bytes(data)


async def test_a_session_without_writes_changes_nothing(tmp_path: Path) -> None:
    """Opened for writing, read, flushed and closed: the image file is the same, byte for byte."""
    path = tmp_path / "a.qcow2"
    qemu.create(path, "qcow2", 8 * MIB)
    add_bitmap(path, "a", 65536)
    before = path.read_bytes()
    image = await open_image(str(path))
    await image.read(0, 4096)
    await image.flush()
    await image.aclose()
    assert path.read_bytes() == before


async def test_stale_bitmaps_stay_stale(tmp_path: Path) -> None:
    """With the autoclear bit clear the extension is nobody's: header and directory stay byte for byte."""
    path = tmp_path / "a.qcow2"
    qemu.create(path, "qcow2", 8 * MIB)
    add_bitmap(path, "a", 65536)
    data = bytearray(path.read_bytes())
    place = bitmap_directory(data)
    assert place is not None
    data[88:96] = bytes(8)
    path.write_bytes(data)
    image = await open_image(str(path))
    await write(image, 0, b"x" * 5000)
    await image.aclose()
    after = path.read_bytes()
    assert after[:65536] == data[:65536]
    assert after[place[0] : sum(place)] == data[place[0] : sum(place)]


async def test_nothing_else_in_the_header_changes(tmp_path: Path) -> None:
    """Kept bitmaps leave the header cluster as it is; unknown autoclear bits are cleared, ours stays."""
    path = tmp_path / "a.qcow2"
    qemu.create(path, "qcow2", 8 * MIB)
    add_bitmap(path, "a", 65536)
    data = bytearray(path.read_bytes())
    data[88] = 0x80
    path.write_bytes(data)
    image = await open_image(str(path))
    await write(image, 0, b"x" * 5000)
    await image.aclose()
    data[88] = 0
    assert path.read_bytes()[:65536] == data[:65536]
    assert qemu_dirty(path, "a") == [(0, 65536)]


@pytest.mark.parametrize("what", ["entry", "refcount", "place", "too long"])
async def test_a_damaged_directory_gives_up_the_bitmaps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A directory that can't be trusted: a warning, the disk is served, the first write clears the autoclear bit."""
    path = tmp_path / "a.qcow2"
    qemu.create(path, "qcow2", 8 * MIB, options="cluster_size=4k")
    add_bitmap(path, "a", 65536)
    data = bytearray(path.read_bytes())
    place = bitmap_directory(data)
    assert place is not None
    if what == "entry":
        data[place[0] + 17] = 63
    elif what == "refcount":
        block = struct.unpack_from(">Q", data, struct.unpack_from(">Q", data, 48)[0])[0]
        data[block + 2 * (place[0] >> 12) + 1] = 2
    elif what == "too long":
        monkeypatch.setattr(kept_bitmaps, "MAX_DIRECTORY_BYTES", 16)
    else:
        position = data.index(struct.pack(">I", 0x23852875)) + 24
        data[position : position + 8] = data[40:48]  # where the L1 table is
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        image = await open_image(str(path))
    assert "bitmaps will be given up by the first write" in caplog.text
    assert path.read_bytes() == data
    await write(image, MIB, b"x" * 5000)
    assert path.read_bytes()[88:96] == bytes(8)
    await image.aclose()
    assert qemu.check(path).corruptions == 0
    assert "bitmaps" not in qemu.info(path, "qcow2")["format-specific"]["data"]


@pytest.mark.parametrize("what", ["table entry", "table size", "past the end", "refcount", "too large", "too full"])
async def test_a_damaged_bitmap_is_marked_and_the_others_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A bitmap that can't be loaded, or takes too much memory: marked as inconsistent, with a warning, no more."""
    path = tmp_path / "a.qcow2"
    qemu.create(path, "qcow2", 8 * MIB, options="cluster_size=4k")
    add_bitmap(path, "bad", 512)
    add_bitmap(path, "good", 65536)
    qemu.io(path, ["write 1M 64k"])
    data = bytearray(path.read_bytes())
    bad = stored_bitmaps(data)["bad"]
    place = bitmap_directory(data)
    assert place is not None
    if what == "table entry":
        data[bad.table_offset + 7] |= 2
    elif what == "table size":
        data[place[0] + 11] = 2
    elif what == "past the end":
        data[bad.table_offset + 3] = 7
    elif what == "refcount":
        block = struct.unpack_from(">Q", data, struct.unpack_from(">Q", data, 48)[0])[0]
        data[block + 2 * (bad.table_offset >> 12) + 1] = 2
    elif what == "too full":
        monkeypatch.setattr(kept_bitmaps, "MAX_LOADED_BYTES", 6000)
    else:
        monkeypatch.setattr(kept_bitmaps, "MAX_BITMAP_BYTES", 4096)
        add_bitmap(path, "third", 4096)
        data = bytearray(path.read_bytes())
    path.write_bytes(data)
    image = await open_image(str(path))
    with caplog.at_level(logging.WARNING):
        await write(image, 3 * MIB, b"x" * 5000)
    lost = "good" if what.startswith("too ") else "bad"
    assert f"bitmap {lost} can't be kept and is marked as inconsistent" in caplog.text
    await image.aclose()
    after = stored_bitmaps(path.read_bytes())
    assert after[lost].flags == AUTO | IN_USE
    if what == "too full":
        assert after["bad"].is_valid
    elif what == "too large":
        assert after["bad"].is_valid
        assert not after["third"].is_valid
    else:
        assert after["good"].is_valid
        assert after["good"].dirty == {16, 48}


async def test_no_room_for_the_bitmap_leaves_it_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storing fails for want of space: the image closes cleanly with all its data, the bitmap stays inconsistent."""
    path = tmp_path / "a.qcow2"
    qemu.create(path, "qcow2", 8 * MIB)
    add_bitmap(path, "a", 512)
    image = await open_image(str(path))
    await write(image, 3 * MIB, b"x" * 5000)

    async def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    assert image.changes is not None
    monkeypatch.setattr(image.changes.allocator, "allocate", no_space)
    with caplog.at_level(logging.ERROR):
        await image.aclose()
    assert "could not be stored" in caplog.text
    assert qemu.check(path).clean
    assert flags_of(path) == {"a": ["auto", "in-use"]}
    qemu.io(path, ["read -P 0x78 3M 5000"])


@pytest.mark.parametrize("cluster_size", ["512", "64k"])
async def test_bitmaps_grow_with_the_disk(tmp_path: Path, cluster_size: str) -> None:
    """A disk that grows within a session: enabled and disabled bitmaps fit it at the end, new bits clear."""
    path, size, new_size = tmp_path / "a.qcow2", 9 * MIB, 5000 * MIB
    qemu.create(path, "qcow2", new_size, options=f"cluster_size={cluster_size}")
    # The L1 table is long enough for the new size already; only the size in the header changes.
    _set_size(path, size)
    add_bitmap(path, "a", 65536)
    add_bitmap(path, "fine", 4096)
    qemu.io(path, ["write 1M 64k"])
    add_bitmap(path, "disabled", 4096, enabled=False)
    image = await open_image(str(path))
    ranges = [(MIB, 65536), await write(image, 8 * MIB, b"x" * 5000)]
    assert image.changes is not None
    bitmaps = image.changes.bitmaps
    assert bitmaps is not None
    await bitmaps.before_growth(image.changes.write_back, size, new_size)
    assert flags_of_bytes(path) == {"a": 3, "fine": 3, "disabled": 1}
    _set_size(path, new_size)
    bitmaps.mark(4999 * MIB, 1000)
    ranges.append((4999 * MIB, 1000))
    mapping = image.layers[0]
    assert isinstance(mapping, Mapping)
    mapping.resize(new_size)
    mapping.guest_size = new_size
    await image.aclose()
    assert qemu.check(path).clean
    assert flags_of(path) == {"a": ["auto"], "fine": ["auto"], "disabled": []}
    for name, granularity in (("a", 65536), ("fine", 4096)):
        assert qemu_dirty(path, name) == ranges_of(granules_of(ranges, granularity), granularity, new_size)
    assert qemu_dirty(path, "disabled") == []


def flags_of_bytes(path: Path) -> dict[str, int]:
    """The flags by name, of an image that is in use."""
    return {name: bitmap.flags for name, bitmap in stored_bitmaps(path.read_bytes()).items()}


def _set_size(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(24)
        file.write(size.to_bytes(8, "big"))
