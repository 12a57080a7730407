"""What the parsers and serialisers of ``format`` refuse, each refusal by the value just beyond what is allowed."""

from __future__ import annotations

import random
import struct
import zlib
from array import array
from uuid import UUID

import pytest

from qcowfuse.errors import CorruptImageError, FormatError, UnsupportedFeatureError
from qcowfuse.format import luks
from qcowfuse.format.bitmap_directory import is_valid_table_entry, parse_bitmap_directory
from qcowfuse.format.compression import decompress_start
from qcowfuse.format.entries import COMPRESSED, COPIED, READS_ZERO, entry_format, masked
from qcowfuse.format.geometry import Geometry
from qcowfuse.format.header import Qcow2Header
from qcowfuse.format.header_bytes import serialise_header, serialise_switch
from qcowfuse.format.luks import CipherSpec
from qcowfuse.format.luks_keys import LuksRandomness, make_luks_area
from qcowfuse.format.size_fields import disk_size_in, replace_size_fields
from qcowfuse.format.snapshots import MAX_SNAPSHOT_EXTRA, Snapshot, parse_snapshot, serialise_snapshots

CLUSTER = 65536
HEADER = Qcow2Header(
    version=3,
    backing_file_offset=0,
    backing_file_size=0,
    cluster_bits=16,
    size=1 << 30,
    crypt_method=0,
    l1_size=2,
    l1_table_offset=0x30000,
    refcount_table_offset=0x10000,
    refcount_table_clusters=1,
    n_snapshots=0,
    snapshots_offset=0,
    backing_file=None,
    header_length=112,
)


def bitmap_entry(**changes: int) -> bytes:
    """An entry of a bitmap directory whose name is "b", padded."""
    fields = {"table": CLUSTER, "size": 1, "flags": 0, "kind": 1, "bits": 16, "name": 1, "extra": 0} | changes
    fixed = struct.pack(
        ">QIIBBHI",
        *(fields[name] for name in ("table", "size", "flags", "kind", "bits", "name", "extra")),
    )
    return (fixed + b"b").ljust(32, b"\0")


def test_a_bitmap_directory_that_is_right() -> None:
    """The entry that the refusals below start from is taken."""
    (entry,) = parse_bitmap_directory(bitmap_entry(), 1, CLUSTER)
    assert (entry.name, entry.table_offset, entry.granularity) == ("b", CLUSTER, CLUSTER)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"table": CLUSTER + 512}, "not a valid bitmap"),
        ({"table": 0}, "not a valid bitmap"),
        ({"size": 0}, "not a valid bitmap"),
        ({"flags": 8}, "not a valid bitmap"),
        ({"kind": 2}, "not a valid bitmap"),
        ({"bits": 8}, "not a valid bitmap"),
        ({"bits": 32}, "not a valid bitmap"),
        ({"name": 0}, "not a valid bitmap"),
        ({"extra": 1}, "not a valid bitmap"),
        ({"name": 9}, "reaches to byte"),
    ],
)
def test_bitmap_entries_that_qemu_would_not_load(changes: dict[str, int], reason: str) -> None:
    """One field at a time."""
    with pytest.raises(FormatError, match=reason):
        parse_bitmap_directory(bitmap_entry(**changes), 1, CLUSTER)


def test_a_bitmap_directory_of_another_length() -> None:
    """More bytes than entries, fewer than one entry, another number than the header extension says."""
    with pytest.raises(FormatError, match="cut short"):
        parse_bitmap_directory(bitmap_entry() + bytes(8), 1, CLUSTER)
    with pytest.raises(FormatError, match="1 bitmaps, expected 2"):
        parse_bitmap_directory(bitmap_entry(), 2, CLUSTER)


@pytest.mark.parametrize(
    ("entry", "valid"),
    [
        (0, True),
        (1, True),
        (CLUSTER, True),
        (CLUSTER | 1, False),
        (CLUSTER + 512, False),
        (2, False),
        (1 << 56, False),
    ],
)
def test_entries_of_a_bitmap_table(entry: int, valid: bool) -> None:
    """An offset or "all ones", never both; reserved bits are 0."""
    assert is_valid_table_entry(entry, CLUSTER) is valid


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cluster_bits": 8}, "cluster_bits 8"),
        ({"cluster_bits": 22}, "cluster_bits 22"),
        ({"l2_bits": 0}, "l2_bits 0"),
        ({"l2_bits": 19}, "l2_bits 19"),
        ({"size": -1}, "virtual size"),
        ({"size": 1 << 63}, "virtual size"),
    ],
)
def test_impossible_geometries(changes: dict[str, int], reason: str) -> None:
    """Clusters, tables and disks beyond what shifts and 64-bit offsets can address."""
    with pytest.raises(FormatError, match=reason):
        Geometry(**{"cluster_bits": 16, "l2_bits": 13, "size": 1 << 30} | changes)


def test_snapshots_that_no_table_holds() -> None:
    """Extra data beyond the limit, an entry that ends too early, names and extra data that no entry can state."""
    snapshot = Snapshot(
        snapshot_id="1",
        name="first",
        l1_table_offset=CLUSTER,
        l1_size=1,
        date_sec=0,
        date_nsec=0,
        vm_clock_nsec=0,
        vm_state_size=0,
        disk_size=1 << 30,
        icount=None,
        n_extra=24,
    )
    data = serialise_snapshots([snapshot])
    with pytest.raises(FormatError, match="expected at most"):
        parse_snapshot(data[:36] + struct.pack(">I", MAX_SNAPSHOT_EXTRA + 1) + data[40:], 0)
    with pytest.raises(FormatError, match="69 bytes, expected 70"):
        parse_snapshot(data[:69], 0)
    with pytest.raises(FormatError, match="name of 65536 bytes"):
        serialise_snapshots([snapshot._replace(name="n" * 65536)])
    with pytest.raises(FormatError, match="extra data of 32 bytes, expected 24"):
        serialise_snapshots([snapshot._replace(n_extra=32)])


