"""Reading a guest range through a backing chain: look up, then fetch every extent.

1. ``start`` never waits: everything it needs is in memory and in the page cache, or it gives a pending read, which
   goes on with what was found.
2. One extent is handed through without a copy. Several are read into their slices of one ``bytearray``; those
   that can't be answered at once are fetched together.
3. What the chain does not hold is zeroes, and a fresh ``bytearray`` is zeroes already.
4. Compressed clusters have ways of their own: :mod:`.compressed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ...buffer import Buffer
from ...format.entries import ClusterKind
from ...format.extents import Extent
from ..image import LARGE_READ, never
from ..layers.mapping import ChainLookup, Layer
from ..layers.table_cache import TableCache
from ..pending import PendingRead, PendingSource, RequestGuard
from .compressed import CompressedReads
from .decoding import CompressedSource
from .fetching import Fetcher
from .quick_reader import QuickReader


class ChainReader:
    """Reads from ``layers`` (the top one first). ``sources`` has None for layers without compressed clusters."""

    def __init__(
        self,
        layers: Sequence[Layer],
        sources: Sequence[CompressedSource | None],
        cache: TableCache,
        guard: RequestGuard,
    ) -> None:
        self.layers = tuple(layers)
        self._cache = cache
        self._guard = guard
        self._fetcher = Fetcher(layers)
        self.compressed = CompressedReads(layers, sources, cache, self._fetcher, guard)
        self.start_quickly = QuickReader(layers, cache, guard).start

    async def lookup(self, guest_offset: int, n_bytes: int, *, first_layer: int = 0) -> list[Extent]:
        """The extents of a range, loading what is missing. Raises OSError, CorruptImageError."""
        lookup = ChainLookup(self.layers, guest_offset, n_bytes, first_layer=first_layer)
        missing = lookup.proceed()
        return lookup.extents if missing is None else await self._complete(lookup, missing)

    async def _complete(self, lookup: ChainLookup, missing: Layer | None) -> list[Extent]:
        while missing is not None:
            slice_ = await missing.load(lookup.position)
            try:
                missing = lookup.proceed(slice_)
            finally:
                self._cache.unpin(slice_)
        return lookup.extents

    def start(self, guest_offset: int, n_bytes: int, is_alone: Callable[[], bool]) -> Buffer | PendingRead:
        """The bytes if they can be had at once; ``is_alone`` is asked once at most. Raises CorruptImageError,
        FormatError, OSError."""
        data = self.start_quickly(guest_offset, n_bytes)
        return self.start_by_extents(guest_offset, n_bytes, is_alone) if data is None else data

    def start_by_extents(self, guest_offset: int, n_bytes: int, is_alone: Callable[[], bool]) -> Buffer | PendingRead:
        """:meth:`start` for any range, by way of a whole look-up."""
        lookup = ChainLookup(self.layers, guest_offset, n_bytes)
        missing = lookup.proceed()
        if missing is not None:
            answer = is_alone()  # asked now: as soon as this read waits, it is not alone
            rest = partial(self._look_further, lookup, missing, guest_offset, n_bytes, lambda: answer)
            return PendingRead(self._guard, rest)
        return self._start_extents(lookup.extents, guest_offset, n_bytes, is_alone)

    async def read(self, guest_offset: int, n_bytes: int) -> Buffer:
        """The bytes. Raises OSError, FormatError, CorruptImageError."""
        started = self.start(guest_offset, n_bytes, never)
        return await started.finish() if isinstance(started, PendingRead) else started

    async def read_extents(self, extents: list[Extent], guest_offset: int, n_bytes: int) -> Buffer:
        """The bytes of a range, of which ``extents`` are what a look-up found. Raises OSError, FormatError."""
        started = self._start_extents(extents, guest_offset, n_bytes, never)
        return await started.finish() if isinstance(started, PendingRead) else started

    async def _look_further(
        self, lookup: ChainLookup, missing: Layer, guest_offset: int, n_bytes: int, is_alone: Callable[[], bool]
    ) -> Buffer:
        extents = await self._complete(lookup, missing)
        started = self._start_extents(extents, guest_offset, n_bytes, is_alone)
        return await started.finish() if isinstance(started, PendingRead) else started

    def _start_extents(
        self, extents: list[Extent], guest_offset: int, n_bytes: int, is_alone: Callable[[], bool]
    ) -> Buffer | PendingRead:
        if len(extents) == 1 and extents[0].kind == ClusterKind.DATA:
            extent = extents[0]
            storage = self._fetcher.data[extent.layer]
            # Its two copies take as long as some ten other requests: the caller may have a thread make them.
            is_for_thread = n_bytes >= LARGE_READ and not is_alone()
            data = None if is_for_thread else storage.try_pread(extent.value, n_bytes)
            return PendingSource(self._guard, storage, extent.value, n_bytes) if data is None else data
        if any(extent.kind == ClusterKind.COMPRESSED for extent in extents):
            return self.compressed.start(extents, guest_offset, n_bytes, is_alone)
        buffer = bytearray(n_bytes)
        view = memoryview(buffer)
        waiting: list[tuple[Extent, memoryview]] = []
        for extent in extents:
            start = extent.guest_offset - guest_offset
            part = view[start : start + extent.n_bytes]
            if not self._fetcher.try_fetch(extent, part):
                waiting.append((extent, part))
        return PendingRead(self._guard, partial(self._fetch_rest, buffer, waiting)) if waiting else buffer

    async def _fetch_rest(self, buffer: bytearray, waiting: list[tuple[Extent, memoryview]]) -> Buffer:
        await self._fetcher.fetch_all(waiting)
        return buffer

    async def aclose(self) -> None:
        """End what goes on in the background; before the storages are closed. Idempotent."""
        await self.compressed.aclose()
