"""Images that name tables far larger than what they hold: no command takes more than 64 MiB for them."""

from __future__ import annotations

import json
import struct
from array import array
from pathlib import Path

import pytest

from qcowfuse.format.header_fields import MAX_L1_SIZE, MAX_REFCOUNT_TABLE_SIZE
from tests.support.peak_memory import LIMIT_KIB, header, run_img, write_sparse

LUKS_POINTER = 0x0537BE77
CLUSTER_BITS = 16
L1_OFFSET = 1 << 20
N_ENTRIES = MAX_L1_SIZE // 8
DISK_SIZE = N_ENTRIES << 2 * CLUSTER_BITS - 3


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The peak, in KiB, of a command that looks at an image with nothing in it."""
    folder = tmp_path_factory.mktemp("idle")
    image = write_sparse(folder / "small.qcow2", {0: header()}, L1_OFFSET + 8)
    done = run_img(folder, "map", image)
    assert done.code == 0, done.stderr
    return done.peak


@pytest.fixture(scope="module")
def idle_writer(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The peak, in KiB, of a command that writes one: it has an event loop, and all of the driver."""
    folder = tmp_path_factory.mktemp("idle")
    assert run_img(folder, "create", folder / "small.qcow2", "1M").code == 0
    done = run_img(folder, "resize", folder / "small.qcow2", "+512")
    assert done.code == 0, done.stderr
    return done.peak


def with_l1_tables(path: Path, n_layers: int) -> Path:
    """A chain of images with the largest L1 tables there can be, of which the files hold nothing."""
    for number in range(n_layers):
        is_last = number == n_layers - 1
        start = header(
            l1_size=N_ENTRIES,
            size=DISK_SIZE,
            backing=b"" if is_last else b"%d" % (number + 1),
            extensions=() if is_last else ((0xE2792ACA, b"qcow2"),),
        )
        write_sparse(path / f"{number}", {0: start}, L1_OFFSET + MAX_L1_SIZE)
    return path / "0"


def test_l1_tables_of_a_long_chain_take_what_their_files_hold(tmp_path: Path, idle: int) -> None:
    """Ten tables of 32 MiB, all holes."""
    done = run_img(tmp_path, "map", with_l1_tables(tmp_path, 10))
    assert done.code == 0, done.stderr
    assert done.peak - idle < LIMIT_KIB


def with_scattered_clusters(
    path: Path, n_clusters: int, *, dirty: bool = False, cluster_bits: int = CLUSTER_BITS, distance: int = 1 << 13
) -> Path:
    """An image with counts of 64 bits whose one L2 table names clusters ``distance`` of them apart; by default each
    has a refcount block of its own."""
    size = 1 << cluster_bits
    entries = [1 << 63 | (64 + number * distance) * size for number in range(n_clusters)]
    start = header(
        cluster_bits=cluster_bits,
        size=n_clusters * size,
        l1_offset=2 * size,
        refcount_order=6,
        incompatible=int(dirty),
    )
    parts = {0: start[:4096], 2 * size: struct.pack(">Q", 1 << 63 | 3 * size)}
    parts[3 * size] = struct.pack(f">{n_clusters}Q", *entries)
    return write_sparse(path, parts, (65 + n_clusters * distance) * size)


def test_counts_of_scattered_clusters_take_no_memory_for_what_lies_between(tmp_path: Path, idle: int) -> None:
    """Each cluster has a refcount block of 64 KiB of its own."""
    image = with_scattered_clusters(tmp_path / "a.qcow2", 2500)
    done = run_img(tmp_path, "check", image)
    assert done.code == 2, done.stderr
    assert b"errors were found" in done.stdout
    assert done.peak - idle < LIMIT_KIB


def test_counts_have_a_limit_that_follows_the_size_on_the_host(tmp_path: Path, idle: int) -> None:
    """A file of some kilobytes whose counts would take 62 MiB is refused, by one line."""
    image = with_scattered_clusters(tmp_path / "a.qcow2", 8000)
    done = run_img(tmp_path, "check", image)
    assert done.code == 1
    assert "needs more than 24 MiB of memory to be checked" in done.stderr
    assert done.peak - idle < LIMIT_KIB


