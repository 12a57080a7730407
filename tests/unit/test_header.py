"""Headers on plain bytes: fields, limits, features, round trips."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfuse.errors import FormatError, UnsupportedFeatureError
from qcowfuse.format import header as h
from qcowfuse.format import header_fields as fields
from qcowfuse.format import header_parsing as parsing
from qcowfuse.format.extensions import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_BITMAPS,
    EXTENSION_DATA_FILE,
    EXTENSION_FEATURE_NAMES,
    EXTENSION_LUKS_HEADER,
    HeaderExtension,
)
from qcowfuse.format.header_bytes import serialise_header

CLUSTER = 65536
V2 = h.Qcow2Header(
    version=2,
    backing_file_offset=0,
    backing_file_size=0,
    cluster_bits=16,
    size=1 << 30,
    crypt_method=0,
    l1_size=2,
    l1_table_offset=3 * CLUSTER,
    refcount_table_offset=CLUSTER,
    refcount_table_clusters=1,
    n_snapshots=0,
    snapshots_offset=0,
)
V3 = V2._replace(version=3, header_length=112)
V1 = h.Qcow1Header(
    backing_file_offset=0,
    backing_file_size=0,
    mtime=0,
    size=1 << 20,
    cluster_bits=12,
    l2_bits=9,
    crypt_method=0,
    l1_table_offset=48,
    backing_file=None,
)


def parse(data: bytes) -> h.Qcow1Header | h.Qcow2Header:
    return parsing.parse_header(data, len(data))


def parse_v3(data: bytes) -> h.Qcow2Header:
    found = parse(data)
    assert isinstance(found, h.Qcow2Header)
    return found


def patched(header: h.Qcow1Header | h.Qcow2Header, offset: int, data: bytes) -> bytes:
    """The serialised header, padded to a cluster, with some bytes replaced."""
    whole = bytearray(serialise_header(header).ljust(1 << header.cluster_bits, b"\0"))
    whole[offset : offset + len(data)] = data
    return bytes(whole)


@pytest.mark.parametrize("header", [V1, V2, V3], ids=["v1", "v2", "v3"])
def test_minimal_headers_round_trip(header: h.Qcow1Header | h.Qcow2Header) -> None:
    """A header of each version comes back the same."""
    assert parse(serialise_header(header)) == header


def test_fields_by_hand() -> None:
    """Every field of a version 3 header is found at the place that the specification gives."""
    data = struct.pack(
        ">4sIQIIQIIQQIIQQQQII8s",
        b"QFI\xfb", 3, 0x200, 4, 16, 0x123456, 0, 7, 0x30000, 0x10000, 2, 3, 0x50000, 9, 1 << 40, 1, 5, 112,
        b"\x01" + bytes(7),
    )  # fmt: skip
    found = parse_v3(data.ljust(0x200, b"\0") + b"base")
    assert found == h.Qcow2Header(
        version=3,
        backing_file_offset=0x200,
        backing_file_size=4,
        cluster_bits=16,
        size=0x123456,
        crypt_method=0,
        l1_size=7,
        l1_table_offset=0x30000,
        refcount_table_offset=0x10000,
        refcount_table_clusters=2,
        n_snapshots=3,
        snapshots_offset=0x50000,
        incompatible_features=9,
        compatible_features=1 << 40,
        autoclear_features=1,
        refcount_order=5,
        header_length=112,
        compression_type=fields.COMPRESSION_ZSTD,
        backing_file="base",
    )
    assert found.dirty
    assert not found.corrupt
    assert found.virtual_size == 0x123400
    assert found.l2_bits == 13


def test_version_2_has_no_feature_bits() -> None:
    """What lies where version 3 has its feature bits is an extension in version 2."""
    extension = HeaderExtension(0xFFFFFFFF, b"\xff" * 20)
    found = parse_v3(serialise_header(V2._replace(extensions=(extension,))))
    assert (found.incompatible_features, found.compatible_features, found.autoclear_features) == (0, 0, 0)
    assert (found.refcount_order, found.header_length, found.extensions) == (4, 72, (extension,))


@pytest.mark.parametrize("data", [b"", b"QFI", b"QFI\xfb\0\0\0", b"\x7fELF\0\0\0\x02", bytes(4096)])
def test_other_files_are_not_probed(data: bytes) -> None:
    """A file without the magic has no format, and no header."""
    assert parsing.probe_format(data) is None
    with pytest.raises(FormatError, match="no QCOW image: starts with"):
        parse(data)


@pytest.mark.parametrize("version", [0, 4, 0xFFFFFFFF])
def test_unknown_versions_are_named(version: int) -> None:
    """A QCOW magic with a version that does not exist is an error that names it."""
    data = b"QFI\xfb" + version.to_bytes(4, "big") + bytes(504)
    for function in (parsing.probe_format, parsing.header_length_needed, parse):
        with pytest.raises(FormatError, match=f"version {version}, expected 1, 2 or 3"):
            function(data)


@pytest.mark.parametrize(
    ("offset", "data", "match"),
    [
        (20, struct.pack(">I", 8), "cluster_bits 8"),
        (20, struct.pack(">I", 22), "cluster_bits 22"),
        (24, struct.pack(">Q", 1 << 63), "virtual size"),
        (24, struct.pack(">Q", (1 << 64) - 1), "virtual size"),
        (24, struct.pack(">Q", (1 << 30) + 1), "L1 table of 2 entries, expected at least 3"),
        (36, struct.pack(">I", 1), "L1 table of 1 entries"),
        (36, struct.pack(">I", (32 << 20) // 8 + 1), "L1 table of 0x2000008 bytes"),
        (36, struct.pack(">I", 0xFFFFFFFF), "L1 table of"),
        (40, struct.pack(">Q", 0x30001), "L1 table at 0x30001"),
        (40, struct.pack(">Q", (1 << 63) - CLUSTER + 1), "L1 table at"),
        (40, struct.pack(">Q", 1 << 63), "L1 table at"),
        (48, struct.pack(">Q", 512), "refcount table at 0x200"),
        (48, struct.pack(">Q", (1 << 63) - CLUSTER), "refcount table at"),
        (56, struct.pack(">I", 0), "refcount table of 0 clusters"),
        (56, struct.pack(">I", 129), "refcount table of 0x810000 bytes"),
        (56, struct.pack(">I", 0xFFFFFFFF), "refcount table of"),
        (60, struct.pack(">I", 65537), "snapshot table of"),
        (64, struct.pack(">Q", 8), "snapshot table at 0x8"),
        (8, struct.pack(">Q", CLUSTER + 1), "backing file name at"),
        (8, struct.pack(">QI", 512, 1024), "backing file name of 1024 bytes"),
        (8, struct.pack(">QI", CLUSTER - 3, 4), "backing file name of 4 bytes, expected at most 3"),
        (8, struct.pack(">QI", 71, 4), "expected behind the header"),
        (96, struct.pack(">I", 7), "refcount_order 7"),
        (100, struct.pack(">I", 103), "header_length 103"),
        (100, struct.pack(">I", CLUSTER + 8), "header_length"),
        (72, struct.pack(">Q", fields.INCOMPATIBLE_COMPRESSION), "expected bit 3 clear"),
        (104, b"\x01", "expected bit 3 set"),
        (88, struct.pack(">Q", fields.AUTOCLEAR_RAW_DATA_FILE), "raw external data"),
        (112, struct.pack(">II", 1, CLUSTER - 112 - 7), "has length"),
        (112, struct.pack(">II", 1, 0xFFFFFFFF), "has length"),
    ],
)
def test_limits_of_version_3(offset: int, data: bytes, match: str) -> None:
    """Each limit that QEMU has at open is one here, and the message names value and expectation."""
    with pytest.raises(FormatError, match=match):
        parse(patched(V3, offset, data))


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (24, struct.pack(">Q", 0)),
        (36, struct.pack(">I", (32 << 20) // 8)),
        (40, struct.pack(">Q", 1 << 50)),
        (48, struct.pack(">Q", 1 << 50)),
        (56, struct.pack(">I", 128)),
        (60, struct.pack(">IQ", 65536, 1 << 50)),
        (96, struct.pack(">I", 0)),
        (100, struct.pack(">I", CLUSTER)),
        (112, struct.pack(">II", 1, CLUSTER - 112 - 8)),
    ],
)
def test_just_inside_the_limits(offset: int, data: bytes) -> None:
    """The greatest allowed values parse, also where a table lies far past the end of the file."""
    assert parse_v3(patched(V3, offset, data)).version == 3


@pytest.mark.parametrize(
    ("offset", "data", "match"),
    [
        (24, struct.pack(">Q", 1), "virtual size 0x1"),
        (24, struct.pack(">Q", 1 << 63), "virtual size"),
        (24, struct.pack(">Q", 152 << 50), "L1 table of"),
        (32, b"\x08", "cluster_bits 8"),
        (32, b"\x11", "cluster_bits 17"),
        (33, b"\x05", "l2_bits 5"),
        (33, b"\x0e", "l2_bits 14"),
        (36, struct.pack(">I", 2), "crypt_method 2"),
        (40, struct.pack(">Q", (1 << 63) - 8), "L1 table at"),
        (8, struct.pack(">QI", 48, 1024), "backing file name of 1024 bytes"),
        (8, struct.pack(">QI", 1 << 62, 10), "backing file name at"),
        (8, struct.pack(">QI", 40, 10), "backing file name at"),
    ],
)
def test_limits_of_version_1(offset: int, data: bytes, match: str) -> None:
    """Each limit of version 1 is an error with value and expectation."""
    with pytest.raises(FormatError, match=match):
        parse(patched(V1, offset, data))


@pytest.mark.parametrize("header", [V1, V2, V3], ids=["v1", "v2", "v3"])
def test_cut_short_anywhere(header: h.Qcow1Header | h.Qcow2Header) -> None:
    """A file that ends inside the header reads as zeroes behind that; the first bytes that matter must be there."""
    whole = serialise_header(header)
    n_needed = {V1: 34, V2: 60, V3: 104}[header]
    for length in range(len(whole) + 1):
        if length < n_needed:
            with pytest.raises(FormatError):
                parse(whole[:length])
        else:
            assert parse(whole[:length]) == parse(whole[:length].ljust(len(whole), b"\0"))
    assert parse(whole) == header


def test_too_few_bytes_of_a_longer_file() -> None:
    """Fewer bytes than the parser asked for are refused unless the file has no more."""
    data = patched(V3, 0, b"")
    with pytest.raises(FormatError, match="expected 65536"):
        parsing.parse_header(data[:512], len(data))


@pytest.mark.parametrize(("header", "n_bytes"), [(V1, 48), (V2, CLUSTER), (V3._replace(cluster_bits=21), 2 << 20)])
def test_length_needed(header: h.Qcow1Header | h.Qcow2Header, n_bytes: int) -> None:
    """The parser wants the first cluster of a QCOW2 image and just header and name of version 1."""
    assert parsing.header_length_needed(serialise_header(header)[:32]) == n_bytes


def test_backing_name_of_version_1() -> None:
    """The name of a version 1 image is found where the header says, and is part of what the parser wants."""
    header = V1._replace(backing_file_offset=48, backing_file_size=9, backing_file="base.qcow", l1_table_offset=64)
    data = serialise_header(header)
    assert parsing.header_length_needed(data[:32]) == len(data) == 57
    assert parse(data) == header


@pytest.mark.parametrize("raw", [b"b\xff\xfe.raw", "grüße".encode(), b"a" * 1023])
def test_backing_names_are_bytes(raw: bytes) -> None:
    """Names of any bytes survive, undecodable ones as the surrogates of os.fsdecode."""
    header = V3._replace(
        backing_file_offset=120,
        backing_file_size=len(raw),
        backing_file=raw.decode("utf-8", "surrogateescape"),
    )
    data = serialise_header(header)
    assert data.endswith(raw)
    assert parse(data) == header


def test_backing_name_ends_at_nul() -> None:
    """A name is cut at its first NUL, as everything written in C cuts it, and never holds one."""
    data = patched(V3._replace(backing_file_offset=120, backing_file_size=6, backing_file="ab"), 120, b"ab\0cd\0")
    found = parse_v3(data)
    assert found.backing_file == "ab"
    assert parse(serialise_header(found)) == found
    assert parse_v3(patched(found, 120, bytes(6))).backing_file is None


def test_backing_format_is_an_extension() -> None:
    """The backing format is what the extension says; none, or an empty one, is None; 16 bytes are too many."""
    header = V3._replace(extensions=(HeaderExtension(EXTENSION_BACKING_FORMAT, b"raw"),))
    assert parse_v3(serialise_header(header)).backing_format == "raw"
    assert V3.backing_format is None
    assert V3._replace(extensions=(HeaderExtension(EXTENSION_BACKING_FORMAT, b""),)).backing_format is None
    with pytest.raises(FormatError, match="backing format name of 16 bytes"):
        parse(serialise_header(V3._replace(extensions=(HeaderExtension(EXTENSION_BACKING_FORMAT, b"x" * 16),))))


def test_unknown_fields_and_extensions_survive() -> None:
    """Fields behind the known ones and extensions of unknown magic come back byte for byte and in order."""
    header = V3._replace(
        header_length=131,
        unknown_fields=bytes(range(19)),
        extensions=(HeaderExtension(5, b"12345"), HeaderExtension(4, b""), HeaderExtension(5, b"\0" * 9)),
    )
    assert parse(serialise_header(header)) == header


def test_short_header_has_no_compression_type() -> None:
    """A header of 104 bytes ends before the compression type, which is deflate then."""
    header = V3._replace(header_length=104, extensions=(HeaderExtension(1 << 24, b"x"),))
    assert parse_v3(serialise_header(header)) == header


def bitmaps_of(n: int = 1, reserved: int = 0, size: int = 32, offset: int = CLUSTER) -> tuple[HeaderExtension, ...]:
    return (HeaderExtension(EXTENSION_BITMAPS, struct.pack(">IIQQ", n, reserved, size, offset)),)


@pytest.mark.parametrize(
    "extensions",
    [
        bitmaps_of(n=0),
        bitmaps_of(n=65536),
        bitmaps_of(reserved=1),
        bitmaps_of(size=(1024 * 65535) + 1),
        bitmaps_of(offset=CLUSTER + 8),
        (HeaderExtension(EXTENSION_BITMAPS, bytes(23)),),
    ],
)
def test_bitmaps_are_checked_as_qemu_does(extensions: tuple[HeaderExtension, ...]) -> None:
    """A bitmaps extension that QEMU refuses to open with is refused."""
    with pytest.raises(FormatError, match="bitmaps extension"):
        parse(serialise_header(V3._replace(extensions=extensions, autoclear_features=fields.AUTOCLEAR_BITMAPS)))


def test_bitmaps_without_their_bit_are_ignored() -> None:
    """Without the autoclear bit the bitmaps are stale, so that their extension may say anything."""
    header = V3._replace(extensions=bitmaps_of(n=0, reserved=7))
    assert parse(serialise_header(header)) == header


def test_luks_pointer_without_luks() -> None:
    """A LUKS header pointer in an image that is not encrypted so is refused."""
    header = V3._replace(extensions=(HeaderExtension(EXTENSION_LUKS_HEADER, bytes(16)),))
    with pytest.raises(FormatError, match="LUKS"):
        parse(serialise_header(header))


def test_luks_pointer_is_aligned() -> None:
    """A LUKS area that does not begin with a cluster is refused, as QEMU does it."""
    for place in ((1 << V3.cluster_bits) + 512, 1 << V3.cluster_bits):
        pointer = HeaderExtension(EXTENSION_LUKS_HEADER, struct.pack(">QQ", place, 4096))
        raw = serialise_header(V3._replace(crypt_method=2, extensions=(pointer,)))
        if place % (1 << V3.cluster_bits):
            with pytest.raises(FormatError, match="LUKS area at"):
                parse(raw)
        else:
            parse(raw)


def test_unknown_compression_type_is_unsupported() -> None:
    """A compression type that does not exist yet is refused by its number."""
    with pytest.raises(UnsupportedFeatureError) as caught:
        parse(
            patched(
                V3._replace(incompatible_features=fields.INCOMPATIBLE_COMPRESSION, compression_type=1), 104, b"\x02"
            )
        )
    assert caught.value.names == ("compression type 2",)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"crypt_method": 9}, ("encryption method 9",)),
        ({"incompatible_features": 1 << 5 | 1 << 63}, ("incompatible feature bit 5", "incompatible feature bit 63")),
        ({"crypt_method": 9, "incompatible_features": 1 << 7}, ("encryption method 9", "incompatible feature bit 7")),
    ],
)
def test_unsupported_features_are_named(changes: dict[str, int], names: tuple[str, ...]) -> None:
    """Everything that the image needs and nobody serves is named at once; parsing it is no error."""
    header = parse_v3(serialise_header(V3._replace(**changes)))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedFeatureError) as caught:
        h.refuse_unsupported(header)
    assert caught.value.names == names


def test_served_features_are_not_refused() -> None:
    """Encryption, dirty, corrupt, zstd and any compatible or autoclear bit are no reason to refuse."""
    bits = fields.INCOMPATIBLE_DIRTY | fields.INCOMPATIBLE_CORRUPT | fields.INCOMPATIBLE_COMPRESSION
    header = V3._replace(
        incompatible_features=bits,
        compression_type=1,
        compatible_features=~0 & (1 << 64) - 1,
        autoclear_features=1,
    )
    header = parse_v3(serialise_header(header))
    h.refuse_unsupported(header)
    h.refuse_unsupported(V1)
    h.refuse_unsupported(V1._replace(crypt_method=1))
    h.refuse_unsupported(V3._replace(crypt_method=2))
    assert h.unknown_incompatible(header) == ()
    assert header.dirty
    assert header.corrupt


def test_unknown_bits_are_named_by_the_image() -> None:
    """The image's feature table names unknown bits; only entries for incompatible bits count, the first one wins."""
    table = b"".join(
        struct.pack(">BB46s", kind, bit, name)
        for kind, bit, name in ((1, 6, b"wrong"), (0, 6, b"right\n\x1b[31m"), (0, 6, b"late"), (2, 7, b"wrong"))
    )
    header = V3._replace(incompatible_features=3 << 6, extensions=(HeaderExtension(EXTENSION_FEATURE_NAMES, table),))
    assert h.unknown_incompatible(header) == ("right??[31m", "incompatible feature bit 7")


