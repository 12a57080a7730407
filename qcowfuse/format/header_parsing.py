"""Bytes of an image's start to its header, judged as QEMU judges it when it opens the image.

1. What QEMU refuses to open is refused here; what it opens is parsed, even where a table lies past the end
   of the file (such a table reads as zeroes).
2. Every length is compared with its limit before anything of that length is made.
3. Fields and extensions that nobody here knows are kept byte for byte.
"""

from __future__ import annotations

import struct
from typing import Literal, NamedTuple

from ..errors import FormatError, UnsupportedFeatureError
from .extensions import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_BITMAPS,
    EXTENSION_LUKS_HEADER,
    HeaderExtension,
    parse_extensions,
)
from .geometry import MAX_CLUSTER_BITS, MAX_REFCOUNT_ORDER, MIN_CLUSTER_BITS, WORD_SIZE, divide_up
from .header import Qcow1Header, Qcow2Header, decode_name, incompatible_names
from .header_fields import (
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_FIELD,
    AUTOCLEAR_RAW_DATA_FILE,
    COMPRESSION_DEFLATE,
    COMPRESSION_ZSTD,
    CRYPT_AES,
    CRYPT_LUKS,
    CRYPT_NONE,
    EXTENDED_L2_MIN_CLUSTER_BITS,
    INCOMPATIBLE_COMPRESSION,
    INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_EXTENDED_L2,
    INCOMPATIBLE_FIELD,
    KNOWN_INCOMPATIBLE,
    L1_SIZE_FIELD,
    MAGIC,
    MAX_BACKING_FORMAT,
    MAX_BACKING_NAME,
    MAX_BITMAP_DIRECTORY_SIZE,
    MAX_BITMAPS,
    MAX_HEADER_AREA,
    MAX_L1_SIZE,
    MAX_REFCOUNT_TABLE_SIZE,
    MAX_SNAPSHOTS,
    MAX_V1_L1_SIZE,
    OFFSET_LIMIT,
    REFCOUNT_TABLE_FIELD,
    SNAPSHOT_ENTRY_SIZE,
    V1_HEADER_LENGTH,
    V1_MAX_CLUSTER_BITS,
    V1_MAX_L2_BITS,
    V1_MIN_CLUSTER_BITS,
    V1_MIN_L2_BITS,
    V1_STRUCT,
    V2_HEADER_LENGTH,
    V2_STRUCT,
    V3_KNOWN_HEADER_LENGTH,
    V3_MIN_HEADER_LENGTH,
    V3_STRUCT,
)

_MAGIC_AND_VERSION = struct.Struct(">4sI")
_BITMAPS = struct.Struct(">IIQQ")


def probe_format(data: bytes) -> Literal["qcow", "qcow2"] | None:
    """The format by magic and version (8 bytes), None for anything else. Raises FormatError for a QCOW magic
    with a version other than 1, 2 or 3."""
    if len(data) < _MAGIC_AND_VERSION.size:
        return None
    magic, version = _MAGIC_AND_VERSION.unpack_from(data)
    if magic != MAGIC:
        return None
    if version not in (1, 2, 3):
        raise FormatError("header", 4, f"version {version}, expected 1, 2 or 3")
    return "qcow" if version == 1 else "qcow2"


def header_length_needed(data: bytes) -> int:
    """How many bytes of the file's start :func:`parse_header` wants, at most 2 MiB, told from the first 32."""
    if probe_format(data) is None or len(data) < 24:
        return V3_KNOWN_HEADER_LENGTH
    name_offset: int
    name_size: int
    cluster_bits: int
    name_offset, name_size, cluster_bits = struct.unpack_from(">QII", data, 8)
    if probe_format(data) == "qcow":
        end = name_offset + name_size if name_offset and 0 < name_size <= MAX_BACKING_NAME else 0
        return max(V1_HEADER_LENGTH, end if end <= MAX_HEADER_AREA else 0)
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        return V3_KNOWN_HEADER_LENGTH
    return 1 << cluster_bits


