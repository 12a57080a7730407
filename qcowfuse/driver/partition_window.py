"""A partition of a virtual disk as a disk of its own.

1. The table is read once, when the disk is opened. A change that is made to it later changes nothing here.
2. All offsets are checked against the window before they are moved: nothing outside of the partition is ever read,
   written or discarded.
3. What needs no waiting costs one call more than without the window.
4. The window cannot grow: what follows the partition belongs to others.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Generator

from ..buffer import Buffer
from ..errors import ImageUsageError, OutOfRangeError
from ..partitions.file_systems import find_file_system
from ..partitions.table import choose_partition, find_table
from ..partitions.values import Partition, PartitionTable, T
from .image import Image, never
from .pending import PendingRead, PendingWrite

_COUNTS = 3
"""Attempts at a count during which nothing is written."""

MAX_WINDOWS = 128
"""Partitions that are served at once."""
_log = logging.getLogger(__name__)


class PartitionWindow:
    """``partition`` of ``image``; implements the Image protocol, and closes ``image`` with itself. ``is_alone``:
    nothing else changes the image."""

    def __init__(self, image: Image, partition: Partition, *, is_alone: bool = True) -> None:
        self.path = image.path
        self.format_name = f"{image.format_name}, partition {partition.number}"
        self.size = partition.n_bytes
        self.cluster_size = image.cluster_size
        self._image = image
        self._start = partition.start
        self._is_alone = is_alone
        self._allocated = 0
        self._allocated_then: int | None = None
        """Of all of the image, when ``_allocated`` was right."""
        self._start_read = image.start_read
        self._start_write = image.start_write

    @property
    def read_only(self) -> bool:
        """See Image."""
        return self._image.read_only

    def start_read(
        self, guest_offset: int, n_bytes: int, is_alone: Callable[[], bool] = never, /
    ) -> Buffer | PendingRead:
        """See Image."""
        if 0 <= guest_offset <= self.size - n_bytes:
            return self._start_read(self._start + guest_offset, n_bytes, is_alone)
        raise self._out_of_range(guest_offset, n_bytes)

    def start_write(
        self, guest_offset: int, data: Buffer, is_alone: Callable[[], bool] = never, /
    ) -> PendingWrite | None:
        """See Image."""
        if 0 <= guest_offset <= self.size - len(data):
            return self._start_write(self._start + guest_offset, data, is_alone)
        raise self._out_of_range(guest_offset, len(data))

    async def read(self, guest_offset: int, n_bytes: int) -> Buffer:
        """See Image."""
        return await self._image.read(self._moved(guest_offset, n_bytes), n_bytes)

    async def write(self, guest_offset: int, data: Buffer) -> None:
        """See Image."""
        await self._image.write(self._moved(guest_offset, len(data)), data)

    async def write_zeroes(self, guest_offset: int, n_bytes: int, *, unmap: bool) -> None:
        """See Image."""
        await self._image.write_zeroes(self._moved(guest_offset, n_bytes), n_bytes, unmap=unmap)

    async def allocate(self, guest_offset: int, n_bytes: int) -> None:
        """See Image."""
        await self._image.allocate(self._moved(guest_offset, n_bytes), n_bytes)

    async def grow(self, size: int) -> None:
        """See Image: it cannot."""
        raise OSError(errno.EOPNOTSUPP, "a partition cannot grow", self.path)

    async def find_extent(self, guest_offset: int, n_bytes: int, *, keep: bool = True) -> tuple[bool, int]:
        """See Image."""
        return await self._image.find_extent(self._moved(guest_offset, n_bytes), n_bytes, keep=keep)

    def try_find_extent(self, guest_offset: int, n_bytes: int) -> tuple[bool, int, bool] | None:
        """See Image."""
        return self._image.try_find_extent(self._moved(guest_offset, n_bytes), n_bytes)

    def try_write_zeroes(self, guest_offset: int, n_bytes: int, *, unmap: bool) -> bool:
        """See Image."""
        if not 0 <= guest_offset <= self.size - n_bytes:
            return False
        return self._image.try_write_zeroes(self._start + guest_offset, n_bytes, unmap=unmap)

    def try_flush(self) -> bool:
        """See Image."""
        return self._image.try_flush()

    async def flush(self) -> None:
        """See Image."""
        await self._image.flush()

    def allocated_bytes(self) -> int:
        """See Image. What the image has gained or lost since the count is taken for the window's. Where other windows
        change the image, too, only gains are: the answer is then rather too much than too little."""
        total = self._image.allocated_bytes()
        if self._allocated_then is not None:
            change = total - self._allocated_then
            total = max(0, self._allocated + (change if self._is_alone else max(0, change)))
        return min(total, self.size)

    async def count_allocated(self) -> None:
        """See Image. Where something is written during each attempt, the count may be too high by that: never too
        low, since programs that archive files pass over one that seems to hold nothing."""
        image = self._image
        await image.count_allocated()
        for _ in range(_COUNTS):
            before = image.allocated_bytes()
            found = 0
            position, end = self._start, self._start + self.size
            while position < end:
                is_data, n_bytes = await image.find_extent(position, end - position, keep=False)
                found += n_bytes if is_data else 0
                position += n_bytes
            after = image.allocated_bytes()
            self._allocated, self._allocated_then = found + max(0, after - before), after
            if before == after:
                return

    def free_host_bytes(self) -> int:
        """See Image."""
        return self._image.free_host_bytes()

    def statistics(self) -> dict[str, int]:
        """See Image: of all of the image."""
        return self._image.statistics()

    async def aclose(self) -> None:
        """See Image."""
        await self._image.aclose()

    def _moved(self, guest_offset: int, n_bytes: int) -> int:
        if guest_offset < 0 or n_bytes < 0 or guest_offset + n_bytes > self.size:
            raise self._out_of_range(guest_offset, n_bytes)
        return self._start + guest_offset

    def _out_of_range(self, guest_offset: int, n_bytes: int) -> OutOfRangeError:
        return OutOfRangeError(
            f"request for {n_bytes} bytes at {guest_offset:#x} of a partition of {self.size} bytes"
        )


async def read_partition_table(image: Image) -> PartitionTable:
    """The partition table of ``image``. Raises what reading it raises."""
    return await _look(find_table(image.size), image, 0)


async def read_file_system(image: Image, start: int, n_bytes: int) -> str:
    """What is in ``n_bytes`` at ``start`` of ``image``; empty where that is not recognised, or can't be read."""
    if start + n_bytes > image.size:
        return ""
    return await _look(find_file_system(n_bytes), image, start)


