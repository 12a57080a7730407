"""Every parser alone: a value or the error that it promises, what is written again is the same, bounds hold.

A target is given a changed subject. It raises what should not have come out of the parser, or AssertionError.
"""

from __future__ import annotations

import logging
import os
import random
import zlib
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from qcowfuse.cli.image_names import configured_folders
from qcowfuse.cli.mount.mount_options import MountOptionError, sort_options
from qcowfuse.errors import CorruptImageError, FormatError
from qcowfuse.format.bitmap_directory import parse_bitmap_directory, replace_entry
from qcowfuse.format.bitmaps import Contents, DirtyBits
from qcowfuse.format.compression import decompress_cluster, decompress_clusters, decompress_start
from qcowfuse.format.cow_plan import plan_write
from qcowfuse.format.entries import ClusterKind, EntryFormat, entry_format, parse_table, serialise_table
from qcowfuse.format.extensions import parse_extensions, parse_feature_names, serialise_extensions
from qcowfuse.format.extents import count_data, lookup_run
from qcowfuse.format.header import Qcow2Header, refuse_unsupported, unknown_incompatible
from qcowfuse.format.header_bytes import serialise_header
from qcowfuse.format.header_parsing import header_length_needed, parse_header, probe_format
from qcowfuse.format.luks import parse_luks_header, serialise_luks_header
from qcowfuse.format.presence import presence_run
from qcowfuse.format.refcounts import max_refcount, parse_refcounts, serialise_refcounts
from qcowfuse.format.snapshots import parse_snapshot, serialise_snapshots
from qcowfuse.format.subclusters import lookup_run_extended, plan_write_extended
from qcowfuse.tools.peek import may_need_passphrase

from . import outer_parsers
from .disks import DISKS, judge_disk
from .subjects import IMAGES, Subject

Parser = Callable[[Subject], None]


def judge_header(data: bytes, file_size: int) -> None:
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


def _header(given: Subject) -> None:
    data = bytes(given.data[: 2 << 20])
    judge_header(data, len(data))
    judge_header(data[:8192].ljust(2 << 20, b"\0"), 1 << 62)
    for for_check in (False, True):
        with suppress(FormatError):
            parse_header(data, len(data), for_check=for_check, for_info=not for_check)


def _extensions(given: Subject) -> None:
    data = bytes(given.data[:8192])
    end = given.cluster_size
    for start in (104, 112, 72, len(data) % 97):
        with suppress(FormatError):
            found = parse_extensions(data, start, end)
            assert sum(8 + len(extension.data) for extension in found) <= max(end - start, 0)
            again = serialise_extensions(found)
            assert parse_extensions(again, 0, len(again)) == found
            for extension in found:
                assert all(len(name.name) <= 46 for name in parse_feature_names(extension.data))


def _field(given: Subject, name: str) -> int:
    place, n_bytes = given.fields[name]
    return int.from_bytes(given.data[place : place + n_bytes], "big")


def _snapshots(given: Subject) -> None:
    start = given.fields["snapshot[0].l1_table_offset"][0]
    data = bytes(given.data[start:])
    position, found = 0, []
    with suppress(FormatError):
        for _ in range(4):
            snapshot, after = parse_snapshot(data, position)
            assert after > position
            found.append(snapshot)
            position = after
    raw = serialise_snapshots(found)
    position = 0
    for snapshot in found:
        again, position = parse_snapshot(raw, position)
        # An icount of all ones is none; of an entry with the short field alone the size of the state moves.
        assert again == snapshot, (again, snapshot)
    assert position == len(raw)


def _bitmap_directory(given: Subject) -> None:
    start = given.fields["bitmap[0].table_offset"][0]
    for length in (64, 32, 63, 2048):
        data = bytes(given.data[start : start + length])
        with suppress(FormatError):
            n_bitmaps = _field(given, "bitmaps.n_bitmaps") if length == 64 else length // 32
            entries = parse_bitmap_directory(data, n_bitmaps, given.cluster_size)
            again = bytearray(data)
            for entry in entries:
                replace_entry(again, entry)
            assert again == data


