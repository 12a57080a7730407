"""Everything that changes the virtual disk: writes, zeroes, space set aside, growth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import trio

from ...errors import CorruptImageError
from ...format.geometry import Geometry
from ..layers.data_file import DataClusters
from ..layers.mapping import Mapping
from ..layers.table_cache import TableCache
from ..layers.usage import Usage
from ..options import DetectZeroes
from ..reading.reader import ChainReader
from ..reading.requests import check_range
from .allocation import Allocator
from .feature_bits import FeatureBits
from .growing import Grower
from .guarded_clusters import MetadataClusters
from .life_cycle import LifeCycle
from .requests import DataFileWrites, PlainWrites, StartsWrites, TrackedWrites, Writes, ZeroDetectingWrites
from .reserving import Reserver
from .write_back import WriteBack
from .writer import Writer
from .writer_at_once import WriterAtOnce
from .zeroing import Zeroer
from .zeroing_at_once import ZeroerAtOnce

if TYPE_CHECKING:
    from .dirty_bitmaps import DirtyBitmaps
    from .unguarded import UnguardedClusters

MAX_UNLINKED = 1 << 18
"""Runs of clusters to be let go of before they are given back: a whole disk of them, scattered, fills memory."""

MAX_MARKED = 1 << 36
"""Bytes of the disk, a power of two, that are marked in dirty bitmaps in one go: 0.2 ms for each bitmap with granules
of 64 KiB."""


class WritableParts(NamedTuple):
    """What an image has that is opened for writing, and how it shall be written."""

    allocator: Allocator
    metadata: MetadataClusters
    l1_table_offset: int
    feature_bits: FeatureBits | None
    bitmaps: DirtyBitmaps | None
    unguarded: UnguardedClusters | None
    data_clusters: DataClusters | None
    discard: bool
    detect_zeroes: DetectZeroes
    cache_budget: Callable[[Geometry], int]
    grow_refusal: str | None


class Changes:
    """Of one disk. ``writes`` starts writes."""

    def __init__(
        self,
        parts: WritableParts,
        *,
        mapping: Mapping,
        reader: ChainReader,
        cache: TableCache,
        usage: Usage,
        life: LifeCycle,
    ) -> None:
        self.allocator = parts.allocator
        self.metadata = parts.metadata
        self.bitmaps = parts.bitmaps
        self.unguarded = parts.unguarded
        self._mapping = mapping
        self._life = life
        self._discard = parts.discard
        self.write_back = WriteBack(
            storage=mapping.storage,
            mapping=mapping,
            l1_table_offset=parts.l1_table_offset,
            allocator=parts.allocator,
            cache=cache,
            metadata=parts.metadata,
            epochs=life.epochs,
            punches=parts.discard,
        )
        cache.write_back = self.write_back.clean_tables
        life.serve(self.write_back, parts.allocator.space, parts.feature_bits, parts.bitmaps, parts.unguarded)
        self.writer = Writer(
            mapping=mapping,
            reader=reader,
            cache=cache,
            allocator=parts.allocator,
            metadata=parts.metadata,
            write_back=self.write_back,
            usage=usage,
            data_clusters=parts.data_clusters,
        )
        self.writer_at_once = WriterAtOnce(
            self.writer,
            mapping=mapping,
            reader=reader,
            cache=cache,
            allocator=parts.allocator,
            metadata=parts.metadata,
            usage=usage,
            data_clusters=parts.data_clusters,
        )
        self._zeroer = Zeroer(
            mapping=mapping,
            reader=reader,
            cache=cache,
            writer=self.writer,
            write_back=self.write_back,
            usage=usage,
            data_clusters=parts.data_clusters,
        )
        self._reserver = Reserver(
            mapping=mapping,
            reader=reader,
            cache=cache,
            writer=self.writer,
            allocator=parts.allocator,
            metadata=parts.metadata,
            usage=usage,
            changing=life.change,
            data_clusters=parts.data_clusters,
        )
        self._grower = Grower(
            path=life.path,
            mapping=mapping,
            reader=reader,
            writer=self.writer,
            zeroer=self._zeroer,
            allocator=parts.allocator,
            metadata=parts.metadata,
            write_back=self.write_back,
            usage=usage,
            cache=cache,
            cache_budget=parts.cache_budget,
            bitmaps=parts.bitmaps,
            refusal=parts.grow_refusal,
        )
        writes = self._writes_of(parts, cache)
        self._zeroer_at_once = ZeroerAtOnce(
            self._zeroer,
            mapping=mapping,
            reader=reader,
            cache=cache,
            writer=self.writer,
            usage=usage,
            start_write=writes.start,
        )
        self.writes = self._detecting_zeroes(parts, writes)

    def _writes_of(self, parts: WritableParts, cache: TableCache) -> StartsWrites:
        mapping, life, bitmaps = self._mapping, self._life, parts.bitmaps
        writes: StartsWrites
        places = mapping.places
        if places is None or mapping.entry_format.is_extended:
            writes = Writes(mapping, cache, self.writer, self.writer_at_once, life, bitmaps)
        else:
            kind = PlainWrites if mapping.data is mapping.storage else DataFileWrites
            writes = kind(
                mapping,
                cache,
                self.writer,
                self.writer_at_once,
                life,
                bitmaps,
                places=places,
                metadata=parts.metadata,
                write_back=self.write_back,
            )
        if bitmaps is not None and bitmaps.has_enabled:
            writes = TrackedWrites(writes, mapping, life, bitmaps)
        return writes

    def _detecting_zeroes(self, parts: WritableParts, writes: StartsWrites) -> StartsWrites:
        if parts.detect_zeroes is DetectZeroes.OFF:
            return writes
        zero = partial(self.write_zeroes, unmap=parts.detect_zeroes is DetectZeroes.UNMAP)
        return ZeroDetectingWrites(writes, self._mapping, self._life, zero)

    async def write_zeroes(self, guest_offset: int, n_bytes: int, *, unmap: bool) -> None:
        """See Image."""
        check_range(self._mapping, guest_offset, n_bytes)
        end = guest_offset + n_bytes
        unmap = unmap and self._discard
        if not n_bytes:
            self._life.require_writable()
        while guest_offset < end:
            # Each step is an operation in flight of its own: what the first ones free need not wait for the last.
            async with self._life.change():
                stop = end
                if self.bitmaps is not None:
                    stop = min(end, (guest_offset | MAX_MARKED - 1) + 1)
                    self.bitmaps.mark(guest_offset, stop - guest_offset)
                guest_offset += await self._zeroer.zero_some(guest_offset, stop - guest_offset, unmap=unmap)
            if self.write_back.n_unlinked >= MAX_UNLINKED:
                await self._life.flush()
            if guest_offset < end:
                await trio.lowlevel.checkpoint()

    def try_write_zeroes(self, guest_offset: int, n_bytes: int, *, unmap: bool) -> bool:
        """See Image."""
        if (
            not self._life.may_write
            or self.write_back.failure is not None
            or self.write_back.n_unlinked >= MAX_UNLINKED
            or not 0 <= guest_offset <= self._mapping.guest_size - n_bytes
            or (self.bitmaps is not None and n_bytes > MAX_MARKED)
        ):
            return False
        try:
            plan = self._zeroer_at_once.plan(guest_offset, n_bytes, unmap=unmap and self._discard)
            if plan is None:
                return False
            if self.bitmaps is not None:
                self.bitmaps.mark(guest_offset, n_bytes)
            return self._zeroer_at_once.zero(plan)
        except CorruptImageError:  # the image has to be marked, which takes waiting
            return False

    async def allocate(self, guest_offset: int, n_bytes: int) -> None:
        """See Image."""
        check_range(self._mapping, guest_offset, n_bytes)
        self._life.require_writable()
        await self._reserver.reserve(guest_offset, n_bytes)

    async def grow(self, size: int) -> None:
        """See Image."""
        async with self._life.change():
            await self._grower.grow(size)
