"""Which extent of the virtual disk lies where in which file of the chain: what ``qemu-img map`` tells.

1. The whole chain is opened read-only, under the rules of ``chain``.
2. Where the tables only say "data", holes of the host file may tell more: always in a raw layer, and in a QCOW2 layer
   that was preallocated (has many more clusters than blocks on the host), as QEMU does it.
3. Neighbours that go on as each other are one entry.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from typing import NamedTuple

from ..consistency.counted_refcounts import StoredRefcounts
from ..driver.chain import open_layers
from ..driver.layers.mapping import Layer, Mapping
from ..driver.options import OpenOptions
from ..format.entries import ClusterKind
from ..format.extents import Run
from ..format.geometry import SECTOR_SIZE, round_up
from ..format.header import Qcow2Header
from ..format.presence import n_without
from ..storage.base import Storage
from ..storage.opened_file import OpenedFile
from ..system.alone import checkpoint
from ..tables.header import read_header

_LOOKS_PER_CHECKPOINT = 32


class MapEntry(NamedTuple):
    """A run of the virtual disk that is stored in one way.

    ``depth`` counts layers from the top; ``present``: some layer says what is there; ``data``: bytes are stored;
    ``zero``: it reads as zeroes; ``host_offset`` in the file at ``path``, None where the bytes lie in no one place.
    """

    guest_offset: int
    n_bytes: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    host_offset: int | None
    path: str


@asynccontextmanager
async def map_image(path: str, options: OpenOptions | None = None) -> AsyncIterator[AsyncIterator[MapEntry]]:
    """The extents of the virtual disk in order, each as long as it can be: iterate over what the context gives.
    The chain is opened as ``options`` say, but read-only and without a key.

    Raises what :func:`~qcowfuse.driver.chain.open_image` raises, CorruptImageError, OSError.
    """
    async with open_layers(path, options or OpenOptions()) as layers:
        walk = MapWalk(layers)
        await walk.find_holes()
        async with aclosing(walk.run()) as entries:
            yield entries


def _joined(first: MapEntry, second: MapEntry) -> MapEntry | None:
    """Both as one, where the second goes on as the first."""
    if (first.depth, first.present, first.zero, first.data, first.compressed) != (
        second.depth,
        second.present,
        second.zero,
        second.data,
        second.compressed,
    ):
        return None
    expected = None if first.host_offset is None else first.host_offset + first.n_bytes
    return first._replace(n_bytes=first.n_bytes + second.n_bytes) if expected == second.host_offset else None


class MapWalk:
    """One pass over a chain, the top layer first."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.recursive: list[bool] = []
        """By layer: whether holes of the host file tell more than the tables do."""
        self._size = layers[0].size
        self.n_looks = 0

    async def find_holes(self) -> None:
        """Which layers' files have to be asked for holes."""
        for layer in self.layers:
            self.recursive.append(not isinstance(layer, Mapping) or await is_preallocated(layer.storage))

    async def run(self) -> AsyncGenerator[MapEntry, None]:
        """All entries, joined."""
        pending: MapEntry | None = None
        position = 0
        while position < self._size:
            for entry in await self.entries_at(position):
                position += entry.n_bytes
                if pending is not None and (joined := _joined(pending, entry)) is not None:
                    pending = joined
                    continue
                if pending is not None:
                    yield pending
                pending = entry
        if pending is None:
            pending = self._entry(0, 0, 0)._replace(present=False)  # a disk of 0 bytes has one empty entry
        yield pending

    async def entries_at(self, position: int) -> list[MapEntry]:
        """Some entries from ``position`` on; at least one."""
        with ExitStack() as pins:
            return await self._entries_at(position, pins)

    async def _entries_at(self, position: int, pins: ExitStack) -> list[MapEntry]:
        n_bytes = self._size - position
        depth = 0
        while True:
            layer = self.layers[depth]
            run = await _run_at(layer, position, min(n_bytes, layer.size - position), pins)
            n_bytes = run.n_bytes
            if run.kind != ClusterKind.UNALLOCATED:
                break
            if depth + 1 == len(self.layers) or position >= self._sectors_end(depth + 1):
                break
            depth += 1
            n_bytes = min(n_bytes, self._sectors_end(depth) - position)
            if position >= self.layers[depth].size:
                # The rest of a raw file's last sector.
                return [self._entry(depth, position, n_bytes, zero=True, host_offset=position)]
        self.n_looks += 1
        if self.n_looks % _LOOKS_PER_CHECKPOINT == 0:
            await checkpoint()
        if run.kind == ClusterKind.COMPRESSED:
            entry = self._entry(depth, position, n_bytes, data=True)
            return [entry._replace(compressed=True)]
        if run.kind == ClusterKind.ENCRYPTED:  # its bytes are nowhere as they are: QEMU gives no place either
            return [self._entry(depth, position, n_bytes, data=True)]
        if run.kind == ClusterKind.DATA:
            return list(self._data_entries(depth, n_bytes, guest_offset=position, host_offset=run.value))
        return list(self._empty_entries(depth, position, n_bytes, is_zero=run.kind == ClusterKind.ZERO))

    def _sectors_end(self, depth: int) -> int:
        return round_up(self.layers[depth].size, SECTOR_SIZE)

    def _entry(
        self,
        depth: int,
        position: int,
        n_bytes: int,
        *,
        data: bool = False,
        zero: bool = False,
        present: bool = True,
        host_offset: int | None = None,
    ) -> MapEntry:
        path = self.layers[depth].data.name
        return MapEntry(position, n_bytes, depth, present, zero, data, False, host_offset, path)

    def _data_entries(self, depth: int, n_bytes: int, *, guest_offset: int, host_offset: int) -> Iterator[MapEntry]:
        is_raw = not isinstance(self.layers[depth], Mapping)
        position = guest_offset
        if not self.recursive[depth]:
            yield self._entry(depth, position, n_bytes, data=True, host_offset=host_offset)
            return
        end = position + n_bytes
        while position < end:
            length, is_hole = _host_extent(self.layers[depth].data, host_offset, end - position)
            # In a raw file a hole is no data; in QCOW2 the tables say that it is.
            is_data = not (is_hole and is_raw)
            yield self._entry(depth, position, length, data=is_data, zero=is_hole, host_offset=host_offset)
            position += length
            host_offset += length

    def _empty_entries(self, depth: int, position: int, n_bytes: int, *, is_zero: bool) -> Iterator[MapEntry]:
        """Zero or unallocated clusters; some of them have a place in the host file all the same."""
        layer = self.layers[depth]
        assert isinstance(layer, Mapping)
        slice_ = layer.cache.slices.get(layer.key(position))
        entry_format = layer.entry_format
        may_have_place = layer.encrypted is None and entry_format.version >= 3
        if slice_ is None or not may_have_place or not (is_zero or entry_format.is_extended):
            yield self._entry(depth, position, n_bytes, zero=True, present=is_zero)
            return
        cluster_bits, cluster_size = layer.geometry.cluster_bits, layer.geometry.cluster_size
        end = position + n_bytes
        entries, words = slice_.entries, entry_format.words
        has_place = entry_format.cluster_mask if entry_format.is_extended else entry_format.offset_mask
        while position < end:
            index, in_cluster = layer.index(position), position % cluster_size
            n_clusters = in_cluster + end - position + cluster_size - 1 >> cluster_bits
            n_alike = n_without(entries, entry_format, has_place, index, n_clusters)
            place = None
            if not n_alike:
                first = entries[words * index] & entry_format.offset_mask
                place = first + in_cluster
                n_alike = 1
                while n_alike < n_clusters:
                    following = entries[words * (index + n_alike)]
                    if not following & has_place or following & entry_format.offset_mask != first + (
                        n_alike << cluster_bits
                    ):
                        break
                    n_alike += 1
            length = min((n_alike << cluster_bits) - in_cluster, end - position)
            yield self._entry(depth, position, length, zero=True, present=is_zero, host_offset=place)
            position += length


async def _run_at(layer: Layer, position: int, n_bytes: int, pins: ExitStack) -> Run:
    """As ``layer.lookup``, what it needs being loaded and pinned first; where the place of a run does not matter, the
    run is found at C speed."""
    if isinstance(layer, Mapping):
        slice_ = layer.cache.slices.get(layer.key(position))
        if slice_ is None:
            await layer.load_l1(position)
        if slice_ is None and layer.empty_until(position, position + n_bytes) == position:
            slice_ = await layer.load(position)
            pins.callback(layer.cache.unpin, slice_)
        if slice_ is not None and layer.presence(slice_.entries, position, 1)[0] is not ClusterKind.DATA:
            kind, n_bytes, _ = layer.presence(slice_.entries, position, n_bytes)
            return Run(kind, 0, n_bytes)
    return layer.lookup(position, n_bytes)


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
