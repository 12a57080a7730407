"""The external data file of an image: which file it is, and where guest clusters lie in it.

1. Its name, found inside the image, is followed as :mod:`~qcowfuse.driver.files` says, relative to the image's folder
   (where QEMU starts from its working directory), and its contents are never probed. The user may name another file
   instead. It is no file of the chain itself.
2. A data cluster lies where it lies in the virtual disk: host offset and guest offset are the same, offset 0 is a
   cluster like any other, nothing is counted and nothing is moved. An entry that names another place is corrupt.
3. A place whose cluster is not linked holds anything: a write fills whole clusters (subclusters) there too. A place
   is given back to the file system before its entry lets go of it, under the claim: afterwards a new write may have
   filled it again. It is in use meanwhile, and must read as before or as zeroes: not every device can promise that.
4. Raw external data (autoclear bit 1): the file as it stands is the virtual disk. Zeroes are written into it and the
   entries stay, so there is one truth whatever fails or races; where a write of a new cluster fails halfway, the
   cluster is linked all the same. Over a backing file or with encryption the bit can't be true and means nothing.

Source: QEMU's do_alloc_cluster_offset(), qcow2_get_host_offset(), qcow2_subcluster_zeroize().
"""

from __future__ import annotations

import os
import sys
from array import array

from ...errors import CorruptImageError, FormatError, ImageUsageError
from ...format.entries import COMPRESSED, OFFSET_MASK, READS_ZERO, ClusterKind
from ...format.extensions import EXTENSION_DATA_FILE, find_extension
from ...format.extents import Run
from ...format.header import Qcow1Header, Qcow2Header
from ...format.header_fields import AUTOCLEAR_RAW_DATA_FILE, CRYPT_NONE, INCOMPATIBLE_DATA_FILE
from ...format.subclusters import ALL_ALLOCATED, SUBCLUSTER_BITS
from ...format.zero_plan import clusters_to_give_back
from ...storage.base import Storage
from ...system.late_logging import LateLogger
from ..files import ChainFile, ChainFiles
from .host_run import HostRun
from .mapping import Mapping
from .table_cache import L2Slice

log = LateLogger(__name__)
_MAX_TABLES_SEARCHED = 4


def has_data_file(header: Qcow1Header | Qcow2Header | None) -> bool:
    """Whether guest data lies in another file than the image."""
    return isinstance(header, Qcow2Header) and bool(header.incompatible_features & INCOMPATIBLE_DATA_FILE)


def has_raw_data_file(header: Qcow1Header | Qcow2Header | None) -> bool:
    """Whether the data file, read as it stands, is the virtual disk."""
    return (
        isinstance(header, Qcow2Header)
        and has_data_file(header)
        and bool(header.autoclear_features & AUTOCLEAR_RAW_DATA_FILE)
        and not header.backing_file
        and header.crypt_method == CRYPT_NONE
    )


async def open_data_file(
    files: ChainFiles, holder: ChainFile, header: Qcow2Header, *, override: str | None, writable: bool
) -> Storage:
    """Open and lock the data file of an image: ``override``, or the one that it names.

    Raises FormatError, ImageLockedError; BackingChainError, for an OSError too.
    """
    if override is not None:
        return (await files.open_given(holder, override, "data file", writable=writable)).storage
    raw = find_extension(header.extensions, EXTENSION_DATA_FILE)
    name = os.fsdecode((raw or b"").partition(b"\0")[0])
    if not name:
        raise FormatError("header", None, "external data file without its name (the --data-file option can give it)")
    return (await files.open_named(holder, name, "data file", writable=writable)).storage


async def check_length(path: str, header: Qcow2Header, mapping: Mapping, *, writable: bool) -> None:
    """A data file that lost its end may be read, as zeroes there, but not written. Raises ImageUsageError, OSError,
    CorruptImageError."""
    length = mapping.data.size()
    end = mapping.size if has_raw_data_file(header) else await _last_data(mapping)
    if end <= length:
        return
    detail = f"data file {mapping.data.name} ends at {length} bytes, but there is data up to {end}: truncated"
    if writable:
        raise ImageUsageError(f"{path}: {detail}; serve it read-only (qcowfuse -r) to save what is left")
    log.warning("%s: %s; what is missing reads as zeroes", path, detail)


