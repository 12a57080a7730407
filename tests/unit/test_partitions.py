"""Partition tables without any I/O: what is found, what is named as wrong, and that nothing wrong is ever used."""

from __future__ import annotations

import random
import struct
import uuid
import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfuse.errors import ImageUsageError
from qcowfuse.partitions.file_systems import find_file_system
from qcowfuse.partitions.mbr import MAX_LINKS
from qcowfuse.partitions.overlaps import Extent, find_overlaps
from qcowfuse.partitions.table import choose_partition, find_table
from qcowfuse.partitions.values import PartitionTable
from tests.support.partition_tables import (
    DISK,
    Entry,
    answer,
    gpt_disk,
    mbr_disk,
    put_boot_record,
    put_protective_mbr,
    with_checksum,
)

N_SECTORS = 4096
ENTRIES = (Entry(100, 199, "boot", attributes=4), None, Entry(200, 299, "daten-\u00e4\U0001f600"))
SECTOR_SIZES = pytest.mark.parametrize("sector_size", [512, 4096])


def table_of(disk: bytes | bytearray) -> PartitionTable:
    return answer(find_table(len(disk)), disk, max_reads=400)


def usable(table: PartitionTable) -> list[int]:
    return [
        partition.number for partition in table.partitions if not partition.problem and not partition.is_container
    ]


# ---- GPT ----


@SECTOR_SIZES
def test_gpt_entries_are_found(sector_size: int) -> None:
    """Number, place, size, type, label, UUID and the flag for booting, with sectors of either size."""
    table = table_of(gpt_disk(N_SECTORS, ENTRIES, sector_size=sector_size))
    assert table.problems == ()
    assert (table.kind, table.sector_size, table.disk_id) == ("gpt", sector_size, str(DISK))
    first, second = table.partitions
    assert (first.number, second.number) == (1, 3)
    assert (first.start, first.n_bytes) == (100 * sector_size, 100 * sector_size)
    assert (first.label, second.label) == ("boot", "daten-\u00e4\U0001f600")
    assert first.uuid == str(Entry(100, 199).unique)
    assert (first.type_id, first.type_name) == ("0fc63daf-8483-4772-8e79-3d69d8477de4", "Linux filesystem")
    assert first.is_bootable
    assert not second.is_bootable
    assert usable(table) == [1, 3]


@SECTOR_SIZES
@pytest.mark.parametrize("damage", [0, 9, 17, 24, 40, 56, 72, 84, 90], ids="byte {}".format)
def test_the_backup_stands_in_for_a_damaged_header(sector_size: int, damage: int) -> None:
    """Whatever byte of the primary header is another one, the partitions come from the backup, and that is said."""
    disk = gpt_disk(N_SECTORS, ENTRIES, sector_size=sector_size)
    whole = table_of(disk)
    disk[sector_size + damage] ^= 1
    table = table_of(disk)
    assert table.partitions == whole.partitions
    assert len(table.problems) == 1
    assert "the primary table is damaged" in table.problems[0]
    assert "backup" in table.problems[0]


@SECTOR_SIZES
def test_the_backup_stands_in_for_damaged_entries(sector_size: int) -> None:
    """A wrong byte among the entries makes the primary table one that does not count."""
    disk = gpt_disk(N_SECTORS, ENTRIES, sector_size=sector_size)
    disk[2 * sector_size + 40] ^= 1
    table = table_of(disk)
    assert [partition.start for partition in table.partitions] == [100 * sector_size, 200 * sector_size]
    assert "GPT entries" in table.problems[0]


@SECTOR_SIZES
def test_a_damaged_backup_is_said(sector_size: int) -> None:
    """The primary table counts all the same."""
    disk = gpt_disk(N_SECTORS, ENTRIES, sector_size=sector_size)
    disk[(N_SECTORS - 1) * sector_size + 50] ^= 1
    table = table_of(disk)
    assert usable(table) == [1, 3]
    assert "the backup table, in sector 4095, is damaged" in table.problems[0]