def test_unknown_bit_beats_a_broken_rest() -> None:
    """With an unknown incompatible bit nothing else is judged: the refusal names the bit."""
    data = patched(V3._replace(incompatible_features=1 << 20), 40, struct.pack(">Q", 1))
    with pytest.raises(UnsupportedFeatureError, match="bit 20"):
        h.refuse_unsupported(parse(data))
    with pytest.raises(UnsupportedFeatureError, match="bit 20"):
        parse(patched(V3._replace(incompatible_features=1 << 20), 112, struct.pack(">II", 1, 0xFFFFFFFF)))


def test_extended_l2_needs_large_clusters() -> None:
    """Subclusters below 512 bytes do not exist: extended L2 entries need clusters of 16 KiB."""
    header = V3._replace(cluster_bits=13, incompatible_features=fields.INCOMPATIBLE_EXTENDED_L2, l1_size=1 << 20)
    with pytest.raises(FormatError, match="cluster_bits 13, expected 14 to 21"):
        parse(serialise_header(header))


def test_extended_l2_needs_twice_the_l1() -> None:
    """With extended entries an L2 table maps half as much, so that the L1 table must be twice as long."""
    header = V3._replace(incompatible_features=fields.INCOMPATIBLE_EXTENDED_L2)
    with pytest.raises(FormatError, match="expected at least 4"):
        parse(serialise_header(header))


