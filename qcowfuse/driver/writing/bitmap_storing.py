"""The end of a session with dirty bitmaps: what is kept in memory is stored, so that it is valid again.

This is rule 3 of :mod:`.dirty_bitmaps`. Each bitmap is prepared: its contents are written, its table gets a place.
The directory then names all prepared ones, and clusters that nothing names any more are freed.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from ...buffer import Buffer
from ...errors import QcowFuseError
from ...format.bitmap_directory import IN_USE, TABLE_ENTRY_OFFSET_MASK, BitmapEntry, replace_entry
from ...format.bitmaps import Contents, DirtyBits, table_entries_needed
from ...format.entries import serialise_table
from ...format.geometry import WORD_SIZE, divide_up
from ...printable import printable
from ...storage.base import Storage
from ..layers.host_run import HostRun
from .guarded_clusters import MetadataClusters
from .refcount_allocation import RefcountAllocator
from .write_back import WriteBack

log = logging.getLogger(__name__)

_MAX_RUN_BYTES = 8 << 20
_MAX_RUN_CLUSTERS = 256


@dataclass(slots=True)
class KeptBitmap:
    """A bitmap in memory; ``table`` is as on disk, ``new_table`` as it is to be. ``bits`` is None for a disabled one:
    what it has stays where it is, only its table may have to grow."""

    entry: BitmapEntry
    bits: DirtyBits | None
    table: array[int]
    new_table: array[int] = field(default_factory=lambda: array("Q"))


class BitmapStorer:
    """See the module docstring."""

    def __init__(
        self,
        storage: Storage,
        *,
        cluster_size: int,
        directory_offset: int,
        allocator: RefcountAllocator,
        metadata: MetadataClusters,
    ) -> None:
        self._storage = storage
        self._cluster_size = cluster_size
        self._directory_offset = directory_offset
        self._allocator = allocator
        self._metadata = metadata

    async def store(
        self,
        bitmaps: Sequence[KeptBitmap],
        directory: bytes,
        entries: Sequence[BitmapEntry],
        write_back: WriteBack,
        size: int,
    ) -> None:
        """Store ``bitmaps`` of a disk of ``size`` bytes. ``directory`` and ``entries`` are as on disk. Failures are
        logged: what could not be stored stays in_use."""
        taken: list[HostRun] = []
        freed: list[HostRun] = []
        stored: list[KeptBitmap] = []
        try:
            for bitmap in bitmaps:
                if await self._try_prepare(bitmap, size, taken, freed):
                    stored.append(bitmap)
            if not stored:
                return
            try:
                await write_back.flush()  # counts and contents of what the tables will name
            except OSError:
                await self._give_back(taken)
                raise
            for bitmap in stored:
                data = serialise_table(bitmap.new_table, 0, len(bitmap.new_table))
                await write(self._storage, bitmap.entry.table_offset, data)
            await write_back.flush_storage()
            await self._write_entries(stored, bytearray(directory), entries, write_back)
        except (QcowFuseError, OSError) as error:
            names = ", ".join(shown_name(bitmap.entry) for bitmap in bitmaps)
            log.error("%s: persistent bitmaps (%s) could not be stored: %s", self._storage.name, names, error)
            return
        for run in freed:
            self._metadata.discard(run.host_offset, run.n_clusters * self._cluster_size)
            write_back.unlink_cluster(run)

    async def _write_entries(
        self, stored: list[KeptBitmap], directory: bytearray, entries: Sequence[BitmapEntry], write_back: WriteBack
    ) -> None:
        """Places of the tables, then their lengths, then the flags; what does not change costs nothing."""
        by_position = {entry.position: entry for entry in entries}
        for step in range(3):
            before = bytes(directory)
            for bitmap in stored:
                wanted, entry = bitmap.entry, by_position[bitmap.entry.position]
                entry = entry._replace(
                    table_offset=wanted.table_offset,
                    table_size=wanted.table_size if step >= 1 else entry.table_size,
                    flags=entry.flags & ~IN_USE if step == 2 else entry.flags,
                )
                replace_entry(directory, entry)
            if directory != before:
                await write(self._storage, self._directory_offset, directory)
                await write_back.flush_storage()

    async def _try_prepare(self, bitmap: KeptBitmap, size: int, taken: list[HostRun], freed: list[HostRun]) -> bool:
        mine: list[HostRun] = []
        unneeded: list[HostRun] = []
        try:
            await self._prepare(bitmap, size, mine, unneeded)
        except (QcowFuseError, OSError) as error:
            log.error(
                "%s: bitmap %s could not be stored and stays marked as inconsistent: %s",
                self._storage.name,
                shown_name(bitmap.entry),
                error,
            )
            await self._give_back(mine)
            return False
        taken += mine
        freed += unneeded
        return True

    async def _prepare(self, bitmap: KeptBitmap, size: int, taken: list[HostRun], freed: list[HostRun]) -> None:
        """Write the contents and find a place for the table; ``entry`` and ``new_table`` are what is to be stored."""
        cluster_size = self._cluster_size
        entry, old = bitmap.entry, bitmap.table
        needed = table_entries_needed(size=size, granularity=entry.granularity, cluster_size=cluster_size)
        table = array("Q", bytes(needed * WORD_SIZE))
        if bitmap.bits is None:
            table[: len(old)] = old
        else:
            await self._write_contents(bitmap.bits, old, table, taken, freed)
        n_old = divide_up(len(old) * WORD_SIZE, cluster_size)
        n_new = divide_up(needed * WORD_SIZE, cluster_size)
        table_offset = entry.table_offset
        if n_new > n_old:
            run = await self._allocator.allocate_exactly(n_new)
            taken.append(run)
            freed.append(HostRun(table_offset, n_old))
            table_offset = run.host_offset
        # Where clusters are taken from here on, nothing but a flush may fail until the table names them.
        await self._allocator.space.secure(table_offset, needed * WORD_SIZE)
        bitmap.entry = entry._replace(table_offset=table_offset, table_size=needed)
        bitmap.new_table = table

    async def _write_contents(
        self, bits: DirtyBits, old: array[int], table: array[int], taken: list[HostRun], freed: list[HostRun]
    ) -> None:
        """Write the clusters of a bitmap, in place where it has them already, and fill ``table``."""
        cluster_size = self._cluster_size
        homeless: list[int] = []
        for number in range(len(table)):
            contents = bits.contents(number)
            host_offset = old[number] & TABLE_ENTRY_OFFSET_MASK if number < len(old) else 0
            if contents is not Contents.MIXED:
                table[number] = contents.value
                if host_offset:
                    freed.append(HostRun(host_offset, 1))
            elif host_offset:
                table[number] = host_offset
                await write(self._storage, host_offset, bits.chunks[number])
            else:
                homeless.append(number)
        position = 0
        while position < len(homeless):
            most = max(1, min(len(homeless) - position, _MAX_RUN_BYTES // cluster_size, _MAX_RUN_CLUSTERS))
            run = await self._allocator.allocate(most)
            taken.append(run)
            numbers = homeless[position : position + run.n_clusters]
            await self._storage.pwritev(run.host_offset, [bits.chunks[number] for number in numbers])
            for index, number in enumerate(numbers):
                table[number] = run.host_offset + index * cluster_size
            position += run.n_clusters

    async def _give_back(self, runs: list[HostRun]) -> None:
        """Clusters that nothing on disk names. Should this fail they are leaked, and no more."""
        with trio.CancelScope(shield=True):
            for run in runs:
                try:
                    await self._allocator.release([run])
                except (OSError, QcowFuseError) as error:
                    log.warning("%s: %s", self._storage.name, error)


async def write(storage: Storage, host_offset: int, data: Buffer) -> None:
    """Write ``data``, at once where that is possible. Raises OSError."""
    if not storage.try_pwritev(host_offset, (data,)):
        await storage.pwritev(host_offset, (data,))


def shown_name(entry: BitmapEntry) -> str:
    """The name of a bitmap as it is fit to be shown."""
    return printable(entry.name.partition("\0")[0])