def test_with_both_copies_damaged_there_is_nothing() -> None:
    """Both are named, and no partition is."""
    disk = gpt_disk(N_SECTORS, ENTRIES)
    disk[512 + 60] ^= 1
    disk[(N_SECTORS - 1) * 512 + 60] ^= 1
    table = table_of(disk)
    assert (table.kind, table.partitions) == ("gpt", ())
    assert table.problems[0].count("wrong checksum") == 2


def test_a_backup_that_says_something_else_is_said() -> None:
    """Each copy is right in itself: the primary counts."""
    disk = gpt_disk(N_SECTORS, ENTRIES)
    other = gpt_disk(N_SECTORS, [Entry(100, 150)])
    disk[N_SECTORS * 256 :] = other[N_SECTORS * 256 :]
    table = table_of(disk)
    assert usable(table) == [1, 3]
    assert "another one than the primary" in table.problems[0]


def test_a_disk_that_was_made_larger_or_smaller() -> None:
    """Larger: all partitions, and a word about the backup. Smaller: those that fit, and words about both."""
    disk = gpt_disk(N_SECTORS, [*ENTRIES, Entry(3000, 3999)])
    larger = table_of(disk + bytes(1 << 20))
    assert usable(larger) == [1, 3, 4]
    assert "not at the end of the disk" in larger.problems[0]
    smaller = table_of(disk[: 2000 * 512])
    assert usable(smaller) == [1, 3]
    assert smaller.partitions[2].problem == "reaches beyond the end of the disk"
    assert "for a larger disk" in smaller.problems[0]
    assert "beyond the end of the disk" in smaller.problems[1]


def test_without_a_protective_mbr_a_gpt_does_not_count() -> None:
    """It may be left from an earlier use; the kernel ignores it, too. It is said."""
    disk = gpt_disk(N_SECTORS, ENTRIES)
    disk[:512] = bytes(512)
    table = table_of(disk)
    assert (table.kind, table.partitions) == ("", ())
    assert "no protective MBR" in table.problems[0]
    put_boot_record(disk, 0, [(0, 0x83, 64, 1000)])
    table = table_of(disk)
    assert (table.kind, [partition.start for partition in table.partitions]) == ("mbr", [64 * 512])
    assert "no protective MBR" in table.problems[0]


def test_of_a_hybrid_mbr_the_gpt_counts() -> None:
    """What the MBR has beside it is said and not used."""
    disk = gpt_disk(N_SECTORS, ENTRIES)
    put_boot_record(disk, 0, [(0, 0xEE, 1, 33), (0x80, 0x07, 500, 100)])
    table = table_of(disk)
    assert (table.kind, usable(table)) == ("gpt", [1, 3])
    assert "partitions of its own" in table.problems[0]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        pytest.param(Entry(300, 299), "ends before it starts", id="backwards"),
        pytest.param(Entry(4000, 4096), "beyond the end of the disk", id="one too far"),
        pytest.param(Entry(300, (1 << 64) - 1), "beyond the end of the disk", id="all ones"),
        pytest.param(Entry(1 << 63, (1 << 63) + 5), "beyond the end of the disk", id="2^63"),
        pytest.param(Entry(0, 99), "lies over the partition table", id="the MBR"),
        pytest.param(Entry(33, 40), "lies over the partition table", id="the entries"),
        pytest.param(Entry(4063, 4063), "lies over the partition table", id="the entries of the backup"),
        pytest.param(Entry(4095, 4095), "lies over the partition table", id="the backup"),
    ],
)
def test_a_gpt_entry_that_cannot_be_is_named_and_not_used(entry: Entry, problem: str) -> None:
    """With right checksums, too: the entry is listed with what is wrong, and the others can be used."""
    table = table_of(gpt_disk(N_SECTORS, [*ENTRIES, entry]))
    assert problem in table.partitions[2].problem
    assert usable(table) == [1, 3]
    with pytest.raises(ImageUsageError, match=f"partition 4 can't be used: it .*{problem}"):
        choose_partition(table, "4")


def test_both_of_two_that_lie_over_each_other_are_named() -> None:
    """Neither can be used, however little they share."""
    table = table_of(gpt_disk(N_SECTORS, [Entry(100, 200), Entry(200, 300), Entry(301, 400)]))
    assert [partition.problem for partition in table.partitions] == [
        "lies over partition 2",
        "lies over partition 1",
        "",
    ]


