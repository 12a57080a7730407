"""The header extensions of a QCOW2 image: a list of (magic, data) between the header and the backing name.

1. Nothing is dropped: extensions that qcowfuse does not know keep their bytes and their place in the list.
2. A length is compared with the space that is left before anything is cut out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import FormatError
from ..printable import printable

EXTENSION_END = 0x00000000
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_FEATURE_NAMES = 0x6803F857
EXTENSION_BITMAPS = 0x23852875
EXTENSION_LUKS_HEADER = 0x0537BE77
EXTENSION_DATA_FILE = 0x44415441

FEATURE_KIND_INCOMPATIBLE = 0
FEATURE_KIND_COMPATIBLE = 1
FEATURE_KIND_AUTOCLEAR = 2

_HEAD = struct.Struct(">II")
_FEATURE_ENTRY = struct.Struct(">BB46s")


class HeaderExtension(NamedTuple):
    """One extension: its 32-bit ``magic`` and its ``data`` without the padding."""

    magic: int
    data: bytes


class FeatureName(NamedTuple):
    """The name that the image's writer gave to feature bit ``bit`` (0 to 255) of ``kind`` (0 to 2 are known)."""

    kind: int
    bit: int
    name: str


def text_of(raw: bytes) -> str:
    """Text of an image as one line that is safe to show: bytes up to the first NUL, the unprintable as ``?``."""
    return printable(raw.partition(b"\0")[0].decode("utf-8", "replace"))


def parse_extensions(data: bytes, start: int, end: int) -> tuple[HeaderExtension, ...]:
    """The extensions in ``data[start:end]``, up to the end marker or ``end``; bytes past ``data`` read as zero.

    ``end`` is the backing file's name or the end of the first cluster, so that it is bounded by the caller.
    Raises FormatError for an extension that reaches past ``end``.
    """
    area = bytes(data[start:end]).ljust(max(end - start, 0), b"\0")
    extensions: list[HeaderExtension] = []
    position = 0
    while position < len(area):
        if len(area) - position < _HEAD.size:
            raise FormatError("header extension", start + position, "cut short, expected 8 bytes of magic and length")
        magic, length = _HEAD.unpack_from(area, position)
        body = position + _HEAD.size
        if length > len(area) - body:
            raise FormatError(
                "header extension",
                start + position,
                f"magic {magic:#010x} has length {length:#x}, expected at most {len(area) - body:#x}",
            )
        if magic == EXTENSION_END:
            break
        extensions.append(HeaderExtension(magic, area[body : body + length]))
        position = body + length + -length % 8
    return tuple(extensions)


def serialise_extensions(extensions: Iterable[HeaderExtension]) -> bytes:
    """The bytes of ``extensions``, each padded to 8 bytes, without the end marker."""
    parts: list[bytes] = []
    for extension in extensions:
        parts += (
            _HEAD.pack(extension.magic, len(extension.data)),
            extension.data,
            bytes(-len(extension.data) % 8),
        )
    return b"".join(parts)


def parse_feature_names(data: bytes) -> tuple[FeatureName, ...]:
    """The entries of a feature name table up to the first unnamed one; names are safe to show. Never raises."""
    names: list[FeatureName] = []
    for position in range(0, len(data), _FEATURE_ENTRY.size):
        entry = data[position : position + _FEATURE_ENTRY.size].ljust(_FEATURE_ENTRY.size, b"\0")
        kind, bit, raw = _FEATURE_ENTRY.unpack(entry)
        name = text_of(raw)
        if not name:
            break
        names.append(FeatureName(kind, bit, name))
    return tuple(names)


def find_extension(extensions: Iterable[HeaderExtension], magic: int) -> bytes | None:
    """The data of the last extension with ``magic`` (QEMU takes the last of several), or None."""
    found: bytes | None = None
    for extension in extensions:
        if extension.magic == magic:
            found = extension.data
    return found
