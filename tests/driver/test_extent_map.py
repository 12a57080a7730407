"""The map of an image: entries as long as they can be, with few looks. (That it is QEMU's is seen in interop.)"""

from __future__ import annotations

import random
import struct
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfuse.format.entries import COPIED, READS_ZERO, entry_format
from qcowfuse.format.presence import n_without
from qcowfuse.tools.extent_map import MapEntry, MapWalk
from tests.driver.test_holes import one_table, with_one_table
from tests.support.images import TOP, open_memory_image

N_TABLES = 300
SPEC = one_table(N_TABLES)


async def mapped(data: bytes) -> tuple[list[MapEntry], int]:
    """All entries, and how many looks at a layer they took."""
    image = await open_memory_image({TOP: data}, read_only=True)
    walk = MapWalk(image.layers)
    entries = [entry async for batch in walk.run() for entry in batch]
    await image.aclose()
    return entries, walk.n_loads


@pytest.mark.parametrize(("entry", "present"), [(READS_ZERO, True), (0, False)])
async def test_one_entry_and_one_look_a_table_where_all_is_alike(entry: int, present: bool) -> None:
    """Not one a cluster, of which a table has 64 here and 8192 in most images."""
    entries, n_looks = await mapped(with_one_table(SPEC, entry))
    assert [(one.guest_offset, one.n_bytes, one.how.present, one.how.zero) for one in entries] == [
        (0, SPEC.size, present, True)
    ]
    assert n_looks == N_TABLES


async def test_zero_clusters_with_a_place_are_joined_where_their_places_are() -> None:
    """One look a table, one entry for each run of places."""
    data = bytearray(with_one_table(SPEC, 0))
    places = [5 << 20 | number << 9 for number in range(64)]
    places[10], places[20] = 1 << 20, 0
    struct.pack_into(">64Q", data, len(data) - 512, *[READS_ZERO | COPIED * bool(place) | place for place in places])
    entries, n_looks = await mapped(bytes(data))
    runs = [
        (0, 10, 5 << 20),
        (10, 1, 1 << 20),
        (11, 9, (5 << 20) + 11 * 512),
        (20, 1, None),
        (21, 43, (5 << 20) + 21 * 512),
    ]
    expected = [
        (SPEC.size // N_TABLES * table + 512 * first, 512 * n, place)
        for table in range(N_TABLES)
        for first, n, place in runs
    ]
    assert [(one.guest_offset, one.n_bytes, one.host_offset) for one in entries] == expected
    assert n_looks == N_TABLES


@given(seed=st.integers(0, 1 << 32), is_extended=st.booleans())
def test_entries_without_some_bits(seed: int, is_extended: bool) -> None:
    """As many as a look at each finds."""
    chooser = random.Random(seed)
    form = entry_format(3, 16, is_extended=is_extended)
    entries = array("Q")
    while len(entries) < 300 * form.words:
        word = chooser.choice([0, 1, COPIED, 1 << 16, 1 << 40, chooser.getrandbits(9)])
        entries.extend([word, *[chooser.getrandbits(64)] * (form.words - 1)] * chooser.choice([1, 2, 100]))
    index = chooser.randrange(100)
    n_clusters = chooser.randint(1, 200)
    bits = chooser.choice([form.offset_mask, form.cluster_mask | COPIED, 1])
    expected = 0
    while expected < n_clusters and not entries[(index + expected) * form.words] & bits:
        expected += 1
    assert n_without(entries, form, bits, index, n_clusters) == expected