@pytest.mark.parametrize(
    ("place", "form", "value"),
    [
        pytest.param(12, "<I", 91, id="a header too short"),
        pytest.param(12, "<I", 513, id="a header longer than its sector"),
        pytest.param(24, "<Q", 2, id="another sector"),
        pytest.param(40, "<Q", 5000, id="usable from the end on"),
        pytest.param(72, "<Q", 0, id="entries over the MBR"),
        pytest.param(72, "<Q", (1 << 64) - 1, id="entries beyond all"),
        pytest.param(80, "<I", 0xFFFFFFFF, id="four thousand million entries"),
        pytest.param(84, "<I", 0, id="entries of no bytes"),
        pytest.param(84, "<I", 127, id="entries too small"),
        pytest.param(84, "<I", 0xFFFFFFF8, id="entries of 4 GiB"),
    ],
)
def test_a_header_with_a_right_checksum_is_distrusted_all_the_same(place: int, form: str, value: int) -> None:
    """Numbers that cannot be make the copy one that does not count; with both like that there is no table."""
    disk = gpt_disk(N_SECTORS, ENTRIES)
    for header in (512, (N_SECTORS - 1) * 512):
        struct.pack_into(form, disk, header + place, value)
        with_checksum(disk, header, 91 if value == 91 else 92)
    table = table_of(disk)
    assert table.partitions == ()
    assert "GPT header" in table.problems[0]


def test_a_name_of_anything_is_text() -> None:
    """Half a surrogate pair becomes a replacement; what follows the end is no part of the name."""
    disk = gpt_disk(N_SECTORS, [Entry(100, 199)], n_entries=4)
    raw = b"a\0\x00\xd8b\0\0\0c\0"
    for place in (1024, (N_SECTORS - 2) * 512):
        disk[place + 56 : place + 56 + len(raw)] = raw
    checksum = struct.pack("<I", zlib.crc32(disk[1024:1536]))
    for header in (512, (N_SECTORS - 1) * 512):
        disk[header + 88 : header + 92] = checksum
        with_checksum(disk, header)
    table = table_of(disk)
    assert table.problems == ()
    assert table.partitions[0].label == "a\ufffdb"


# ---- MBR ----


def logical_disk(*, n_logical: int = 3) -> bytearray:
    """A primary partition, an extended one, and logical ones of 50 sectors in it, 100 apart."""
    disk = mbr_disk(N_SECTORS, [(0x80, 0x83, 64, 100), (0, 0x05, 1000, 3000)])
    for number in range(n_logical):
        link = (0, 0x05, (number + 1) * 100, 60) if number + 1 < n_logical else (0, 0, 0, 0)
        put_boot_record(disk, 1000 + number * 100, [(0, 0x83, 10, 50), link])
    return disk


