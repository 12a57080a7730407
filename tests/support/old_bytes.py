"""Storages that keep old bytes where nothing was written, and images whose free parts are full of them.

A regular file that grows, or gets a hole, reads as zeroes there. Old bytes are seen, and modelled here, where

1. the image lies on a block device: all behind its end is what others have left, the length is fixed, and a discard
   leaves what was there, zeroes or noise (``device``);
2. clusters were in use before: what was freed, by us, by QEMU or by a repair of leaks, keeps its bytes where the file
   system can't punch holes, or where that is not wanted; the file may be longer than what is in use (``used``);
3. the place in an external data file belongs to a cluster that is not linked (both);
4. the power goes while a file grows: a file system that does not order data before its own tables (ext4 with
   data=writeback) shows old blocks then (:meth:`.recording.Cut.states`).

Old bytes are noise and copies of what the image holds elsewhere: old tables look like tables. A raw data file is the
disk as it stands and has none inside of it. Version 1 takes clusters at the end of the file alone: there is no device
for it, and nothing to be used again.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache

from qcowfuse.buffer import Buffer

from .checker import free_clusters, linked_guest_clusters
from .images import DATA, TOP, BuiltImage, ImageSpec, StorageKind, build_image
from .memory_storage import MemoryStorage
from .recording import SECTOR

KINDS: tuple[StorageKind, ...] = ("file", "used", "device")
_BEHIND = 64 << 10
_MOST_WRITTEN = 3 << 20


class UsedFile(MemoryStorage):
    """A file that keeps what was in a hole, as the Storage protocol allows."""

    async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
        """Nothing changes."""
        self._must_be_writable()
        await self._checkpoint()


class Device(MemoryStorage):
    """There is nothing behind the end, and a discard leaves old bytes, zeroes or noise."""

    def __init__(self, data: Buffer, *, suspend: bool = False, name: str = "device") -> None:
        super().__init__(data, suspend=suspend, name=name)
        self.is_fixed = True
        self.n_discarded = 0

    def _must_fit(self, host_offset: int, n_bytes: int) -> None:
        if host_offset + n_bytes > len(self.data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """See Storage."""
        self._must_fit(host_offset, sum(map(len, buffers)))
        return super().try_pwritev(host_offset, buffers)

    async def pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """See Storage."""
        self._must_fit(host_offset, sum(map(len, buffers)))
        await super().pwritev(host_offset, buffers)

    async def write_zeroes(self, host_offset: int, n_bytes: int, *, unmap: bool = False) -> None:
        """See Storage."""
        self._must_fit(host_offset, 0 if unmap else n_bytes)
        await super().write_zeroes(host_offset, n_bytes, unmap=unmap)

    async def allocate(self, host_offset: int, n_bytes: int) -> bool:
        """See Storage."""
        self._must_fit(host_offset, n_bytes)
        return True

    async def truncate(self, n_bytes: int) -> None:
        """See Storage."""
        if n_bytes != len(self.data):
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), self.name)

    async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
        """See Storage: old bytes, zeroes or noise, but no noise in what is ``in_use``."""
        self._must_be_writable()
        await self._checkpoint()
        n_bytes = min(n_bytes, len(self.data) - host_offset)
        self.n_discarded += n_bytes
        left = (host_offset >> 9) % (2 if in_use else 3)
        if left:
            self.data[host_offset : host_offset + n_bytes] = bytes([0xDD * (left - 1)]) * n_bytes


def storage_of(built: BuiltImage, path: str, data: Buffer | None = None, *, suspend: bool = False) -> MemoryStorage:
    """A file of an image, or ``data`` in its place, on the kind of storage that the image was made for."""
    kinds: dict[str, type[MemoryStorage]] = {"file": MemoryStorage, "used": UsedFile, "device": Device}
    kind = kinds[built.storage] if path in (TOP, DATA) else MemoryStorage
    return kind(built.files[path] if data is None else data, suspend=suspend, name=path)


@cache
def build_over_old_bytes(spec: ImageSpec, kind: StorageKind) -> BuiltImage:
    """The image that ``spec`` describes, on a storage of a kind."""
    return over_old_bytes(build_image(spec), kind)


def build_in_turn(specs: Mapping[str, ImageSpec], name: str, kinds: Sequence[StorageKind] = KINDS) -> BuiltImage:
    """One of several images, each of which lies on another kind of storage than the one before it."""
    return build_over_old_bytes(specs[name], kinds[list(specs).index(name) % len(kinds)])


def over_old_bytes(built: BuiltImage, kind: StorageKind) -> BuiltImage:
    """The same image on a storage of a kind, with old bytes where that has them; a file for version 1."""
    spec = built.spec
    if kind == "file" or spec.version == 1:
        return built
    top = bytearray(built.top)
    old = _old_clusters(top, spec.cluster_size)
    whole = -(-len(top) // spec.cluster_size) * spec.cluster_size
    for cluster in free_clusters(top):
        start = cluster * spec.cluster_size
        top[start : start + spec.cluster_size] = next(old)[: len(top) - start]
    # What was discarded can't be taken at once, so that there has to be room for more than the disk, or for all that
    # a test writes to a large one.
    end = whole + (_BEHIND if kind == "used" else min(2 * spec.size, _MOST_WRITTEN) + 8 * _BEHIND)
    top += bytes(whole - len(top))
    while len(top) < end:
        top += next(old)
    files = {**built.files, TOP: bytes(top)}
    if spec.data_file:
        files[DATA] = _data_file_over_old_bytes(built, old)
    return replace(built, files=files, storage=kind)


def _data_file_over_old_bytes(built: BuiltImage, old: Iterator[bytes]) -> bytes:
    spec = built.spec
    data = bytearray(built.files[DATA].ljust(spec.size, b"\0"))
    linked = linked_guest_clusters(built.top)
    for cluster in range(0 if spec.data_file == "raw" else -(-len(data) // spec.cluster_size)):
        if cluster not in linked:
            start = cluster * spec.cluster_size
            data[start : start + spec.cluster_size] = next(old)[: len(data) - start]
    end = -(-len(data) // spec.cluster_size) * spec.cluster_size + _BEHIND
    return bytes(data) + random.Random(spec.seed).randbytes(end - len(data))


def _old_clusters(top: bytearray, cluster_size: int) -> Iterator[bytes]:
    """Noise, and now and then what is in a cluster of the image, with noise in its empty sectors."""
    chooser = random.Random(len(top))
    used = bytes(top)
    n_clusters = len(used) // cluster_size
    while True:
        cluster = chooser.randbytes(cluster_size)
        if chooser.random() < 0.4:
            start = chooser.randrange(n_clusters) * cluster_size
            old = used[start : start + cluster_size]
            places = [slice(place, place + SECTOR) for place in range(0, cluster_size, SECTOR)]
            cluster = b"".join(old[place] if any(old[place]) else cluster[place] for place in places)
        yield cluster
