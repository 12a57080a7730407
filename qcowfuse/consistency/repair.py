"""Mending an image: what a check finds wrong is set right, in an order that survives a power cut at any moment.

1. In place, where every cluster in use has a refcount block to correct its count in: too low counts are raised,
   flush; too high ones lowered, flush; wrong COPIED flags set right, flush. Counts are never lower than they were as
   long as a reference to their cluster may still be on disk.
2. Rebuilt, where blocks are missing or cannot be used, or the snapshot table must be written anew: new blocks, table
   and snapshot table are written behind the end of the file (inside it, into clusters that nothing refers to, where
   it cannot grow), flush; then the header points at them, with one write inside its first sector,
   flush. A new walk finds the old structures leaked, and they are freed as in rule 1.
3. Nothing else is given up for lost: entries that QEMU leaves alone (data at an impossible place, reserved bits) are
   left alone here, and stay corruptions. The one kind that is mended is rule 4 of ``walk``.
4. The dirty and corrupt bits go when all the rest is durable and nothing is left to mend.
5. Freed space goes back to the file system only in an image that had wrong counts and flags, nothing worse: elsewhere
   what looks free may be all that is left of somebody's data.

Crash points, by these rules:

    repair-counts-partly-raised
        some counts are raised, not all of them: no worse than before
    repair-header-unwritten
        new structures are written, the header is unchanged: clusters behind the end that nothing refers to
    repair-old-structures-kept
        the header is changed: the old structures are leaks
    repair-counts-partly-lowered
        some counts are lowered: fewer leaks than before
    repair-flags-partly-set
        some flags are set: the count of each cluster is right, a wrong flag costs a copy or was wrong before
    repair-still-dirty
        all is mended, the dirty bit is still set: the next repair finds nothing to do

Source: QEMU's qcow2_check_refcounts(), rebuild_refcount_structure(), qcow2_check_fix_snapshot_table().
"""

from __future__ import annotations

import errno
import logging
import struct
import time
from array import array

from ..errors import FormatError, ImageUsageError, UnsupportedFeatureError
from ..format.entries import serialise_table
from ..format.header import Qcow2Header, unknown_incompatible
from ..format.header_fields import (
    AUTOCLEAR_FIELD,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    INCOMPATIBLE_FIELD,
    KNOWN_AUTOCLEAR,
    MAX_REFCOUNT_TABLE_SIZE,
    MAX_SNAPSHOTS,
    REFCOUNT_TABLE_FIELD,
    SNAPSHOTS_FIELD,
)
from ..format.header_parsing import parse_header
from ..format.refcounts import REFCOUNT_TABLE_OFFSET_MASK, serialise_refcounts
from ..storage.base import Storage
from ..tables.header import read_header_area
from .compare import Comparison, check_storage
from .counted_refcounts import ReferenceCounts
from .result import CheckResult, Fix, Progress, Report
from .snapshots import SnapshotTable, load_snapshot_table
from .walk import ITEMS_PER_CHECKPOINT, Walk

_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EINVAL, errno.EPERM)
_MAX_FREED_RUNS = 1 << 16
_MAX_REBUILDS = 4
_WRITE_BYTES = 1 << 20
_LOG_INTERVAL = 10.0

log = logging.getLogger(__name__)


async def repair_storage(
    storage: Storage, fix: Fix, *, report: Report, progress: Progress | None = None, verify: bool = True
) -> CheckResult:
    """Mend an open, writable image. The result is that of a second check (with ``verify``, and if anything was
    mended), and says how much was mended.

    Raises UnsupportedFeatureError for version 1 and unknown features, ImageUsageError where ``fix`` does not include
    what has to be done first, FormatError for what cannot be understood or mended, OSError.
    """
    header, n_lost = await _load_header(storage, fix)
    repair = _Repair(storage, header, fix, report, progress)
    result = await repair.run(n_lost)
    has_mended = result.leaks_fixed or result.corruptions_fixed
    if has_mended and (verify or not result.is_clean):
        again = await check_storage(storage, repair.header, report, progress)
        again.leaks_fixed, again.corruptions_fixed = result.leaks_fixed, result.corruptions_fixed
        result = again
    if result.is_clean:
        await repair.finish()
    return result