def test_mbr_partitions_are_found() -> None:
    """Primary, extended and logical ones, these from 5 on; UUIDs as the kernel makes them."""
    table = table_of(logical_disk())
    assert table.problems == ()
    assert (table.kind, table.disk_id) == ("mbr", "12345678")
    found = [(partition.number, partition.start // 512, partition.n_bytes // 512) for partition in table.partitions]
    assert found == [(1, 64, 100), (2, 1000, 3000), (5, 1010, 50), (6, 1110, 50), (7, 1210, 50)]
    assert [partition.is_container for partition in table.partitions] == [False, True, False, False, False]
    assert table.partitions[0].is_bootable
    assert table.partitions[2].uuid == "12345678-05"
    assert usable(table) == [1, 5, 6, 7]


def test_a_chain_in_a_circle_ends() -> None:
    """What was found before counts; the loop is named."""
    disk = logical_disk()
    put_boot_record(disk, 1200, [(0, 0x83, 10, 50), (0, 0x05, 100, 60)])
    table = table_of(disk)
    assert usable(table) == [1, 5, 6, 7]
    assert "is a loop: it comes back to sector 1100" in table.problems[0]


def test_a_chain_that_goes_elsewhere_ends() -> None:
    """Out of its extended partition, to another boot record, or to what is no boot record."""
    disk = logical_disk()
    put_boot_record(disk, 1200, [(0, 0x83, 10, 50), (0, 0x05, 0xFFFFFF00, 60)])
    assert "leaves it: sector 4294968040" in table_of(disk).problems[0]
    put_boot_record(disk, 1200, [(0, 0x83, 10, 50), (0, 0x05, 2000, 60)])
    table = table_of(disk)
    assert usable(table) == [1, 5, 6, 7]
    assert "no boot record in sector 3000" in table.problems[0]


def test_a_chain_is_never_followed_for_ever() -> None:
    """More boot records than the kernel knows partitions end it, with a word; so for several chains together."""
    disk = mbr_disk(N_SECTORS, [(0, 0x05, 1000, 1500), (0, 0x0F, 2500, 1500)])
    for first in (1000, 2500):
        for number in range(600):
            put_boot_record(disk, first + 2 * number, [(0, 0x83, 1, 1), (0, 0x05, 2 * number + 2, 2)])
    table = table_of(disk)
    assert len(table.partitions) == 2 + MAX_LINKS
    assert [f"more than {MAX_LINKS} links" in problem for problem in table.problems] == [True, True]


def test_an_extended_partition_with_nothing_in_it() -> None:
    """All zeroes where the first boot record would be is nothing to speak of."""
    table = table_of(mbr_disk(N_SECTORS, [(0, 0x0F, 1000, 3000)]))
    assert (usable(table), table.problems) == ([], ())
    with pytest.raises(ImageUsageError, match="only holds others"):
        choose_partition(table, "1")


@pytest.mark.parametrize(
    ("entries", "problems"),
    [
        ([(0, 0x83, 100, 100), (0, 0x83, 150, 100)], ["lies over partition 2", "lies over partition 1"]),
        ([(0, 0x83, 100, 100), (0, 0x83, 200, 3897)], ["", "reaches beyond the end of the disk"]),
        ([(0, 0x83, 100, 0xFFFFFFFF)], ["reaches beyond the end of the disk"]),
        ([(0, 0x83, 0, 100)], ["lies over the partition table"]),
        ([(0, 0x83, 100, 1000), (0, 0x05, 1000, 100)], ["lies over partition 2", "lies over partition 1"]),
    ],
)
def test_an_mbr_entry_that_cannot_be_is_named(entries: list[tuple[int, int, int, int]], problems: list[str]) -> None:
    """Over others, over the table, over an extended partition, or beyond the disk."""
    table = table_of(mbr_disk(N_SECTORS, entries))
    assert [partition.problem for partition in table.partitions] == problems


def test_a_logical_partition_that_cannot_be_is_named() -> None:
    """Out of its extended partition, over a boot record of the chain, or over another."""
    disk = logical_disk(n_logical=2)
    put_boot_record(disk, 1000, [(0, 0x83, 10, 91), (0, 0x05, 100, 60)])  # over the second boot record
    put_boot_record(disk, 1100, [(0, 0x83, 10, 2991)])
    table = table_of(disk)
    assert "lies over the partition table" in table.partitions[2].problem
    assert "reaches out of partition 2" in table.partitions[3].problem
    assert usable(table) == [1]


def test_garbage_in_the_last_entries_of_a_link_is_passed_over() -> None:
    """As the kernel does it: what fits counts, what does not is garbage."""
    disk = logical_disk(n_logical=1)
    put_boot_record(disk, 1000, [(0, 0x83, 10, 50), (0, 0, 0, 0), (7, 0x83, 100, 5000), (9, 0x83, 100, 50)])
    table = table_of(disk)
    assert [partition.start // 512 for partition in table.partitions[2:]] == [1010, 1100]


@pytest.mark.parametrize("mark", [b"FAT16   ", b"FAT32   ", b"NTFS    "])
def test_the_boot_sector_of_a_file_system_is_no_table(mark: bytes) -> None:
    """It has the same signature; what stands in the place of the table is code or nothing."""
    disk = mbr_disk(N_SECTORS, [(0, 0x83, 100, 100)])
    place = {b"FAT16   ": 54, b"FAT32   ": 82}.get(mark, 3)
    disk[0:3] = b"\xeb\x58\x90"
    disk[place : place + 8] = mark
    assert table_of(disk) == PartitionTable()
    code = mbr_disk(N_SECTORS, [(0x33, 0x83, 100, 100)])
    assert table_of(code) == PartitionTable()


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1023, 1024, 1535, 4095, 4096, 8192, 12288])
def test_disks_of_hardly_any_size(size: int) -> None:
    """Nothing is read that is not there."""
    assert table_of(bytes(size)) == PartitionTable()
    disk = bytearray(size)
    if size >= 512:
        put_protective_mbr(disk, size // 512)
    assert usable(table_of(disk)) == []


# ---- properties ----


def assert_only_the_right_is_used(table: PartitionTable, size: int) -> None:
    """Numbers are given once. What can be used lies in the disk, behind the first sector, and apart from others."""
    numbers = [partition.number for partition in table.partitions]
    assert len(set(numbers)) == len(numbers)
    good = sorted((part.start, part.end) for part in table.partitions if not part.problem and not part.is_container)
    for start, end in good:
        assert 512 <= start < end <= size
    for (_, end), (start, _) in pairwise(good):
        assert end <= start


SECTORS = st.integers(0, N_SECTORS + 40) | st.sampled_from([(1 << 32) - 1, 1 << 63, (1 << 64) - 1])


@given(st.lists(st.tuples(SECTORS, SECTORS), max_size=12), st.sampled_from([512, 4096]))
def test_gpt_with_any_numbers(places: list[tuple[int, int]], sector_size: int) -> None:
    """The checksums are right, the numbers are not."""
    disk = gpt_disk(N_SECTORS, [Entry(*place) for place in places], sector_size=sector_size)
    table = table_of(disk)
    assert len(table.partitions) == len(places)
    assert_only_the_right_is_used(table, len(disk))


MBR_ENTRIES = st.lists(
    st.tuples(
        st.sampled_from([0, 0x80]),
        st.sampled_from([0x05, 0x0F, 0x83, 0]),
        st.integers(0, 300) | st.just((1 << 32) - 1),
        st.integers(0, 300) | st.just((1 << 32) - 1),
    ),
    min_size=4,
    max_size=4,
)


@given(st.dictionaries(st.integers(0, 299), MBR_ENTRIES, max_size=12), MBR_ENTRIES)
def test_mbr_with_any_chain(records: dict[int, list[tuple[int, int, int, int]]], first: object) -> None:
    """Boot records all over a small disk that point anywhere."""
    disk = mbr_disk(300, [])
    for sector, entries in {**records, 0: first}.items():
        put_boot_record(disk, sector, entries)  # type: ignore[arg-type]
    assert_only_the_right_is_used(table_of(disk), len(disk))


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=9))
def test_overlaps_are_all_found(ranges: list[tuple[int, int]]) -> None:
    """Just those that share a place with another one, by trying all pairs; the one that is named does so, too."""
    extents = [Extent(start, end, str(number), number) for number, (start, end) in enumerate(ranges)]
    found = find_overlaps(extents)

    def share(one: Extent, other: Extent) -> bool:
        return max(one.start, other.start) < min(one.end, other.end)

    for one in extents:
        assert (one.key in found) == any(share(one, other) for other in extents if other.key != one.key)
        if one.key in found:
            assert share(one, extents[int(found[one.key])])


