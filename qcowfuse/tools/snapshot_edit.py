"""Creating, applying and deleting internal snapshots of an image that nobody else has open.

1. Each change takes effect with one write inside the header's first sector, and that write is between two flushes.
   Nothing that the image refers to is overwritten before it; whatever stops the program or the machine, the image is
   wholly what it was or wholly what it shall be, and consistent in both cases: no leaks, no wrong COPIED flags.
2. The header's first 96 bytes hold all that has to change together: virtual size, active L1 table, refcount table,
   snapshot table and autoclear bits. So tables that change are written anew, to clusters that are free: those L2
   tables whose COPIED flags change, the L1 table, the snapshot table, and the refcounts
   (:mod:`~qcowfuse.tools.shadow_refcounts`).
3. References are counted before tables are written. An image in which a reference has no count, or in which the disk
   would be left with one, is refused, and is what it was.
4. After a failure before that write the file gets its old length back; after a failure of the write itself, or of the
   flush behind it, either state may be found, and nothing is touched any more.
5. Clusters that become free are given back to the file system at the end; a failure in that costs space alone.
6. Data clusters are counted, never read: no key is needed for an encrypted image. Persistent bitmaps stay as they
   are, and true, when snapshots are created and deleted; to apply one would make them wrong and is refused, as in
   QEMU. Autoclear bits that are not known here are cleared.

Why not as QEMU does it, in place: raised counts have to be durable before the snapshot is, COPIED flags have to be
clear before anybody writes, and no order of the two is free of states that ``qemu-img check`` calls corrupt: flags
that say "alone" where the count says 2 (a writer would then change the snapshot too), or the reverse (harmless, but
an error all the same). The dirty bit would cover these, but version 2 has none, and the repair that it asks for may
take long. The price of new tables is their space until the end, 0.02 % of the data with clusters of 64 KiB, and the
reading and writing of as much, which the other way has to do as well.

What results is what ``qemu-img snapshot`` leaves: after creating and applying, the active L1 table and that of the
snapshot refer to the same L2 tables. Source: QEMU's block/qcow2-snapshot.c.
"""

from __future__ import annotations

import re
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import trio

from ..consistency.lost_end import refuse_lost_end
from ..driver.files import StorageOpener, open_storage
from ..driver.options import OpenOptions
from ..driver.writing.guarded_clusters import MetadataClusters, find_metadata
from ..errors import CorruptImageError, FormatError, ImageUsageError, UnsupportedFeatureError
from ..format.bitmap_directory import bitmap_directory_place
from ..format.compressed_entries import parse_compressed_entry
from ..format.entries import COMPRESSED, COPIED, OFFSET_MASK, entry_format, parse_table, serialise_table
from ..format.geometry import SECTOR_SIZE, WORD_SIZE, divide_up
from ..format.header import Qcow2Header
from ..format.header_bytes import serialise_switch
from ..format.header_fields import (
    INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_EXTENDED_L2,
    KNOWN_AUTOCLEAR,
    MAX_L1_SIZE,
    MAX_SNAPSHOTS,
    SWITCH_FIELDS,
)
from ..format.snapshots import MAX_SNAPSHOT_TABLE_SIZE, Snapshot, serialise_snapshots
from ..format.table_runs import clear_copied, n_back_to_back
from ..storage.base import Storage, pread
from ..tables.header import read_header
from ..tables.refcount_table import read_refcount_table
from ..tables.snapshot_table import (
    find_snapshot,
    load_l1_table,
    load_snapshot_l1_table,
    load_snapshots,
)
from .shadow_refcounts import ShadowRefcounts