def parse_header(
    data: bytes, file_size: int, *, for_check: bool = False, for_info: bool = False
) -> Qcow1Header | Qcow2Header:
    """The validated header in ``data``, the first :func:`header_length_needed` bytes of a file of ``file_size``.

    ``data`` may be shorter where the file is. ``for_check``: an image without a refcount table is accepted.
    ``for_info``: so is an image whose data cannot be found, because nobody reads its data. Raises FormatError, and
    UnsupportedFeatureError only for what keeps the rest of the header from being understood.
    """
    format_name = probe_format(data)
    if format_name is None:
        raise FormatError("header", 0, f"no QCOW image: starts with {bytes(data[:4]).hex(' ') or 'nothing'}")
    if len(data) < min(header_length_needed(data), file_size):
        raise FormatError("header", None, f"{len(data)} bytes, expected {header_length_needed(data)}")
    return _parse_v1(data) if format_name == "qcow" else _parse_v2(data, for_check=for_check, for_info=for_info)


def _parse_v1(data: bytes) -> Qcow1Header:
    data = bytes(data).ljust(V1_HEADER_LENGTH, b"\0")
    (
        _magic,
        _version,
        backing_file_offset,
        backing_file_size,
        mtime,
        size,
        cluster_bits,
        l2_bits,
        _padding,
        crypt_method,
        l1_table_offset,
    ) = V1_STRUCT.unpack_from(data)
    _require(1 < size < OFFSET_LIMIT, 24, f"virtual size {size:#x}, expected 2 to 2^63 - 1")
    _require(
        V1_MIN_CLUSTER_BITS <= cluster_bits <= V1_MAX_CLUSTER_BITS,
        32,
        f"cluster_bits {cluster_bits}, expected 9 to 16",
    )
    _require(V1_MIN_L2_BITS <= l2_bits <= V1_MAX_L2_BITS, 33, f"l2_bits {l2_bits}, expected 6 to 13")
    _require(crypt_method in (CRYPT_NONE, CRYPT_AES), 36, f"crypt_method {crypt_method}, expected 0 or 1")
    backing_file: str | None = None
    if backing_file_offset and backing_file_size:
        _require(
            backing_file_size <= MAX_BACKING_NAME,
            16,
            f"backing file name of {backing_file_size} bytes, expected at most {MAX_BACKING_NAME}",
        )
        _require(
            V1_HEADER_LENGTH <= backing_file_offset <= MAX_HEADER_AREA - backing_file_size,
            8,
            f"backing file name at {backing_file_offset:#x}, expected in the first 2 MiB behind the header",
        )
        backing_file = _parse_backing_name(data, backing_file_offset, backing_file_size)
    header = Qcow1Header(
        backing_file_offset=backing_file_offset,
        backing_file_size=backing_file_size,
        mtime=mtime,
        size=size,
        cluster_bits=cluster_bits,
        l2_bits=l2_bits,
        crypt_method=crypt_method,
        l1_table_offset=l1_table_offset,
        backing_file=backing_file,
    )
    l1_bytes = header.n_l1_entries * WORD_SIZE
    _require(l1_bytes <= MAX_V1_L1_SIZE, 24, f"L1 table of {l1_bytes:#x} bytes, expected at most {MAX_V1_L1_SIZE:#x}")
    _require(
        l1_table_offset < OFFSET_LIMIT - l1_bytes,
        40,
        f"L1 table at {l1_table_offset:#x}, expected to end below 2^63",
    )
    return header


def _parse_v2(data: bytes, *, for_check: bool, for_info: bool) -> Qcow2Header:
    # Past the end of the file QEMU reads zeroes, so that a header-only file is as good as a padded one.
    data = bytes(data).ljust(V2_HEADER_LENGTH, b"\0")
    (
        _magic,
        version,
        backing_file_offset,
        backing_file_size,
        cluster_bits,
        size,
        crypt_method,
        l1_size,
        l1_table_offset,
        refcount_table_offset,
        refcount_table_clusters,
        n_snapshots,
        snapshots_offset,
    ) = V2_STRUCT.unpack_from(data)
    _require(
        MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS, 20, f"cluster_bits {cluster_bits}, expected 9 to 21"
    )
    cluster_size = 1 << cluster_bits
    area = bytes(data[:cluster_size]).ljust(cluster_size, b"\0")
    fields = _parse_v3_fields(area) if version == 3 else _V2_DEFAULTS
    incompatible, header_length = fields.incompatible, fields.header_length
    _require(
        backing_file_offset <= cluster_size,
        8,
        f"backing file name at {backing_file_offset:#x}, expected inside the first cluster",
    )
    _check_compression(fields.compression_type, incompatible)
    extensions = _parse_extensions(area, header_length, backing_file_offset or cluster_size, incompatible)
    backing_file = _parse_v2_backing_file(area, header_length, backing_file_offset, backing_file_size)
    header = Qcow2Header(
        version=version,
        backing_file_offset=backing_file_offset,
        backing_file_size=backing_file_size,
        cluster_bits=cluster_bits,
        size=size,
        crypt_method=crypt_method,
        l1_size=l1_size,
        l1_table_offset=l1_table_offset,
        refcount_table_offset=refcount_table_offset,
        refcount_table_clusters=refcount_table_clusters,
        n_snapshots=n_snapshots,
        snapshots_offset=snapshots_offset,
        incompatible_features=incompatible,
        compatible_features=fields.compatible,
        autoclear_features=fields.autoclear,
        refcount_order=fields.refcount_order,
        header_length=header_length,
        compression_type=fields.compression_type,
        unknown_fields=area[V3_KNOWN_HEADER_LENGTH:header_length],
        extensions=extensions,
        backing_file=backing_file,
    )
    # An unknown feature may give the other fields another meaning: they are nobody's to judge then.
    if not incompatible & ~KNOWN_INCOMPATIBLE:
        _check_tables(header, may_lack_refcounts=for_check)
        _check_extensions(header)
        if not for_info:
            _check_raw_data_file(header)
    return header