async def _last_data(mapping: Mapping) -> int:
    """A guest offset that the data file must reach beyond: one byte into the last data cluster, 0 for none. Only the
    last L2 tables are looked at."""
    entry_format = mapping.entry_format
    words = entry_format.words
    n_per_table = 1 << mapping.slices_per_table_bits
    n_tables = 0
    for l1_index in range(mapping.geometry.n_l1_entries - 1, -1, -1):
        if not mapping.l1_table[l1_index] & entry_format.l1_offset_mask:
            continue
        for number in range((l1_index + 1) * n_per_table - 1, l1_index * n_per_table - 1, -1):
            try:
                entries = (await mapping.read_slice(number)).entries
            except CorruptImageError:
                continue  # the request that needs the table will say so
            if not any(entries):
                continue
            for index in range(len(entries) // words - 1, -1, -1):
                entry = entries[index * words]
                if not entry & entry_format.cluster_mask or entry & COMPRESSED:
                    continue
                subcluster = 0
                if entry_format.is_extended:
                    allocated = entries[2 * index + 1] & ALL_ALLOCATED
                    if not allocated:
                        continue
                    subcluster = (allocated & -allocated).bit_length() - 1
                elif entry & READS_ZERO:
                    continue
                start = (number << mapping.slice_bits) + index << entry_format.cluster_bits
                return min(start + (subcluster << entry_format.cluster_bits - SUBCLUSTER_BITS) + 1, mapping.size)
        n_tables += 1
        if n_tables == _MAX_TABLES_SEARCHED:
            break
    return 0


class DataFileMapping(Mapping):
    """The tables of an image with an external data file."""

    def lookup_in(self, slice_: L2Slice, guest_offset: int, n_bytes: int) -> Run:
        """See Layer. Raises CorruptImageError for data that is not in its place, too."""
        run = super().lookup_in(slice_, guest_offset, n_bytes)
        if run.kind in (ClusterKind.DATA, ClusterKind.ENCRYPTED):
            if run.value != guest_offset:
                raise _misplaced(guest_offset=guest_offset, host_offset=run.value)
        else:
            self._check_places(slice_.entries, guest_offset, run.n_bytes)
        return run

    def presence(self, entries: array[int], guest_offset: int, n_bytes: int) -> tuple[ClusterKind, int, bool]:
        """See Mapping. Of data that is not in its place, reading says so."""
        kind, n_bytes, is_followed = super().presence(entries, guest_offset, n_bytes)
        if kind is ClusterKind.DATA:
            return kind, n_bytes, False  # the places of what follows were not checked
        self._check_places(entries, guest_offset, n_bytes)
        return kind, n_bytes, is_followed

    def _check_places(self, entries: array[int], guest_offset: int, n_bytes: int) -> None:
        """Clusters that are there but hold no data must be in their places too, as QEMU wants it."""
        cluster_bits = self.geometry.cluster_bits
        words = self.entry_format.words
        index = self.index(guest_offset)
        first = guest_offset >> cluster_bits
        n_clusters = (guest_offset + n_bytes - 1 >> cluster_bits) + 1 - first
        n_skipped, n_owners = clusters_to_give_back(entries, self.entry_format, index, n_clusters)
        if not n_owners:
            return
        is_there = self.entry_format.cluster_mask
        for number in range(n_skipped, n_clusters):
            entry = entries[(index + number) * words]
            if entry & is_there and entry & OFFSET_MASK != first + number << cluster_bits:
                raise _misplaced(guest_offset=first + number << cluster_bits, host_offset=entry & OFFSET_MASK)


class DataClusters:
    """Places for guest clusters in a writable data file. ``is_raw``: see rule 4 of the module."""

    def __init__(self, storage: Storage, *, cluster_size: int, is_raw: bool) -> None:
        self.storage = storage
        self.is_raw = is_raw
        self._cluster_size = cluster_size
        # What lies behind the end of a device shows when that is enlarged.
        self._high_water = sys.maxsize if storage.is_fixed else storage.size()

    def take(self, guest_offset: int, n_clusters: int) -> HostRun:
        """The place of ``n_clusters`` from ``guest_offset`` on, the start of a cluster."""
        is_fresh = guest_offset >= self._high_water
        self._high_water = max(self._high_water, guest_offset + n_clusters * self._cluster_size)
        return HostRun(guest_offset, n_clusters, is_fresh)

    def check(self, *, guest_offset: int, host_offset: int) -> None:
        """Raises CorruptImageError unless the cluster at ``guest_offset`` is in its place."""
        if guest_offset != host_offset:
            raise _misplaced(guest_offset=guest_offset, host_offset=host_offset)


def _misplaced(*, guest_offset: int, host_offset: int) -> CorruptImageError:
    detail = f"guest offset {guest_offset:#x} is at {host_offset:#x} of the data file, expected the same offset"
    return CorruptImageError("L2 entry", None, detail)