def test_a_backing_name_that_does_not_fit_its_place() -> None:
    """Its length is not the one stated, or it would lie on the header."""
    named = HEADER._replace(backing_file="base.qcow2", backing_file_offset=512, backing_file_size=10)
    assert serialise_header(named)[512:522] == b"base.qcow2"
    with pytest.raises(FormatError, match="expected 9"):
        serialise_header(named._replace(backing_file_size=9))
    with pytest.raises(FormatError, match="backing file name of 10 bytes at 0x60"):
        serialise_header(named._replace(backing_file_offset=96))


def test_the_fields_that_switch_tables() -> None:
    """48 bytes, in version 3 72: what stands in the whole header at this place."""
    for version, n_bytes in ((2, 48), (3, 72)):
        header = HEADER._replace(version=version, header_length=72 if version == 2 else 112)
        whole = serialise_header(header)
        assert serialise_switch(header) == whole[24 : 24 + n_bytes]
        assert len(serialise_switch(header)) == n_bytes


def test_size_fields_of_a_header_that_is_cut_short() -> None:
    """23 bytes are refused, 24 are changed; version 1 keeps what it has in place of the length of the L1 table."""
    fields = bytes(range(24))
    with pytest.raises(FormatError, match="23 bytes, expected 24"):
        replace_size_fields(fields[:23], version=3, size=1, l1_size=1, l1_table_offset=1)
    changed = replace_size_fields(fields, version=3, size=5, l1_size=6, l1_table_offset=7)
    assert (disk_size_in(changed), changed[8:12], changed[12:]) == (5, fields[8:12], b"\0\0\0\6" + bytes(7) + b"\7")
    assert replace_size_fields(fields, version=1, size=5, l1_size=6, l1_table_offset=7)[8:16] == fields[8:16]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_l2_table_beyond_all_files(version: int) -> None:
    """Only version 1 has bits for such an offset."""
    form = entry_format(version, 16)
    assert form.l1_host_offset(1 << 55) == 1 << 55
    if version == 1:
        with pytest.raises(CorruptImageError, match="beyond 2\\^56"):
            form.l1_host_offset(1 << 56)
    else:
        assert form.l1_host_offset(1 << 56 | COPIED) == 0


def test_masked_is_what_a_loop_would_give() -> None:
    """Mask and shift of every entry, none spilling into its neighbour."""
    table = array("Q", [0, COPIED | 0x50000, COMPRESSED | READS_ZERO, (1 << 64) - 1])
    for mask, shift in ((0x00FFFFFFFFFFFE00, 9), (COPIED, 63), ((1 << 64) - 1, 0)):
        assert list(masked(table, mask, shift)) == [(entry & mask) >> shift for entry in table]


def test_the_start_of_a_broken_stream_is_left_to_the_whole() -> None:
    """The start is given where it is whole; else None, so that the decoder of whole clusters says what is wrong."""
    packer = zlib.compressobj(wbits=-12)
    data = packer.compress(b"start" * 100) + packer.flush()
    assert decompress_start(data, 10) == b"startstart"
    assert decompress_start(data, 501) is None
    assert decompress_start(b"\xff" * 20, 10) is None


def test_hashes_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that needs one is refused with its name, whatever it needs it for."""
    assert luks.has_hash("sha256")
    assert not luks.has_hash("no-such-hash")
    spec = CipherSpec("aes-256", "cbc", "essiv", "sha256")
    assert spec.missing() == []
    randomness = LuksRandomness(b"k" * 32, random.Random(1).randbytes(32 * 3999), b"d" * 32, b"s" * 32, UUID(int=7))
    header, _ = make_luks_area(spec, "sha1", b"secret", randomness, slot_iterations=1000, digest_iterations=1000)
    luks.require_available(header)
    monkeypatch.setattr(luks, "has_hash", lambda name: False)
    assert spec.missing() == ["LUKS IV hash sha256"]
    with pytest.raises(UnsupportedFeatureError, match=r"LUKS IV hash sha256.*LUKS hash sha1"):
        luks.require_available(header)


@pytest.mark.parametrize(("cipher", "mode", "refused"), [("aes-192", "cbc", True), ("aes-192", "xts", False)])
def test_key_material_of_broken_sectors(cipher: str, mode: str, refused: bool) -> None:
    """4000 stripes of the key fill whole sectors, or QEMU ends with a failed assertion when it opens the image."""
    spec = CipherSpec(cipher, mode, "plain64")
    split = random.Random(1).randbytes(spec.key_bytes * 3999)
    randomness = LuksRandomness(bytes(spec.key_bytes), split, b"d" * 32, b"s" * 32, UUID(int=7))
    if refused:
        with pytest.raises(UnsupportedFeatureError, match="broken sectors"):
            make_luks_area(spec, "sha1", b"s", randomness, slot_iterations=1000, digest_iterations=1000)
    else:
        header, material = make_luks_area(
            spec, "sha1", b"s", randomness, slot_iterations=1000, digest_iterations=1000
        )
        assert header.spec == spec
        assert len(material) % 512 == 0
