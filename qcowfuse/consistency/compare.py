"""Comparing what a walk has counted with the stored refcounts, and both with the COPIED flags; mending the flags.

1. A count that is too high is a leak: space is lost. One that is too low is a corruption, and where there is no block
   to correct it in, the refcount structure must be rebuilt.
2. The COPIED flag says "refcount is 1", in both directions, in the active tables. A table in which all entries have
   it, and whose refcounts were found to be as counted and not above 1, needs no second look.
3. Flags are mended after the counts; a table is written from its first wrong entry to its last.

Source: QEMU's compare_refcounts(), check_oflag_copied().
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from ..errors import FormatError
from ..format.entries import COMPRESSED, COPIED, OFFSET_MASK, parse_table, serialise_table
from ..format.header import Qcow2Header
from ..storage.base import Storage
from .counted_refcounts import DUBIOUS, is_zero_or_one
from .result import CheckResult, Progress, Report
from .snapshots import load_snapshot_table
from .walk import ITEMS_PER_CHECKPOINT, Walk

LEAK = "Leaked"
"""How the report of a leak begins."""
_ITEMS_PER_PAGE = 1 << 5
"""Comparing all counts of a page at once takes as long as looking at so many."""


async def check_storage(
    storage: Storage, header: Qcow2Header, report: Report, progress: Progress | None = None
) -> CheckResult:
    """Check an open image and change nothing. Raises FormatError for what cannot be understood at all, OSError."""
    snapshots = await load_snapshot_table(storage, header)
    walk = Walk(storage, header, snapshots, report, progress)
    for number in snapshots.incomplete(header.version):
        walk.corrupt(f"snapshot table entry {number} is incomplete")
    await walk.run()
    comparison = Comparison(walk)
    await comparison.run()
    await comparison.check_copied()
    if progress is not None:
        progress(1, 1)
    return walk.result


class Comparison:
    """``wrong_blocks``: those with at least one count that is too low or too high; ``has_zero``: a cluster in use has
    refcount 0; ``lacks_blocks``: and there is no block to correct it in."""

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._unequal: set[int] = set()
        """Pages in which a count is not 0 or 1, or not what it should be."""
        self.wrong_blocks: list[int] = []
        self.has_zero = False
        self.lacks_blocks = False

    async def run(self, *, quiet: bool = False) -> None:
        """The stored refcounts against the counted ones, block by block. ``quiet``: no report, no sums."""
        walk = self._walk
        self._unequal.clear()
        self.wrong_blocks.clear()
        highest = 0
        for number in self._block_numbers():
            last = await self._compare_block(number, quiet=quiet)
            highest = max(highest, last)
        walk.result.image_end_offset = (highest + 1) << walk.header.cluster_bits

    async def _compare_block(self, number: int, *, quiet: bool) -> int:
        """Returns the last cluster that is in use or has a refcount, 0 for none."""
        walk, counts = self._walk, self._walk.counts
        n_here = min(1 << counts.block_bits, walk.n_clusters - (number << counts.block_bits))
        if n_here <= 0:
            return 0
        try:
            stored = await walk.stored.block(number)
        except FormatError as error:
            self._unequal.update(counts.pages_of(number))
            if not quiet:
                walk.result.check_errors += n_here
                walk.report(f"ERROR {error}")
            return 0
        if stored is walk.stored.empty:
            stored = None
        highest = 0
        for page in counts.pages_of(number):
            first = page << counts.page_bits
            if first >= walk.n_clusters:
                break
            counted = counts.pages.get(page, counts.empty)
            if stored is None:
                if counted is counts.empty:
                    continue
                self.lacks_blocks |= any(counted)
                has = counts.empty
            else:
                start = first - (number << counts.block_bits)
                has = stored[start : start + len(counted)]
            if first + len(counted) > walk.n_clusters:
                counted, has = counted[: walk.n_clusters - first], has[: walk.n_clusters - first]
            last = _last_in_use(has, counted)
            highest = max(highest, first + last if last >= 0 else 0)
            if has.tobytes() != counted.tobytes():
                self._unequal.add(page)
                if number not in self.wrong_blocks[-1:]:
                    self.wrong_blocks.append(number)
                await self._judge_page(first, has, counted, quiet=quiet)
            elif not is_zero_or_one(has):
                self._unequal.add(page)
            await walk.handled(_ITEMS_PER_PAGE)
        if not quiet:
            await walk.step()
        return highest

    def _block_numbers(self) -> Iterator[int]:
        walk = self._walk
        stored = {number for number, entry in enumerate(walk.stored.table) if entry}
        return iter(sorted(stored | walk.counts.numbers_of_blocks()))

    async def _judge_page(self, first: int, stored: array[int], counted: array[int], *, quiet: bool) -> None:
        result, report = self._walk.result, self._walk.report
        for index, (has, needs) in enumerate(zip(stored, counted, strict=True)):
            if index % ITEMS_PER_CHECKPOINT == 0:
                await self._walk.handled(ITEMS_PER_CHECKPOINT)
            if has == needs:
                continue
            self.has_zero |= has == 0
            if quiet:
                continue
            where = f"cluster {first + index:#x}: refcount {has}, {needs} references"
            if has < needs:
                result.corruptions += 1
                report(f"ERROR {where}")
            else:
                result.leaks += 1
                report(f"{LEAK} {where}")

    # COPIED flags

    async def check_copied(self, *, mend: bool = False) -> None:
        """Every COPIED flag in the active tables; with ``mend`` it is set right."""
        walk, header = self._walk, self._walk.header
        if not header.l1_size:
            return
        for start in range(0, header.l1_size, ITEMS_PER_CHECKPOINT):
            await walk.handled(ITEMS_PER_CHECKPOINT)
            part = await walk.l1_part(header.l1_table_offset, header.l1_size, start)
            wrong: list[int] = []
            for index, entry in walk.used(part, start):
                l2_offset = entry & OFFSET_MASK
                if not l2_offset:
                    walk.skip_step()
                    continue
                refcount = await self._refcount(l2_offset)
                if refcount is None:
                    continue
                if (refcount == 1) != bool(entry & COPIED):
                    self._note(f"L1 entry {entry:#018x}", refcount, mended=mend)
                    part[index - start] ^= COPIED
                    wrong.append(index - start)
                if not self._is_known_good(index):
                    await self._check_copied_l2(l2_offset, mend=mend)
                await walk.step()
            if mend and wrong:
                data = serialise_table(part, wrong[0], wrong[-1] + 1)
                await walk.storage.pwritev(header.l1_table_offset + 8 * (start + wrong[0]), [data])

    def _is_known_good(self, index: int) -> bool:
        first, last = self._walk.pages_of_tables[index]
        if first == DUBIOUS:
            return False
        return not self._unequal or self._unequal.isdisjoint(range(first, last + 1))

    async def _check_copied_l2(self, l2_offset: int, *, mend: bool) -> None:
        walk = self._walk
        words = parse_table(await walk.read(l2_offset, walk.cluster_size))
        mend = mend and walk.may_write_l2(l2_offset)
        wrong: list[int] = []
        block_bits, cluster_bits = walk.stored.block_bits, walk.header.cluster_bits
        mask = (1 << block_bits) - 1
        has_data_file = walk.has_data_file
        known, block = -1, walk.stored.empty
        for index in range(0, len(words), 2 if walk.is_extended else 1):
            if index % ITEMS_PER_CHECKPOINT == 0:
                await walk.handled(min(ITEMS_PER_CHECKPOINT, len(words) - index))
            entry = words[index]
            if not entry or entry & COMPRESSED:
                continue
            cluster = (entry & OFFSET_MASK) >> cluster_bits
            if has_data_file:
                if not (entry & OFFSET_MASK or entry & COPIED):
                    continue
                refcount = 1
            else:
                if not entry & OFFSET_MASK:
                    continue
                if cluster >> block_bits != known:
                    known = cluster >> block_bits
                    try:
                        block = await walk.stored.block(known) or walk.stored.empty
                    except FormatError:
                        known = -1
                        continue
                refcount = block[cluster & mask]
            if (refcount == 1) != (entry >> 63):
                self._note(f"L2 entry {entry:#018x}", refcount, mended=mend)
                words[index] ^= COPIED
                wrong.append(index)
        if mend and wrong:
            data = serialise_table(words, wrong[0], wrong[-1] + 1)
            await walk.storage.pwritev(l2_offset + 8 * wrong[0], [data])

    def _note(self, what: str, refcount: int, *, mended: bool) -> None:
        result = self._walk.result
        if mended:
            result.corruptions_fixed += 1
        else:
            result.corruptions += 1
        done = "Repaired" if mended else "ERROR"
        self._walk.report(f"{done} COPIED flag of {what} is wrong: refcount {refcount}")

    async def _refcount(self, host_offset: int) -> int | None:
        """The stored refcount of a cluster, None where it cannot be told (reported already)."""
        stored = self._walk.stored
        cluster = host_offset >> self._walk.header.cluster_bits
        try:
            block = await stored.block(cluster >> stored.block_bits)
        except FormatError:
            return None
        return 0 if block is None else block[cluster & (stored.n_per_block - 1)]


def _last_in_use(stored: array[int], counted: array[int]) -> int:
    """The last index at which either is not 0; -1 for none."""
    n_used = max(len(part.tobytes().rstrip(b"\0")) for part in (stored, counted))
    return -(-n_used // stored.itemsize) - 1 if n_used else -1