@given(st.randoms(use_true_random=False), st.sampled_from([512, 4096]))
def test_changed_bytes(chooser: random.Random, sector_size: int) -> None:
    """Bytes that are other ones: whatever is left, nothing wrong is used, and it ends."""
    disk = gpt_disk(N_SECTORS, ENTRIES, sector_size=sector_size) if chooser.random() < 0.5 else logical_disk()
    for _ in range(chooser.randint(1, 4)):
        disk[
            chooser.choice((446, 450, 454, 458, 462, 512, 1000 * 512 + 446, sector_size, 1024))
            + chooser.randrange(90)
        ] = chooser.randrange(256)
    assert_only_the_right_is_used(table_of(disk), len(disk))


# ---- which one is meant ----


def test_a_partition_is_chosen_by_number_label_or_uuid() -> None:
    """A number goes before a label that looks like one; a UUID may have capitals."""
    names = [Entry(100, 199, "root"), Entry(200, 299, "1"), Entry(300, 399, "home")]
    table = table_of(gpt_disk(N_SECTORS, names))
    for wanted, number in (("1", 1), ("2", 2), ("root", 1), ("home", 3), (str(names[1].unique).upper(), 2)):
        assert choose_partition(table, wanted).number == number


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("4", r"no partition 4 \(there are: 1, 2, 3\)"),
        ("0", "no partition 0"),
        ("Root", "no partition Root"),
        ("", "no partition"),
        ("-1", "no partition -1"),
        ("\u0661", "no partition"),  # a digit, but none that int() should be asked about
        ("twice", "may be any of the partitions 2, 3: give the number"),
    ],
)
def test_what_is_not_there_or_not_one_is_refused(wanted: str, message: str) -> None:
    """One line, with what there is."""
    table = table_of(
        gpt_disk(N_SECTORS, [Entry(100, 199, "root"), Entry(200, 299, "twice"), Entry(300, 399, "twice")])
    )
    with pytest.raises(ImageUsageError, match=message):
        choose_partition(table, wanted)


