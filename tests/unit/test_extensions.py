"""Header extensions on plain bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfuse.errors import FormatError
from qcowfuse.format.extensions import (
    FeatureName,
    HeaderExtension,
    find_extension,
    parse_extensions,
    parse_feature_names,
    serialise_extensions,
)

MAGICS = st.integers(1, (1 << 32) - 1)


@given(st.lists(st.builds(HeaderExtension, MAGICS, st.binary(max_size=100))), st.integers(0, 40), st.booleans())
def test_round_trip(extensions: list[HeaderExtension], start: int, marked: bool) -> None:
    """Any list of extensions comes back, with an end marker or up to the very end."""
    data = b"\xee" * start + serialise_extensions(extensions)
    end = len(data) + (8 if marked else 0)
    assert parse_extensions(data + bytes(8), start, end) == tuple(extensions)


def test_ends_at_the_marker() -> None:
    """What lies behind the end marker is not looked at."""
    data = serialise_extensions([HeaderExtension(7, b"abc")]) + bytes(8) + b"\xff" * 64
    assert parse_extensions(data, 0, len(data)) == (HeaderExtension(7, b"abc"),)


def test_padding_may_reach_past_the_end() -> None:
    """An extension whose data fit ends the list, although its padding would not."""
    data = struct.pack(">II", 7, 3) + b"abc"
    assert parse_extensions(data, 0, len(data)) == (HeaderExtension(7, b"abc"),)


@pytest.mark.parametrize("n_bytes", [1, 7])
def test_a_cut_head_is_an_error(n_bytes: int) -> None:
    """Fewer than 8 bytes hold no extension, not even the end marker."""
    with pytest.raises(FormatError, match="cut short"):
        parse_extensions(bytes(64), 0, n_bytes)


@pytest.mark.parametrize("length", [17, 1 << 31, (1 << 32) - 1])
def test_lengths_are_bounded(length: int) -> None:
    """A length beyond the end is an error that names it, whatever lies behind."""
    data = struct.pack(">II", 7, length) + bytes(1000)
    with pytest.raises(FormatError, match=f"{length:#x}, expected at most 0x10"):
        parse_extensions(data, 0, 24)


def test_a_file_that_is_shorter_reads_as_zero() -> None:
    """Past the end of the bytes there is an end marker."""
    assert parse_extensions(b"", 112, 65536) == ()
    assert parse_extensions(bytes(200), 300, 200) == ()


def test_feature_names() -> None:
    """Entries are kind, bit and a name that ends at a NUL or after 46 bytes; the first nameless one ends them."""
    data = b"".join(
        (
            struct.pack(">BB46s", 0, 3, b"compression type"),
            struct.pack(">BB46s", 2, 255, b"x" * 46),
            struct.pack(">BB46s", 0, 0, b""),
            struct.pack(">BB46s", 0, 1, b"unseen"),
        )
    )
    assert parse_feature_names(data) == (FeatureName(0, 3, "compression type"), FeatureName(2, 255, "x" * 46))
    assert parse_feature_names(data[:50]) == (FeatureName(0, 3, "compression type"),)
    assert parse_feature_names(data[:53]) == (FeatureName(0, 3, "compression type"), FeatureName(2, 255, "xxx"))


@given(st.binary(max_size=300))
def test_feature_names_are_safe_to_show(data: bytes) -> None:
    """Whatever the table holds, names are one printable line, and nothing is raised."""
    for feature in parse_feature_names(data):
        assert feature.name.isprintable()


def test_the_last_of_several_counts() -> None:
    """Of two extensions with the same magic the last is found, as in QEMU."""
    extensions = (HeaderExtension(1, b"a"), HeaderExtension(2, b"b"), HeaderExtension(1, b"c"))
    assert find_extension(extensions, 1) == b"c"
    assert find_extension(extensions, 3) is None
