"""The life of an open image: read, written from the first write on, frozen when it is found corrupt, closed.

1. Header bits that the first write makes untrue are cleared before it, durably (rule R5). Before it, too, bitmaps are
   marked as in use.
2. Metadata that is found impossible freezes the image: no write after that, the corrupt bit set on disk where the
   version has one; what was written before is still flushed.
3. After a failed flush nothing is written either.
4. At the end nothing is written once the bitmaps are stored.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import trio

from ...errors import CorruptImageError, ReadOnlyImageError
from ..layers.mapping import Mapping
from ..layers.range_claims import InFlightEpochs
from .feature_bits import FeatureBits
from .metadata_space import MetadataSpace
from .write_back import WriteBack

if TYPE_CHECKING:
    from .dirty_bitmaps import DirtyBitmaps
    from .unguarded import UnguardedClusters

log = logging.getLogger(__name__)


class LifeCycle:
    """Of one image; a RequestGuard. ``may_write``: the first write has begun and nothing has ended writing since, but
    for a failed flush (``write_back.failure``)."""

    def __init__(self, path: str, mapping: Mapping) -> None:
        self.path = path
        self.epochs = InFlightEpochs()
        self.may_write = False
        self._mapping = mapping
        self._frozen: Exception | None = None
        self._closed = False
        self._has_begun = False
        self._begin_lock = trio.Lock()
        self._write_back: WriteBack | None = None
        self._space: MetadataSpace | None = None
        self._feature_bits: FeatureBits | None = None
        self._bitmaps: DirtyBitmaps | None = None
        self._unguarded: UnguardedClusters | None = None

    def serve(
        self,
        write_back: WriteBack,
        space: MetadataSpace,
        feature_bits: FeatureBits | None,
        bitmaps: DirtyBitmaps | None,
        unguarded: UnguardedClusters | None,
    ) -> None:
        """The image is open for writing: this is what begins, is marked and is stored."""
        self._write_back = write_back
        self._space = space
        self._feature_bits = feature_bits
        self._bitmaps = bitmaps
        self._unguarded = unguarded

    @property
    def read_only(self) -> bool:
        """True when opened read-only, and from the moment on that an error made it so."""
        return self._write_back is None or self.is_frozen or self.has_failed

    @property
    def is_frozen(self) -> bool:
        """Whether the image was found corrupt."""
        return self._frozen is not None

    @property
    def has_failed(self) -> bool:
        """Whether a flush failed."""
        return self._write_back is not None and self._write_back.failure is not None

    def require_writable(self) -> None:
        """Raises ReadOnlyImageError."""
        if self._write_back is None:
            raise ReadOnlyImageError(f"{self.path}: opened read-only")
        if self._closed:
            raise ReadOnlyImageError(f"{self.path}: is being closed")
        if self._frozen is not None:
            raise ReadOnlyImageError(f"{self.path}: read-only since: {self._frozen}")
        if self._write_back.failure is not None:
            raise ReadOnlyImageError(f"{self.path}: read-only since a flush failed: {self._write_back.failure}")

    async def begin(self) -> None:
        """Before the first write, see rule 1; nothing when that was done. Raises OSError."""
        if self._has_begun:
            return
        async with self._begin_lock:
            if self._has_begun:
                return
            if self._unguarded is not None:
                await self._unguarded.begin()
            if self._feature_bits is not None and self._write_back is not None:
                await self._feature_bits.before_first_write(self._write_back.flush_storage)
            if self._bitmaps is not None and self._write_back is not None:
                await self._bitmaps.begin(self._write_back, self._mapping.guest_size)
            self._has_begun = True
            self.may_write = not self._closed and self._frozen is None

    async def freeze(self, error: CorruptImageError) -> None:
        """See rule 2; nothing when that was done."""
        if self._frozen is not None or self._write_back is None:
            return
        self._frozen = error
        self.may_write = False
        log.error("%s: %s; the image is read-only from now on", self.path, error)
        if self._feature_bits is not None:
            with suppress(OSError):
                await self._feature_bits.mark_corrupt(self._write_back.flush_storage)

    @asynccontextmanager
    async def change(self) -> AsyncIterator[None]:
        """What surrounds every change: it has begun, it is an operation in flight, corruption freezes. Raises
        ReadOnlyImageError, OSError."""
        self.require_writable()
        async with self.look():
            await self.begin()
            yield

    @asynccontextmanager
    async def look(self) -> AsyncIterator[None]:
        """What surrounds whatever reads host clusters: an operation in flight, corruption freezes."""
        epoch = self.epochs.enter()
        try:
            yield
        except CorruptImageError as error:
            await self.freeze(error)
            raise
        finally:
            self.epochs.leave(epoch)

    def try_flush(self) -> bool:
        """See Image."""
        return self._write_back is None or self._write_back.try_flush()

    async def flush(self) -> None:
        """Make every completed write durable. Raises OSError, CorruptImageError."""
        if self._write_back is not None:
            try:
                await self._write_back.flush()
            except CorruptImageError as error:
                await self.freeze(error)
                raise

    def begin_end(self) -> bool:
        """No further write; whether that was not said before."""
        was_open, self._closed, self.may_write = not self._closed, True, False
        return was_open

    async def end_writing(self) -> None:
        """Bring all that was written to disk, once. Raises OSError."""
        if self._unguarded is not None:
            await self._unguarded.aclose()
        has_begun, self._has_begun = self._has_begun, False
        write_back = self._write_back
        if write_back is None or not has_begun:
            return
        await self._flush_at_end(write_back)
        if self._space is not None:
            await self._space.end()
        if self._bitmaps is not None and self._frozen is None:
            await self._bitmaps.store(write_back, self._mapping.guest_size)
            if write_back.failure is None and write_back.is_dirty:
                await write_back.flush()
        for _ in range(2):  # the second writes what the first has unlinked, and its counts
            if write_back.failure is None and write_back.is_dirty:
                await write_back.flush()

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
