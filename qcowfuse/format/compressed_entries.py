"""Where the L2 entry of a compressed cluster says that it lies in the image file.

Sources: qcow2 specification, "Cluster mapping"; QEMU's block/qcow.c for version 1.
"""

from __future__ import annotations

from typing import NamedTuple

from ..errors import FormatError
from .geometry import SECTOR_SIZE


class CompressedCluster(NamedTuple):
    """Where a compressed cluster lies: ``host_offset`` at any byte, ``n_bytes`` (1 to two clusters) to read."""

    host_offset: int
    n_bytes: int


def parse_compressed_entry(entry: int, cluster_bits: int) -> CompressedCluster:
    """The place that a QCOW2 L2 entry with the compressed flag (bit 62) names; the flags are ignored."""
    offset_bits = 62 - (cluster_bits - 8)
    host_offset = entry & ((1 << offset_bits) - 1)
    n_more_sectors = (entry >> offset_bits) & ((1 << (cluster_bits - 8)) - 1)
    return CompressedCluster(host_offset, (n_more_sectors + 1) * SECTOR_SIZE - host_offset % SECTOR_SIZE)


def parse_compressed_entry_v1(entry: int, cluster_bits: int) -> CompressedCluster:
    """The place that a version 1 L2 entry with the compressed flag (bit 63) names.

    Raises FormatError for a length of 0, which no stream has.
    """
    offset_bits = 63 - cluster_bits
    host_offset = entry & ((1 << offset_bits) - 1)
    n_bytes = (entry >> offset_bits) & ((1 << cluster_bits) - 1)
    if n_bytes == 0:
        raise FormatError("L2 entry", None, f"{entry:#018x} names 0 compressed bytes, expected at least 1")
    return CompressedCluster(host_offset=host_offset, n_bytes=n_bytes)
