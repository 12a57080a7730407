"""The header of an image out of its file."""

from __future__ import annotations

from ..format.header import Qcow1Header, Qcow2Header, refuse_unsupported
from ..format.header_parsing import header_length_needed, parse_header
from ..storage.base import Storage, pread

_ENOUGH_TO_TELL = 512
"""Bytes that tell how many more there are to read."""


async def read_header_area(storage: Storage) -> bytes:
    """What :func:`~qcowfuse.format.header_parsing.parse_header` wants, at most 2 MiB; less where the file ends.

    Raises FormatError (a version that nobody knows), OSError.
    """
    start = bytes(await pread(storage, 0, min(_ENOUGH_TO_TELL, storage.size())))
    return bytes(await pread(storage, 0, min(header_length_needed(start), storage.size())))


async def read_header(
    storage: Storage, *, for_check: bool = False, for_info: bool = False
) -> Qcow1Header | Qcow2Header:
    """The header of an open image. ``for_check`` and ``for_info`` are those of
    :func:`~qcowfuse.format.header_parsing.parse_header`.

    Raises FormatError, UnsupportedFeatureError (unknown features and methods of encryption), OSError.
    """
    area = await read_header_area(storage)
    header = parse_header(area, storage.size(), for_check=for_check, for_info=for_info)
    refuse_unsupported(header)
    return header