async def partition_windows(image: Image) -> dict[str, Image]:
    """Windows of all partitions of ``image`` that can be used, by ``p1``, ``p2`` ...: others may change the image
    beside each of them. What can't be used, and what is wrong with the table, is logged. Raises as reading does."""
    table = await read_partition_table(image)
    for problem in table.problems:
        _log.warning("%s: partition table: %s", image.path, problem)
    if not table.kind:
        _log.warning("%s: the disk has no partition table", image.path)
    found: dict[str, Image] = {}
    for partition in table.partitions:
        if partition.problem:
            _log.warning("%s: partition %d is not served: it %s", image.path, partition.number, partition.problem)
        elif len(found) == MAX_WINDOWS:
            _log.warning("%s: partition %d is not served: there are too many", image.path, partition.number)
        elif not partition.is_container:
            found[f"p{partition.number}"] = PartitionWindow(image, partition, is_alone=False)
    return found


async def open_partition(image: Image, wanted: str) -> PartitionWindow:
    """The partition of ``image`` with the number, the UUID or the label ``wanted``. Raises ImageUsageError, and what
    reading the table raises; the image is then still the caller's to close."""
    table = await read_partition_table(image)
    try:
        partition = choose_partition(table, wanted)
    except ImageUsageError as exc:
        raise ImageUsageError(f"{image.path}: {exc}") from None
    for problem in table.problems:
        _log.warning("%s: partition table: %s", image.path, problem)
    return PartitionWindow(image, partition)


async def _look(look: Generator[tuple[int, int], bytes, T], image: Image, start: int) -> T:
    """Have ``look`` answered with bytes of ``image``, offsets counted from ``start``."""
    try:
        place, n_bytes = next(look)
        while True:
            place, n_bytes = look.send(bytes(await image.read(start + place, n_bytes)))
    except StopIteration as end:
        result: T = end.value
        return result
