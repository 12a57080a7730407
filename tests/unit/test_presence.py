"""Runs of clusters with data, against judging each entry on its own."""

from __future__ import annotations

import random
import sys
from array import array
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfuse.errors import CorruptImageError
from qcowfuse.format import presence
from qcowfuse.format.entries import (
    COMPRESSED,
    COMPRESSED_V1,
    COPIED,
    READS_ZERO,
    ClusterKind,
    EntryFormat,
    entry_format,
)
from qcowfuse.format.extents import lookup_run
from qcowfuse.format.presence import presence_run
from qcowfuse.format.short_runs import COMPILED_AFTER, short_run
from qcowfuse.format.subclusters import ALL_ALLOCATED, ALL_ZERO, lookup_run_extended

BITS = 16
CLUSTER = 1 << BITS
FORMATS = {
    "v1": entry_format(1, BITS),
    "v2": entry_format(2, BITS),
    "v3": entry_format(3, BITS),
    "data file": entry_format(3, BITS, has_data_file=True),
    "extended": entry_format(3, BITS, is_extended=True),
    "extended data file": entry_format(3, BITS, is_extended=True, has_data_file=True),
}


def kind_of(entries: array[int], form: EntryFormat, index: int, in_cluster: int) -> ClusterKind | None:
    """What one byte is, None for corrupt."""
    lookup = lookup_run_extended if form.is_extended else lookup_run
    try:
        kind = lookup(entries, form, index, in_cluster, 1).kind
    except CorruptImageError:
        return None
    return ClusterKind.DATA if kind == ClusterKind.COMPRESSED else ClusterKind(kind)


