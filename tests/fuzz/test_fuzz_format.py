"""Malformed bytes into the parsers: a value or FormatError, in bounded time and memory."""

from __future__ import annotations

import struct
import tempfile
import tracemalloc
from functools import cache
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from qcowfuse.errors import FormatError
from qcowfuse.format.extensions import parse_extensions, parse_feature_names
from qcowfuse.format.header import Qcow2Header, refuse_unsupported, unknown_incompatible
from qcowfuse.format.header_bytes import serialise_header
from qcowfuse.format.header_parsing import header_length_needed, parse_header, probe_format
from tests.support import qemu

INTERESTING = (0, 1, 7, 8, 9, 21, 22, 63, 64, 72, 104, 105, 112, 511, 512, 1023, 1024, 65535, 65536, 1 << 21)
INTEGERS = st.sampled_from(INTERESTING) | st.integers(0, (1 << 64) - 1) | st.integers(0, 63).map(lambda bit: 1 << bit)
FIELDS = ((8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8), (72, 8),
          (80, 8), (88, 8), (96, 4), (100, 4), (104, 1), (112, 4), (116, 4), (32, 1), (33, 1))  # fmt: skip


def judge(data: bytes, file_size: int) -> None:
    """Run everything that looks at a header; what parses must also be written and parsed again."""
    try:
        probe_format(data)
        assert 0 < header_length_needed(data[:64]) <= 2 << 20
        header = parse_header(data, file_size)
    except FormatError:
        return
    if isinstance(header, Qcow2Header):
        unknown_incompatible(header)
        assert header.backing_format is None or "\0" not in header.backing_format
    assert header.backing_file is None or "\0" not in header.backing_file
    assert 0 <= header.virtual_size < 1 << 63
    try:
        refuse_unsupported(header)
        written = serialise_header(header)
    except FormatError:
        return
    assert parse_header(written.ljust(2 << 20, b"\0"), 1 << 60) == header


@cache
def starts() -> tuple[bytes, ...]:
    """The first bytes of images by qemu-img, one of each kind that differs in its header."""
    with tempfile.TemporaryDirectory() as folder:
        return make_starts(Path(folder))


def make_starts(folder: Path) -> tuple[bytes, ...]:
    qemu.create(folder / "base", "raw", 65536)
    found = []
    for number, (format_name, options, overlay) in enumerate(
        (
            ("qcow", "", False),
            ("qcow", "", True),
            ("qcow2", "compat=0.10", False),
            ("qcow2", "compat=0.10,cluster_size=512", True),
            ("qcow2", "cluster_size=4k", False),
            ("qcow2", "compression_type=zstd", True),
            ("qcow2", "cluster_size=512,refcount_bits=1", True),
        )
    ):
        path = folder / str(number)
        backing = {"backing": "base", "backing_format": "raw"} if overlay else {}
        qemu.create(path, format_name, 1 << 20, options=options, **backing)
        found.append(path.read_bytes()[:8192])
    return tuple(found)


@given(data=st.binary(max_size=300), version=st.integers(0, 4) | st.none())
@example(data=b"", version=None)
def test_any_bytes(data: bytes, version: int | None) -> None:
    """Arbitrary bytes, with and without a magic before them, are a header or FormatError."""
    if version is not None:
        data = b"QFI\xfb" + version.to_bytes(4, "big") + data
    judge(data, len(data))


@settings(max_examples=1500, deadline=1000)
@given(
    which=st.integers(0, 6),
    changes=st.lists(st.tuples(st.sampled_from(FIELDS), INTEGERS), max_size=5),
    length=st.integers(0, 8192),
    cut=st.booleans(),
)
def test_changed_fields(
    which: int,
    changes: list[tuple[tuple[int, int], int]],
    length: int,
    cut: bool,
) -> None:
    """A header by qemu-img with fields set to extremes, whole or cut, is a header or FormatError."""
    data = bytearray(starts()[which])
    for (offset, n_bytes), value in changes:
        data[offset : offset + n_bytes] = (value & (1 << 8 * n_bytes) - 1).to_bytes(n_bytes, "big")
    if cut:
        del data[length:]
    judge(bytes(data), len(data))
    judge(bytes(data).ljust(2 << 20, b"\0"), 1 << 62)


@given(data=st.binary(max_size=400), start=st.integers(0, 500), end=st.integers(0, 500))
def test_any_extensions(data: bytes, start: int, end: int) -> None:
    """Arbitrary bytes as extensions are a list of them or FormatError; a list that fits is bounded by its bytes."""
    try:
        extensions = parse_extensions(data, start, end)
    except FormatError:
        return
    assert sum(8 + len(extension.data) for extension in extensions) <= max(end - start, 0)
    for extension in extensions:
        parse_feature_names(extension.data)


def test_the_longest_extension_list() -> None:
    """A 2 MiB cluster full of empty extensions is parsed in bounded memory."""
    header = bytearray(112)
    struct.pack_into(">4sI", header, 0, b"QFI\xfb", 3)
    struct.pack_into(">I", header, 20, 21)
    struct.pack_into(">II", header, 96, 4, 112)
    struct.pack_into(">QI", header, 48, 2 << 20, 1)
    data = bytes(header) + struct.pack(">II", 1, 0) * (((2 << 20) - 112) // 8)
    tracemalloc.start()
    try:
        found = parse_header(data, len(data))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert isinstance(found, Qcow2Header)
    assert len(found.extensions) == ((2 << 20) - 112) // 8