@pytest.mark.parametrize(
    ("n_clusters", "cluster_bits", "distance"),
    [(1200, CLUSTER_BITS, 1 << 13), pytest.param(2900, 21, 1300, id="2 MiB")],
)
def test_a_repair_takes_no_memory_for_what_lies_between(
    n_clusters: int, cluster_bits: int, distance: int, tmp_path: Path, idle_writer: int
) -> None:
    """A small dirty image, repaired when it is opened for writing; with clusters of 2 MiB there is a page of counts
    for each, which is as many as there may be, and a block of 2 MiB for hundreds of them."""
    image = with_scattered_clusters(
        tmp_path / "a.qcow2", n_clusters, dirty=True, cluster_bits=cluster_bits, distance=distance
    )
    done = run_img(tmp_path, "resize", image, "+512")
    assert done.code == 0, done.stderr
    assert done.peak - idle_writer < LIMIT_KIB
    assert run_img(tmp_path, "check", image).code == 0


def test_check_reads_the_largest_l1_table_in_parts(tmp_path: Path, idle: int) -> None:
    """32 MiB, all holes."""
    done = run_img(tmp_path, "check", with_l1_tables(tmp_path, 1))
    assert done.code == 2
    assert done.peak - idle < LIMIT_KIB // 4


def test_a_luks_header_of_128_gib_is_not_counted(tmp_path: Path, idle: int) -> None:
    """It is a corruption, as no image with it can be opened."""
    pointer = struct.pack(">QQ", 0, 1 << 37)
    start = header(
        cluster_bits=9, size=1 << 15, refcount_order=6, crypt_method=2, extensions=((LUKS_POINTER, pointer),)
    )
    image = write_sparse(tmp_path / "luks.qcow2", {0: start}, 1 << 37)
    done = run_img(tmp_path, "check", image)
    assert done.code == 2
    assert "LUKS header at 0x0 has 0x2000000000 bytes, more than 0x1000000" in done.stderr
    assert done.peak - idle < LIMIT_KIB


def with_names_of_snapshots(path: Path) -> Path:
    """63 MiB of snapshot names, in each of which one character makes Python use 4 bytes for all of them."""
    name = "\U0001f600".encode() + b"n" * 65000
    entries = bytearray()
    for number in range(1000):
        snapshot_id = b"%d" % number
        fixed = struct.pack(">QIHHIIQII", 0, 0, len(snapshot_id), len(name), 0, 0, 0, 0, 24)
        entries += fixed + struct.pack(">QQQ", 0, 1 << 20, 0) + snapshot_id + name
        entries += bytes(-len(entries) % 8)
    start = header(n_snapshots=1000, snapshots_offset=2 * L1_OFFSET)
    return write_sparse(path, {0: start, 2 * L1_OFFSET: bytes(entries)}, 2 * L1_OFFSET + len(entries))


def test_names_of_snapshots_are_not_kept(tmp_path: Path, idle_writer: int) -> None:
    """check, info and the list, and an image that is opened for writing."""
    image = with_names_of_snapshots(tmp_path / "a.qcow2")
    done = run_img(tmp_path, "check", image)
    assert done.code == 2
    assert b"errors were found" in done.stdout
    assert done.peak - idle_writer < LIMIT_KIB // 4
    done = run_img(tmp_path, "resize", image, "1M")
    assert done.code == 0, done.stderr
    assert done.peak - idle_writer < LIMIT_KIB // 4
    for command in (["info", "--output=json"], ["info"], ["snapshot", "-l"], ["snapshot", "-l", "--output=json"]):
        done = run_img(tmp_path, *command, image)
        assert done.code == 0, done.stderr
        assert done.stdout.count(b"n" * 65000) == 1000
        assert done.peak - idle_writer < LIMIT_KIB // 4


def test_names_of_bitmaps_are_not_kept(tmp_path: Path, idle_writer: int) -> None:
    """A directory of 40 MiB; such a one is given up by the first write, which a warning says."""
    name = "\U0001f600".encode() + b"n" * 900
    fixed = struct.pack(">QIIBBHI", L1_OFFSET + (1 << CLUSTER_BITS), 1, 0, 1, 16, len(name), 0)
    entry = fixed + name + bytes(-(len(fixed) + len(name)) % 8)
    extension = struct.pack(">IIQQ", 43000, 0, 43000 * len(entry), 2 * L1_OFFSET)
    start = header(autoclear=1, extensions=((0x23852875, extension),))
    image = write_sparse(tmp_path / "a.qcow2", {0: start, 2 * L1_OFFSET: entry * 43000})
    for command in (["info", "--output=json"], ["info"]):
        done = run_img(tmp_path, *command, image)
        assert done.code == 0, done.stderr
        assert done.stdout.count(b"n" * 900) == 43000
        assert done.peak - idle_writer < LIMIT_KIB // 4
    done = run_img(tmp_path, "check", image)
    assert done.code == 2
    assert done.peak - idle_writer < LIMIT_KIB // 4
    done = run_img(tmp_path, "resize", image, "1M")
    assert done.code == 0, done.stderr
    assert "more than 4194304; the disk can be used, but its persistent bitmaps will be given up" in done.stderr
    assert done.peak - idle_writer < LIMIT_KIB // 4


