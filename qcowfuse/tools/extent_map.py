"""Which extent of the virtual disk lies where in which file of the chain: what ``qemu-img map`` tells.

1. The whole chain is opened read-only, under the rules of ``chain``.
2. Where the tables only say "data", holes of the host file may tell more: always in a raw layer, and in a QCOW2 layer
   that was preallocated (has many more clusters than blocks on the host), as QEMU does it.
3. Neighbours that go on as each other are one entry.
4. Measured, of processor time: about 1.5 us an entry. Memory goes with the layers, one L2 slice of each at a time.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import NamedTuple

from ..consistency.counted_refcounts import StoredRefcounts
from ..driver.chain import open_layers
from ..driver.layers.mapping import Layer, Mapping
from ..driver.options import OpenOptions
from ..errors import QcowFuseError
from ..format.entries import COMPRESSED, READS_ZERO
from ..format.geometry import SECTOR_SIZE, round_up
from ..format.header import Qcow2Header
from ..storage.base import Storage
from ..storage.opened_file import OpenedFile
from ..system.alone import checkpoint
from ..tables.header import read_header
from .layer_runs import ENCRYPTED, HELD, PLACE, LayerRuns

_BATCH = 1 << 12
"""Entries that are given at a time, about."""
_STEPS = 1 << 14
"""Looks below a layer between two checkpoints, about."""


class Storing:
    """How bytes of the disk are stored, or not. ``depth`` counts layers from the top; ``present``: some layer says
    what is there; ``data``: bytes are stored; ``zero``: it reads as zeroes. ``path`` is the file with the data of
    that layer. Of one map, those that say the same are the same object."""

    __slots__ = ("compressed", "data", "depth", "path", "present", "zero")

    def __init__(
        self,
        depth: int,
        path: str,
        *,
        present: bool = True,
        zero: bool = False,
        data: bool = False,
        compressed: bool = False,
    ) -> None:
        self.depth = depth
        self.path = path
        self.present = present
        self.zero = zero
        self.data = data
        self.compressed = compressed


class MapEntry(NamedTuple):
    """A run of the virtual disk that is stored in one way; ``host_offset`` is None where the bytes lie in no one
    place."""

    guest_offset: int
    n_bytes: int
    host_offset: int | None
    how: Storing


_entry: Callable[[tuple[int, int, int | None, Storing]], MapEntry] = partial(tuple.__new__, MapEntry)
"""As :class:`MapEntry` makes one, in half of the time."""


@asynccontextmanager
async def map_image(path: str, options: OpenOptions | None = None) -> AsyncIterator[AsyncIterator[list[MapEntry]]]:
    """The extents of the virtual disk in order, each as long as it can be, some at a time: iterate over what the
    context gives. The chain is opened as ``options`` say, but read-only and without a key.

    Raises what :func:`~qcowfuse.driver.chain.open_layers` raises, CorruptImageError, OSError.
    """
    async with open_layers(path, options or OpenOptions()) as layers:
        walk = MapWalk(layers)
        await walk.find_holes()
        async with aclosing(walk.run()) as entries:
            yield entries


class _MapLayer:
    """A layer, with the ways in which it may store something. ``sectors_end``: where its last sector ends;
    ``looks_for_holes``: holes of the host file tell more than the tables do."""

    __slots__ = (
        "compressed",
        "data",
        "hole",
        "looks_for_holes",
        "nothing",
        "runs",
        "sectors_end",
        "size",
        "storage",
        "unallocated",
        "zero",
    )

    def __init__(self, depth: int, layer: Layer) -> None:
        path = layer.data.name
        self.storage = layer.data
        self.size = layer.size
        self.sectors_end = round_up(layer.size, SECTOR_SIZE)
        self.runs = LayerRuns(layer)
        self.looks_for_holes = not isinstance(layer, Mapping)
        self.unallocated = Storing(depth, path, present=False, zero=True)
        self.nothing = Storing(depth, path, present=False)
        self.zero = Storing(depth, path, zero=True)
        self.data = Storing(depth, path, data=True)
        self.compressed = Storing(depth, path, data=True, compressed=True)
        # In a raw file a hole is no data; in QCOW2 the tables say that it is.
        self.hole = self.zero if self.looks_for_holes else Storing(depth, path, zero=True, data=True)


class MapWalk:
    """One pass over a chain, the top layer first."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._stack = [_MapLayer(depth, layer) for depth, layer in enumerate(layers)]
        self._missing: tuple[LayerRuns, int] | None = None
        self._n_steps = 0
        self.n_loads = 0
        """How often runs of some layer were looked for."""

    async def find_holes(self) -> None:
        """Which layers' files have to be asked for holes. Raises FormatError, OSError."""
        for layer, mapped in zip(self._layers, self._stack, strict=True):
            if isinstance(layer, Mapping):
                mapped.looks_for_holes = await is_preallocated(layer.storage)

    async def run(self) -> AsyncGenerator[list[MapEntry], None]:
        """All entries, some at a time. Raises CorruptImageError, OSError, when the entries before were given."""
        found: list[MapEntry] = []
        position = 0
        size = self._stack[0].size
        while position < size:
            self._n_steps = 0
            position = self._fill(found, 0, position, size)
            if len(found) >= _BATCH:
                last = found.pop()  # it may go on
                yield found
                found = [last]
            if self._missing is not None:
                runs, place = self._missing
                self._missing = None
                self.n_loads += 1
                try:
                    await runs.load(place)
                except (QcowFuseError, OSError):
                    yield found[:-1]
                    raise
            await checkpoint()
        yield found or [MapEntry(0, 0, None, self._stack[0].nothing)]  # a disk of 0 bytes has one empty entry

    def _fill(self, found: list[MapEntry], depth: int, position: int, end: int) -> int:
        """Add what there is from ``position`` to ``end`` in a layer and below it. Returns how far it came: not to the
        end where that is enough for now, or where ``_missing`` says what has to be loaded."""
        layer = self._stack[depth]
        runs = layer.runs
        starts, words, runs_end = runs.starts, runs.words, runs.starts[-1]
        number = bisect_right(starts, position) - 1 if starts[0] <= position < runs_end else len(words)
        is_lowest, may_go_on = depth + 1 == len(self._stack), True
        while position < end:
            if number >= len(words):
                self._missing = runs, position
                return position
            word, start, stop = words[number], starts[number], starts[number + 1]
            number += 1
            if stop > end:
                stop = end
            place: int | None = (word & PLACE) + position - start
            if not word or word & HELD:
                place = place if word else None
                how = layer.unallocated
                if not is_lowest:
                    reached = self._fill_below(found, depth, position, stop, place)
                    if reached < stop:
                        return reached
                    position, may_go_on = stop, True
                    if len(found) >= _BATCH or self._n_steps >= _STEPS:
                        return position
                    continue
            elif word & READS_ZERO:
                place = place if word > READS_ZERO else None
                how = layer.zero
            elif word & (COMPRESSED | ENCRYPTED):  # data is nowhere as it is: QEMU gives no place either
                place = None
                how = layer.compressed if word & COMPRESSED else layer.data
            elif layer.looks_for_holes:
                position = _add_by_holes(found, position, stop, (word & PLACE) + position - start, layer)
                if position < stop or len(found) >= _BATCH:
                    return position
                may_go_on = True
                continue
            else:
                how = layer.data
            if may_go_on:
                _add(found, position, stop, place, how)
                may_go_on = not runs.are_longest
            else:
                found.append(_entry((position, stop - position, place, how)))
            position = stop
            if len(found) >= _BATCH or self._n_steps >= _STEPS:
                return position
        return position

    def _fill_below(self, found: list[MapEntry], depth: int, position: int, end: int, place: int | None) -> int:
        """As :meth:`_fill`, for what the layer does not have; ``place``: it has a host cluster all the same."""
        layer = self._stack[depth]
        below = self._stack[depth + 1] if depth + 1 < len(self._stack) else None
        while position < end:
            if below is None or position >= below.sectors_end:
                _add(found, position, end, place, layer.unallocated)
                return end
            if position >= below.size:
                # The rest of a raw file's last sector.
                stop = min(end, below.sectors_end)
                _add(found, position, stop, position, below.zero)
            else:
                self._n_steps += 1
                stop = min(end, below.size)
                reached = self._fill(found, depth + 1, position, stop)
                if reached < stop:
                    return reached
            if place is not None:
                place += stop - position
            position = stop
        return position