@pytest.mark.parametrize(
    "header",
    [
        V3._replace(header_length=120),
        V3._replace(backing_file="name", backing_file_size=4, backing_file_offset=100),
        V3._replace(backing_file="name", backing_file_size=3, backing_file_offset=200),
        V3._replace(extensions=(HeaderExtension(EXTENSION_DATA_FILE, bytes(CLUSTER)),)),
        V3._replace(extensions=(HeaderExtension(7, bytes(20)),), backing_file_offset=128, backing_file_size=0),
    ],
)
def test_parts_that_do_not_fit_are_not_written(header: h.Qcow2Header) -> None:
    """A header whose parts overlap is an error and not a broken image."""
    with pytest.raises(FormatError):
        serialise_header(header)


NAMES = st.binary(min_size=1, max_size=60).filter(lambda raw: b"\0" not in raw)
EXTENSIONS = st.lists(
    st.builds(HeaderExtension, st.integers(0x80000000, 0xE0000000), st.binary(max_size=40)), max_size=5
)


@given(
    version=st.sampled_from((2, 3)),
    cluster_bits=st.integers(10, 21),
    size=st.integers(0, 1 << 20),
    bits=st.tuples(st.integers(0, 3), st.integers(0, (1 << 64) - 1), st.integers(2, (1 << 62) - 1)),
    refcount_order=st.integers(0, 6),
    unknown=st.binary(max_size=50),
    extensions=EXTENSIONS,
    name=st.none() | NAMES,
    gap=st.integers(0, 9),
)
def test_any_header_round_trips(
    version: int,
    cluster_bits: int,
    size: int,
    bits: tuple[int, int, int],
    refcount_order: int,
    unknown: bytes,
    extensions: list[HeaderExtension],
    name: bytes | None,
    gap: int,
) -> None:
    """parse(serialise(header)) is the header, for headers with anything in them that is allowed."""
    cluster_size = 1 << cluster_bits
    header = V2._replace(
        version=version,
        cluster_bits=cluster_bits,
        size=size,
        l1_size=1 << 12,
        l1_table_offset=3 * cluster_size,
        refcount_table_offset=cluster_size,
        extensions=tuple(extensions),
    )
    if version == 3:
        header = header._replace(
            incompatible_features=bits[0],
            compatible_features=bits[1],
            autoclear_features=bits[2] & ~fields.AUTOCLEAR_RAW_DATA_FILE,
            refcount_order=refcount_order,
            header_length=112 + len(unknown),
            unknown_fields=unknown,
        )
    if name is not None:
        header = header._replace(
            backing_file_offset=len(serialise_header(header)) + gap,
            backing_file_size=len(name),
            backing_file=name.decode("utf-8", "surrogateescape"),
        )
    data = serialise_header(header)
    assert parsing.parse_header(data, len(data)) == header
    padded = data.ljust(cluster_size, b"\0")
    assert parsing.parse_header(padded, 1 << 40) == header