def _bitmaps(given: Subject) -> None:
    """The bits in memory, and a set of numbers that must be the same."""
    chooser = random.Random(bytes(given.data[:64]) + bytes(given.data[-200:]))
    granularity = 1 << chooser.randint(9, 14)
    cluster_size, size = 512, chooser.randint(1, 1 << 23)
    n_granules = -(-size // granularity)
    bits, model = DirtyBits(granularity=granularity, cluster_size=cluster_size), set[int]()
    per_chunk = cluster_size * 8
    for _ in range(6):
        if chooser.random() < 0.3:
            number = chooser.randrange(-(-n_granules // per_chunk))
            at = chooser.randrange(len(given.data) + 1)
            stored = bytes(given.data[at : at + cluster_size]).ljust(cluster_size, b"\0")
            whole = chooser.random() < 0.2
            bits.load(number, None if whole else stored, size=size)
            model = {granule for granule in model if granule // per_chunk != number}
            for index in range(min(per_chunk, n_granules - number * per_chunk)):
                if whole or stored[index >> 3] >> (index & 7) & 1:
                    model.add(number * per_chunk + index)
        else:
            offset = chooser.randrange(size)
            n_bytes = chooser.randint(0, min(size - offset, 1 << chooser.randint(0, 23)))
            bits.mark(offset, n_bytes)
            if n_bytes:
                model.update(range(offset // granularity, (offset + n_bytes - 1) // granularity + 1))
    for number in range(-(-n_granules // per_chunk)):
        mine = {granule - number * per_chunk for granule in model if granule // per_chunk == number}
        found = bits.contents(number)
        chunk = bits.chunks.get(number, bytes(cluster_size))
        assert {index for index in range(per_chunk) if chunk[index >> 3] >> (index & 7) & 1} == mine
        assert (found is Contents.ZEROES) == (not mine)
        assert (found is Contents.ONES) == (len(mine) == per_chunk)


def _luks(given: Subject) -> None:
    for length in (4040 * 512, 2 << 20, len(given.data)):
        with suppress(FormatError):
            header = parse_luks_header(bytes(given.data), length)
            assert header.payload_offset <= length
            header = replace(header, uuid="")  # shown, never written again: bytes that are no text don't come back
            assert parse_luks_header(serialise_luks_header(header), length) == header


def _entries(given: Subject) -> None:
    chooser = random.Random(bytes(given.data[:128]) + bytes(given.data[-512:]))
    first = min((place for name, (place, _) in given.fields.items() if name.startswith("l2[")), default=0)
    raw = bytes(given.data[first : first + 1024]).ljust(1024, b"\0")
    words = parse_table(raw)
    assert serialise_table(words, 0, len(words)) == raw
    for form in (
        entry_format(1, 12),
        entry_format(2, 9),
        entry_format(3, 9),
        entry_format(3, 16, has_data_file=True),
        entry_format(3, 14, is_extended=True),
        entry_format(3, 16, is_extended=True, has_data_file=True),
    ):
        _look_up(words, form, chooser)


def _look_up(words: array[int], form: EntryFormat, chooser: random.Random) -> None:
    cluster_size = 1 << form.cluster_bits
    look_up, plan = (lookup_run_extended, plan_write_extended) if form.is_extended else (lookup_run, plan_write)
    for entry in words[:16]:
        with suppress(CorruptImageError):
            assert form.l1_host_offset(entry) < 1 << 56
        with suppress(CorruptImageError):
            if form.classify(entry) is ClusterKind.COMPRESSED:
                with suppress(FormatError):
                    assert 1 <= form.compressed_cluster(entry).n_bytes <= 2 << form.cluster_bits
    for _ in range(4):
        index = chooser.randrange(len(words) // form.words)
        in_cluster = chooser.randrange(cluster_size)
        n_bytes = chooser.randint(1, 4 * cluster_size)
        with suppress(CorruptImageError):
            run = look_up(words, form, index, in_cluster, n_bytes)
            assert 1 <= run.n_bytes <= n_bytes
        with suppress(CorruptImageError):
            found = plan(words, form, index, in_cluster, n_bytes)
            assert 1 <= found.n_bytes <= n_bytes
            assert found.head >= 0
            assert found.tail >= 0
        with suppress(CorruptImageError):
            n_same = presence_run(words, form, index, in_cluster, n_bytes)
            assert n_same
    with suppress(CorruptImageError):
        count_data(words, form, needs_holes=True)


def _refcounts(given: Subject) -> None:
    start = given.fields["refcount_table[0]"][0]
    data = bytes(given.data[start : start + 512]).ljust(512, b"\0")
    for order in range(7):
        counts = parse_refcounts(data, order)
        assert len(counts) == 512 * 8 >> order
        assert order == 6 or max(counts) <= max_refcount(order)
        assert serialise_refcounts(counts, order, 0, len(counts)) == data


def _compression(kind: int) -> Parser:
    def parse(given: Subject) -> None:
        places = sorted(
            place for name, (place, _) in given.fields.items() if name.startswith("packed") and "][0]" in name
        )
        size = given.cluster_size
        packed = [bytes(given.data[place : place + 512]) for place in places[:5]]
        together = decompress_clusters(packed, kind, size)
        for data, outcome in zip(packed, together, strict=True):
            try:
                alone: bytes | FormatError = decompress_cluster(data, kind, size)
            except FormatError as error:
                alone = error
            if isinstance(alone, FormatError):
                assert isinstance(outcome, FormatError), "alone an error, together none"
                assert str(alone) == str(outcome), (str(alone), str(outcome))
                continue
            assert len(alone) == size
            assert not isinstance(outcome, FormatError), f"together {outcome}"
            assert alone == bytes(outcome), "other bytes together"
            if kind == 0:
                assert zlib.decompressobj(-15).decompress(data, size) == alone, "other bytes than zlib's"
                start = decompress_start(data, 100)
                assert start is None or start == alone[:100], "another start"

    return parse


def _text(given: Subject) -> str:
    return given.data.decode("utf-8", "surrogateescape")


def _mount_options(given: Subject) -> None:
    with suppress(MountOptionError):
        found = sort_options([_text(given)])
        assert all(found.values.values())


def _in_file(data: bytes) -> int:
    fd = os.memfd_create("fuzz")
    os.fchmod(fd, 0o600)
    os.write(fd, data)
    return fd


def _configuration(given: Subject) -> None:
    fd = _in_file(bytes(given.data))
    log = logging.getLogger("qcowfuse.cli.image_names")
    try:
        log.disabled = True
        folders = configured_folders(f"/proc/self/fd/{fd}", owner=os.getuid())
        assert all(folder.startswith("/") for folder in folders)
    finally:
        log.disabled = False
        os.close(fd)


def _quick_look(given: Subject) -> None:
    data = bytes(given.data[:8192])
    fd = _in_file(data)
    try:
        may = may_need_passphrase(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    with suppress(FormatError):
        header = parse_header(bytes(given.data[: 2 << 20]), len(given.data))
        assert may or not (header.crypt_method or header.backing_file), "a no too few"


def _printable_lines(given: Subject) -> None:
    """What an error says is one line, whatever bytes it is about."""
    with suppress(FormatError):
        try:
            refuse_unsupported(parse_header(bytes(given.data[: 2 << 20]), len(given.data)))
        except FormatError as error:
            if not str(error).isprintable():
                raise AssertionError(f"not fit to be shown: {str(error)!r}") from None


_QCOW2 = tuple(name for name in IMAGES if not name.startswith("v1"))
PARSERS: dict[str, tuple[Parser, tuple[str, ...]]] = {
    "header": (_header, tuple(IMAGES)),
    "messages": (_printable_lines, tuple(IMAGES)),
    "extensions": (_extensions, _QCOW2),
    "snapshots": (_snapshots, ("v3-snapshots", "v3-refcount-2-snapshot", "v2-snapshot-4k")),
    "bitmap-directory": (_bitmap_directory, ("v3-bitmaps",)),
    "bitmaps": (_bitmaps, ("v3-bitmaps", "v3-512")),
    "luks": (_luks, ("luks",)),
    "entries": (_entries, tuple(IMAGES)),
    "refcounts": (_refcounts, _QCOW2),
    "deflate": (_compression(0), ("v3-deflate", "v1-deflate", "v3-extended-packed")),
    "zstd": (_compression(1), ("v3-zstd",)),
    "mount-options": (_mount_options, ("options",)),
    "configuration": (_configuration, ("configuration",)),
    "quick-look": (_quick_look, tuple(IMAGES)),
    "partitions": (judge_disk, tuple(DISKS)),
    "arguments": (outer_parsers.arguments, ("command-line",)),
    "names": (outer_parsers.names, ("names",)),
    "requests": (outer_parsers.requests, ("requests",)),
}
"""By name: the target and the subjects that it takes."""
__all__ = ["PARSERS", "judge_header"]
