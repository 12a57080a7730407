"""All runs of a slice at once are those that looks at one entry after the other find."""

from __future__ import annotations

import random
from array import array

import pytest

from qcowfuse.errors import CorruptImageError
from qcowfuse.format.all_runs import all_runs
from qcowfuse.format.entries import COMPRESSED, COPIED, ClusterKind, EntryFormat, entry_format

FORMATS = {
    "version 1": entry_format(1, 12),
    "version 2": entry_format(2, 9),
    "version 3": entry_format(3, 16),
    "large clusters": entry_format(3, 21),
}


def words_of(entries: array[int], form: EntryFormat) -> list[int]:
    """What each entry is, as :class:`~qcowfuse.format.all_runs.AllRuns` has it. Raises CorruptImageError."""
    words = []
    for entry in entries:
        kind = form.classify(entry)
        place = entry & form.offset_mask
        words.append({ClusterKind.COMPRESSED: COMPRESSED, ClusterKind.ZERO: place | 1}.get(kind, place))
    return words


def goes_on(before: int, after: int, cluster_size: int) -> bool:
    """Whether two neighbours are one run."""
    has_place = before & ~1 & ~COMPRESSED
    return after == before + cluster_size if has_place else after == before


def some_entry(chooser: random.Random, form: EntryFormat, before: int, *, is_odd: bool) -> int:
    """An entry that may follow another one; ``is_odd``: it may be impossible."""
    cluster_size = 1 << form.cluster_bits
    place = chooser.choice([1, 2, 3, chooser.getrandbits(20), (1 << 55 - form.cluster_bits)]) * cluster_size
    entries = [
        0,
        0,
        place | form.copied,
        place,
        before,
        before + cluster_size,
        form.compressed | chooser.getrandbits(50),
    ]
    if form.reads_zero:
        entries += [1, 1, place | 1, COPIED | place | 1, COPIED | 1, form.compressed | 1]
    if is_odd:
        entries += [chooser.getrandbits(64), place | 512, 1, 1 << 56, 1 << 62, 0x80, cluster_size - 1]
    return chooser.choice(entries) & (1 << 64) - 1


@pytest.mark.parametrize("name", FORMATS)
def test_runs_are_those_of_the_entries(name: str) -> None:
    """Of each length, with short and long runs; and where an entry is impossible, nothing is said."""
    form = FORMATS[name]
    chooser = random.Random(name)
    n_refused = 0
    for number in range(1500):
        entries = array("Q")
        n_entries = chooser.choice([1, 2, 3, 10, 64, 100])
        while len(entries) < n_entries:
            entry = some_entry(chooser, form, entries[-1] if entries else 0, is_odd=number % 4 == 0)
            step = chooser.choice([0, 1 << form.cluster_bits])
            length = chooser.choice([1, 1, 2, 9])
            entries.extend(entry + step * index & (1 << 64) - 1 for index in range(length))
        found = all_runs(entries, form)
        try:
            words = words_of(entries, form)
        except CorruptImageError:
            assert found is None
            n_refused += 1
            continue
        assert found is not None
        ends = [*found.firsts, len(entries)]
        cluster_size = 1 << form.cluster_bits
        expected = [0, *(n for n in range(1, len(words)) if not goes_on(words[n - 1], words[n], cluster_size))]
        assert found.firsts.tolist() == expected
        assert found.words.tolist() == [words[first] for first in ends[:-1]]
    assert 50 < n_refused < 400


def test_what_one_word_does_not_tell_is_left_alone() -> None:
    """Extended entries, and data that lies in another file."""
    entries = array("Q", [0] * 64)
    assert all_runs(entries, entry_format(3, 16, is_extended=True)) is None
    assert all_runs(entries, entry_format(3, 16, has_data_file=True)) is None
