"""Where the fields of a QCOW header stand, what their bits mean, and the limits that QEMU sets them."""

from __future__ import annotations

import struct

from .geometry import MAX_CLUSTER_BITS

MAGIC = b"QFI\xfb"

INCOMPATIBLE_DIRTY = 1 << 0
INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_COMPRESSION = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
KNOWN_INCOMPATIBLE = (1 << 5) - 1
COMPATIBLE_LAZY_REFCOUNTS = 1 << 0
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_RAW_DATA_FILE = 1 << 1
KNOWN_AUTOCLEAR = AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_DATA_FILE

CRYPT_NONE = 0
CRYPT_AES = 1
CRYPT_LUKS = 2
COMPRESSION_DEFLATE = 0
COMPRESSION_ZSTD = 1

# Places of the fields that change while an image is in use.
SWITCH_FIELDS = 24
"""size and all behind it up to the autoclear features: tables that change together, inside one sector."""
L1_SIZE_FIELD = 36
"""l1_size (u32) and behind it l1_table_offset (u64): written as one, inside one sector."""
REFCOUNT_TABLE_FIELD = 48
"""refcount_table_offset (u64) and behind it refcount_table_clusters (u32): written as one."""
SNAPSHOTS_FIELD = 60
"""n_snapshots (u32) and behind it snapshots_offset (u64): written as one."""
INCOMPATIBLE_FIELD = 72
AUTOCLEAR_FIELD = 88

V1_HEADER_LENGTH = 48
V2_HEADER_LENGTH = 72
V3_MIN_HEADER_LENGTH = 104
V3_KNOWN_HEADER_LENGTH = 112
"""Bytes up to the end of the fields known here: compression_type and its 7 bytes of padding."""

MAX_L1_SIZE = 32 * 1024 * 1024
"""Bytes of an L1 table of version 2 or 3."""
MAX_V1_L1_SIZE = (1 << 31) - 512
"""Bytes of an L1 table of version 1, what QEMU can read at once: with its clusters of 4 KiB, 512 TiB less 128 MiB."""
MAX_REFCOUNT_TABLE_SIZE = 8 * 1024 * 1024
MAX_SNAPSHOTS = 65536
SNAPSHOT_ENTRY_SIZE = 40
MAX_BACKING_NAME = 1023
MAX_BACKING_FORMAT = 15
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY_SIZE = 1024 * MAX_BITMAPS
MAX_HEADER_AREA = 1 << MAX_CLUSTER_BITS
"""Bytes at the start of a file that can matter to the parser."""
OFFSET_LIMIT = 1 << 63

V1_MIN_CLUSTER_BITS, V1_MAX_CLUSTER_BITS = 9, 16
V1_MIN_L2_BITS, V1_MAX_L2_BITS = 6, 13
EXTENDED_L2_MIN_CLUSTER_BITS = 14

V1_STRUCT = struct.Struct(">4sIQIIQBBHIQ")
V2_STRUCT = struct.Struct(">4sIQIIQIIQQIIQ")
V3_STRUCT = struct.Struct(">QQQII")
"""The fields of each version, in their order; those of version 3 stand behind those of version 2."""
