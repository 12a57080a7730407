"""A QCOW image, version 1, 2 or 3, as a virtual disk that is read and written: the facade.

One class serves all versions: they differ in values (:class:`~qcowfuse.format.entries.EntryFormat`), in how
host clusters are found (:class:`~qcowfuse.driver.writing.allocation.Allocator`) and in the header bits; the way of a
request is the same. Requests are started by :mod:`.reading.requests` and :mod:`.writing.requests`; what begins,
freezes and ends is in :mod:`.writing.life_cycle`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from ..buffer import Buffer
from ..errors import ReadOnlyImageError
from ..storage.base import Storage
from .counters import counters_of
from .image import StartRead, StartWrite, never
from .layers.holes import HoleFinder
from .layers.mapping import Layer, Mapping
from .layers.table_cache import TableCache
from .layers.usage import Usage
from .pending import PendingRead, PendingWrite
from .reading.decoding import CompressedSource
from .reading.reader import ChainReader
from .reading.requests import check_range, reads_of
from .writing.changes import Changes, WritableParts
from .writing.life_cycle import LifeCycle


class QcowImage:
    """Implements the Image protocol. Made by :func:`~qcowfuse.driver.chain.open_image`; ``parts`` is None for an
    image that is only read. What it is made of is public for inspection."""

    def __init__(
        self,
        *,
        path: str,
        format_name: str,
        layers: Sequence[Layer],
        sources: Sequence[CompressedSource | None],
        cache: TableCache,
        storages: Sequence[Storage],
        parts: WritableParts | None,
    ) -> None:
        mapping = layers[0]
        assert isinstance(mapping, Mapping)
        self.path = path
        self.format_name = format_name
        self.cluster_size = mapping.geometry.cluster_size
        self.cache = cache
        self.life = LifeCycle(path, mapping)
        self.reader = ChainReader(layers, sources, cache, self.life)
        self._mapping = mapping
        self._storages = tuple(storages)
        self._usage = Usage(self.reader.layers, mapping.data)
        self._holes = HoleFinder(self.reader.layers)
        self.start_read: StartRead = reads_of(mapping, self.reader, cache, self.life).start
        self.start_write: StartWrite = self._refuse_write
        self.changes: Changes | None = None
        if parts is not None:
            self.changes = Changes(
                parts, mapping=mapping, reader=self.reader, cache=cache, usage=self._usage, life=self.life
            )
            self.start_write = self.changes.writes.start

    @property
    def size(self) -> int:
        """See Image."""
        return self._mapping.guest_size

    @property
    def read_only(self) -> bool:
        """See Image."""
        return self.life.read_only

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The chain, the image itself first."""
        return self.reader.layers

    async def read(self, guest_offset: int, n_bytes: int) -> Buffer:
        """See Image."""
        started = self.start_read(guest_offset, n_bytes)
        return await started.finish() if isinstance(started, PendingRead) else started

    async def write(self, guest_offset: int, data: Buffer) -> None:
        """See Image."""
        pending = self.start_write(guest_offset, data)
        if pending is not None:
            await pending.finish()

    def _refuse_write(
        self, guest_offset: int, data: Buffer, is_alone: Callable[[], bool] = never, /
    ) -> PendingWrite | None:
        """What ``start_write`` is for an image that is only read."""
        check_range(self._mapping, guest_offset, len(data))
        self.life.require_writable()
        raise AssertionError("an image without writable parts is read-only")

    async def write_zeroes(self, guest_offset: int, n_bytes: int, *, unmap: bool) -> None:
        """See Image."""
        check_range(self._mapping, guest_offset, n_bytes)
        await self._writable().write_zeroes(guest_offset, n_bytes, unmap=unmap)

    async def allocate(self, guest_offset: int, n_bytes: int) -> None:
        """See Image."""
        check_range(self._mapping, guest_offset, n_bytes)
        await self._writable().allocate(guest_offset, n_bytes)

    async def grow(self, size: int) -> None:
        """See Image."""
        await self._writable().grow(size)

    def _writable(self) -> Changes:
        if self.changes is None:
            raise ReadOnlyImageError(f"{self.path}: opened read-only")
        return self.changes

    async def find_extent(self, guest_offset: int, n_bytes: int, *, keep: bool = True) -> tuple[bool, int]:
        """See Image."""
        check_range(self._mapping, guest_offset, n_bytes)
        async with self.life.look():
            return await self._holes.find(guest_offset, n_bytes, keep=keep)

    def try_find_extent(self, guest_offset: int, n_bytes: int) -> tuple[bool, int, bool] | None:
        """See Image."""
        if not 0 <= guest_offset <= self._mapping.guest_size - n_bytes:
            check_range(self._mapping, guest_offset, n_bytes)
        return self._holes.try_find(guest_offset, n_bytes)

    def try_write_zeroes(self, guest_offset: int, n_bytes: int, *, unmap: bool) -> bool:
        """See Image."""
        return self.changes is not None and self.changes.try_write_zeroes(guest_offset, n_bytes, unmap=unmap)

    def try_flush(self) -> bool:
        """See Image."""
        return self.life.try_flush()

    async def flush(self) -> None:
        """See Image."""
        await self.life.flush()

    def allocated_bytes(self) -> int:
        """See Image."""
        return self._usage.allocated_bytes

    async def count_allocated(self) -> None:
        """Find out what :meth:`allocated_bytes` is; until this has ended it is an estimate. Reads every L2 table
        once, past the cache. Raises OSError, FormatError."""
        await self._usage.count(self.life.epochs)

    def free_host_bytes(self) -> int:
        """See Image."""
        return self._mapping.data.free_bytes()

    def statistics(self) -> dict[str, int]:
        """See Image."""
        life = self.life
        states = {"read_only": life.read_only, "flush_failed": life.has_failed, "corrupt": life.is_frozen}
        return counters_of(self.cache, self.reader.compressed.decoded, self._storages, states)

    async def aclose(self) -> None:
        """See Image."""
        if not self.life.begin_end():
            return
        try:
            await self.life.end_writing()
        finally:
            with trio.CancelScope(shield=True):
                await self.reader.aclose()
                for storage in self._storages:
                    await storage.aclose()
