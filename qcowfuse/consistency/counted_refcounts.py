"""The refcounts of an image twice over: as its tables have them, and as counted from the references to each cluster.

1. Both are kept in arrays of the refcounts' own width, and only where something refers to a cluster. What is counted
   is kept in pages of 8 KiB, so that memory follows what the image uses, not how large the blocks are nor how far
   apart references are; it is limited by the space that the image takes on the host.
2. Stored blocks are read when asked for, and the latest ones kept. A block that lies past the end of the file is
   empty, as QEMU reads it.
3. A count stops at the largest value that its width holds. The caller is told of each reference beyond that.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterable

from ..errors import FormatError
from ..format.header import Qcow2Header
from ..format.header_fields import OFFSET_LIMIT
from ..format.refcounts import (
    REFCOUNT_TABLE_OFFSET_MASK,
    empty_refcounts,
    entries_per_block,
    max_refcount,
    parse_refcounts,
)
from ..storage.base import Storage
from ..tables.refcount_table import read_refcount_table

MAX_COUNTS_BYTES = 1 << 30
"""Memory for counts; 32 TiB of data in clusters of 64 KiB with 16 bits each."""
FREE_COUNTS_BYTES = 24 << 20
"""Memory for counts of an image that takes no space on the host; each byte that it takes allows for one more. A
cluster in use has an entry of 8 bytes in some table, and a count of at most 8."""
_PAGE_BYTES = 8 << 10
_TABLES_PER_PART = 1 << 12
_MANY = 16
"""Counts that are raised at once, not one by one."""
DUBIOUS = 0xFFFF_FFFF
"""Of :class:`PagesOfTables`: the table needs a look at each entry."""
_BLOCK_CACHE_BYTES = 16 << 20
_LARGE_BLOCK_CACHE_BYTES = 4 << 20
"""For blocks of 1 MiB and more: two of them describe terabytes, and of what is in work there are copies, too."""


class StoredRefcounts:
    """The refcounts as the image has them."""

    def __init__(self, storage: Storage, header: Qcow2Header) -> None:
        self._storage = storage
        self._header = header
        self.order = header.refcount_order
        self.n_per_block = entries_per_block(header.cluster_bits, header.refcount_order)
        self.block_bits = self.n_per_block.bit_length() - 1
        self.table: array[int] = array("Q")
        self._blocks: OrderedDict[int, array[int]] = OrderedDict()
        self.empty = empty_refcounts(header.cluster_bits, header.refcount_order)
        block_bytes = len(self.empty) * self.empty.itemsize
        cache_bytes = _BLOCK_CACHE_BYTES if block_bytes < 1 << 20 else _LARGE_BLOCK_CACHE_BYTES
        self._max_blocks = max(cache_bytes // block_bytes, 1)

    async def load_table(self) -> None:
        """Read the refcount table. Raises OSError."""
        self.table = await read_refcount_table(self._storage, self._header)

    async def block(self, number: int) -> array[int] | None:
        """The counts of a block, None where there is none (all zero). Raises FormatError for a place that no block
        can have, OSError."""
        if number >= len(self.table):
            return None
        host_offset = self.table[number] & REFCOUNT_TABLE_OFFSET_MASK
        if not host_offset:
            return None
        block = self._blocks.get(number)
        if block is not None:
            self._blocks.move_to_end(number)
            return block
        cluster_size = 1 << self._header.cluster_bits
        if host_offset % cluster_size or host_offset >= OFFSET_LIMIT - cluster_size:
            raise FormatError("refcount table entry", None, f"block {number} at {host_offset:#x}: impossible place")
        if host_offset >= self._storage.size():
            block = self.empty
        else:
            block = parse_refcounts(await self._storage.pread(host_offset, cluster_size), self.order)
        self._blocks[number] = block
        if len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)
        return block

    def forget_all(self) -> None:
        """Keep no block in memory."""
        self._blocks.clear()

    def forget(self, number: int) -> None:
        """A block was written: read it again when it is asked for."""
        self._blocks.pop(number, None)


def counts_limit(storage: Storage) -> int:
    """Bytes of memory for the counts of an image."""
    return min(MAX_COUNTS_BYTES, FREE_COUNTS_BYTES + storage.allocated_bytes())


class ReferenceCounts:
    """The references counted so far, in ``pages`` by number: each has the counts of a refcount block, or of a part of
    one. ``limit``: bytes of memory."""

    def __init__(self, cluster_bits: int, refcount_order: int, limit: int = MAX_COUNTS_BYTES) -> None:
        self.pages: dict[int, array[int]] = {}
        block = empty_refcounts(cluster_bits, refcount_order)
        self.block_bits = len(block).bit_length() - 1
        self.empty = block[: min(len(block), _PAGE_BYTES // block.itemsize)]
        self.max_count = max_refcount(refcount_order)
        self.page_bits = len(self.empty).bit_length() - 1
        self.pages_per_block_bits = self.block_bits - self.page_bits
        self._limit = limit
        self._n_bytes = 0
        self._zero_bytes = self.empty.tobytes()
        self._ones = array(self.empty.typecode, [1]) * len(self.empty)

    def pages_of(self, block_number: int) -> range:
        """The numbers of the pages of a refcount block."""
        shift = self.pages_per_block_bits
        return range(block_number << shift, block_number + 1 << shift)

    def numbers_of_blocks(self) -> set[int]:
        """The refcount blocks that have a page here."""
        return {number >> self.pages_per_block_bits for number in self.pages}

    def block(self, block_number: int) -> array[int]:
        """The counts of a whole refcount block, a copy."""
        block = array(self.empty.typecode)
        for number in self.pages_of(block_number):
            block += self.pages.get(number, self.empty)
        return block

    def page(self, number: int) -> array[int]:
        """The counts of a page, made if need be. Raises FormatError when there are too many."""
        counts = self.pages.get(number)
        if counts is None:
            self._n_bytes += len(self._zero_bytes)
            if self._n_bytes > self._limit:
                detail = f"needs more than {self._limit >> 20} MiB of memory to be checked"
                raise FormatError("image", None, detail)
            counts = self.pages[number] = self.empty[:]
        return counts

    def get(self, cluster: int) -> int:
        """The references to a cluster."""
        counts = self.pages.get(cluster >> self.page_bits)
        return counts[cluster & len(self.empty) - 1] if counts is not None else 0

    def add(self, cluster: int) -> bool:
        """One reference more; False where the count cannot rise. Raises FormatError, as :meth:`page`."""
        counts = self.page(cluster >> self.page_bits)
        index = cluster & len(self.empty) - 1
        if counts[index] >= self.max_count:
            return False
        counts[index] += 1
        return True

    def add_run(self, cluster: int, n_clusters: int) -> list[int]:
        """One reference more to each cluster of a run; those whose count cannot rise. Raises FormatError."""
        failed: list[int] = []
        end = cluster + n_clusters
        while cluster < end:
            counts = self.page(cluster >> self.page_bits)
            index = cluster & len(self.empty) - 1
            n_here = min(len(self.empty) - index, end - cluster)
            if not (n_here > 1 and self._raise(counts, index, n_here)):
                failed += [number for number in range(cluster, cluster + n_here) if not self.add(number)]
            cluster += n_here
        return failed

    def add_runs(self, runs: Iterable[tuple[int, int]]) -> list[int]:
        """As :meth:`add_run`, for many runs (first cluster, length), most of which are short."""
        failed: list[int] = []
        page_bits, mask, max_count = self.page_bits, len(self.empty) - 1, self.max_count
        counts, known = self.empty, -1
        for cluster, length in runs:
            index = cluster & mask
            if length >= _MANY or index + length > mask + 1:
                failed += self.add_run(cluster, length)
                continue
            if cluster >> page_bits != known:
                known = cluster >> page_bits
                counts = self.page(known)
            for place in range(index, index + length):
                if counts[place] < max_count:
                    counts[place] += 1
                else:
                    failed.append((known << page_bits) + place)
        return failed

    def add_each(self, clusters: Iterable[int]) -> list[int]:
        """One reference more to each cluster; those whose count cannot rise, in their order. Raises FormatError."""
        failed: list[int] = []
        page_bits, mask, max_count = self.page_bits, len(self.empty) - 1, self.max_count
        counts, known = self.empty, -1
        for cluster in clusters:
            if cluster >> page_bits != known:
                known = cluster >> page_bits
                counts = self.page(known)
            count = counts[cluster & mask]
            if count < max_count:
                counts[cluster & mask] = count + 1
            else:
                failed.append(cluster)
        return failed

    def add_map(self, cluster: int, references: array[int]) -> bool:
        """As many references more to the clusters from ``cluster`` on, 0 or 1 for each; False, and nothing is done,
        where some count may be too high for that. Raises FormatError, as :meth:`page`."""
        parts: list[tuple[array[int], int, array[int]]] = []
        start = 0
        while start < len(references):
            counts = self.page(cluster + start >> self.page_bits)
            index = cluster + start & len(self.empty) - 1
            part = references[start : start + len(self.empty) - index]
            before = counts[index : index + len(part)]
            if before != self.empty[: len(part)]:
                if max(before) >= self.max_count:
                    return False
                part = _sum(before, part)
            parts.append((counts, index, part))
            start += len(part)
        for counts, index, after in parts:
            counts[index : index + len(after)] = after
        return True

    def _raise(self, counts: array[int], index: int, length: int) -> bool:
        """One more for each of so many counts of a page; False, and nothing is done, where any cannot rise."""
        before = counts[index : index + length]
        if before == self.empty[:length]:
            counts[index : index + length] = self._ones[:length]
            return True
        if max(before) >= self.max_count:
            return False
        counts[index : index + length] = _sum(before, self._ones[:length])
        return True


def _sum(first: array[int], second: array[int]) -> array[int]:
    """One by one; no sum is too large for its place."""
    n_bytes = len(first) * first.itemsize
    numbers = (int.from_bytes(part.tobytes(), sys.byteorder) for part in (first, second))
    return array(first.typecode, sum(numbers).to_bytes(n_bytes, sys.byteorder))


class PagesOfTables:
    """By active L1 entry, the first and last page of counts that describe the clusters of an L2 table in which all
    entries are COPIED; :data:`DUBIOUS` and 0 of any other. Memory goes with the entries that are noted."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[array[int], array[int]]] = {}

    def __getitem__(self, index: int) -> tuple[int, int]:
        part = self._parts.get(index // _TABLES_PER_PART)
        if part is None:
            return DUBIOUS, 0
        return part[0][index % _TABLES_PER_PART], part[1][index % _TABLES_PER_PART]

    def __setitem__(self, index: int, pages: tuple[int, int]) -> None:
        part = self._parts.get(index // _TABLES_PER_PART)
        if part is None:
            part = array("I", [DUBIOUS]) * _TABLES_PER_PART, array("I", [0]) * _TABLES_PER_PART
            self._parts[index // _TABLES_PER_PART] = part
        part[0][index % _TABLES_PER_PART], part[1][index % _TABLES_PER_PART] = pages


def is_zero_or_one(counts: array[int]) -> bool:
    """Whether no count is larger than 1."""
    raw, size, n_counts = counts.tobytes(), counts.itemsize, len(counts)
    if raw.translate(None, b"\0\1"):
        return False
    low = 0 if sys.byteorder == "little" else size - 1
    return all(raw[place::size].count(0) == n_counts for place in range(size) if place != low)
