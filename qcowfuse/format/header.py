"""The headers of QCOW versions 1, 2 and 3 as values, and the names of the features that an image needs."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import UnsupportedFeatureError
from .extensions import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_FEATURE_NAMES,
    FEATURE_KIND_INCOMPATIBLE,
    HeaderExtension,
    find_extension,
    parse_feature_names,
)
from .geometry import SECTOR_SIZE, divide_up
from .header_fields import (
    COMPRESSION_DEFLATE,
    CRYPT_AES,
    CRYPT_LUKS,
    CRYPT_NONE,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    INCOMPATIBLE_EXTENDED_L2,
    KNOWN_INCOMPATIBLE,
    V2_HEADER_LENGTH,
)


class Qcow1Header(NamedTuple):
    """The header of a version 1 image. ``size`` in bytes, ``mtime`` of the backing file in seconds."""

    backing_file_offset: int
    backing_file_size: int
    mtime: int
    size: int
    cluster_bits: int
    l2_bits: int
    crypt_method: int
    l1_table_offset: int
    backing_file: str | None

    @property
    def n_l1_entries(self) -> int:
        """Entries of the L1 table; version 1 does not store it."""
        return divide_up(self.size, 1 << (self.cluster_bits + self.l2_bits))

    @property
    def virtual_size(self) -> int:
        """Bytes of the virtual disk as QEMU serves it: whole sectors of 512."""
        return self.size // SECTOR_SIZE * SECTOR_SIZE


class Qcow2Header(NamedTuple):
    """The header of a version 2 or 3 image; version 2 has the values that version 3 gives to absent fields.

    ``size`` in bytes, ``l1_size`` in entries, ``unknown_fields`` the bytes between the fields known here and
    ``header_length``. ``backing_file`` has undecodable bytes as surrogates, as ``os.fsdecode`` gives them.
    """

    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    n_snapshots: int
    snapshots_offset: int
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = V2_HEADER_LENGTH
    compression_type: int = COMPRESSION_DEFLATE
    unknown_fields: bytes = b""
    extensions: tuple[HeaderExtension, ...] = ()
    backing_file: str | None = None

    @property
    def backing_format(self) -> str | None:
        """What the image calls its backing file's format ("raw", "qcow2"), or None when it does not say."""
        raw = find_extension(self.extensions, EXTENSION_BACKING_FORMAT)
        return None if raw is None else decode_name(raw) or None

    @property
    def l2_bits(self) -> int:
        """log2 of the entries per L2 table."""
        extended = self.incompatible_features & INCOMPATIBLE_EXTENDED_L2
        return self.cluster_bits - (4 if extended else 3)

    @property
    def virtual_size(self) -> int:
        """Bytes of the virtual disk as QEMU serves it: whole sectors of 512."""
        return self.size // SECTOR_SIZE * SECTOR_SIZE

    @property
    def dirty(self) -> bool:
        """Whether refcounts may be too low on disk (incompatible bit 0)."""
        return bool(self.incompatible_features & INCOMPATIBLE_DIRTY)

    @property
    def corrupt(self) -> bool:
        """Whether some writer found the metadata to be wrong (incompatible bit 1)."""
        return bool(self.incompatible_features & INCOMPATIBLE_CORRUPT)


def unknown_incompatible(header: Qcow2Header) -> tuple[str, ...]:
    """Names of the set incompatible bits that qcowfuse does not know: those in the image's own feature name table,
    and "incompatible feature bit N" for a bit without a name there."""
    table = find_extension(header.extensions, EXTENSION_FEATURE_NAMES) or b""
    return incompatible_names(header.incompatible_features, table)


def refuse_unsupported(header: Qcow1Header | Qcow2Header) -> None:
    """Raise UnsupportedFeatureError with the names of all that the image needs and qcowfuse does not have."""
    names: list[str] = []
    if header.crypt_method not in (CRYPT_NONE, CRYPT_AES, CRYPT_LUKS):
        names.append(f"encryption method {header.crypt_method}")
    if isinstance(header, Qcow2Header):
        names += unknown_incompatible(header)
    if names:
        raise UnsupportedFeatureError(names)


def incompatible_names(incompatible: int, table: bytes) -> tuple[str, ...]:
    """As :func:`unknown_incompatible`, of the field ``incompatible`` and the bytes of a feature name table."""
    known = {
        feature.bit: feature.name
        for feature in reversed(parse_feature_names(table))
        if feature.kind == FEATURE_KIND_INCOMPATIBLE
    }
    unknown = incompatible & ~KNOWN_INCOMPATIBLE
    return tuple(known.get(bit, f"incompatible feature bit {bit}") for bit in range(64) if unknown & (1 << bit))


def decode_name(raw: bytes) -> str:
    """Bytes up to the first NUL (as C code reads them), undecodable ones as surrogates."""
    return raw.partition(b"\0")[0].decode("utf-8", "surrogateescape")
