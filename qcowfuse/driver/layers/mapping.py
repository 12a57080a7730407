"""Guest range to extents: one mapping per layer, and the look-up that goes down the backing chain.

1. ``lookup`` is a plain function and answers from memory; a run of kind MISS says that a slice has to be loaded.
2. ``load`` is the only part that waits. It pins what it loads; the caller unpins after it has looked there.
3. The L1 table is in memory as long as the image is open, but for large ones of layers that are not written: see
   :mod:`~qcowfuse.tables.paged_table`. A missing L2 table is one run of unallocated clusters.
4. A layer ends where its virtual disk ends: beyond it the guest sees zeroes, not the next layer.
5. The data of an encrypted layer has a kind of its own, so that no reader takes the encrypted bytes for the data.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from ...buffer import Buffer
from ...format.entries import ClusterKind, EntryFormat, Table, parse_table
from ...format.extents import MISS, Extent, Run, lookup_run
from ...format.geometry import Geometry
from ...format.presence import presence_run
from ...format.subclusters import lookup_run_extended
from ...storage.base import Deliver, OnEnd, Storage, pread
from ...tables.paged_table import PagedTable
from .table_cache import LAYER_BITS, L2Slice, TableCache

if TYPE_CHECKING:
    from .encryption import EncryptedData

_MAX_L1_SCAN = 4096
_CONTIGUOUS = (ClusterKind.DATA, ClusterKind.ENCRYPTED)

LookupRun = Callable[["array[int]", EntryFormat, int, int, int], Run]
"""See :func:`~qcowfuse.format.extents.lookup_run`."""


def _encrypted_lookup(lookup: LookupRun) -> LookupRun:
    def lookup_encrypted(
        entries: array[int], entry_format: EntryFormat, index: int, in_cluster: int, n_bytes: int
    ) -> Run:
        run = lookup(entries, entry_format, index, in_cluster, n_bytes)
        return run._replace(kind=ClusterKind.ENCRYPTED) if run.kind == ClusterKind.DATA else run

    return lookup_encrypted


class Places(Protocol):
    """What holds guest data at host offsets, as the guest sees it; each call as Storage has it."""

    def try_pread(self, host_offset: int, n_bytes: int) -> Buffer | None:
        """See Storage."""

    async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
        """See Storage."""

    def start_delivery(self, host_offset: int, n_bytes: int, deliver: Deliver, on_end: OnEnd) -> bool:
        """See Storage."""

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """See Storage."""

    async def pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """See Storage."""


class Layer(Protocol):
    """One image of a backing chain, as far as reading is concerned."""

    @property
    def storage(self) -> Storage:
        """The image file: where its tables and compressed clusters are."""

    @property
    def data(self) -> Storage:
        """Where guest data lies, at the host offsets of DATA runs; the image file unless there is a data file."""

    @property
    def encrypted(self) -> EncryptedData | None:
        """What reads and writes runs of kind ENCRYPTED; None where there are none."""

    @property
    def size(self) -> int:
        """Virtual size in bytes."""

    def lookup(self, guest_offset: int, n_bytes: int) -> Run:
        """The run at ``guest_offset``, at most ``n_bytes``, all inside the layer. Raises CorruptImageError."""

    def lookup_in(self, slice_: L2Slice, guest_offset: int, n_bytes: int) -> Run:
        """The same with the slice that :meth:`load` has just given: that was a miss, and is no hit."""

    async def load(self, guest_offset: int) -> L2Slice:
        """Load the slice whose absence made ``lookup`` say MISS; it is pinned."""


class RawLayer:
    """A raw image at the bottom of a chain: guest offset and host offset are the same."""

    encrypted: EncryptedData | None = None

    def __init__(self, storage: Storage) -> None:
        self.storage = self.data = storage
        self.size = storage.size()

    def lookup(self, guest_offset: int, n_bytes: int) -> Run:
        """Always data."""
        return Run(ClusterKind.DATA, guest_offset, n_bytes)

    def lookup_in(self, slice_: L2Slice, guest_offset: int, n_bytes: int) -> Run:
        """Never needed."""
        raise AssertionError("a raw layer has no tables")

    async def load(self, guest_offset: int) -> L2Slice:
        """Never needed."""
        raise AssertionError("a raw layer has no tables")


class Mapping:
    """The L1 and L2 tables of one QCOW layer. ``layer`` is its index in the chain, 0 on top.

    The mapping of the top layer owns the size of the disk. ``size`` is what the tables map; ``guest_size`` is what
    the guest may ask for, which is less for as long as the disk grows (:mod:`~qcowfuse.driver.writing.growing`).
    """

    def __init__(
        self,
        *,
        layer: int,
        geometry: Geometry,
        entry_format: EntryFormat,
        l1_table: Table | PagedTable,
        storage: Storage,
        cache: TableCache,
        data: Storage | None = None,
        encrypted: EncryptedData | None = None,
    ) -> None:
        self.layer = layer
        self.geometry = geometry
        self.size = self.guest_size = geometry.size
        self.entry_format = entry_format
        self.l1_table = l1_table
        self._paged = l1_table if isinstance(l1_table, PagedTable) else None
        self.storage = storage
        self.data = storage if data is None else data
        self.cache = cache
        self.encrypted = encrypted
        self.lookup_run: LookupRun = lookup_run_extended if entry_format.is_extended else lookup_run
        if encrypted is not None:
            self.lookup_run = _encrypted_lookup(self.lookup_run)
        self._cluster_bits = geometry.cluster_bits
        self._cluster_mask = geometry.cluster_size - 1
        self.slice_bits = geometry.slice_bits
        self.slice_mask = (1 << self.slice_bits) - 1
        self.slice_shift = geometry.cluster_bits + self.slice_bits
        self.slices_per_table_bits = geometry.l2_bits - self.slice_bits

    @property
    def whole_l1_table(self) -> Table:
        """The L1 table of a layer that is written, which is in memory."""
        assert not isinstance(self.l1_table, PagedTable)
        return self.l1_table

    @property
    def places(self) -> Places | None:
        """Where guest data can be read and written by its host offset alone; None where that is not enough."""
        return self.data if self.encrypted is None else self.encrypted.places

    def resize(self, size: int) -> None:
        """Map ``size`` bytes from now on; what a longer L1 table adds is empty."""
        self.geometry = self.geometry.with_size(size)
        self.size = size
        n_missing = max(self.geometry.n_l1_entries - len(self.l1_table), 0)
        if n_missing:
            assert isinstance(self.l1_table, array), "a very large table never grows"
            self.l1_table.frombytes(bytes(n_missing * self.l1_table.itemsize))

    def key(self, guest_offset: int) -> int:
        """Cache key of the slice that maps ``guest_offset``."""
        return guest_offset >> self.slice_shift << LAYER_BITS | self.layer

    def index(self, guest_offset: int) -> int:
        """Index within its slice of the entry that maps ``guest_offset``."""
        return guest_offset >> self.geometry.cluster_bits & self.slice_mask

    def l1_index(self, guest_offset: int) -> int:
        """Index of the L1 entry that maps ``guest_offset``."""
        return guest_offset >> self.geometry.l1_shift

    def slice_end(self, guest_offset: int) -> int:
        """Where the range of the slice that maps ``guest_offset`` ends."""
        return (guest_offset >> self.slice_shift) + 1 << self.slice_shift

    def cached_slice(self, guest_offset: int) -> L2Slice | None:
        """The slice that maps ``guest_offset``, if it is in memory."""
        return self.cache.get(self.key(guest_offset))

    def locate(self, guest_offset: int, n_bytes: int) -> tuple[L2Slice, int] | None:
        """The slice that maps all of a range and the index in it of the first entry, if it is in memory. The slice
        does not count as used."""
        slice_ = self.cache.slices.get(self.key(guest_offset))
        if slice_ is None or guest_offset + n_bytes > min(self.slice_end(guest_offset), self.size):
            return None
        return slice_, self.index(guest_offset)

    def lookup(self, guest_offset: int, n_bytes: int) -> Run:
        """See Layer."""
        slice_ = self.cache.get(guest_offset >> self.slice_shift << LAYER_BITS | self.layer)
        if slice_ is not None:
            return self.lookup_in(slice_, guest_offset, n_bytes)
        empty_until = self.empty_until(guest_offset, guest_offset + n_bytes)
        if empty_until == guest_offset:
            return Run(MISS, 0, 0)
        return Run(ClusterKind.UNALLOCATED, 0, empty_until - guest_offset)

    def lookup_in(self, slice_: L2Slice, guest_offset: int, n_bytes: int) -> Run:
        """See Layer."""
        return self.lookup_run(
            slice_.entries,
            self.entry_format,
            guest_offset >> self._cluster_bits & self.slice_mask,
            guest_offset & self._cluster_mask,
            n_bytes,
        )

    def presence(self, entries: array[int], guest_offset: int, n_bytes: int) -> tuple[ClusterKind, int, bool]:
        """What the slice with these entries says of ``guest_offset``, for how many of ``n_bytes``, and whether it is
        known to be different behind: see :func:`~qcowfuse.format.presence.presence_run`. Raises CorruptImageError."""
        index = guest_offset >> self._cluster_bits & self.slice_mask
        return presence_run(entries, self.entry_format, index, guest_offset & self._cluster_mask, n_bytes)

    def empty_until(self, guest_offset: int, end: int) -> int:
        """How far from ``guest_offset`` on, at most to ``end``, there are no L2 tables; ``guest_offset`` itself
        where there is one, or where that part of the L1 table is not in memory. Looks at a bounded number of L1
        entries at a time."""
        l1_shift = self.geometry.l1_shift
        mask = self.entry_format.l1_offset_mask
        l1_table = self.l1_table
        first = guest_offset >> l1_shift
        if l1_table[first] & mask:
            return guest_offset
        if self._paged is not None:
            used = self._paged.empty_until(first + 1, (end - 1 >> l1_shift) + 1)
            return min(end, used << l1_shift)
        last = min((end - 1) >> l1_shift, first + _MAX_L1_SCAN)
        if last > first and not any(l1_table[first : last + 1]):
            return min(end, (last + 1) << l1_shift)
        for l1_index in range(first, last + 1):
            if l1_table[l1_index] & mask:
                return max(guest_offset, l1_index << l1_shift)
        return min(end, (last + 1) << l1_shift)

    async def load_l1(self, guest_offset: int) -> None:
        """Have the part of a large L1 table in memory that :meth:`empty_until` looks at first. Raises OSError."""
        if self._paged is not None:
            await self._paged.load(guest_offset >> self.geometry.l1_shift)

    async def load(self, guest_offset: int) -> L2Slice:
        """See Layer. Raises OSError, CorruptImageError."""
        slice_number = guest_offset >> self.slice_shift
        key = slice_number << LAYER_BITS | self.layer
        return await self.cache.load(key, partial(self.read_slice, slice_number))

    def slice_host_offset(self, slice_number: int) -> int:
        """Where a slice stands in the image file; 0 when its table does not exist. Its L1 entry is in memory.
        Raises CorruptImageError."""
        l1_index = slice_number >> self.slices_per_table_bits
        table = self.entry_format.l1_host_offset(self.l1_table[l1_index])
        if not table:
            return 0
        in_table = slice_number & ((1 << self.slices_per_table_bits) - 1)
        return table + in_table * self.geometry.slice_size

    async def read_slice(self, slice_number: int) -> L2Slice:
        """Read a slice from the image file, past the cache."""
        l1_index = slice_number >> self.slices_per_table_bits
        if self._paged is not None:
            await self._paged.load(l1_index)
        host_offset = self.slice_host_offset(slice_number)
        if self._paged is not None and host_offset >= max(self.storage.size(), 1) and not self._paged.has_warned:
            self._paged.has_warned = True
            from ...consistency.lost_end import warn_of_lost_table

            warn_of_lost_table(self.storage, host_offset)
        n_bytes = self.geometry.slice_size
        if not host_offset:
            entries = parse_table(bytes(n_bytes))
        else:
            entries = parse_table(await pread(self.storage, host_offset, n_bytes))
        return L2Slice(slice_number << LAYER_BITS | self.layer, slice_number, l1_index, entries)


class Missing(Exception):  # noqa: N818 - not an error: the answer "load this first"
    """``lookup_chain`` met a slice that is not in memory: await ``layer.load(guest_offset)`` and look again."""

    def __init__(self, layer: Layer, guest_offset: int) -> None:
        self.layer = layer
        self.guest_offset = guest_offset


class ChainLookup:
    """The look-up of a guest range that lies inside layer ``first_layer``, resolved down the chain.

    :meth:`proceed` goes on until a slice is missing, and later from there: no entry is looked at twice. ``extents``
    are those found so far. UNALLOCATED never appears: what no layer holds is ZERO. Adjacent extents that continue
    each other are one.
    """

    __slots__ = ("_end", "_first_layer", "_layers", "_number", "_remaining", "extents", "position")

    def __init__(self, layers: Sequence[Layer], guest_offset: int, n_bytes: int, *, first_layer: int = 0) -> None:
        self._layers = layers
        self._first_layer = self._number = first_layer
        self.position = guest_offset
        self._end = guest_offset + n_bytes
        self._remaining = n_bytes
        self.extents: list[Extent] = []

    def proceed(self, loaded: L2Slice | None = None) -> Layer | None:
        """The layer whose slice at ``position`` has to be loaded, None when all is found. ``loaded`` is that slice,
        in the call after. Raises CorruptImageError."""
        extents, layers, n_layers = self.extents, self._layers, len(self._layers)
        number, position, remaining, end = self._number, self.position, self._remaining, self._end
        # Up to where each layer above ``number`` is known to hold nothing. So a run of one layer is counted once,
        # however many pieces of it the layers below have.
        first_layer = self._first_layer
        empty_until = [position + remaining] * (number - first_layer)
        while position < end:
            while True:
                layer = layers[number]
                if position >= layer.size:
                    kind, value = int(ClusterKind.ZERO), 0
                    break
                n_here = min(remaining, layer.size - position)
                if loaded is None:
                    run = layer.lookup(position, n_here)
                else:
                    run, loaded = layer.lookup_in(loaded, position, n_here), None
                kind, value = run.kind, run.value
                if kind == MISS:
                    self._number, self.position, self._remaining = number, position, remaining
                    return layer
                remaining = run.n_bytes
                if kind != ClusterKind.UNALLOCATED:
                    break
                empty_until.append(position + remaining)
                number += 1
                if number == n_layers:
                    kind = int(ClusterKind.ZERO)
                    break
            last = extents[-1] if extents else None
            if (
                last is not None
                and last.kind == kind
                and (
                    kind == ClusterKind.ZERO
                    or (kind in _CONTIGUOUS and last.layer == number and last.value + last.n_bytes == value)
                )
            ):
                extents[-1] = last._replace(n_bytes=last.n_bytes + remaining)
            else:
                extents.append(Extent(kind, number, value, position, remaining))
            position += remaining
            while empty_until and empty_until[-1] <= position:
                empty_until.pop()
            number = first_layer + len(empty_until)
            remaining = (empty_until[-1] if empty_until else end) - position
        return None


def lookup_chain(layers: Sequence[Layer], guest_offset: int, n_bytes: int, *, first_layer: int = 0) -> list[Extent]:
    """The extents of a guest range, see :class:`ChainLookup`, where all tables are in memory.

    Raises Missing, CorruptImageError.
    """
    lookup = ChainLookup(layers, guest_offset, n_bytes, first_layer=first_layer)
    layer = lookup.proceed()
    if layer is not None:
        raise Missing(layer, lookup.position)
    return lookup.extents
