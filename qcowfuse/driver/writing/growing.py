"""Growing the virtual disk, all versions alike: the new part reads as zeroes, a crash leaves the old size or the new.

1. Inside, the disk is as large as it will be from the start; the guest sees the new size when all is durable.
2. A longer L1 table gets a new place, even where the old one had room: nothing that the header points at is written
   before the header can say so. (QEMU switches the table and the size in two steps; here one write does both.)
3. What would show in the new part is zeroed, and durably so, before the size changes: a backing file that is
   longer, the rest of the last cluster, the state of a virtual machine that an L1 table may hold behind the disk.
   Where the version has no zero clusters and a backing file would show, zeroes are written as data.
4. An external data file is only made longer. What it holds behind the old end is somebody's data, and stays: in a raw
   one the disk goes on with it, and it is linked as it stands; in others nothing links to it, and no more of it shows
   than the rest of the last cluster if that is linked. (QEMU shortens those to the new size.)
5. After a failure the disk has its old size. A longer L1 table stays, and goes to disk with the next flush.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from ...errors import ImageUsageError, QcowFuseError
from ...format.entries import ClusterKind
from ...format.geometry import SECTOR_SIZE, Geometry, divide_up, round_up
from ...format.header_fields import MAX_L1_SIZE
from ...format.size_fields import SIZE_FIELDS_LENGTH, SIZE_FIELDS_OFFSET, disk_size_in, replace_size_fields
from ..layers.host_run import HostRun
from ..layers.mapping import Mapping
from ..layers.table_cache import TableCache
from ..layers.usage import Usage
from ..reading.reader import ChainReader
from .allocation import Allocator, MetadataWrite
from .guarded_clusters import MetadataClusters
from .round import SizeFields
from .write_back import WriteBack
from .writer import Writer
from .zeroing import Zeroer

if TYPE_CHECKING:
    from .dirty_bitmaps import DirtyBitmaps

log = logging.getLogger(__name__)
_MAX_SIZE = (1 << 63) - SECTOR_SIZE


class Grower:
    """Grows the top layer of a chain. ``refusal``: why this image cannot grow, None where it can. ``bitmaps`` are
    made ready for the size to come before anything is larger. ``cache_budget`` says how many bytes of L2 tables to
    keep for a geometry."""

    def __init__(
        self,
        *,
        path: str,
        mapping: Mapping,
        reader: ChainReader,
        writer: Writer,
        zeroer: Zeroer,
        allocator: Allocator,
        metadata: MetadataClusters,
        write_back: WriteBack,
        usage: Usage,
        cache: TableCache,
        cache_budget: Callable[[Geometry], int],
        bitmaps: DirtyBitmaps | None,
        refusal: str | None = None,
    ) -> None:
        self._path = path
        self._mapping = mapping
        self._reader = reader
        self._writer = writer
        self._zeroer = zeroer
        self._allocator = allocator
        self._metadata = metadata
        self._write_back = write_back
        self._usage = usage
        self._cache = cache
        self._cache_budget = cache_budget
        self._bitmaps = bitmaps
        self._refusal = refusal
        self._version = mapping.entry_format.version
        self._lock = trio.Lock()

    async def grow(self, size: int) -> None:
        """Make the disk ``size`` bytes, rounded up to 512; nothing if it is that large already.
        Raises OSError (EFBIG, EOPNOTSUPP, ...), ImageUsageError for less, CorruptImageError."""
        async with self._lock:
            old_size = self._mapping.size
            if size > _MAX_SIZE:
                raise OSError(errno.EFBIG, f"a disk has less than 2^63 bytes, not {size}", self._path)
            size = round_up(size, SECTOR_SIZE)
            if size < old_size:
                raise ImageUsageError(f"{self._path}: has {old_size} bytes, and a disk cannot be made smaller")
            if size == old_size:
                return
            geometry = self._mapping.geometry.with_size(size)
            if geometry.n_l1_entries * 8 > MAX_L1_SIZE:
                raise OSError(errno.EFBIG, f"{size} bytes need an L1 table of more than 32 MiB", self._path)
            if self._refusal is not None:
                raise OSError(errno.EOPNOTSUPP, self._refusal, self._path)
            if self._bitmaps is not None:
                await self._bitmaps.before_growth(self._write_back, old_size, size)
            is_counted = self._usage.is_exact
            await self._grow(geometry, old_size)
            self._mapping.guest_size = size
        self._cache.budget = max(self._cache.budget, self._cache_budget(geometry))
        with suppress(OSError, QcowFuseError):  # it stays an estimate
            if is_counted:
                await self._usage.count(self._write_back.epochs)

    async def _grow(self, geometry: Geometry, old_size: int) -> None:
        fields = bytes(await self._mapping.storage.pread(SIZE_FIELDS_OFFSET, SIZE_FIELDS_LENGTH))
        n_l1_before = len(self._mapping.l1_table)
        if geometry.n_l1_entries > n_l1_before:
            await self._move_l1(geometry.n_l1_entries)
        self._mapping.resize(geometry.size)
        try:
            if self._mapping.data is not self._mapping.storage:
                await self._grow_data_file(old_size, geometry.size)
            if not self._writer.has_raw_data_file:
                await self._zero(old_size, geometry.size, n_l1_before)
            await self._write_back.change_header(self._size_fields(fields, geometry.size))
        except BaseException:
            self._mapping.resize(old_size)
            self._write_back.revise_header(self._size_fields(fields, disk_size_in(fields)))
            raise

    def _size_fields(self, fields: bytes, size: int) -> SizeFields:
        def write(l1_size: int, l1_table_offset: int) -> MetadataWrite:
            new = replace_size_fields(
                fields, version=self._version, size=size, l1_size=l1_size, l1_table_offset=l1_table_offset
            )
            return MetadataWrite(SIZE_FIELDS_OFFSET, new)

        return write

    async def _move_l1(self, n_entries: int) -> None:
        """A place for a longer L1 table. Where an earlier failure has left one that never came to disk, that is
        brought to disk first."""
        if self._write_back.l1_is_moving:
            await self._write_back.flush()
        n_clusters = divide_up(n_entries * 8, self._mapping.geometry.cluster_size)
        n_bytes = n_clusters * self._mapping.geometry.cluster_size
        run = await self._allocator.allocate_exactly(n_clusters)
        try:
            await self._allocator.space.secure(run.host_offset, n_bytes)
        except BaseException:
            with trio.CancelScope(shield=True), suppress(OSError, QcowFuseError):
                await self._allocator.release([run])
            raise
        self._metadata.add_l1(run.host_offset, n_bytes)
        self._write_back.move_l1(run.host_offset, self._l1_has_moved)

    async def _grow_data_file(self, old_size: int, size: int) -> None:
        """An external data file is at least as long as the disk; rule 4."""
        data = self._mapping.data
        if data.is_fixed:
            data.refresh_size()
        position, end = old_size, min(data.size(), size)
        while position < end and self._writer.has_raw_data_file:
            position += await self._writer.link_some(position, end - position)
        if data.size() < size:
            await data.truncate(size)

    def _l1_has_moved(self, old: HostRun) -> None:
        if self._version == 1 or not old.n_clusters:
            return  # version 1 never gives anything back
        self._metadata.discard(old.host_offset, old.n_clusters * self._mapping.geometry.cluster_size)
        self._write_back.unlink_cluster(old)

    async def _zero(self, old_size: int, size: int, n_l1_before: int) -> None:
        """Zero whatever is not zero from ``old_size`` to ``size``, in an external data file by the entries alone."""
        has_data_file = self._mapping.data is not self._mapping.storage
        cluster_size, shift = self._writer.cluster_size, self._mapping.geometry.l1_shift
        end = min(size, max(n_l1_before << shift, *(layer.size for layer in self._reader.layers[1:]), old_size))
        position = old_size
        while position < end:
            stop = min(end, self._mapping.slice_end(position))  # one slice at a time, as the writer does
            for extent in await self._reader.lookup(position, stop - position):
                extent_end = extent.guest_offset + extent.n_bytes
                if extent.kind == ClusterKind.ZERO or extent_end <= position:
                    continue
                start, position = max(position, extent.guest_offset), min(round_up(extent_end, cluster_size), size)
                if has_data_file and extent.layer == 0:
                    start = round_up(start, cluster_size)
                while start < position:
                    start += await self._zeroer.zero_some(start, position - start, unmap=not has_data_file)
            position = max(position, stop)
            await trio.lowlevel.checkpoint()