async def repair_dirty(path: str, storage: Storage) -> None:
    """Mend an image that was not closed cleanly, before it is written; the log has the progress and the outcome.

    Raises ImageUsageError where that leaves it damaged, OSError.
    """
    began = time.monotonic()
    next_word = began + _LOG_INTERVAL

    def progress(n_done: int, n_all: int) -> None:
        nonlocal next_word
        if time.monotonic() >= next_word:
            next_word = time.monotonic() + _LOG_INTERVAL
            log.warning("%s: repairing, %d %% of this pass", path, 100 * n_done // max(n_all, 1))

    log.warning("%s: was not closed cleanly: repairing it", path)
    advice = f"serve it read-only (qcowfuse -r), or see what is wrong: qcowfuse-img check {path}"
    try:
        result = await repair_storage(
            storage, Fix.ALL, report=lambda finding: log.debug("%s", finding), progress=progress, verify=False
        )
    except FormatError as error:
        raise ImageUsageError(f"{path}: was not closed cleanly and cannot be repaired ({error}); {advice}") from error
    if not result.is_clean:
        raise ImageUsageError(
            f"{path}: was not closed cleanly, and {result.corruptions + result.check_errors} errors are beyond "
            f"repair; {advice}"
        )
    log.warning(
        "%s: repaired in %.1f s: %d leaked clusters and %d errors mended",
        path,
        time.monotonic() - began,
        result.leaks_fixed,
        result.corruptions_fixed,
    )


async def _load_header(storage: Storage, fix: Fix) -> tuple[Qcow2Header, int]:
    """The header, and how many snapshots it has to lose because there is no table, or none so large: it does not
    count them."""
    data = await read_header_area(storage)
    n_lost = 0
    if fix & Fix.ERRORS and len(data) >= SNAPSHOTS_FIELD + 12 and data[4:8] != b"\0\0\0\1":
        n_snapshots, snapshots_offset = struct.unpack_from(">IQ", data, SNAPSHOTS_FIELD)
        n_kept = min(n_snapshots, MAX_SNAPSHOTS) if snapshots_offset else 0
        n_lost = n_snapshots - n_kept
        data = data[:SNAPSHOTS_FIELD] + struct.pack(">I", n_kept) + data[SNAPSHOTS_FIELD + 4 :]
    header = parse_header(data, storage.size(), for_check=True)
    if not isinstance(header, Qcow2Header):
        raise UnsupportedFeatureError(["checks of version 1 images"])
    if names := unknown_incompatible(header):
        raise UnsupportedFeatureError(names)
    return header, n_lost


class _Repair:
    def __init__(
        self, storage: Storage, header: Qcow2Header, fix: Fix, report: Report, progress: Progress | None
    ) -> None:
        self._storage = storage
        self.header = header
        self._fix = fix
        self._report = report
        self._progress = progress
        self._cluster_bits = header.cluster_bits
        self._freed: list[tuple[int, int]] = []
        self._found_impossible = False

    async def run(self, n_lost: int) -> CheckResult:
        fix_errors = bool(self._fix & Fix.ERRORS)
        await self._clear_unknown_bits()
        if n_lost:
            self._report(f"Repaired header: {n_lost} snapshots that it has no table for dropped")
            await self._write_header(SNAPSHOTS_FIELD, struct.pack(">I", self.header.n_snapshots))
        snapshots = await load_snapshot_table(self._storage, self.header, repair=fix_errors)
        walk, comparison = await self._look(snapshots, fix_entries=fix_errors)
        incomplete = snapshots.incomplete(self.header.version)
        if (walk.needs_rebuild or comparison.has_zero) and not fix_errors:
            raise ImageUsageError(
                "clusters in use have no refcount, which takes qcowfuse-img check -r all to mend; nothing was changed"
            )
        if fix_errors and (
            walk.needs_rebuild
            or walk.has_block_outside
            or comparison.lacks_blocks
            or snapshots.must_be_written(self.header.version)
        ):
            walk, comparison = await self._rebuild(walk, snapshots)
        elif comparison.wrong_blocks:
            await self._mend_counts(walk, comparison, count=True)
            await comparison.run(quiet=True)
        # With leaks alone to mend, flags are set right only where the refcounts are known to be.
        await comparison.check_copied(mend=fix_errors or walk.result.is_clean)
        n_snapshot_faults = snapshots.n_cut + snapshots.n_dropped + len(incomplete)
        if fix_errors:
            walk.result.corruptions_fixed += n_lost + n_snapshot_faults
        else:
            walk.result.corruptions += n_snapshot_faults
        result = walk.result
        await self._storage.flush()
        if self._progress is not None:
            self._progress(1, 1)
        self._found_impossible |= bool(n_lost or n_snapshot_faults)
        return result

    async def finish(self) -> None:
        """Everything is well now."""
        await self._clear_marks()
        if not self._found_impossible:
            for cluster, n_clusters in self._freed:
                await self._storage.punch_hole(cluster << self._cluster_bits, n_clusters << self._cluster_bits)

    async def _look(
        self, snapshots: SnapshotTable, *, fix_entries: bool, quiet: bool = False
    ) -> tuple[Walk, Comparison]:
        walk = Walk(
            self._storage,
            self.header,
            snapshots,
            _ignore if quiet else self._report,
            self._progress,
            fix_entries=fix_entries,
        )
        await walk.run()
        self._found_impossible |= bool(walk.result.corruptions or walk.result.corruptions_fixed)
        comparison = Comparison(walk)
        await comparison.run(quiet=quiet)
        return walk, comparison

    # Rule 1

    async def _mend_counts(self, walk: Walk, comparison: Comparison, *, count: bool) -> None:
        """Raise, then lower. ``count``: in the sums of the result as well."""
        result = walk.result
        if self._fix & Fix.ERRORS:
            for number in comparison.wrong_blocks:
                n_mended = await self._write_block(walk, number, raise_them=True)
                if count:
                    result.corruptions -= n_mended
                    result.corruptions_fixed += n_mended
        await self._storage.flush()
        if self._fix & Fix.LEAKS:
            for number in comparison.wrong_blocks:
                n_mended = await self._write_block(walk, number, raise_them=False)
                if count:
                    result.leaks -= n_mended
                    result.leaks_fixed += n_mended
            await self._storage.flush()

    async def _write_block(self, walk: Walk, number: int, *, raise_them: bool) -> int:
        """Set the counts of one block that are too low (or too high) to what they should be; how many there were."""
        stored = await walk.stored.block(number)
        host_offset = walk.stored.table[number] & REFCOUNT_TABLE_OFFSET_MASK if stored is not None else 0
        if stored is None or not host_offset:
            return 0
        counted = walk.counts.block(number)
        first = number << walk.stored.block_bits
        n_here = min(len(stored), walk.n_clusters - first)
        mended = stored[:]
        n_mended = 0
        for index in range(n_here):
            if index % ITEMS_PER_CHECKPOINT == 0:
                await walk.handled(ITEMS_PER_CHECKPOINT)
            has, needs = stored[index], counted[index]
            if has < needs if raise_them else has > needs:
                mended[index] = needs
                n_mended += 1
                if not needs:
                    self._note_freed(first + index)
        if n_mended:
            data = serialise_refcounts(mended, walk.stored.order, 0, len(mended))
            await self._storage.pwritev(host_offset, [data])
            walk.stored.forget(number)
        return n_mended

    # Rule 2

    async def _rebuild(self, walk: Walk, snapshots: SnapshotTable) -> tuple[Walk, Comparison]:
        """New refcount structure (and snapshot table, where that has to be new), and a second look."""
        before = walk.result
        for _ in range(_MAX_REBUILDS):
            self._report("Rebuilding the refcount structure")
            await self._write_new_structure(walk, snapshots)
            walk.counts.pages.clear()  # the second walk needs the memory
            walk.stored.forget_all()
            snapshots = await load_snapshot_table(self._storage, self.header)
            walk, comparison = await self._look(snapshots, fix_entries=False, quiet=True)
            # The file has grown: what pointed just past its end may now be inside, and count.
            if not (comparison.lacks_blocks or walk.needs_rebuild):
                break
        else:
            raise FormatError("image", None, "the rebuilt refcount structure is still wrong: beyond repair")
        await self._mend_counts(walk, comparison, count=False)
        await comparison.run(quiet=True)
        after = walk.result
        after.corruptions_fixed = before.corruptions_fixed + max(before.corruptions - after.corruptions, 0)
        after.leaks_fixed = before.leaks_fixed + before.leaks
        return walk, comparison

    async def _write_new_structure(self, walk: Walk, snapshots: SnapshotTable) -> None:
        table = snapshots if snapshots.must_be_written(self.header.version) else None
        n_table_bytes = 0
        if table is not None:
            async for piece in table.pieces(self.header.virtual_size):
                n_table_bytes += len(piece)
        n_more = -(-n_table_bytes >> self._cluster_bits)
        n_in_file = self._storage.size() >> self._cluster_bits
        plan = await _plan_behind(walk, max(-(-self._storage.size() >> self._cluster_bits), walk.n_clusters), n_more)
        try:
            await self._write_structure(walk.counts, plan, table)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            self._withdraw(walk.counts, plan)
            found = await _find_room(walk, n_in_file, plan.n_clusters + 2)
            if found is None:
                raise
            plan = _plan(walk.counts, found, n_more, self._cluster_bits)
            if plan.n_clusters > _room_at(walk.counts, found, n_in_file):
                raise
            await self._write_structure(walk.counts, plan, table)
        await self._storage.flush()
        fields = struct.pack(">QI", plan.table_cluster << self._cluster_bits, plan.n_table_clusters)
        header = self.header._replace(
            refcount_table_offset=plan.table_cluster << self._cluster_bits,
            refcount_table_clusters=plan.n_table_clusters,
        )
        if table is not None:
            offset = plan.table_cluster + plan.n_table_clusters << self._cluster_bits
            fields += struct.pack(">IQ", len(snapshots), offset)
            header = header._replace(n_snapshots=len(snapshots), snapshots_offset=offset)
        await self._write_header(REFCOUNT_TABLE_FIELD, fields)
        self.header = header

    async def _write_structure(self, counts: ReferenceCounts, plan: _Plan, snapshots: SnapshotTable | None) -> None:
        """The new clusters, each counted once, and everything that goes into them."""
        for cluster in range(plan.start, plan.start + plan.n_clusters):
            counts.add(cluster)
        table = array("Q", bytes(plan.n_table_clusters << self._cluster_bits))
        for place, number in enumerate(plan.blocks, plan.start):
            table[number] = place << self._cluster_bits
            block = counts.block(number)
            data = serialise_refcounts(block, self.header.refcount_order, 0, len(block))
            await self._storage.pwritev(place << self._cluster_bits, [data])
        place = plan.table_cluster << self._cluster_bits
        buffer = bytearray(serialise_table(table, 0, len(table)))
        if snapshots is not None:
            async for piece in snapshots.pieces(self.header.virtual_size):
                buffer += piece
                if len(buffer) >= _WRITE_BYTES:
                    await self._storage.pwritev(place, [buffer])
                    place += len(buffer)
                    buffer = bytearray()
            buffer += bytes(-(place + len(buffer)) % (1 << self._cluster_bits))
        if buffer:
            await self._storage.pwritev(place, [buffer])

    def _withdraw(self, counts: ReferenceCounts, plan: _Plan) -> None:
        for cluster in range(plan.start, plan.start + plan.n_clusters):
            counts.pages[cluster >> counts.page_bits][cluster & len(counts.empty) - 1] -= 1

    # The header, and freed space

    async def _write_header(self, place: int, data: bytes) -> None:
        await self._storage.pwritev(place, [data])
        await self._storage.flush()

    async def _clear_unknown_bits(self) -> None:
        autoclear = self.header.autoclear_features
        if autoclear & ~KNOWN_AUTOCLEAR:
            await self._write_header(AUTOCLEAR_FIELD, (autoclear & KNOWN_AUTOCLEAR).to_bytes(8, "big"))
            self.header = self.header._replace(autoclear_features=autoclear & KNOWN_AUTOCLEAR)

    async def _clear_marks(self) -> None:
        features = self.header.incompatible_features
        if marks := features & (INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT):
            await self._write_header(INCOMPATIBLE_FIELD, (features & ~marks).to_bytes(8, "big"))
            self.header = self.header._replace(incompatible_features=features & ~marks)

    def _note_freed(self, cluster: int) -> None:
        if self._freed and sum(self._freed[-1]) == cluster:
            self._freed[-1] = (self._freed[-1][0], self._freed[-1][1] + 1)
        elif len(self._freed) < _MAX_FREED_RUNS:
            self._freed.append((cluster, 1))


class _Plan:
    """Where a new structure goes: blocks from cluster ``start`` on, then the table, then the snapshot table."""

    def __init__(self, start: int, blocks: list[int], n_table_clusters: int, n_more: int) -> None:
        self.start = start
        self.blocks = blocks
        self.table_cluster = start + len(blocks)
        self.n_table_clusters = n_table_clusters
        self.n_clusters = len(blocks) + n_table_clusters + n_more


def _blocks_in_use(counts: ReferenceCounts) -> set[int]:
    shift = counts.pages_per_block_bits
    return {number >> shift for number, page in counts.pages.items() if page.tobytes().lstrip(b"\0")}


def _plan(
    counts: ReferenceCounts, start: int, n_more: int, cluster_bits: int, in_use: set[int] | None = None
) -> _Plan:
    """The blocks that are needed, those that describe the new clusters among them. Raises FormatError."""
    needed = _blocks_in_use(counts) if in_use is None else set(in_use)
    while True:
        n_table_clusters = -(-(max(needed) + 1) * 8 >> cluster_bits)
        if n_table_clusters << cluster_bits > MAX_REFCOUNT_TABLE_SIZE:  # before its own clusters are counted
            raise FormatError("image", None, "its refcount table would be larger than QEMU allows: cannot be rebuilt")
        plan = _Plan(start, sorted(needed), n_table_clusters, n_more)
        own = range(start >> counts.block_bits, (start + plan.n_clusters - 1 >> counts.block_bits) + 1)
        if needed.issuperset(own):
            break
        needed.update(own)
    return plan


async def _plan_behind(walk: Walk, start: int, n_more: int) -> _Plan:
    """The first place at or behind cluster ``start`` that nothing points at, not even by mistake."""
    in_use = _blocks_in_use(walk.counts)
    plan = _plan(walk.counts, start, n_more, walk.header.cluster_bits, in_use)
    for first, last in sorted(walk.beyond):
        if first >= plan.start + plan.n_clusters:
            break
        if last >= plan.start:
            plan = _plan(walk.counts, last + 1, n_more, walk.header.cluster_bits, in_use)
        await walk.handled(1 + len(in_use))
    return plan


def _room_at(counts: ReferenceCounts, cluster: int, end: int) -> int:
    """How many clusters in a row nothing refers to."""
    first = cluster
    while cluster < end and not counts.get(cluster):
        cluster += 1
    return cluster - first


async def _find_room(walk: Walk, end: int, n_clusters: int) -> int | None:
    """The first place inside the file with ``n_clusters`` in a row that nothing refers to."""
    counts = walk.counts
    cluster = 0
    while cluster + n_clusters <= end:
        n_free = _room_at(counts, cluster, min(end, cluster + n_clusters))
        if n_free == n_clusters:
            return cluster
        cluster += n_free + 1
        await walk.handled(n_free + 1)
    return None


def _ignore(_: str) -> None:
    pass
