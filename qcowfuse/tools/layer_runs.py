"""The runs of one layer, found for a whole L2 slice at a time where that can be: what the map of a chain is made of.

1. A run is a word. 0: not allocated; a host offset, with or without :data:`DATA`: data; ``READS_ZERO``, and a host
   offset where there is one (:data:`PLACED`, too, where that may be 0); ``COMPRESSED`` and :data:`ENCRYPTED`, of
   which no place is told; :data:`HELD` with a host offset.
2. One slice of a layer is in work at a time: a walk goes through a disk from its start to its end.
3. What is wrong with an entry is told when the walk comes to it: the runs that lie before it are found first.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from ..driver.layers.mapping import Layer, Mapping
from ..errors import CorruptImageError
from ..format.all_runs import all_runs
from ..format.entries import COMPRESSED, READS_ZERO, ClusterKind
from ..format.presence import n_without

DATA = 1 << 1
ENCRYPTED = 1 << 2
HELD = 1 << 3
"""Not allocated, but with a host cluster: subclusters of extended entries."""
PLACED = 1 << 4
PLACE = ~((1 << 9) - 1)
"""What of a word is a host offset; there is none inside a sector."""
_MOST_RUNS = 1 << 12
"""That are found before the walk comes to them, where each takes a look."""


class LayerRuns:
    """The runs of some range of the layer: number n begins at guest offset ``starts[n]`` and is ``words[n]``.
    ``starts`` has the end of the range as well. ``are_longest``: none goes on as the one before."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self.starts = array("Q", [0])
        self.words = array("Q")
        self.are_longest = False

    async def load(self, position: int) -> None:
        """Have the runs around ``position``, which lies inside the layer. Raises CorruptImageError, OSError."""
        layer = self._layer
        self.are_longest = False
        if not isinstance(layer, Mapping):
            self.starts, self.words = array("Q", [0, layer.size]), array("Q", [DATA])
            return
        slice_ = layer.cache.slices.get(layer.key(position))
        if slice_ is None:
            await layer.load_l1(position)
            empty_until = layer.empty_until(position, layer.size)
            if empty_until > position:
                self.starts, self.words = array("Q", [position, empty_until]), array("Q", [0])
                return
            slice_ = await layer.load(position)
        else:
            slice_.n_pins += 1
        try:
            self._find(layer, slice_.entries, position)
        finally:
            layer.cache.unpin(slice_)

    def _find(self, layer: Mapping, entries: array[int], position: int) -> None:
        cluster_bits = layer.geometry.cluster_bits
        end = min(layer.slice_end(position), layer.size)
        first = position >> layer.slice_shift << layer.slice_shift
        n_entries = (end - first - 1 >> cluster_bits) + 1
        if n_entries * layer.entry_format.words < len(entries):
            entries = entries[: n_entries * layer.entry_format.words]
        found = all_runs(entries, layer.entry_format)
        if found is None:
            self._find_one_by_one(layer, entries, position >> cluster_bits << cluster_bits, end)
            return
        self.starts = array("Q", [first + (index << cluster_bits) for index in found.firsts])
        self.starts.append(end)
        self.words = found.words
        self.are_longest = layer.encrypted is None
        if layer.encrypted is not None:
            self.words = array("Q", map(_without_place, found.words))

    def _find_one_by_one(self, layer: Mapping, entries: array[int], position: int, end: int) -> None:
        """Rule 3."""
        starts, words = array("Q"), array("Q")
        try:
            while position < end and len(words) < _MOST_RUNS:
                kind, n_bytes, _ = layer.presence(entries, position, end - position)
                if kind is ClusterKind.DATA:
                    run = layer.lookup(position, end - position)
                    n_bytes = run.n_bytes
                    place = run.value | DATA if run.kind == ClusterKind.DATA else ENCRYPTED
                    starts.append(position)
                    words.append(COMPRESSED if run.kind == ClusterKind.COMPRESSED else place)
                else:
                    for start, word in _empty_runs(layer, entries, position, n_bytes, is_zero=bool(kind)):
                        starts.append(start)
                        words.append(word)
                position += n_bytes
        except CorruptImageError:
            if not words:
                raise
        starts.append(position)
        self.starts, self.words = starts, words


def _without_place(word: int) -> int:
    if not word or word & COMPRESSED:
        return word
    return READS_ZERO if word & READS_ZERO else ENCRYPTED


def _empty_runs(
    layer: Mapping, entries: array[int], position: int, n_bytes: int, *, is_zero: bool
) -> Iterator[tuple[int, int]]:
    """Start and word of runs of zero or unallocated clusters; some of them have a place in the host file all the
    same."""
    entry_format = layer.entry_format
    may_have_place = layer.encrypted is None and entry_format.version >= 3
    if not may_have_place or not (is_zero or entry_format.is_extended):
        yield position, READS_ZERO if is_zero else 0
        return
    cluster_bits, cluster_size = layer.geometry.cluster_bits, layer.geometry.cluster_size
    end = position + n_bytes
    words = entry_format.words
    has_place = entry_format.cluster_mask if entry_format.is_extended else entry_format.offset_mask
    while position < end:
        index, in_cluster = layer.index(position), position % cluster_size
        n_clusters = in_cluster + end - position + cluster_size - 1 >> cluster_bits
        n_alike = n_without(entries, entry_format, has_place, index, n_clusters)
        word = READS_ZERO if is_zero else 0
        if not n_alike:
            first = entries[words * index] & entry_format.offset_mask
            word = first + in_cluster | (READS_ZERO | PLACED if is_zero else HELD)
            n_alike = 1
            while n_alike < n_clusters:
                following = entries[words * (index + n_alike)]
                if not following & has_place or following & entry_format.offset_mask != first + (
                    n_alike << cluster_bits
                ):
                    break
                n_alike += 1
        yield position, word
        position += min((n_alike << cluster_bits) - in_cluster, end - position)