@cache
def kinds_of(entry: tuple[int, ...], form: EntryFormat) -> list[ClusterKind | None]:
    """What the cluster of an entry is, or each of its subclusters."""
    places = range(0, CLUSTER, CLUSTER // 32) if form.is_extended else (0,)
    return [kind_of(array("Q", entry), form, 0, place) for place in places]


def words_of(form: EntryFormat, chooser: random.Random) -> tuple[int, ...]:
    """One entry, of any kind that there is, now and then an odd one."""
    offset = chooser.choice([1, 5, 0x80, 0x8000, 1 << 30]) << BITS
    if form.version == 1:
        odd = [chooser.getrandbits(64), 1 << 57, offset | 7, COMPRESSED_V1 | 3]
        return (chooser.choice([0, offset, COMPRESSED_V1 | chooser.getrandbits(60), *odd]),)
    kinds = [0, offset, offset | COPIED, COMPRESSED | chooser.getrandbits(61)]
    odd = [COPIED, READS_ZERO | COPIED, offset | 512 | COPIED, offset | 512 | READS_ZERO, 2, 0x80 << 48 | COPIED]
    if not form.is_extended:
        kinds += [READS_ZERO, READS_ZERO | offset, READS_ZERO | offset | COPIED]
        return (chooser.choice(kinds if chooser.random() < 0.9 else odd),)
    entry = chooser.choice(kinds if chooser.random() < 0.9 else odd)
    if entry & COMPRESSED and chooser.random() < 0.9:
        return entry, 0
    mixed = chooser.getrandbits(32)
    return entry, chooser.choice(
        [0, ALL_ZERO, ALL_ALLOCATED, mixed, (mixed ^ ALL_ALLOCATED) << 32 | mixed, mixed << 32]
    )


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@given(
    seed=st.integers(0, 1 << 32), n_entries=st.sampled_from([1, 3, 64, 65, 300]), length=st.sampled_from([1, 3, 70])
)
def test_runs_are_of_one_kind_and_as_long_as_that(form: EntryFormat, seed: int, n_entries: int, length: int) -> None:
    """Every byte that a run covers is of its kind, corrupt entries are met as such, and between two entries that are
    the same, of one kind as a whole, no run ends.
    """
    chooser = random.Random(seed)
    entries = array("Q")
    while len(entries) < n_entries * form.words:
        entries.extend(words_of(form, chooser) * chooser.randint(1, length))
    del entries[n_entries * form.words :]
    step = CLUSTER // 32 if form.is_extended else CLUSTER
    each = [tuple(entries[at : at + form.words]) for at in range(0, len(entries), form.words)]
    kinds = [kind for entry in each for kind in kinds_of(entry, form)]
    place = chooser.choice([0, 1, CLUSTER - 1])
    end = n_entries * CLUSTER - chooser.choice([0, 5])
    while place < end:
        kind = kind_of(entries, form, place // CLUSTER, place % CLUSTER)
        if kind is None:
            with pytest.raises(CorruptImageError):
                presence_run(entries, form, place // CLUSTER, place % CLUSTER, end - place)
            place += step
            continue
        found, n_bytes, is_followed = presence_run(entries, form, place // CLUSTER, place % CLUSTER, end - place)
        assert found is kind
        if is_followed:
            next_kind = kind_of(entries, form, (place + n_bytes) // CLUSTER, (place + n_bytes) % CLUSTER)
            assert next_kind is not None
            assert (next_kind is ClusterKind.DATA) is not (kind is ClusterKind.DATA)
            assert place + n_bytes < end
        assert 1 <= n_bytes <= end - place
        last = place + n_bytes - 1
        assert kind_of(entries, form, last // CLUSTER, last % CLUSTER) is kind
        assert set(kinds[place // step : last // step + 1]) == {kind}
        index, beyond = last // CLUSTER, (last + 1) // CLUSTER
        if beyond > index and last + 1 < end:
            words, following = (entries[i * form.words : (i + 1) * form.words] for i in (index, beyond))
            is_mixed = form.is_extended and (words[1] not in (0, ALL_ZERO, ALL_ALLOCATED) or words[0] & READS_ZERO)
            assert words != following or is_mixed, "a run ended between two entries that are the same"
        place += n_bytes


SLICES: dict[str, tuple[str, tuple[int, ...], int]] = {
    "nothing": ("v3", (0,), 0),
    "zeroes": ("v3", (READS_ZERO,), 0),
    "zeroes with a place": ("v3", (READS_ZERO | COPIED | CLUSTER,), CLUSTER),
    "data": ("v3", (COPIED | CLUSTER,), CLUSTER),
    "scattered data": ("v3", (COPIED | CLUSTER,), 5 * CLUSTER),
    "shared data": ("v3", (CLUSTER,), CLUSTER),
    "compressed": ("v3", (COMPRESSED | 512,), 700),
    "data, version 2": ("v2", (COPIED | CLUSTER,), CLUSTER),
    "compressed, version 1": ("v1", (COMPRESSED_V1 | 512,), 700),
    "data, version 1": ("v1", (CLUSTER,), CLUSTER),
    "data file": ("data file", (COPIED,), CLUSTER),
    "extended zeroes": ("extended", (0, ALL_ZERO), 0),
    "extended zeroes with a place": ("extended", (COPIED | CLUSTER, ALL_ZERO), CLUSTER),
    "extended data": ("extended", (COPIED | CLUSTER, ALL_ALLOCATED), CLUSTER),
    "extended shared data": ("extended", (CLUSTER, ALL_ALLOCATED), CLUSTER),
    "extended compressed": ("extended", (COMPRESSED | 512, 0), 700),
}


@pytest.mark.parametrize("name", SLICES)
def test_a_whole_slice_is_one_run_found_with_two_looks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 KiB of entries of one kind; and the same but for the last, third and first one."""
    kind, words, step = SLICES[name]
    form = FORMATS[kind]
    n_entries = 8192 // form.words
    entries = array("Q")
    for number in range(n_entries):
        entries.extend([words[0] + number * step, *words[1:]])
    n_looks = 0
    for function in ("_n_like", "_n_like_extended"):
        real = getattr(presence, function)

        def counted(*arguments: object, real: object = real, **more: object) -> int:
            nonlocal n_looks
            n_looks += 1
            return real(*arguments, **more)  # type: ignore[operator,no-any-return]

        monkeypatch.setattr(presence, function, counted)
    assert presence_run(entries, form, 0, 0, n_entries * CLUSTER)[1] == n_entries * CLUSTER
    assert n_looks <= 2
    other = (0,) * form.words if words[0] else ((READS_ZERO,) if form.words == 1 else (0, ALL_ZERO))
    if form.words == 2:
        other = (0, 0) if words[1] else (COPIED | CLUSTER, ALL_ZERO)
    for changed in (n_entries - 1, 3, 1):
        entries[changed * form.words : (changed + 1) * form.words] = array("Q", other)
        assert presence_run(entries, form, 0, 0, n_entries * CLUSTER)[1] == changed * CLUSTER


@pytest.mark.parametrize("name", SLICES)
def test_short_runs_are_found_with_one_match(name: str) -> None:
    """Runs of less than 64 entries, each of a kind that the slices above have, in turns with another kind."""
    kind, words, step = SLICES[name]
    form = FORMATS[kind]
    other = array("Q", [COPIED | CLUSTER, ALL_ALLOCATED][: form.words])
    if presence_run(array("Q", words), form, 0, 0, CLUSTER)[0] is ClusterKind.DATA:
        other = array("Q", [0] * form.words)
    entries = array("Q")
    lengths = (1, 2, 63, 1)
    for length in lengths:
        for number in range(length):
            entries.extend([words[0] + number * step, *words[1:]])
        entries.extend(other)

    is_matched = form.version > 1 and sys.byteorder == "little"
    index, n_entries = 0, len(entries) // form.words
    for _ in range(COMPILED_AFTER):
        short_run(entries, form, 0, 1)
    for length in lengths:
        for n_alike in (length, 1):
            found = presence_run(entries, form, index, 0, (n_entries - index) * CLUSTER)
            assert found[1] == n_alike * CLUSTER
            is_followed = index + n_alike < n_entries
            matched = (found[0], n_alike, is_followed) if is_matched else None
            assert short_run(entries, form, index, n_entries - index) == matched
            assert found[2] is (is_matched and is_followed)
            assert presence_run(entries, form, index, 7, 9) == (found[0], 9, False)
            index += n_alike
