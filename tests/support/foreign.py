"""Images as other programs write them: laid out byte by byte here, with the peculiarities of images found elsewhere.

Neither QEMU nor qcowfuse takes part in the making, so that a habit of theirs (where tables lie, in which order
clusters are handed out, what a header holds) is nothing that the tests depend on.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

KIB = 1 << 10
MIB = 1 << 20
TIB = 1 << 40

_MAGIC = b"QFI\xfb"
_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_BACKING_FORMAT = 0xE2792ACA
_DATA_FILE_NAME = 0x44415441
_HAS_DATA_FILE = 4

Maker = Callable[[Path], object]


def header(
    *,
    version: int = 3,
    cluster_bits: int = 16,
    size: int = 10 * MIB,
    n_l1_entries: int = 1,
    l1_offset: int | None = None,
    table_offset: int | None = None,
    n_snapshots: int = 0,
    incompatible: int = 0,
    length: int = 112,
    extensions: Mapping[int, bytes] | None = None,
    backing: str = "",
) -> bytes:
    """A header with its extensions and the backing file's name right behind them. Tables: L1 in cluster 3, refcounts
    in cluster 1, unless said."""
    l1_offset = 3 << cluster_bits if l1_offset is None else l1_offset
    table_offset = 1 << cluster_bits if table_offset is None else table_offset
    more = b""
    for kind, data in (extensions or {}).items():
        more += struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
    more += bytes(8)
    name_offset = (72 if version == 2 else length) + len(more)
    fields = struct.pack(
        ">4sIQIIQIIQQIIQ",
        *(_MAGIC, version, name_offset if backing else 0, len(backing), cluster_bits, size, 0),
        *(n_l1_entries, l1_offset, table_offset, 1, n_snapshots, 0),
    )
    if version == 3:
        fields += struct.pack(">QQQII", incompatible, 0, 0, 4, length) + bytes(length - 104)
    return fields + more + backing.encode()


def sound_image(
    path: Path,
    size: int,
    clusters: Mapping[int, bytes],
    *,
    cluster_bits: int,
    compressed: bool = False,
    tables_last: bool = False,
    length: int = 112,
    seed: int = 1,
) -> None:
    """An image with the given guest clusters, in an order of its own: data before or behind the tables.

    Compressed clusters are deflate streams of a window of 4 KiB, packed one behind the other without regard for
    sectors, as ``qemu-img convert -c`` does it.
    """
    cluster = 1 << cluster_bits
    per_table = cluster // 8
    l1 = [0] * -(-size // (cluster * per_table))
    tables: dict[int, list[int]] = {index // per_table: [0] * per_table for index in sorted(clusters)}
    data = bytearray()
    counts: dict[int, int] = {}  # of host clusters, within the data
    order = sorted(clusters)
    if not compressed:
        random.Random(seed).shuffle(order)
    places: dict[int, tuple[int, int]] = {}
    for index in order:
        content = clusters[index].ljust(cluster, b"\0")
        if compressed:
            packer = zlib.compressobj(9, zlib.DEFLATED, -12)
            content = packer.compress(content) + packer.flush()
            assert len(content) < cluster, "does not compress"
        places[index] = (len(data), len(content))
        for host in range(len(data) // cluster, (len(data) + len(content) - 1) // cluster + 1):
            counts[host] = counts.get(host, 0) + 1
        data += content
    data += bytes(-len(data) % cluster)

    n_data, n_l1 = len(data) // cluster, -(-len(l1) * 8 // cluster)
    n_meta_but_blocks = 2 + n_l1 + len(tables)  # header, refcount table, L1, L2
    n_blocks = 1
    while n_blocks * cluster // 2 < n_meta_but_blocks + n_blocks + n_data:
        n_blocks += 1
    n_meta = n_meta_but_blocks + n_blocks
    data_at = 1 if tables_last else n_meta
    meta_at = 1 + n_data if tables_last else 1
    table_at, blocks_at, l1_at, l2_at = (meta_at + place for place in (0, 1, 1 + n_blocks, 1 + n_blocks + n_l1))

    for index, (at, n_bytes) in places.items():
        host_offset = data_at * cluster + at
        entry = host_offset | _COPIED
        if compressed:
            shift = 62 - (cluster_bits - 8)
            more_sectors = (host_offset + n_bytes - 1) // 512 - host_offset // 512
            entry = _COMPRESSED | more_sectors << shift | host_offset
        tables[index // per_table][index % per_table] = entry
    refcounts = [1] * (n_meta + n_data) + [0] * (n_blocks * cluster // 2 - n_meta - n_data)
    for host, count in counts.items():
        refcounts[data_at + host] = count
    for place, number in enumerate(tables):
        l1[number] = (l2_at + place) * cluster | _COPIED

    file = bytearray((n_meta + n_data) * cluster)

    def put(cluster_number: int, content: bytes) -> None:
        file[cluster_number * cluster : cluster_number * cluster + len(content)] = content

    head = header(
        cluster_bits=cluster_bits,
        size=size,
        n_l1_entries=len(l1),
        l1_offset=l1_at * cluster,
        table_offset=table_at * cluster,
        length=length,
    )
    put(0, head)
    put(table_at, struct.pack(f">{n_blocks}Q", *((blocks_at + n) * cluster for n in range(n_blocks))))
    put(blocks_at, struct.pack(f">{len(refcounts)}H", *refcounts))
    put(l1_at, struct.pack(f">{len(l1)}Q", *l1))
    for place, entries in enumerate(tables.values()):
        put(l2_at + place, struct.pack(f">{per_table}Q", *entries))
    put(data_at, bytes(data))
    path.write_bytes(file)


def _noise(cluster_bits: int, indices: range, seed: int) -> dict[int, bytes]:
    rng = random.Random(seed)
    return {index: rng.randbytes(1 << cluster_bits) for index in indices}


def _text(cluster_bits: int, indices: range, seed: int) -> dict[int, bytes]:
    rng = random.Random(seed)
    words = [rng.randbytes(5).hex().encode() for _ in range(20)]
    half = 1 << (cluster_bits - 1)
    return {index: b" ".join(rng.choices(words, k=half))[:half] for index in indices}


def small_file_system(path: Path) -> None:
    """A small full-cluster disk, its clusters in no order."""
    sound_image(path, 4 * MIB, _noise(16, range(0, 60, 13), 1), cluster_bits=16)


def tables_behind_the_data(path: Path) -> None:
    """All tables at the file's end, and a last cluster that is not whole."""
    sound_image(path, 300 * KIB + 512, _noise(12, range(1, 75, 3), 2), cluster_bits=12, tables_last=True)