class _V3Fields(NamedTuple):
    """What version 3 has behind the fields of version 2."""

    incompatible: int
    compatible: int
    autoclear: int
    refcount_order: int
    header_length: int
    compression_type: int


_V2_DEFAULTS = _V3Fields(0, 0, 0, 4, V2_HEADER_LENGTH, COMPRESSION_DEFLATE)


def _parse_v3_fields(area: bytes) -> _V3Fields:
    """``area``: the first cluster."""
    incompatible, compatible, autoclear, refcount_order, header_length = V3_STRUCT.unpack_from(area, V2_HEADER_LENGTH)
    _require(
        V3_MIN_HEADER_LENGTH <= header_length <= len(area),
        100,
        f"header_length {header_length}, expected 104 to {len(area)}",
    )
    compression_type = area[V3_MIN_HEADER_LENGTH] if header_length > V3_MIN_HEADER_LENGTH else COMPRESSION_DEFLATE
    return _V3Fields(incompatible, compatible, autoclear, refcount_order, header_length, compression_type)


def _parse_v2_backing_file(area: bytes, header_length: int, offset: int, n_bytes: int) -> str | None:
    """``area``: the first cluster, in which ``offset`` lies, or at its end."""
    if not offset:
        return None
    limit = min(MAX_BACKING_NAME, len(area) - offset)
    _require(n_bytes <= limit, 16, f"backing file name of {n_bytes} bytes, expected at most {limit}")
    if not n_bytes:
        return None
    _require(
        offset >= header_length,
        8,
        f"backing file name at {offset:#x}, expected behind the header of {header_length}",
    )
    return _parse_backing_name(area, offset, n_bytes)


def _check_compression(compression_type: int, incompatible: int) -> None:
    if compression_type not in (COMPRESSION_DEFLATE, COMPRESSION_ZSTD):
        raise UnsupportedFeatureError([f"compression type {compression_type}"])
    expected = compression_type != COMPRESSION_DEFLATE
    _require(
        bool(incompatible & INCOMPATIBLE_COMPRESSION) == expected,
        INCOMPATIBLE_FIELD,
        f"incompatible features {incompatible:#x}, expected bit 3 {'set' if expected else 'clear'} "
        f"for compression type {compression_type}",
    )


def _parse_extensions(area: bytes, start: int, end: int, incompatible: int) -> tuple[HeaderExtension, ...]:
    try:
        return parse_extensions(area, start, end)
    except FormatError:
        if incompatible & ~KNOWN_INCOMPATIBLE:
            raise UnsupportedFeatureError(incompatible_names(incompatible, b"")) from None
        raise