MAX_NAME = 255
"""Bytes of a new snapshot's name; longer ones QEMU cuts."""

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all, now and then."""


async def create_snapshot(
    path: str, name: str, *, progress: Progress | None = None, opener: StorageOpener = open_storage
) -> Snapshot:
    """Make a snapshot of what the disk holds now, with a new id, and return it. Names need not be unique.

    Raises ImageUsageError (name too long, too many snapshots, refcounts too narrow, image needs repair),
    UnsupportedFeatureError (version 1, external data file), FormatError, ImageLockedError, OSError.
    """
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
        raise ImageUsageError(f"the name of a snapshot has at most {MAX_NAME} bytes")
    async with _editing(path, opener, progress) as editor:
        return await editor.create(name)


async def apply_snapshot(
    path: str, id_or_name: str, *, progress: Progress | None = None, opener: StorageOpener = open_storage
) -> None:
    """Give the disk the contents and the size that it had when the snapshot was made; an id goes before a name.

    Raises as :func:`create_snapshot`; ImageUsageError also where there is no such snapshot, where the image has
    persistent bitmaps, and in version 2 where the sizes differ.
    """
    async with _editing(path, opener, progress) as editor:
        await editor.apply(find_snapshot(path, editor.snapshots, id_or_name))


async def delete_snapshot(
    path: str, id_or_name: str, *, progress: Progress | None = None, opener: StorageOpener = open_storage
) -> None:
    """Delete a snapshot; a name goes before an id, as in ``qemu-img``, which knows only names here.

    Raises as :func:`create_snapshot`; ImageUsageError also where there is no such snapshot.
    """
    async with _editing(path, opener, progress) as editor:
        await editor.delete(find_snapshot(path, editor.snapshots, id_or_name, names_first=True))


@asynccontextmanager
async def _editing(path: str, opener: StorageOpener, progress: Progress | None) -> AsyncIterator[_Editor]:
    storage = await opener(path, True, OpenOptions())
    n_bytes = storage.size()
    editor: _Editor | None = None
    try:
        header = await read_header(storage)
        if not isinstance(header, Qcow2Header):
            raise UnsupportedFeatureError(["snapshots of version 1 images"])
        _refuse(path, header)
        snapshots, snapshots_bytes = await load_snapshots(storage, header)
        l1_table = await load_l1_table(storage, header.l1_table_offset, header.l1_size)
        refcount_table = await read_refcount_table(storage, header)
        others = [("snapshot table", header.snapshots_offset, snapshots_bytes)]
        others += [("L1 table of a snapshot", entry.l1_table_offset, entry.l1_size * 8) for entry in snapshots]
        await refuse_lost_end(path, storage, header, l1_table=l1_table, refcount_table=refcount_table, others=others)
        metadata = await find_metadata(storage, header, l1_table=l1_table, refcount_table=refcount_table)
        if metadata.shared:
            raise CorruptImageError("image", None, "two of its structures lie on the same cluster")
        if (bitmaps := bitmap_directory_place(header)) is not None:
            metadata.check(*bitmaps[:2], "the bitmap directory")
            metadata.add(*bitmaps[:2])
        shadow = ShadowRefcounts(storage, header, refcount_table, metadata)
        editor = _Editor(storage, header, l1_table, snapshots, snapshots_bytes, shadow, metadata, progress)
        yield editor
    except CorruptImageError as error:
        raise ImageUsageError(f"{path}: {error}; nothing was changed: the image needs a check first") from error
    finally:
        with trio.CancelScope(shield=True):
            if (editor is None or not editor.has_switched) and storage.size() > n_bytes:
                with suppress(OSError):
                    await storage.truncate(n_bytes)
            await storage.aclose()


def _refuse(path: str, header: Qcow2Header) -> None:
    if header.incompatible_features & INCOMPATIBLE_DATA_FILE:
        raise UnsupportedFeatureError(["snapshots of images with an external data file"])
    if header.corrupt or header.dirty:
        why = "marked as corrupt" if header.corrupt else "not closed cleanly, and its refcounts may be wrong"
        raise ImageUsageError(f"{path}: {why}; repair it first: qcowfuse-img check -r all {path}")


class _Editor:
    """One change of one image. ``has_switched``: the header may have been written."""

    def __init__(
        self,
        storage: Storage,
        header: Qcow2Header,
        l1_table: array[int],
        snapshots: tuple[Snapshot, ...],
        snapshots_bytes: int,
        shadow: ShadowRefcounts,
        metadata: MetadataClusters,
        progress: Progress | None,
    ) -> None:
        self.has_switched = False
        self.snapshots = snapshots
        self._snapshots_bytes = snapshots_bytes
        self._storage = storage
        self._header = header
        self._l1_table = l1_table
        self._shadow = shadow
        self._metadata = metadata
        self._progress = progress
        self._steps_done = self._steps = 0
        self._cluster_bits = header.cluster_bits
        self._cluster_size = 1 << header.cluster_bits
        self._is_extended = bool(header.incompatible_features & INCOMPATIBLE_EXTENDED_L2)
        self._entry_format = entry_format(header.version, header.cluster_bits, is_extended=self._is_extended)

    async def create(self, name: str) -> Snapshot:
        """See :func:`create_snapshot`."""
        if len(self.snapshots) >= MAX_SNAPSHOTS:
            raise ImageUsageError(f"the image has {len(self.snapshots)} snapshots, and there can't be more")
        self._steps = 2 * self._n_tables(self._l1_table)
        await self._count_references(self._l1_table, 1)
        l1_table = await self._with_shared_tables(self._l1_table)
        now = time.time_ns()
        snapshot = Snapshot(
            snapshot_id=str(max((_number(entry.snapshot_id) for entry in self.snapshots), default=0) + 1),
            name=name,
            l1_table_offset=await self._write_new(_serialised(l1_table), "the L1 table of a snapshot"),
            l1_size=len(l1_table),
            date_sec=now // 1_000_000_000,
            date_nsec=now % 1_000_000_000,
            vm_clock_nsec=0,
            vm_state_size=0,
            disk_size=self._header.virtual_size,
            icount=0,
        )
        await self._end(l1_table=l1_table, snapshots=(*self.snapshots, snapshot))
        return snapshot

    async def apply(self, snapshot: Snapshot) -> None:
        """See :func:`apply_snapshot`."""
        header = self._header
        if bitmap_directory_place(header) is not None:
            raise ImageUsageError(
                "the image has persistent bitmaps, which would not be true any more; remove them first: "
                "qemu-img bitmap --remove"
            )
        size = header.size
        if snapshot.disk_size is not None and snapshot.disk_size // SECTOR_SIZE != size // SECTOR_SIZE:
            if header.version < 3:
                raise ImageUsageError(
                    f"the disk had {snapshot.disk_size} bytes when the snapshot was made and has {size} now; "
                    "an image of version 2 with snapshots can't be resized"
                )
            size = snapshot.disk_size
        l1_table = await load_snapshot_l1_table(self._storage, header, snapshot)
        n_needed = divide_up(size, 1 << (header.cluster_bits + header.l2_bits))
        if n_needed * WORD_SIZE > MAX_L1_SIZE:
            raise FormatError("snapshot table entry", None, f"disk of {size} bytes, more than any L1 table can map")
        self._steps = self._n_tables(self._l1_table) + 2 * self._n_tables(l1_table)
        await self._count_references(self._l1_table, -1)
        await self._count_references(l1_table, 1)
        l1_table.extend([0] * (n_needed - len(l1_table)))
        await self._end(l1_table=await self._with_true_flags(l1_table), size=size)

    async def delete(self, snapshot: Snapshot) -> None:
        """See :func:`delete_snapshot`."""
        l1_table = await load_snapshot_l1_table(self._storage, self._header, snapshot)
        self._steps = self._n_tables(l1_table) + 2 * self._n_tables(self._l1_table)
        await self._count_references(l1_table, -1)
        await self._count_references(self._l1_table, 0)
        await self._shadow.add(snapshot.l1_table_offset, snapshot.l1_size * WORD_SIZE, -1)
        remaining = tuple(entry for entry in self.snapshots if entry is not snapshot)
        await self._end(l1_table=await self._with_true_flags(self._l1_table), snapshots=remaining)

    # Counting

    def _n_tables(self, l1_table: array[int]) -> int:
        return len(l1_table) - l1_table.count(0)

    async def _step(self) -> None:
        self._steps_done += 1
        if self._progress is not None:
            self._progress(min(self._steps_done, self._steps), self._steps)
        await trio.lowlevel.checkpoint()

    async def _read_table(self, host_offset: int) -> array[int]:
        if host_offset >= self._storage.size():
            raise CorruptImageError("L2 table", host_offset, "lies past the end of the image file")
        return parse_table(await pread(self._storage, host_offset, self._cluster_size))

    async def _count_references(self, l1_table: array[int], delta: int) -> None:
        """``delta`` references to each L2 table of ``l1_table``, and for each of them to what it refers to. With 0:
        see that all of it has a count."""
        for entry in l1_table:
            table_offset = self._entry_format.l1_host_offset(entry)
            if not table_offset:
                continue
            await self._shadow.add(table_offset, self._cluster_size, delta)
            await self._count_data(await self._read_table(table_offset), delta)
            await self._step()

    async def _count_data(self, words: array[int], delta: int) -> None:
        shadow, cluster_bits = self._shadow, self._cluster_bits
        in_cluster = self._cluster_size - 1
        block_bits, block_mask = shadow.block_bits, shadow.block_mask
        known, counts = -1, array("Q")
        clusters: list[int] = []
        entries = words[::2] if self._is_extended else words
        index, n_alike = 0, 0
        while (index := index + n_alike) < len(entries):
            entry, n_alike = entries[index], 1
            if entry & COMPRESSED:
                place = parse_compressed_entry(entry, cluster_bits)
                clusters.append(place.host_offset >> cluster_bits)
                await shadow.add(place.host_offset, place.n_bytes, delta)
                known = -1
                continue
            host_offset = entry & OFFSET_MASK
            if not host_offset:
                continue
            if host_offset & in_cluster:
                raise CorruptImageError("L2 entry", None, f"{entry:#018x}: host offset is not cluster aligned")
            n_alike = n_back_to_back(entries, index, self._cluster_size)
            if n_alike > 1:
                await shadow.add(host_offset, n_alike << cluster_bits, delta)
                self._metadata.check(host_offset, n_alike << cluster_bits, "data")
                known = -1
                continue
            cluster = host_offset >> cluster_bits
            if cluster >> block_bits != known:
                known = cluster >> block_bits
                counts = await (shadow.block(known) if delta else shadow.peek(known))
            in_block = cluster & block_mask
            counts[in_block] = shadow.changed(counts[in_block], delta, cluster)
            clusters.append(cluster)
        self._metadata.check_each(clusters, "data")

    # Tables

    async def _with_shared_tables(self, l1_table: array[int]) -> array[int]:
        """The L1 table for the disk and its newest snapshot, both counted already: nothing in it is COPIED."""
        result = l1_table[:]
        for number, entry in enumerate(l1_table):
            table_offset = self._entry_format.l1_host_offset(entry)
            if not table_offset:
                continue
            words = await self._read_table(table_offset)
            if clear_copied(words, 2 if self._is_extended else 1):
                result[number] = await self._write_new(_serialised(words), "an L2 table")
                await self._shadow.add(result[number], self._cluster_size, 1, is_new=True)
                await self._shadow.add(table_offset, self._cluster_size, -2)
            else:
                result[number] = entry & ~COPIED
            await self._step()
        return result

    async def _with_true_flags(self, l1_table: array[int]) -> array[int]:
        """The L1 table for the disk, COPIED where a count is 1 and nowhere else; L2 tables that need it are new."""
        result = l1_table[:]
        for number, entry in enumerate(l1_table):
            table_offset = self._entry_format.l1_host_offset(entry)
            if not table_offset:
                continue
            words = await self._read_table(table_offset)
            if await self._set_copied(words):
                result[number] = await self._write_new(_serialised(words), "an L2 table") | COPIED
                await self._shadow.add(table_offset, self._cluster_size, -1)
            elif await self._shadow.count(table_offset >> self._cluster_bits) == 1:
                result[number] = entry | COPIED
            else:
                result[number] = entry & ~COPIED
            await self._step()
        return result

    async def _set_copied(self, words: array[int]) -> bool:
        """Whether there was anything to change."""
        shadow, cluster_bits = self._shadow, self._cluster_bits
        block_bits, block_mask = shadow.block_bits, shadow.block_mask
        known, counts = -1, array("Q")
        changed = False
        for index in range(0, len(words), 2 if self._is_extended else 1):
            entry = words[index]
            flagged = entry & ~COPIED
            cluster = (entry & OFFSET_MASK) >> cluster_bits
            if cluster and not entry & COMPRESSED:
                if cluster >> block_bits != known:
                    known = cluster >> block_bits
                    counts = await shadow.peek(known)
                if counts[cluster & block_mask] == 1:
                    flagged |= COPIED
            if flagged != entry:
                words[index] = flagged
                changed = True
        return changed

    async def _write_new(self, data: bytes, purpose: str) -> int:
        """Write a structure to clusters of its own, with one reference; returns where. 0 for no bytes."""
        if not data:
            return 0
        run = await self._shadow.take(divide_up(len(data), self._cluster_size), purpose)
        await self._storage.pwritev(run.host_offset, (data, bytes(-len(data) % self._cluster_size)))
        return run.host_offset

    # The end

    async def _end(
        self, *, l1_table: array[int], snapshots: tuple[Snapshot, ...] | None = None, size: int | None = None
    ) -> None:
        """Write what is new, and point the header at it."""
        header = self._header
        if l1_table != self._l1_table:
            l1_table_offset = await self._write_new(_serialised(l1_table), "the L1 table")
            await self._shadow.add(header.l1_table_offset, header.l1_size * WORD_SIZE, -1)
            header = header._replace(l1_table_offset=l1_table_offset, l1_size=len(l1_table))
        if snapshots is not None:
            header = await self._write_snapshots(header, snapshots)
        table = await self._shadow.write()
        header = header._replace(
            refcount_table_offset=table.host_offset,
            refcount_table_clusters=table.n_clusters,
            size=header.size if size is None else size,
            autoclear_features=header.autoclear_features & KNOWN_AUTOCLEAR,
        )
        await self._storage.flush()
        self.has_switched = True
        await self._storage.pwritev(SWITCH_FIELDS, (serialise_switch(header),))
        await self._storage.flush()
        with suppress(OSError):
            async for run in self._shadow.freed():
                await self._storage.punch_hole(run.host_offset, run.n_clusters << self._cluster_bits)

    async def _write_snapshots(self, header: Qcow2Header, snapshots: Sequence[Snapshot]) -> Qcow2Header:
        data = serialise_snapshots(snapshots)
        if len(data) > MAX_SNAPSHOT_TABLE_SIZE:
            raise ImageUsageError(f"the snapshot table would have more than {MAX_SNAPSHOT_TABLE_SIZE} bytes")
        place = await self._write_new(data, "the snapshot table")
        await self._shadow.add(header.snapshots_offset, self._snapshots_bytes, -1)
        return header._replace(n_snapshots=len(snapshots), snapshots_offset=place)


def _serialised(table: array[int]) -> bytes:
    return serialise_table(table, 0, len(table))


def _number(snapshot_id: str) -> int:
    """The number that an id begins with, as C's strtoul has it; 0 for none."""
    match = re.match(r"[ \t\n\v\f\r]*\+?([0-9]{1,18})", snapshot_id)
    return int(match[1]) if match else 0