def _add(found: list[MapEntry], start: int, stop: int, place: int | None, how: Storing) -> None:
    """One entry more, or the last one is longer."""
    if found:
        guest_offset, n_bytes, host_offset, before = found[-1]
        if before is how and place == (None if host_offset is None else host_offset + n_bytes):
            found[-1] = _entry((guest_offset, stop - guest_offset, host_offset, how))
            return
    found.append(_entry((start, stop - start, place, how)))


def _add_by_holes(found: list[MapEntry], position: int, end: int, place: int, layer: _MapLayer) -> int:
    """Add data, of which holes of the host file tell more. Returns how far it came: to the end, or until there are
    enough entries."""
    while position < end and len(found) < _BATCH:
        length, is_hole = _host_extent(layer.storage, place, end - position)
        _add(found, position, position + length, place, layer.hole if is_hole else layer.data)
        position += length
        place += length
    return position


def _host_extent(storage: Storage, host_offset: int, n_bytes: int) -> tuple[int, bool]:
    """How many bytes from ``host_offset`` on are alike, at most ``n_bytes``, and whether they are a hole."""
    if host_offset >= storage.size():
        return n_bytes, True
    if not isinstance(storage, OpenedFile):
        return min(n_bytes, storage.size() - host_offset), False
    fd = storage.fileno()
    try:
        data = os.lseek(fd, host_offset, os.SEEK_DATA)
        if data > host_offset:
            return min(n_bytes, data - host_offset), True
        return min(n_bytes, os.lseek(fd, host_offset, os.SEEK_HOLE) - host_offset), False
    except OSError as error:
        # ENXIO: a hole up to the end. Anything else: the file system can't tell, so it is data.
        is_hole = error.errno == errno.ENXIO
        return (n_bytes if is_hole else min(n_bytes, storage.size() - host_offset)), is_hole


async def is_preallocated(storage: Storage) -> bool:
    """Whether a QCOW2 image has many more clusters in use than the host has blocks for, as after preallocation of
    metadata: then what its tables call data may well be holes. Raises FormatError, OSError."""
    header = await read_header(storage)
    if not isinstance(header, Qcow2Header):
        return False
    stored = StoredRefcounts(storage, header)
    await stored.load_table()
    n_on_host = storage.allocated_bytes() >> header.cluster_bits
    threshold = max(n_on_host * 10 // 9, n_on_host + 2)
    n_clusters = -(-storage.size() >> header.cluster_bits)
    if n_clusters < threshold:
        return False
    n_used = 0
    for number in range(min(len(stored.table), -(-n_clusters >> stored.block_bits))):
        block = await stored.block(number)
        if block is not None:
            left = n_clusters - (number << stored.block_bits)
            part = block[:left]
            n_used += len(part) - part.count(0)
            if n_used >= threshold:
                return True
    return False