def firmware(path: Path) -> None:
    """Clusters of 512 bytes, all compressed; a header of 104 bytes."""
    sound_image(path, 416 * KIB, _text(9, range(3, 700, 7), 3), cluster_bits=9, compressed=True, length=104)


def compressed_64k(path: Path) -> None:
    """The usual clusters, compressed, several in one host cluster."""
    sound_image(path, 3 * MIB, _text(16, range(0, 48, 5), 4), cluster_bits=16, compressed=True)


def nothing_written(path: Path) -> None:
    """Not one L2 table, and an L1 table of many entries."""
    sound_image(path, 19 * MIB + 512, {}, cluster_bits=12)


SOUND: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (small_file_system, tables_behind_the_data, firmware, compressed_64k, nothing_written)
}
"""Images without an error that ``qemu-img check`` knows."""


def no_disk(path: Path) -> None:
    """A disk of 0 bytes without L1 table, whose refcount block lies outside the file."""
    head = header(size=0, n_l1_entries=0, l1_offset=0, length=104)
    path.write_bytes(head.ljust(64 * KIB, b"\0") + struct.pack(">Q", 2 << 16).ljust(64 * KIB, b"\0"))


def many_broken_snapshots(path: Path) -> None:
    """65536 snapshots whose table lies on the header."""
    path.write_bytes(header(size=512, n_snapshots=1 << 16, length=104).ljust(197_120, b"\0"))


def _writes(**fields: int | str | dict[int, bytes]) -> Maker:
    """A header with ``fields`` before empty tables: what a header-only image of a test suite is."""

    def make(path: Path) -> None:
        path.write_bytes(header(**fields).ljust(196_616, b"\0"))  # type: ignore[arg-type]

    return make


def over(backing: str, backing_format: str = "qcow2", *, version: int = 3) -> Maker:
    """An overlay; an empty format is no format."""
    extensions = {_BACKING_FORMAT: backing_format.encode()} if backing_format else {}
    return _writes(version=version, extensions=extensions, backing=backing)


def other_format(path: Path) -> None:
    """The start of a sparse VMDK file."""
    path.write_bytes((b"KDMV" + struct.pack("<II", 1, 3) + b"# Disk DescriptorFile\n").ljust(65_405, b"\0"))


def old_version_of_152_tib(path: Path) -> None:
    """Version 1 that ends behind its header, in an L1 table of 608 MiB."""
    fields = struct.pack(">4sIQIIQBBHIQ", _MAGIC, 1, 0, 0, 0, 152 * TIB + 512, 12, 9, 0, 0, 48)
    path.write_bytes(fields.ljust(516, b"\0"))


WRONG: dict[str, Maker] = {
    "other_format": other_format,
    "l1_table_of_32_gib": _writes(size=1 << 60, n_l1_entries=0xFFFFFFFF),
    "data_file_without_a_name": _writes(incompatible=_HAS_DATA_FILE, extensions={_DATA_FILE_NAME: b""}),
}
"""Refused for what the image itself says."""

INCOMPLETE: dict[str, Maker] = {
    "loop-1": over("loop-2.qcow2"),
    "loop-2": over("loop-1.qcow2"),
    "loop-self": over("loop-self.qcow2"),
    "missing_raw": over("missing.raw", "raw"),
    "missing_raw_version_2": over("missing", "raw", version=2),
    "missing_qcow2": over("missing.qcow2", "qcow2"),
    "missing_without_a_format": over("missing", ""),
    "protocol_as_format": over("missing", "file"),
    "network": over("nbd+tcp://example.org:6000/blah", "nbd"),
    "missing_data_file": _writes(incompatible=_HAS_DATA_FILE, extensions={_DATA_FILE_NAME: b"missing.raw"}),
}
"""Refused for another file, which is missing, of no use or the image itself."""

ALL: dict[str, Maker] = {
    **SOUND,
    "no_disk": no_disk,
    "many_broken_snapshots": many_broken_snapshots,
    "old_version_of_152_tib": old_version_of_152_tib,
    **WRONG,
    **INCOMPLETE,
}
"""Every image, by its name."""