def test_a_disk_without_a_table_has_no_partition() -> None:
    """The refusal says which of both it is: no table, or a damaged one."""
    with pytest.raises(ImageUsageError, match="no partition 1: the disk has no partition table"):
        choose_partition(PartitionTable(), "1")
    disk = bytearray(1 << 20)
    put_protective_mbr(disk, 2048)
    with pytest.raises(ImageUsageError, match="no GPT header in sector 1"):
        choose_partition(table_of(disk), "1")


# ---- file systems ----


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("ext2", {1080: b"\x53\xef"}),
        ("ext3", {1080: b"\x53\xef", 1116: b"\4\0\0\0"}),
        ("ext4", {1080: b"\x53\xef", 1116: b"\4\0\0\0\x40\0\0\0"}),
        ("jbd", {1080: b"\x53\xef", 1120: b"\x08\0\0\0"}),
        ("xfs", {0: b"XFSB"}),
        ("btrfs", {0x10040: b"_BHRfS_M"}),
        ("vfat", {0: b"\xeb\x3c\x90", 54: b"FAT16   ", 510: b"\x55\xaa"}),
        ("vfat", {0: b"\xeb\x58\x90", 82: b"FAT32   ", 510: b"\x55\xaa"}),
        ("ntfs", {0: b"\xeb\x52\x90NTFS    ", 510: b"\x55\xaa"}),
        ("exfat", {0: b"\xeb\x76\x90EXFAT   ", 510: b"\x55\xaa"}),
        ("swap", {4086: b"SWAPSPACE2"}),
        ("swap", {65526: b"SWAPSPACE2"}),
        ("crypto_LUKS", {0: b"LUKS\xba\xbe\0\2", 1080: b"\x53\xef"}),
        ("LVM2_member", {512: b"LABELONE", 536: b"LVM2 001"}),
        ("iso9660", {0x8001: b"CD001"}),
        ("squashfs", {0: b"hsqs"}),
        ("", {}),
        ("", {1080: b"\x53"}),
    ],
)
def test_file_systems_by_their_magic(name: str, places: dict[int, bytes]) -> None:
    """Each in its place; nothing is read outside of the partition, however small it is."""
    disk = bytearray(1 << 17)
    for place, magic in places.items():
        disk[place : place + len(magic)] = magic
    assert answer(find_file_system(len(disk)), disk, max_reads=3) == name
    for n_bytes in (0, 1, 512, 1081, 1082, 1130, 4095, 4096, 0x8001, 0x8006, 65536, 0x10048):
        assert answer(find_file_system(n_bytes), disk[:n_bytes]) in (name, "", "ext2", "ext3")


def test_uuids_are_as_the_library_writes_them() -> None:
    """The first three numbers are little-endian."""
    entry = Entry(100, 199, kind=uuid.UUID("01234567-89ab-cdef-0123-456789abcdef"))
    (partition,) = table_of(gpt_disk(N_SECTORS, [entry])).partitions
    assert (partition.type_id, partition.type_name) == ("01234567-89ab-cdef-0123-456789abcdef", "")