def _check_tables(header: Qcow2Header, *, may_lack_refcounts: bool) -> None:
    """Places and sizes of the tables, with QEMU's limits."""
    cluster_size = 1 << header.cluster_bits
    if header.incompatible_features & INCOMPATIBLE_EXTENDED_L2:
        _require(
            header.cluster_bits >= EXTENDED_L2_MIN_CLUSTER_BITS,
            20,
            f"cluster_bits {header.cluster_bits}, expected 14 to 21 with extended L2 entries",
        )
    _require(
        header.refcount_order <= MAX_REFCOUNT_ORDER,
        96,
        f"refcount_order {header.refcount_order}, expected 0 to {MAX_REFCOUNT_ORDER}",
    )
    if not may_lack_refcounts:
        _require(header.refcount_table_clusters > 0, 56, "refcount table of 0 clusters, expected at least 1")
    tables = (
        (
            "refcount table",
            REFCOUNT_TABLE_FIELD,
            header.refcount_table_offset,
            header.refcount_table_clusters * cluster_size,
            MAX_REFCOUNT_TABLE_SIZE,
        ),
        (
            "snapshot table",
            64,
            header.snapshots_offset,
            header.n_snapshots * SNAPSHOT_ENTRY_SIZE,
            MAX_SNAPSHOTS * SNAPSHOT_ENTRY_SIZE,
        ),
        ("L1 table", 40, header.l1_table_offset, header.l1_size * WORD_SIZE, MAX_L1_SIZE),
    )
    for name, field, offset, n_bytes, limit in tables:
        _require(n_bytes <= limit, field, f"{name} of {n_bytes:#x} bytes, expected at most {limit:#x}")
        _require(
            offset % cluster_size == 0 and offset < OFFSET_LIMIT - n_bytes,
            field,
            f"{name} at {offset:#x}, expected a multiple of {cluster_size:#x} that ends below 2^63",
        )
    _require(header.size < OFFSET_LIMIT, 24, f"virtual size {header.size:#x}, expected less than 2^63")
    n_needed = divide_up(header.size, 1 << (header.cluster_bits + header.l2_bits))
    _require(
        header.l1_size >= n_needed,
        L1_SIZE_FIELD,
        f"L1 table of {header.l1_size} entries, expected at least {n_needed} for {header.size} bytes",
    )


def _check_extensions(header: Qcow2Header) -> None:
    """The extensions that QEMU looks into when it opens an image."""
    cluster_size = 1 << header.cluster_bits
    for extension in header.extensions:
        if extension.magic == EXTENSION_BACKING_FORMAT and len(extension.data) > MAX_BACKING_FORMAT:
            raise FormatError(
                "header extension",
                None,
                f"backing format name of {len(extension.data)} bytes, expected at most {MAX_BACKING_FORMAT}",
            )
        if extension.magic == EXTENSION_LUKS_HEADER and header.crypt_method != CRYPT_LUKS:
            raise FormatError(
                "header extension",
                None,
                f"LUKS header pointer with crypt_method {header.crypt_method}, expected 2",
            )
        if extension.magic == EXTENSION_LUKS_HEADER and int.from_bytes(extension.data[:8], "big") % cluster_size:
            raise FormatError(
                "LUKS header pointer",
                None,
                f"LUKS area at {int.from_bytes(extension.data[:8], 'big'):#x}, expected a multiple of {cluster_size}",
            )
        if extension.magic == EXTENSION_BITMAPS:
            _check_bitmaps(extension.data, cluster_size, header.autoclear_features)


def _check_raw_data_file(header: Qcow2Header) -> None:
    raw_data_file = header.autoclear_features & AUTOCLEAR_RAW_DATA_FILE
    _require(
        not raw_data_file or bool(header.incompatible_features & INCOMPATIBLE_DATA_FILE),
        AUTOCLEAR_FIELD,
        f"autoclear features {header.autoclear_features:#x}: raw external data without an external data file",
    )


def _check_bitmaps(data: bytes, cluster_size: int, autoclear: int) -> None:
    if len(data) != _BITMAPS.size:
        raise FormatError("bitmaps extension", None, f"{len(data)} bytes, expected {_BITMAPS.size}")
    if not autoclear & AUTOCLEAR_BITMAPS:
        return
    n_bitmaps, reserved, directory_size, directory_offset = _BITMAPS.unpack(data)
    if (
        reserved
        or not 1 <= n_bitmaps <= MAX_BITMAPS
        or directory_offset % cluster_size
        or directory_size > MAX_BITMAP_DIRECTORY_SIZE
    ):
        raise FormatError(
            "bitmaps extension",
            None,
            f"{n_bitmaps} bitmaps, directory of {directory_size:#x} bytes at {directory_offset:#x}, reserved "
            f"{reserved:#x}, expected 1 to {MAX_BITMAPS}, at most {MAX_BITMAP_DIRECTORY_SIZE:#x}, aligned, 0",
        )


def _parse_backing_name(data: bytes, offset: int, n_bytes: int) -> str | None:
    raw = bytes(data[offset : offset + n_bytes])
    return decode_name(raw) or None


def _require(condition: bool, host_offset: int, detail: str) -> None:
    if not condition:
        raise FormatError("header", host_offset, detail)
