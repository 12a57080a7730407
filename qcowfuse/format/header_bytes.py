"""The bytes of a QCOW header: the inverse of :func:`~qcowfuse.format.header_parsing.parse_header`.

1. Fields and extensions that nobody here knows come back byte for byte.
2. Whatever does not fit where the header says is refused, never cut.
"""

from __future__ import annotations

import struct

from ..errors import FormatError
from .extensions import serialise_extensions
from .header import Qcow1Header, Qcow2Header
from .header_fields import MAGIC, V1_STRUCT, V2_STRUCT, V3_STRUCT

_SWITCH_V2 = struct.Struct(">QIIQQIIQ")
_SWITCH_V3 = struct.Struct(">QQQ")


def serialise_header(header: Qcow1Header | Qcow2Header) -> bytes:
    """The bytes of ``header`` from offset 0 to the end of the backing file's name (or of the extensions).

    The inverse of :func:`parse_header`. Raises FormatError when the parts do not fit where the header says.
    """
    if isinstance(header, Qcow1Header):
        fixed = V1_STRUCT.pack(
            MAGIC,
            1,
            header.backing_file_offset,
            header.backing_file_size,
            header.mtime,
            header.size,
            header.cluster_bits,
            header.l2_bits,
            0,
            header.crypt_method,
            header.l1_table_offset,
        )
        return _append_backing_name(fixed, header)
    fixed = V2_STRUCT.pack(
        MAGIC,
        header.version,
        header.backing_file_offset,
        header.backing_file_size,
        header.cluster_bits,
        header.size,
        header.crypt_method,
        header.l1_size,
        header.l1_table_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.n_snapshots,
        header.snapshots_offset,
    )
    if header.version >= 3:
        fixed += V3_STRUCT.pack(
            header.incompatible_features,
            header.compatible_features,
            header.autoclear_features,
            header.refcount_order,
            header.header_length,
        )
        fixed += bytes([header.compression_type]) + bytes(7)
        fixed = fixed[: header.header_length] + header.unknown_fields
    if len(fixed) != header.header_length:
        raise FormatError("header", 100, f"header_length {header.header_length}, expected {len(fixed)}")
    end = header.backing_file_offset or 1 << header.cluster_bits
    if header.extensions:
        fixed += serialise_extensions(header.extensions)
        n_padding = -len(header.extensions[-1].data) % 8
        if len(fixed) - n_padding > end:
            raise FormatError("header", None, f"extensions end at {len(fixed):#x}, expected at most {end:#x}")
        fixed = fixed[:end]
    # Extensions that fill their place to the last byte need no end marker, and there is no room for one.
    if end - len(fixed) >= 8:
        fixed += bytes(8)
    return _append_backing_name(fixed, header)


def serialise_switch(header: Qcow2Header) -> bytes:
    """What stands at :data:`~qcowfuse.format.header_fields.SWITCH_FIELDS`: 48 bytes, in version 3 72. One write of
    them switches an image from one set of tables to another."""
    data = _SWITCH_V2.pack(
        header.size,
        header.crypt_method,
        header.l1_size,
        header.l1_table_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.n_snapshots,
        header.snapshots_offset,
    )
    if header.version >= 3:
        data += _SWITCH_V3.pack(header.incompatible_features, header.compatible_features, header.autoclear_features)
    return data


def _append_backing_name(fixed: bytes, header: Qcow1Header | Qcow2Header) -> bytes:
    if header.backing_file is None:
        return fixed
    name = header.backing_file.encode("utf-8", "surrogateescape").ljust(header.backing_file_size, b"\0")
    if len(name) != header.backing_file_size or len(fixed) > header.backing_file_offset:
        raise FormatError(
            "header",
            8,
            f"backing file name of {len(name)} bytes at {header.backing_file_offset:#x}, "
            f"expected {header.backing_file_size} behind {len(fixed):#x}",
        )
    return fixed.ljust(header.backing_file_offset, b"\0") + name
