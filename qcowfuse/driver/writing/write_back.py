"""The ordering rules R1 to R5 and flush(): the only place that writes metadata of a running image.

R1  a raised refcount is durable before any link to that cluster is
R2  the contents of a cluster (data, COW, a new table) are durable before the link to it is
R3  an unlink is durable before the refcount falls, and before the cluster is used again
R4  what is moved or added is durable before what points at it: an L2 table before its L1 entry, a refcount block
    before its table entry, a grown refcount table before the header field (one write inside one sector)
R5  header bits first: autoclear bits that we do not keep are cleared before the first write

One round of write-back is, in this order:

    1  one synchronous step takes everything dirty: refcount blocks, L2 slices, L1 entries, and the clusters
       that were unlinked so far. What changes from here on belongs to the next round.
    2  write the refcount blocks (and a grown refcount table); only where blocks were added: flush, then write
       what points at them                                                                            (R4)
    3  write the slices of L2 tables that no L1 entry on disk points at yet: nothing can see them
    4  flush: counts, data and new tables are durable                                             (R1, R2)
    5  write the other L2 slices and the L1 entries                                                   (R4)
    6  flush: the promise of fsync
    7  the unlinked clusters of step 1 lose their reference, once no operation that began before step 1 is in
       flight; the lower counts go out with the next round                                            (R3)

With nothing dirty a round is step 6 alone: one fdatasync, or none where nothing has changed.
A round for eviction stops after step 5.

With an external data file, guest data lies there and all the rest in the image file. The first flush of both files
in a round, step 4 or else step 6, begins with the data file's: what was written to it before the round is durable
before any link to it, and one flush of it a round is enough.

A round that changes the size fields of the header (:mod:`.growing`) has two steps more. A larger L1 table, at a new
place, is written whole in step 5; then comes a flush, so that all that hides what lay behind the old end is durable,
and then one write inside one sector that switches the size, the length of the L1 table and its place. Until that
write has succeeded, no L1 entry is written that the table on disk has no room for, and after it has failed none at
all but with the next try: which table counts is in doubt.

1. Rounds never overlap. A flush that is asked for while one runs shares the next one with all others.
2. A write that fails (ENOSPC, EIO) leaves what is not written dirty; the next round tries again. So does one that
   would land on other metadata: then the image is frozen by the caller that asked for the round. In step 5 each write
   stands for itself: one that finds the disk full keeps none of the others from being made.
3. A flush that fails is final: the kernel has dropped pages that we can't name. Every later flush fails with the
   same error and the image is read-only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from ...errors import QcowFuseError
from ...format.entries import EntryFormat, Table, serialise_table
from ...format.geometry import SECTOR_WORDS, WORD_SIZE, divide_up, round_up
from ...storage.base import Storage
from ...storage.held import Held
from ..layers.host_run import HostRun
from ..layers.mapping import Mapping
from ..layers.range_claims import InFlightEpochs
from ..layers.table_cache import L2Slice, TableCache
from .allocation import Allocator, DirtyRefcounts, MetadataWrite, in_parts, merged
from .guarded_clusters import MetadataClusters
from .metadata_space import LEAST_WRITE, NO_SPACE
from .round import Part, Round, SharedFlush, SizeFields

log = logging.getLogger(__name__)
RUNS_AT_ONCE = 1024
_WRITES_PER_CHECKPOINT = 32


class WriteBack:
    """Write-back and flush of one writable QCOW image."""

    def __init__(
        self,
        *,
        storage: Storage,
        mapping: Mapping,
        l1_table_offset: int,
        allocator: Allocator,
        cache: TableCache,
        metadata: MetadataClusters,
        epochs: InFlightEpochs,
        punches: bool = True,
    ) -> None:
        self._punches = punches
        self.failure: Exception | None = None
        self.epochs = epochs
        self._storage = storage
        self._data = None if mapping.data is storage else mapping.data
        self._mapping = mapping
        self._cluster_size = mapping.geometry.cluster_size
        self._entry_format: EntryFormat = mapping.entry_format
        self._l1_table: Table = mapping.whole_l1_table
        self._l1_table_offset = l1_table_offset
        self._l1_size = len(mapping.l1_table)
        self._moved_l1: tuple[int, Callable[[HostRun], None]] | None = None
        self._size_fields: SizeFields | None = None
        self._header_in_doubt = False
        self._allocator = allocator
        self._cache = cache
        self._metadata = metadata
        self._space = allocator.space
        self._space.serve(self._dirty_bytes, self.clean_tables)
        self._lock = self._space.round_lock
        self._n_writes = 0
        self._next_flush: SharedFlush | None = None
        self._dirty_l1: set[int] = set()
        self._unlinked_tables: set[int] = set()
        self._unlinked: list[HostRun] = []
        self._released: list[tuple[int, list[HostRun]]] = []

    def check_link(self, l1_index: int) -> None:
        """Raises CorruptImageError where the L1 entry can't be written, because something else lies there."""
        self._metadata.check_own(self._l1_table_offset + WORD_SIZE * l1_index, WORD_SIZE, "L1 table")

    async def secure_link(self, l1_index: int) -> None:
        """Before :meth:`link_table`: give the L1 entry its space in the file. Raises OSError."""
        if l1_index >= self._l1_size:
            return  # a table that is moving has its space
        table, table_bytes = self._l1_table_offset, WORD_SIZE * self._l1_size
        await self._space.secure_part(*self._link_part(l1_index), of=table, of_bytes=table_bytes)

    def has_link_space(self, l1_index: int) -> bool:
        """Whether :meth:`secure_link` would not wait."""
        return l1_index >= self._l1_size or self._space.has(*self._link_part(l1_index))

    def _link_part(self, l1_index: int) -> tuple[int, int]:
        """Place and length of the sector of the L1 table that holds an entry."""
        start = l1_index // SECTOR_WORDS * SECTOR_WORDS * WORD_SIZE
        return self._l1_table_offset + start, min(SECTOR_WORDS * WORD_SIZE, WORD_SIZE * self._l1_size - start)

    def link_table(self, l1_index: int, host_offset: int) -> None:
        """Point an L1 entry, in memory, at a table that is written but that the disk does not link yet."""
        self._l1_table[l1_index] = host_offset | self._entry_format.copied
        self._dirty_l1.add(l1_index)
        self._unlinked_tables.add(l1_index)

    def unlink_cluster(self, run: HostRun) -> None:
        """Clusters that nothing in memory refers to any more: to be given back when that is durable."""
        if self._unlinked:
            host_offset, n_clusters, _ = self._unlinked[-1]
            if host_offset + n_clusters * self._cluster_size == run.host_offset:
                self._unlinked[-1] = HostRun(host_offset, n_clusters + run.n_clusters)
                return
        self._unlinked.append(run)

    @property
    def n_unlinked(self) -> int:
        """How many runs of clusters wait to be given back by the next flush."""
        return len(self._unlinked)

    def move_l1(self, host_offset: int, on_moved: Callable[[HostRun], None]) -> None:
        """The L1 table has become longer than the one on disk, which it will replace, at ``host_offset``, with the
        next :meth:`change_header`. Then ``on_moved`` is told where the old one was."""
        assert self._moved_l1 is None
        self._moved_l1 = (host_offset, on_moved)

    @property
    def l1_is_moving(self) -> bool:
        """Whether there was a :meth:`move_l1` that is not on disk yet."""
        return self._moved_l1 is not None

    async def change_header(self, size_fields: SizeFields) -> None:
        """Flush, with the size fields of the header last. When it fails they are tried again by every flush, until
        one succeeds or :meth:`revise_header` has others."""
        self._size_fields = size_fields
        await self.flush()

    def revise_header(self, size_fields: SizeFields) -> None:
        """After a failure: what the next flush puts into the header, if the header, or the L1 table, is pending."""
        if self._size_fields is not None or self._moved_l1 is not None:
            self._size_fields = size_fields

    @property
    def is_dirty(self) -> bool:
        """Whether the image file lacks anything that memory has."""
        return bool(
            self._cache.dirty
            or self._dirty_l1
            or self._allocator.is_dirty
            or self._unlinked
            or self._released
            or self._size_fields is not None
        )

    def _dirty_bytes(self) -> int:
        n_slices = len(self._cache.dirty)
        n_links = len({index // SECTOR_WORDS for index in self._dirty_l1}) if self._dirty_l1 else 0
        slice_bytes = max(self._mapping.geometry.slice_size, LEAST_WRITE)
        return n_slices * slice_bytes + n_links * LEAST_WRITE + self._allocator.dirty_bytes()

    def unwritten_range(self) -> tuple[int, int] | None:
        """First byte of the disk, and end, of what may have changed without the image file knowing; None: nothing."""
        bits, mapping = self._mapping.slice_shift, self._mapping
        if not (places := [(slice_.slice_number << bits, 1 << bits) for slice_ in self._cache.dirty.values()]):
            return None
        return min(start for start, _ in places), min(max(start + size for start, size in places), mapping.size)

    def check_usable(self) -> None:
        """Raise the error that made the image unusable for writing, if there was one."""
        if self.failure is not None:
            raise self.failure

    def try_flush(self) -> bool:
        """:meth:`flush` where no round is needed or under way and no file has to wait; else False: no promise."""
        if self.failure is not None or self._next_flush is not None or self._lock.locked() or self.is_dirty:
            return False
        return (self._data is None or self._data.try_flush()) and self._storage.try_flush()

    async def flush(self) -> None:
        """Make everything written so far durable. Raises OSError; after a failed fdatasync always the same."""
        while True:
            self.check_usable()
            shared = self._next_flush
            if shared is not None:
                await shared.done.wait()
                if shared.error is not None:
                    raise shared.error
                if shared.succeeded:
                    return
                continue
            mine = self._next_flush = SharedFlush()
            try:
                async with Held(self._lock):
                    self._next_flush = None
                    self.check_usable()
                    await self._run(final=True)
                    mine.succeeded = True
            except Exception as error:
                mine.error = error
                raise
            finally:
                if self._next_flush is mine:
                    self._next_flush = None
                mine.done.set()
            return

    async def clean_tables(self) -> None:
        """Hand all dirty metadata to the kernel in the right order, without the last flush."""
        async with Held(self._lock):
            self.check_usable()
            await self._run(final=False)

    async def flush_storage(self, data: Storage | None = None) -> None:
        """Flush the image file, the data file before it where one is given; a failure is final. Raises OSError."""
        try:
            if data is not None:
                await data.flush()
            await self._storage.flush()
        except OSError as error:
            self.fail(error)
            raise

    def fail(self, error: Exception) -> None:
        """From now on the image is read-only and every flush raises ``error``."""
        if self.failure is None:
            self.failure = error
            log.error("%s: %s; the image is read-only from now on", self._storage.name, error)

    async def _run(self, *, final: bool) -> None:
        round_ = self._take(final=final)
        try:
            await self._write_round(round_, final=final)
        except BaseException:
            self._restore(round_)
            raise
        finally:
            for slice_ in round_.slices:
                self._cache.unpin(slice_)
        self._commit(round_)
        if final:
            await self._release_unlinked()

    def _take(self, *, final: bool) -> Round:
        """Step 1: no ``await`` in here, so that what is taken fits together."""
        slices = list(self._cache.dirty.values())
        self._cache.dirty.clear()
        round_ = Round(self._allocator.take_dirty(), slices, self._size_fields if final else None)
        new_tables = round_.new_tables = self._unlinked_tables
        for slice_ in slices:
            part = Part(self._serialise(slice_), slice_)
            (round_.early if slice_.l1_index in new_tables else round_.late).append(part)
            slice_.n_pins += 1
            slice_.mark_clean()
        held_back = set() if round_.size_fields else self._held_back()
        dirty_l1 = round_.dirty_l1 = self._dirty_l1 - held_back
        links = self._serialise_l1(dirty_l1)
        if round_.size_fields is not None:
            links = self._serialise_moved_l1() or links
            round_.header.append(round_.size_fields(len(self._l1_table), self._l1_place))
        round_.late += [Part([link]) for link in links]
        self._dirty_l1, self._unlinked_tables = held_back, new_tables & held_back
        self._unlinked += self._allocator.take_unlinked()
        if final and self._unlinked:
            round_.unlinked, self._unlinked = self._unlinked, []
            round_.epoch = self.epochs.advance()
        return round_

    async def _write_round(self, round_: Round, *, final: bool) -> None:
        """Steps 2 to 6."""
        await self._write_refcounts(round_.refcounts)
        for part in round_.early:
            await self._write_all(part.writes)
        data = self._data
        if round_.late or round_.header:
            await self.flush_storage(data)
            data = None
            round_.links_written = True
            await self._write_links(round_.late)
        if round_.header:
            await self.flush_storage()
            self._header_in_doubt = True
            await self._write_all(round_.header)
        self._cache.write_backs += len(round_.slices)
        if final:
            await self.flush_storage(data)

    def _restore(self, round_: Round) -> None:
        """The round has failed: what it took and did not write is dirty again."""
        self._allocator.put_back()
        for part in (*round_.early, *round_.late):
            if part.slice_ is not None and not part.is_written:
                self._cache.mark_dirty(part.slice_, part.start, part.end)
        self._dirty_l1 |= round_.dirty_l1
        if not round_.links_written:
            self._unlinked_tables |= round_.new_tables
        self._unlinked += round_.unlinked

    def _commit(self, round_: Round) -> None:
        """The round is on disk, or with the kernel where it was for eviction."""
        self._allocator.written()
        if round_.size_fields is not None:
            self._header_changed(round_.size_fields)
        if round_.unlinked:
            self._released.append((round_.epoch, round_.unlinked))

    def _serialise(self, slice_: L2Slice) -> list[MetadataWrite]:
        """The dirty part of a slice, whole sectors."""
        table = self._mapping.slice_host_offset(slice_.slice_number)
        return [
            MetadataWrite(table + start * WORD_SIZE, serialise_table(slice_.entries, start, end))
            for start, end in slice_.dirty_sectors()
        ]

    def _serialise_l1(self, indices: set[int]) -> list[MetadataWrite]:
        writes = []
        for sector in sorted({index // SECTOR_WORDS for index in indices}):
            start = sector * SECTOR_WORDS
            end = min(start + SECTOR_WORDS, self._l1_size)
            data = serialise_table(self._l1_table, start, end)
            writes.append(MetadataWrite(self._l1_table_offset + 8 * start, data))
        return writes

    def _held_back(self) -> set[int]:
        """Dirty L1 entries that can't be written before the header has changed; see the module docstring."""
        if self._moved_l1 is None:
            return set()
        if self._header_in_doubt:
            return set(self._dirty_l1)
        return {index for index in self._dirty_l1 if index >= self._l1_size}

    @property
    def _l1_place(self) -> int:
        return self._l1_table_offset if self._moved_l1 is None else self._moved_l1[0]

    def _serialise_moved_l1(self) -> list[MetadataWrite]:
        """All of the L1 table for its new place, whole clusters; nothing when it stays where it is."""
        if self._moved_l1 is None:
            return []
        data = serialise_table(self._l1_table, 0, len(self._l1_table))
        whole = round_up(len(data), self._mapping.geometry.cluster_size)
        return [MetadataWrite(self._l1_place, data.ljust(whole, b"\0"))]

    def _header_changed(self, size_fields: SizeFields) -> None:
        """The header is durable: what has moved has moved."""
        self._header_in_doubt = False
        if self._size_fields is size_fields:
            self._size_fields = None
        if self._moved_l1 is None:
            return
        cluster_size = self._cluster_size
        old = HostRun(self._l1_table_offset, divide_up(self._l1_size * WORD_SIZE, cluster_size))
        self._l1_table_offset, on_moved = self._moved_l1
        self._l1_size = len(self._l1_table)
        self._moved_l1 = None
        on_moved(old)

    async def _write_refcounts(self, refcounts: DirtyRefcounts) -> None:
        await self._write_all(refcounts.blocks)
        await self._write_all(refcounts.moved_table)
        if refcounts.table:
            await self.flush_storage()
            await self._write_all(refcounts.table)

    async def _write_links(self, parts: list[Part]) -> None:
        """Step 5. A part that is written needs no other: it links what is durable."""
        failed: OSError | None = None
        for part in parts:
            try:
                await self._write_all(part.writes)
                part.is_written = True
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                failed = failed or error
        if failed is not None:
            raise failed

    async def _write_all(self, writes: Sequence[MetadataWrite]) -> None:
        for host_offset, data in writes:
            self._n_writes += 1
            if self._n_writes % _WRITES_PER_CHECKPOINT == 0:
                await trio.lowlevel.checkpoint()
            self._metadata.check_own(host_offset, len(data), "a table")
            try:
                await self._write(host_offset, data)
            except OSError as error:
                if not await self._space.can_help(error):
                    raise
                await self._write(host_offset, data)

    async def _write(self, host_offset: int, data: bytes) -> None:
        if not self._storage.try_pwritev(host_offset, (data,)):
            await self._storage.pwritev(host_offset, (data,))

    async def _release_unlinked(self) -> None:
        """Step 7, for every round whose readers have gone."""
        waiting, self._released = self._released, []
        for epoch, runs in waiting:
            if not self.epochs.all_ended(epoch):
                self._released.append((epoch, runs))
                continue
            # Everything is durable already: a caller that gives up waiting now must not leave clusters behind.
            with trio.CancelScope(shield=True):
                for first in range(0, len(runs), RUNS_AT_ONCE):
                    for run in merged(runs[first : first + RUNS_AT_ONCE], self._cluster_size):
                        for part in in_parts(run, self._cluster_size):
                            await self._release(part)
                    await trio.lowlevel.checkpoint()

    async def _release(self, run: HostRun) -> None:
        try:
            await self._allocator.release([run], punch=self._punches)
        except (OSError, QcowFuseError) as error:
            # The reference is gone on disk already: a count that can't be lowered is a leak at worst.
            log.warning("%s: %s", self._storage.name, error)