def with_bitmaps_of_ones(path: Path, n_bitmaps: int, *, cluster_bits: int, size: int) -> Path:
    """Bitmaps with granules of 512 bytes, each of whose tables says that all of it is ones."""
    cluster_size = 1 << cluster_bits
    n_entries = -(-size // (512 * 8 * cluster_size))
    entries, parts = b"", {}
    for number in range(n_bitmaps):
        place = (5 + number) * cluster_size
        entries += struct.pack(">QIIBBHI8s", place, n_entries, 2, 1, 9, 8, 0, b"%08d" % number)
        parts[place] = struct.pack(">Q", 1) * n_entries
    n_l1 = -(-size >> 2 * cluster_bits - 3)
    extension = struct.pack(">IIQQ", n_bitmaps, 0, len(entries), 4 * cluster_size)
    start = header(
        cluster_bits=cluster_bits,
        size=size,
        l1_size=n_l1,
        l1_offset=3 * cluster_size,
        autoclear=1,
        extensions=((0x23852875, extension),),
    )
    counts = struct.pack(">H", 1) * (5 + n_bitmaps)
    assert max(len(counts), n_l1 * 8, n_entries * 8, len(entries)) <= cluster_size
    parts |= {0: start, cluster_size: struct.pack(">Q", 2 * cluster_size), 2 * cluster_size: counts}
    parts[4 * cluster_size] = entries
    return write_sparse(path, parts, (5 + n_bitmaps) * cluster_size)


@pytest.mark.parametrize(
    ("n_bitmaps", "size", "n_kept"),
    [pytest.param(1, 1 << 36, 1, id="one of 256 parts"), pytest.param(2000, 1 << 20, 765, id="many of one part")],
)
def test_bitmaps_of_ones_take_no_memory(
    n_bitmaps: int, size: int, n_kept: int, tmp_path: Path, idle_writer: int
) -> None:
    """The first write loads them. The last part of each takes a cluster; those that do not fit are marked."""
    image = with_bitmaps_of_ones(tmp_path / "a.qcow2", n_bitmaps, cluster_bits=16, size=size)
    assert run_img(tmp_path, "check", image).code == 0
    done = run_img(tmp_path, "resize", image, "+512")
    assert done.code == 0, done.stderr
    assert done.peak - idle_writer < LIMIT_KIB
    assert done.stderr.count("can't be kept") == min(n_bitmaps - n_kept, 21)
    listed = json.loads(run_img(tmp_path, "info", "--output=json", image).stdout)
    flags = [bitmap["flags"] for bitmap in listed["format-specific"]["data"]["bitmaps"]]
    assert flags.count(["auto"]) == n_kept
    assert flags.count(["in-use", "auto"]) == n_bitmaps - n_kept
    assert run_img(tmp_path, "check", image).code == 0


def test_more_bitmaps_than_can_be_kept_are_given_up(tmp_path: Path, idle_writer: int) -> None:
    """65,535 of them, in a directory of 2 MiB, by the first write."""
    place = L1_OFFSET + (1 << CLUSTER_BITS)
    entries = b"".join(struct.pack(">QIIBBHI8s", place, 1, 0, 1, 16, 8, 0, b"%08d" % n) for n in range(65535))
    extension = struct.pack(">IIQQ", 65535, 0, len(entries), 2 * L1_OFFSET)
    start = header(autoclear=1, extensions=((0x23852875, extension),))
    image = write_sparse(tmp_path / "a.qcow2", {0: start, 2 * L1_OFFSET: entries})
    done = run_img(tmp_path, "resize", image, "1M")
    assert done.code == 0, done.stderr
    assert "65535 bitmaps, more than 4096; the disk can be used, but its persistent bitmaps will be" in done.stderr
    assert done.peak - idle_writer < LIMIT_KIB // 4


def test_a_very_long_table_of_snapshots_is_not_changed(tmp_path: Path, idle_writer: int) -> None:
    """It would have to be held in memory as a whole; the limit is named."""
    image = with_names_of_snapshots(tmp_path / "a.qcow2")
    before = image.read_bytes()[:L1_OFFSET]
    done = run_img(tmp_path, "snapshot", "-c", "new", image)
    assert done.code == 1
    assert "the table of its 1000 snapshots has more than 8 MiB" in done.stderr
    assert done.peak - idle_writer < LIMIT_KIB
    assert image.read_bytes()[:L1_OFFSET] == before


def test_the_largest_l1_table_is_held_once(tmp_path: Path, idle_writer: int) -> None:
    """Of an image that is opened for writing, with four million entries that name the same table."""
    table, size = L1_OFFSET + MAX_L1_SIZE, 1 << CLUSTER_BITS
    start = header(l1_size=N_ENTRIES, size=DISK_SIZE)
    parts = {0: start, L1_OFFSET: struct.pack(">Q", 1 << 63 | table) * N_ENTRIES}
    image = write_sparse(tmp_path / "a.qcow2", parts, table + size)
    done = run_img(tmp_path, "resize", image, str(DISK_SIZE))
    assert done.code == 0, done.stderr
    assert done.peak - idle_writer < LIMIT_KIB


def shuffled(n_entries: int, first: int, flags: int = 0) -> bytes:
    """A table that names as many clusters from ``first`` on, in no order."""
    size = 1 << CLUSTER_BITS
    entries = array("Q", (flags | first + number * 2_654_435_761 % n_entries * size for number in range(n_entries)))
    entries.byteswap()
    return entries.tobytes()


def test_as_many_tables_as_there_can_be_are_guarded_in_little_memory(tmp_path: Path, idle_writer: int) -> None:
    """Of an image that is opened for writing: as many L2 tables as an L1 table can name, and as many refcount blocks
    as a refcount table, each another one and all of them holes."""
    first, n_blocks = L1_OFFSET + MAX_L1_SIZE, MAX_REFCOUNT_TABLE_SIZE // 8
    refcount_table = first + (N_ENTRIES << CLUSTER_BITS)
    first_block = refcount_table + MAX_REFCOUNT_TABLE_SIZE
    start = bytearray(header(l1_size=N_ENTRIES, size=DISK_SIZE))
    struct.pack_into(">QI", start, 48, refcount_table, MAX_REFCOUNT_TABLE_SIZE >> CLUSTER_BITS)
    parts = {0: bytes(start), L1_OFFSET: shuffled(N_ENTRIES, first, 1 << 63)}
    parts[refcount_table] = shuffled(n_blocks, first_block)
    image = write_sparse(tmp_path / "a.qcow2", parts, first_block + (n_blocks << CLUSTER_BITS))
    done = run_img(tmp_path, "resize", image, str(DISK_SIZE))
    assert done.code == 0, done.stderr
    assert done.peak - idle_writer < LIMIT_KIB


def test_tables_in_a_file_of_very_many_clusters_are_guarded_up_to_a_limit(tmp_path: Path, idle: int) -> None:
    """The file has more than 2^32 clusters, and two million L2 tables, the last one at its end."""
    folder = tmp_path
    n_tables, end = 1 << 21, (1 << 32) + 8 << 9
    entries = array("Q", (1 << 63 | 64 << 20 | number << 9 for number in range(n_tables - 1)))
    entries.append(1 << 63 | end - 512)
    entries.byteswap()
    start = header(cluster_bits=9, l1_size=n_tables, size=n_tables << 15)
    image = write_sparse(folder / "a.qcow2", {0: start[:512], L1_OFFSET: entries.tobytes()}, end)
    done = run_img(folder, "resize", image, str(n_tables << 15))
    assert done.code == 1
    assert "some lie so far behind in the file" in done.stderr
    assert "serve it read-only (qcowfuse -r)" in done.stderr
    assert done.peak - idle < LIMIT_KIB


@pytest.mark.parametrize(
    ("l1_mib", "message"), [(32, "has 4194304 L2 tables"), (40, "has more than 32 MiB in use, too much to write")]
)
def test_too_many_tables_of_version_1_are_not_written(
    l1_mib: int, message: str, tmp_path: Path, idle_writer: int
) -> None:
    """An L1 table that is full: it would be held in memory, with the places of its tables."""
    cluster_bits, l2_bits, n_entries = 12, 9, l1_mib << 17
    size = n_entries << cluster_bits + l2_bits
    start = struct.pack(">4sIQIIQBBHIQ", b"QFI\xfb", 1, 0, 0, 0, size, cluster_bits, l2_bits, 0, 0, 4096)
    table = 4096 + n_entries * 8
    parts = {0: start, 4096: struct.pack(">Q", table) * n_entries}
    image = write_sparse(tmp_path / "a.qcow", parts, table + 4096)
    done = run_img(tmp_path, "resize", image, str(size))
    assert done.code == 1
    assert message in done.stderr
    assert "serve it read-only (qcowfuse -r)" in done.stderr
    assert done.peak - idle_writer < LIMIT_KIB
