"""The refcount table of an image out of its file."""

from __future__ import annotations

from array import array

from ..format.entries import parse_table
from ..format.header import Qcow2Header
from ..storage.base import Storage, pread


async def read_refcount_table(storage: Storage, header: Qcow2Header) -> array[int]:
    """The table that the header points at, at most 8 MiB (the parser of the header sees to that); what lies behind
    the end of the file reads as zeroes. Raises OSError.
    """
    n_bytes = header.refcount_table_clusters << header.cluster_bits
    return parse_table(await pread(storage, header.refcount_table_offset, n_bytes))
