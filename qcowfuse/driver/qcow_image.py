"""A QCOW image, version 1, 2 or 3, as a virtual disk that is read and written.

One class serves all versions: they differ in values (:class:`~qcowfuse.format.entries.EntryFormat`), in how
host clusters are found (:class:`~qcowfuse.driver.writing.allocation.Allocator`) and in the header bits; the way of a
request is the same.

1. The ``try_`` calls answer only what needs no waiting, and of them only ``try_allocate_write`` changes metadata: it
takes
   and links new clusters in one step.
2. Metadata that is found impossible freezes the image: no write after that, the corrupt bit set on disk where
   the version has one; what was written before is still flushed.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import trio

from ..buffer import Buffer
from ..errors import CorruptImageError, OutOfRangeError, ReadOnlyImageError
from ..format.entries import ALL_BITS, COPIED
from ..format.geometry import Geometry
from ..storage.base import Storage
from .counters import counters_of
from .layers.data_file import DataClusters
from .layers.holes import HoleFinder
from .layers.mapping import Layer, Mapping
from .layers.range_claims import InFlightEpochs
from .layers.table_cache import LAYER_BITS, TableCache
from .layers.usage import Usage
from .options import DetectZeroes
from .reading.reader import ChainReader
from .writing.allocation import Allocator
from .writing.feature_bits import FeatureBits
from .writing.growing import Grower
from .writing.guarded_clusters import MetadataClusters
from .writing.reserving import Reserver
from .writing.write_back import WriteBack
from .writing.writer import Writer
from .writing.zero_detection import is_zero
from .writing.zeroing import Zeroer

if TYPE_CHECKING:
    from .writing.dirty_bitmaps import DirtyBitmaps
    from .writing.unguarded import UnguardedClusters

log = logging.getLogger(__name__)
_MAX_UNLINKED = 1 << 18
"""Runs of clusters to be let go of before they are given back: a whole disk of them, scattered, fills memory."""
_SHORT_READ = "request for {n_bytes} bytes at {guest_offset:#x} of a disk of {size} bytes"


class QcowImage:
    """See the module docstring; implements the Image protocol. Made by :func:`~qcowfuse.driver.chain.open_image`."""

    def __init__(
        self,
        *,
        path: str,
        format_name: str,
        mapping: Mapping,
        reader: ChainReader,
        cache: TableCache,
        storages: Sequence[Storage],
        allocator: Allocator | None,
        metadata: MetadataClusters,
        l1_table_offset: int,
        feature_bits: FeatureBits | None,
        bitmaps: DirtyBitmaps | None = None,
        unguarded: UnguardedClusters | None = None,
        data_clusters: DataClusters | None = None,
        discard: bool = True,
        detect_zeroes: DetectZeroes = DetectZeroes.OFF,
        cache_budget: Callable[[Geometry], int] = lambda _: 0,
        grow_refusal: str | None = None,
    ) -> None:
        self._discard = discard
        self.path = path
        self.format_name = format_name
        self.size = mapping.size
        self.cluster_size = mapping.geometry.cluster_size
        self._mapping = mapping
        self._reader = reader
        self._cache = cache
        self._storages = tuple(storages)
        self._storage = mapping.storage
        self._usage = Usage(reader.layers, mapping.data)
        self._holes = HoleFinder(reader.layers)
        self._frozen: Exception | None = None
        self._closed = False
        self._allocator = allocator
        self._begin_lock = trio.Lock()
        self._feature_bits = feature_bits
        self._writable = allocator is not None
        self._begun = False
        self._write_back: WriteBack | None = None
        self._writer: Writer | None = None
        self._zeroer: Zeroer | None = None
        self._reserver: Reserver | None = None
        self._grower: Grower | None = None
        if allocator is not None:
            self._write_back = WriteBack(
                storage=self._storage,
                mapping=mapping,
                l1_table_offset=l1_table_offset,
                allocator=allocator,
                cache=cache,
                metadata=metadata,
                punches=discard,
            )
            cache.write_back = self._write_back.clean_tables
            self._writer = Writer(
                mapping=mapping,
                reader=reader,
                cache=cache,
                allocator=allocator,
                metadata=metadata,
                write_back=self._write_back,
                usage=self._usage,
                data_clusters=data_clusters,
            )
            self._zeroer = Zeroer(
                mapping=mapping,
                reader=reader,
                cache=cache,
                writer=self._writer,
                write_back=self._write_back,
                usage=self._usage,
                data_clusters=data_clusters,
            )
            self._reserver = Reserver(
                mapping=mapping,
                reader=reader,
                cache=cache,
                writer=self._writer,
                allocator=allocator,
                metadata=metadata,
                usage=self._usage,
                changing=self._guarded_write,
                data_clusters=data_clusters,
            )
            self._grower = Grower(
                path=path,
                mapping=mapping,
                reader=reader,
                writer=self._writer,
                zeroer=self._zeroer,
                allocator=allocator,
                metadata=metadata,
                write_back=self._write_back,
                usage=self._usage,
                cache=cache,
                cache_budget=cache_budget,
                before_growth=self._before_growth,
                refusal=grow_refusal,
            )
        # What the hot path asks of the objects above, looked up once.
        self._slices = cache.slices
        self._slice_shift = mapping.slice_shift
        self._slice_mask = mapping.slice_mask
        self._cluster_bits = mapping.geometry.cluster_bits
        self._cluster_mask = self.cluster_size - 1
        # Encrypted data is never read or written as it is, and data in a data file has ways of its own.
        has_data_file = mapping.data is not mapping.storage
        is_fast = not has_data_file and mapping.encrypted is None
        self._not_plain = mapping.entry_format.not_plain if is_fast else ALL_BITS
        self._offset_mask = mapping.entry_format.offset_mask
        self._in_place_mask = mapping.entry_format.in_place_mask if is_fast else 0
        self._in_place_value = mapping.entry_format.in_place_value if is_fast else 1
        self._metadata_clusters = metadata.clusters
        self._try_pread = mapping.data.try_pread
        self._pread = mapping.data.pread
        self._try_pwritev = mapping.data.try_pwritev
        self._bitmaps = bitmaps
        self._unguarded = unguarded
        self.try_read: Callable[[int, int], Buffer | None] = self._try_read
        self._try_write_here = self._try_write
        if has_data_file and mapping.encrypted is None and not mapping.entry_format.is_extended:
            self.try_read, self._try_write_here = self._try_read_data_file, self._try_write_data_file
        self.try_write: Callable[[int, Buffer], bool] = self._try_write_here
        if bitmaps is not None and bitmaps.has_enabled:
            self.try_write = self._try_write_tracked
        self._detect_zeroes = None if detect_zeroes is DetectZeroes.OFF else detect_zeroes
        if self._detect_zeroes:
            try_write = self.try_write
            self.try_write = lambda guest_offset, data: not is_zero(data) and try_write(guest_offset, data)

    @property
    def read_only(self) -> bool:
        """See Image."""
        return (
            not self._writable
            or self._frozen is not None
            or (self._write_back is not None and self._write_back.failure is not None)
        )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The chain, the image itself first."""
        return self._reader.layers

    def _try_read(self, guest_offset: int, n_bytes: int) -> Buffer | None:
        """What ``try_read`` is but for a data file, see Image."""
        slice_ = self._slices.get(guest_offset >> self._slice_shift << LAYER_BITS)
        if slice_ is not None:
            entry = slice_.entries[guest_offset >> self._cluster_bits & self._slice_mask]
            host_offset = entry & self._offset_mask
            in_cluster = guest_offset & self._cluster_mask
            if (
                not entry & self._not_plain
                and host_offset
                and in_cluster + n_bytes <= self.cluster_size
                and 0 <= guest_offset <= self.size - n_bytes
            ):
                data = self._try_pread(host_offset + in_cluster, n_bytes)
                if data is not None:  # else it will be looked up, and counted, by read()
                    cache = self._cache
                    cache.hits += 1
                    if slice_ is not cache.newest:
                        cache.touch(slice_)
                return data
        if not 0 <= guest_offset <= self.size - n_bytes:
            return None
        try:
            return self._reader.try_read(guest_offset, n_bytes)
        except CorruptImageError:
            return None  # read() meets it again and can mark the image

    def try_read_alone(self, guest_offset: int, n_bytes: int) -> Buffer | None:
        """See Image."""
        if guest_offset < 0 or self._frozen is not None:
            return None
        return self._reader.try_single(guest_offset, n_bytes)

    async def read(self, guest_offset: int, n_bytes: int, *, may_block_loop: bool = False) -> Buffer:
        """See Image."""
        self._check_range(guest_offset, n_bytes)
        if not n_bytes:
            return b""
        epochs = None if self._write_back is None else self._write_back.epochs
        epoch = 0 if epochs is None else epochs.enter()
        # What _guarded_read() does, without what a context manager costs: that counts where the disk is fast.
        try:
            host_offset = self._plain_offset(guest_offset, n_bytes)
            if host_offset:
                data = self._try_pread(host_offset, n_bytes)
                return await self._pread(host_offset, n_bytes) if data is None else data
            wanted = self._reader.find_single(guest_offset, n_bytes)
            if wanted is not None:
                return await self._reader.read_single(wanted, guest_offset, n_bytes, may_block_loop=may_block_loop)
            return await self._reader.read(guest_offset, n_bytes, may_block_loop=may_block_loop)
        except CorruptImageError as error:
            await self._freeze(error)
            raise
        finally:
            if epochs is not None:
                epochs.leave(epoch)

    def _plain_offset(self, guest_offset: int, n_bytes: int) -> int:
        """Where a range inside of one cluster lies, if it is as _try_read likes it; else 0."""
        slice_ = self._slices.get(guest_offset >> self._slice_shift << LAYER_BITS)
        in_cluster = guest_offset & self._cluster_mask
        if slice_ is None or in_cluster + n_bytes > self.cluster_size:
            return 0
        entry = slice_.entries[guest_offset >> self._cluster_bits & self._slice_mask]
        host_offset = entry & self._offset_mask
        if not host_offset or entry & self._not_plain:
            return 0
        self._cache.hits += 1
        self._cache.touch(slice_)
        return host_offset + in_cluster

    def _try_write_tracked(self, guest_offset: int, data: Buffer) -> bool:
        """What ``try_write`` is while bitmaps are kept."""
        if not self._begun or self._bitmaps is None or not 0 <= guest_offset <= self.size - len(data):
            return False
        self._bitmaps.mark(guest_offset, len(data))
        return self._try_write_here(guest_offset, data)

    def _try_read_data_file(self, guest_offset: int, n_bytes: int) -> Buffer | None:
        """What ``try_read`` is with a data file: the data must be in its place there."""
        slice_ = self._slices.get(guest_offset >> self._slice_shift << LAYER_BITS)
        if slice_ is not None:
            in_cluster = guest_offset & self._cluster_mask
            if (
                slice_.entries[guest_offset >> self._cluster_bits & self._slice_mask]
                == COPIED | guest_offset - in_cluster
                and in_cluster + n_bytes <= self.cluster_size
                and 0 <= guest_offset <= self.size - n_bytes
            ):
                data = self._try_pread(guest_offset, n_bytes)
                if data is not None:
                    cache = self._cache
                    cache.hits += 1
                    if slice_ is not cache.newest:
                        cache.touch(slice_)
                return data
        return self._try_read(guest_offset, n_bytes)

    def _try_write_data_file(self, guest_offset: int, data: Buffer) -> bool:
        """What ``try_write`` is with a data file: each cluster must be in its place there."""
        if not self._begun:
            return False
        slice_ = self._slices.get(guest_offset >> self._slice_shift << LAYER_BITS)
        n_bytes = len(data)
        if slice_ is None or not 0 <= guest_offset <= self.size - n_bytes:
            return False
        index = guest_offset >> self._cluster_bits & self._slice_mask
        entries, expected = slice_.entries, COPIED | guest_offset & ~self._cluster_mask
        end = COPIED + guest_offset + n_bytes
        while True:
            if index > self._slice_mask or entries[index] != expected:
                return False
            index += 1
            expected += self.cluster_size
            if expected >= end:
                break
        write_back = self._write_back
        if self._frozen is not None or write_back is None or write_back.failure is not None:
            return False
        if not self._try_pwritev(guest_offset, (data,)):
            return False
        cache = self._cache
        cache.hits += 1
        if slice_ is not cache.newest:
            cache.touch(slice_)
        return True

    def _try_write(self, guest_offset: int, data: Buffer) -> bool:
        """What ``try_write`` is otherwise, see Image."""
        if not self._begun:
            return False
        slice_ = self._slices.get(guest_offset >> self._slice_shift << LAYER_BITS)
        if slice_ is None:
            return False
        n_bytes = len(data)
        index = guest_offset >> self._cluster_bits & self._slice_mask
        entries = slice_.entries
        entry = entries[index]
        host_offset = entry & self._offset_mask
        if entry & self._in_place_mask != self._in_place_value or not host_offset:
            return False
        in_cluster = guest_offset & self._cluster_mask
        if not 0 <= guest_offset <= self.size - n_bytes:
            return False
        end = in_cluster + n_bytes
        host_cluster = host_offset >> self._cluster_bits
        if not self._metadata_clusters.isdisjoint(
            range(host_cluster, host_cluster + (end + self._cluster_mask >> self._cluster_bits))
        ):
            return False
        covered = cluster_size = self.cluster_size
        while covered < end:
            index += 1
            if (
                index > self._slice_mask
                or entries[index] & self._in_place_mask != self._in_place_value
                or entries[index] & self._offset_mask != host_offset + covered
            ):
                return False
            covered += cluster_size
        write_back = self._write_back
        if self._frozen is not None or write_back is None or write_back.failure is not None:
            return False
        if not self._try_pwritev(host_offset + in_cluster, (data,)):
            return False
        cache = self._cache
        cache.hits += 1
        if slice_ is not cache.newest:
            cache.touch(slice_)
        return True

    def try_allocate_write(self, guest_offset: int, data: Buffer) -> bool:
        """See Image."""
        n_bytes = len(data)
        if not 0 <= guest_offset <= self.size - n_bytes or (self._detect_zeroes and is_zero(data)):
            return False
        return self._write_at_once(guest_offset, memoryview(data)) == n_bytes

    async def write(self, guest_offset: int, data: Buffer) -> None:
        """See Image."""
        if self._detect_zeroes and is_zero(data):
            unmap = self._detect_zeroes is DetectZeroes.UNMAP
            await self.write_zeroes(guest_offset, len(data), unmap=unmap)
            return
        self._check_range(guest_offset, len(data))
        view = memoryview(data)
        position = self._write_at_once(guest_offset, view)
        if position == len(view) > 0:
            return
        async with self._guarded_write() as writer:
            if self._bitmaps is not None:
                self._bitmaps.mark(guest_offset, len(view))
            while position < len(view):
                self._require_writable()
                position += await writer.write_some(guest_offset + position, view[position:])

    def _write_at_once(self, guest_offset: int, view: memoryview) -> int:
        """Write what needs no waiting, from the start; returns how many bytes that was. Raises OSError."""
        writer, write_back = self._writer, self._write_back
        if not self._begun or self._frozen is not None or writer is None or write_back is None or write_back.failure:
            return 0
        if self._bitmaps is not None:
            self._bitmaps.mark(guest_offset, len(view))
        position = 0
        cache = self._cache
        try:
            while position < len(view):
                n_hits = cache.hits
                n_written = writer.try_write_some(guest_offset + position, view[position:])
                if not n_written:
                    cache.hits = n_hits  # it will be looked up again
                    break
                position += n_written
        except CorruptImageError:
            pass  # the awaited way meets it again and marks the image
        return position

    async def write_zeroes(self, guest_offset: int, n_bytes: int, *, unmap: bool) -> None:
        """See Image."""
        self._check_range(guest_offset, n_bytes)
        end = guest_offset + n_bytes
        unmap = unmap and self._discard
        if not n_bytes:
            self._require_writable()
        while guest_offset < end:
            # Each step is an operation in flight of its own: what the first ones free need not wait for the last.
            async with self._guarded_write():
                if self._bitmaps is not None:
                    self._bitmaps.mark(guest_offset, end - guest_offset)
                assert self._zeroer is not None
                guest_offset += await self._zeroer.zero_some(guest_offset, end - guest_offset, unmap=unmap)
            if self._write_back is not None and self._write_back.n_unlinked >= _MAX_UNLINKED:
                await self.flush()
            if guest_offset < end:
                await trio.lowlevel.checkpoint()

    async def allocate(self, guest_offset: int, n_bytes: int) -> None:
        """See Image."""
        self._check_range(guest_offset, n_bytes)
        self._require_writable()
        assert self._reserver is not None
        await self._reserver.reserve(guest_offset, n_bytes)

    async def grow(self, size: int) -> None:
        """See Image."""
        async with self._guarded_write():
            assert self._grower is not None
            await self._grower.grow(size, self._has_grown)

    async def _before_growth(self, size: int) -> None:
        if self._bitmaps is not None and self._write_back is not None:
            await self._bitmaps.before_growth(self._write_back, size)

    def _has_grown(self, size: int) -> None:
        self.size = size

    @asynccontextmanager
    async def _guarded_write(self) -> AsyncIterator[Writer]:
        """What surrounds every change: header bits first, an operation in flight, corruption freezes."""
        write_back, writer = self._require_writable()
        epoch = write_back.epochs.enter()
        try:
            if not self._begun:
                await self._begin_writing()
            yield writer
        except CorruptImageError as error:
            await self._freeze(error)
            raise
        finally:
            write_back.epochs.leave(epoch)

    @asynccontextmanager
    async def _guarded_read(self) -> AsyncIterator[None]:
        """What surrounds whatever reads host clusters: an operation in flight, corruption freezes."""
        epochs = None if self._write_back is None else self._write_back.epochs
        epoch = 0 if epochs is None else epochs.enter()
        try:
            yield
        except CorruptImageError as error:
            await self._freeze(error)
            raise
        finally:
            if epochs is not None:
                epochs.leave(epoch)

    async def find_extent(self, guest_offset: int, n_bytes: int, *, keep: bool = True) -> tuple[bool, int]:
        """See Image."""
        self._check_range(guest_offset, n_bytes)
        async with self._guarded_read():
            return await self._holes.find(guest_offset, n_bytes, keep=keep)

    async def flush(self) -> None:
        """See Image."""
        if self._write_back is not None:
            try:
                await self._write_back.flush()
            except CorruptImageError as error:
                await self._freeze(error)
                raise

    def allocated_bytes(self) -> int:
        """See Image."""
        return self._usage.allocated_bytes

    async def count_allocated(self) -> None:
        """Find out what :meth:`allocated_bytes` is; until this has ended it is an estimate. Reads every L2 table
        once, past the cache. Raises OSError, FormatError."""
        await self._usage.count(InFlightEpochs() if self._write_back is None else self._write_back.epochs)

    def free_host_bytes(self) -> int:
        """See Image."""
        return self._mapping.data.free_bytes()

    def statistics(self) -> dict[str, int]:
        """See Image."""
        has_failed = self._write_back is not None and self._write_back.failure is not None
        states = {"read_only": self.read_only, "flush_failed": has_failed, "corrupt": self._frozen is not None}
        return counters_of(self._cache, self._reader.decoded, self._storages, states)

    async def aclose(self) -> None:
        """See Image."""
        if self._closed:
            return
        self._closed = True
        if self._unguarded is not None:
            await self._unguarded.aclose()
        begun, self._begun = self._begun, False  # nothing is written after the bitmaps are stored
        try:
            if self._write_back is not None and begun:
                await self._flush_at_end(self._write_back)
                if self._allocator is not None:
                    await self._allocator.space.end()
                if self._bitmaps is not None and self._frozen is None:
                    await self._bitmaps.store(self._write_back, self.size)
                    if self._write_back.failure is None and self._write_back.is_dirty:
                        await self._write_back.flush()
                for _ in range(2):  # what that one has unlinked, and the counts of it
                    if self._write_back.failure is None and self._write_back.is_dirty:
                        await self._write_back.flush()
        finally:
            with trio.CancelScope(shield=True):
                await self._reader.aclose()
                for storage in self._storages:
                    await storage.aclose()

    async def _flush_at_end(self, write_back: WriteBack) -> None:
        """Raises OSError, which says what is lost. Whatever else could be written is durable then."""
        try:
            await write_back.flush()
        except OSError as error:
            unwritten = write_back.unwritten_range()
            if unwritten is None:
                raise
            if write_back.failure is None:
                with suppress(OSError):
                    await write_back.flush_storage()
            where = "between bytes {} and {} of the disk".format(*unwritten)
            detail = f"{error.strerror}; what was written {where} since the last fsync may be lost, with its space"
            raise OSError(error.errno, detail, self.path) from error

    def _check_range(self, guest_offset: int, n_bytes: int) -> None:
        if guest_offset < 0 or n_bytes < 0 or guest_offset + n_bytes > self.size:
            detail = _SHORT_READ.format(n_bytes=n_bytes, guest_offset=guest_offset, size=self.size)
            raise OutOfRangeError(detail)

    def _require_writable(self) -> tuple[WriteBack, Writer]:
        if self._write_back is None or self._writer is None:
            raise ReadOnlyImageError(f"{self.path}: opened read-only")
        if self._closed:
            raise ReadOnlyImageError(f"{self.path}: is being closed")
        if self._frozen is not None:
            raise ReadOnlyImageError(f"{self.path}: read-only since: {self._frozen}")
        if self._write_back.failure is not None:
            raise ReadOnlyImageError(f"{self.path}: read-only since a flush failed: {self._write_back.failure}")
        return self._write_back, self._writer

    async def _begin_writing(self) -> None:
        """R5: header bits that the first write makes untrue are cleared before it, durably; so do bitmaps say that
        they are in use."""
        async with self._begin_lock:
            if self._begun:
                return
            if self._unguarded is not None:
                await self._unguarded.begin()
            if self._feature_bits is not None and self._write_back is not None:
                await self._feature_bits.before_first_write(self._write_back.flush_storage)
            if self._bitmaps is not None and self._write_back is not None:
                await self._bitmaps.begin(self._write_back)
            self._begun = True

    async def _freeze(self, error: CorruptImageError) -> None:
        if self._frozen is not None or not self._writable:
            return
        self._frozen = error
        log.error("%s: %s; the image is read-only from now on", self.path, error)
        if self._feature_bits is not None and self._write_back is not None:
            with suppress(OSError):
                await self._feature_bits.mark_corrupt(self._write_back.flush_storage)
