"""Images and structures to start from, built field by field, each field known by its name.

1. Nothing here uses the package or a tool: what the bytes are to mean is written from the specification.
2. Every image is valid, without leaks, and holds :data:`SIZE` bytes of disk unless it says otherwise.
3. The order of fields is that of their making, and so always the same.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import zstandard

from .encrypted import LUKS_SECTORS, encrypt, luks_key

SIZE = 96 << 10
COPIED = 1 << 63
COMPRESSED = 1 << 62
Kind = Literal["none", "data", "zero", "zero-data", "packed"]
Place = tuple[int, int]


@dataclass
class Subject:
    """``data`` with ``fields``: name to offset and bytes. ``files``: what else the chain has, by path."""

    data: bytearray = field(default_factory=bytearray)
    fields: dict[str, Place] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    cluster_size: int = 512

    def put(self, name: str, offset: int, n_bytes: int, value: int) -> None:
        """Write a big-endian field and remember it."""
        self.room(offset + n_bytes)
        self.data[offset : offset + n_bytes] = value.to_bytes(n_bytes, "big")
        self.fields[name] = (offset, n_bytes)

    def put_bytes(self, name: str, offset: int, value: bytes) -> None:
        """Write bytes; each of the first 16 is a field of its own."""
        self.room(offset + len(value))
        self.data[offset : offset + len(value)] = value
        for number in range(min(len(value), 16)):
            self.fields[f"{name}[{number}]"] = (offset + number, 1)

    def room(self, end: int) -> None:
        """Make the data at least ``end`` bytes long."""
        self.data.extend(bytes(max(0, end - len(self.data))))

    def allocate(self, n_bytes: int) -> int:
        """Whole clusters at the end; the offset."""
        offset = -(-len(self.data) // self.cluster_size) * self.cluster_size
        self.room(offset + -(-max(n_bytes, 1) // self.cluster_size) * self.cluster_size)
        return offset


@dataclass(frozen=True)
class Qcow2:
    """What a version 2 or 3 image has. ``kinds`` are those of the guest clusters, over and over."""

    version: int = 3
    cluster_bits: int = 9
    order: int = 4
    kinds: tuple[Kind, ...] = ("data", "none", "zero", "data", "zero-data", "none")
    compression: int = 0
    extended: bool = False
    snapshots: int = 0
    extra: int = 24
    bitmaps: int = 0
    backing: bool = False
    data_file: bool = False
    crypt: int = 0
    """The method: 1 is AES, 2 LUKS."""
    extensions: tuple[tuple[int, bytes], ...] = ()
    size: int = SIZE


def _pack(data: bytes, compression: int) -> bytes:
    if compression:
        return zstandard.ZstdCompressor().compress(data)
    packer = zlib.compressobj(wbits=-12)
    return packer.compress(data) + packer.flush()


def contents(number: int, n_bytes: int) -> bytes:
    """Of guest cluster ``number``: something that compresses."""
    word = struct.pack(">I", number + 1) + random.Random(number).randbytes(12)
    return (word * (n_bytes // len(word) + 1))[:n_bytes]


def build_qcow2(spec: Qcow2) -> Subject:
    """The image."""
    return _Qcow2Builder(spec).build()


class _Qcow2Builder:
    def __init__(self, spec: Qcow2) -> None:
        self.spec = spec
        self.cluster_size = 1 << spec.cluster_bits
        self.subject = Subject(bytearray(self.cluster_size), cluster_size=self.cluster_size)
        self.counts: dict[int, int] = {}

    def use(self, offset: int, n_bytes: int, count: int = 1) -> None:
        for cluster in range(offset // self.cluster_size, (offset + n_bytes - 1) // self.cluster_size + 1):
            self.counts[cluster] = self.counts.get(cluster, 0) + count

    def table(self, n_bytes: int) -> int:
        offset = self.subject.allocate(n_bytes)
        self.use(offset, n_bytes)
        return offset

    def build(self) -> Subject:
        spec, subject, size = self.spec, self.subject, self.cluster_size
        self.use(0, size)
        if spec.data_file:
            subject.files["data"] = bytes(spec.size)
        n_l2 = size // (16 if spec.extended else 8)
        n_l1 = -(-spec.size // (size * n_l2))
        l1 = self.table(8 * n_l1)
        copied = 0 if spec.snapshots else COPIED
        for number in range(n_l1):
            l2 = self.table(size)
            subject.put(f"l1[{number}]", l1 + 8 * number, 8, l2 | copied)
            self.fill_l2(number, l2, n_l2, copied)
        for entry in range(n_l1):
            self.use(struct.unpack_from(">Q", subject.data, l1 + 8 * entry)[0] & (COPIED - 1), 1, spec.snapshots)
        snapshots = self.snapshots(l1, n_l1) if spec.snapshots else 0
        extensions = list(spec.extensions)
        if spec.backing:
            extensions.append((0xE2792ACA, b"raw"))
            subject.files["base"] = contents(99, spec.size - size)
        if spec.data_file:
            extensions.append((0x44415441, b"data"))
        if spec.bitmaps:
            extensions.append((0x23852875, self.bitmap_extension()))
        if spec.crypt == 2:
            extensions.append((0x0537BE77, self.luks()))
        refcount_table = self.refcounts()
        self.header(n_l1, l1, refcount_table, snapshots, extensions)
        return subject

    def fill_l2(self, number: int, l2: int, n_l2: int, copied: int) -> None:
        spec, subject, size = self.spec, self.subject, self.cluster_size
        step = 16 if spec.extended else 8
        n_clusters = -(-spec.size // size)
        for index in range(n_l2):
            guest = number * n_l2 + index
            kind = spec.kinds[guest % len(spec.kinds)] if guest < n_clusters else "none"
            entry, bitmap = self.cluster(kind, guest, copied)
            subject.put(f"l2[{number}][{index}]", l2 + step * index, 8, entry)
            if spec.extended:
                subject.put(f"l2[{number}][{index}].bitmap", l2 + step * index + 8, 8, bitmap)

    def cluster(self, kind: Kind, guest: int, copied: int) -> tuple[int, int]:
        """L2 entry and subcluster bitmap."""
        spec, subject, size = self.spec, self.subject, self.cluster_size
        times = 1 + spec.snapshots if spec.snapshots else 1
        if kind == "none":
            return 0, 0
        if kind == "zero":
            return (0, 0xFFFF_FFFF << 32) if spec.extended else (1, 0)
        if kind == "packed":
            packed = _pack(contents(guest, size), spec.compression)
            offset = subject.allocate(len(packed))
            subject.put_bytes(f"packed[{guest}]", offset, packed)
            n_sectors = -(-len(packed) // 512)
            self.use(offset, n_sectors * 512, times)
            return COMPRESSED | n_sectors - 1 << 62 - (spec.cluster_bits - 8) | offset, 0
        if spec.data_file:
            offset = guest * size
            stored = subject.files["data"]
            subject.files["data"] = stored[:offset] + contents(guest, size) + stored[offset + size :]
        else:
            offset = subject.allocate(size)
            data = contents(guest, size)
            if spec.crypt:
                data = encrypt(spec.crypt, data, offset, guest * size)
            subject.data[offset : offset + size] = data
            self.use(offset, size, times)
        if spec.extended:
            bitmap = 0x0F0F_00FF << 32 | 0xF0F0_FF00 if kind == "zero-data" else 0xFFFF_FFFF
            return offset | copied, bitmap
        return offset | copied | (kind == "zero-data"), 0

    def snapshots(self, l1: int, n_l1: int) -> int:
        """All share every table with the disk."""
        spec, subject = self.spec, self.subject
        entries = []
        for number in range(spec.snapshots):
            copy = self.table(8 * n_l1)
            for index in range(n_l1):
                (word,) = struct.unpack_from(">Q", subject.data, l1 + 8 * index)
                subject.put(f"snapshot[{number}].l1[{index}]", copy + 8 * index, 8, word)
            entries.append(copy)
        n_bytes = sum(-(-(40 + spec.extra + 2) // 8) * 8 for _ in entries)
        place = self.table(n_bytes)
        position = place
        for number, copy in enumerate(entries):
            names = (("l1_table_offset", 8), ("l1_size", 4), ("id_size", 2), ("name_size", 2), ("date_sec", 4),
                     ("date_nsec", 4), ("vm_clock_nsec", 8), ("vm_state_size", 4), ("extra_size", 4))  # fmt: skip
            values = (copy, n_l1, 1, 1, 1, 0, 0, 0, spec.extra)
            for (name, n_field), value in zip(names, values, strict=True):
                subject.put(f"snapshot[{number}].{name}", position, n_field, value)
                position += n_field
            for name, value in (("vm_state_size_large", 0), ("disk_size", spec.size), ("icount", (1 << 64) - 1)):
                if spec.extra >= 24:
                    subject.put(f"snapshot[{number}].{name}", position, 8, value)
                    position += 8
            subject.put_bytes(f"snapshot[{number}].names", position, b"%d%c" % (number + 1, 97 + number))
            position = -(-(position + 2) // 8) * 8
        return place

    def bitmap_extension(self) -> bytes:
        spec, subject, size = self.spec, self.subject, self.cluster_size
        granularity_bits = 12
        n_granules = -(-spec.size >> granularity_bits)
        n_entries = -(-n_granules // (8 * size))
        entry_size = -(-(24 + 1) // 8) * 8
        directory = self.table(entry_size * spec.bitmaps)
        for number in range(spec.bitmaps):
            table = self.table(8 * n_entries)
            for index in range(n_entries):
                bits = self.table(size)
                subject.data[bits] = 0x5A
                subject.put(f"bitmap[{number}].table[{index}]", table + 8 * index, 8, bits)
            position = directory + number * entry_size
            names = (("table_offset", 8), ("table_size", 4), ("flags", 4), ("type", 1), ("granularity_bits", 1),
                     ("name_size", 2), ("extra_size", 4))  # fmt: skip
            for (name, n_field), value in zip(names, (table, n_entries, 2, 1, granularity_bits, 1, 0), strict=True):
                subject.put(f"bitmap[{number}].{name}", position, n_field, value)
                position += n_field
            subject.put_bytes(f"bitmap[{number}].name", position, b"%c" % (97 + number))
        return struct.pack(">IIQQ", spec.bitmaps, 0, entry_size * spec.bitmaps, directory)

    def luks(self) -> bytes:
        area = self.table(LUKS_SECTORS * 512)
        put_luks_header(self.subject, area, key_bytes=32, slot_sectors=256)
        digest, salt, material = luks_key()
        for place, value in ((112, digest), (208 + 8, salt), (8 * 512, material)):
            self.subject.data[area + place : area + place + len(value)] = value
        return struct.pack(">QQ", area, LUKS_SECTORS * 512)

    def refcounts(self) -> int:
        """Table of one cluster and as many blocks as that takes."""
        spec, subject, size = self.spec, self.subject, self.cluster_size
        table = self.table(size)
        per_block = size * 8 >> spec.order
        blocks: list[int] = []
        while len(blocks) * per_block * size < len(subject.data):
            blocks.append(self.table(size))
        for number, block in enumerate(blocks):
            subject.put(f"refcount_table[{number}]", table + 8 * number, 8, block)
            for index in range(per_block):
                count = self.counts.get(number * per_block + index, 0)
                if spec.order >= 3:
                    width = 1 << spec.order - 3
                    subject.put(f"refcount[{number * per_block + index}]", block + index * width, width, count)
                else:
                    place, shift = block + (index << spec.order) // 8, (index << spec.order) % 8
                    subject.put(f"refcount_byte[{place}]", place, 1, subject.data[place] | count << shift)
        for index in range(len(blocks), min(size // 8, len(blocks) + 2)):
            subject.put(f"refcount_table[{index}]", table + 8 * index, 8, 0)
        return table

    def header(
        self, n_l1: int, l1: int, refcount_table: int, snapshots: int, extensions: list[tuple[int, bytes]]
    ) -> None:
        spec, subject = self.spec, self.subject
        length = 112 if spec.version == 3 else 72
        position = length
        for number, (magic, data) in enumerate(extensions):
            subject.put(f"extension[{number}].magic", position, 4, magic)
            subject.put(f"extension[{number}].length", position + 4, 4, len(data))
            self.extension_data(number, magic, position + 8, data)
            position += 8 + -(-len(data) // 8) * 8
        subject.put("extension[end].magic", position, 4, 0)
        name = b"base" if spec.backing else b""
        subject.put_bytes("backing_name", position + 8, name)
        values: tuple[int, ...] = (0x514649FB, spec.version, position + 8 if name else 0, len(name),
                  spec.cluster_bits, spec.size, spec.crypt,
                  n_l1, l1, refcount_table, 1, spec.snapshots, snapshots)  # fmt: skip
        names: tuple[tuple[str, int], ...] = (("magic", 4), ("version", 4), ("backing_file_offset", 8),
                 ("backing_file_size", 4),
                 ("cluster_bits", 4), ("size", 8), ("crypt_method", 4), ("l1_size", 4), ("l1_table_offset", 8),
                 ("refcount_table_offset", 8), ("refcount_table_clusters", 4), ("n_snapshots", 4),
                 ("snapshots_offset", 8))  # fmt: skip
        if spec.version == 3:
            incompatible = spec.data_file << 2 | bool(spec.compression) << 3 | spec.extended << 4
            values += (incompatible, 0, bool(spec.bitmaps), spec.order, length, spec.compression)
            names += (("incompatible", 8), ("compatible", 8), ("autoclear", 8), ("refcount_order", 4),
                      ("header_length", 4), ("compression_type", 1))  # fmt: skip
        offset = 0
        for (field_name, n_field), value in zip(names, values, strict=True):
            subject.put(f"header.{field_name}", offset, n_field, value)
            offset += n_field

    def extension_data(self, number: int, magic: int, position: int, data: bytes) -> None:
        subject = self.subject
        if magic == 0x23852875:
            values = zip(
                ("n_bitmaps", "reserved", "directory_size", "directory_offset"),
                (4, 4, 8, 8),
                struct.unpack(">IIQQ", data),
                strict=True,
            )
            for name, n_bytes, value in values:
                subject.put(f"bitmaps.{name}", position, n_bytes, value)
                position += n_bytes
        else:
            subject.put_bytes(f"extension[{number}].data", position, data)


def build_qcow1(*, cluster_bits: int, l2_bits: int, packed: bool = False, backing: bool = False) -> Subject:
    """A version 1 image: every second guest cluster is there."""
    size = 1 << cluster_bits
    subject = Subject(cluster_size=512)
    name = b"base" if backing else b""
    if backing:
        subject.files["base"] = contents(99, SIZE - 700 // 512 * 512)
    n_l1 = -(-SIZE // (size << l2_bits))
    l1 = 56
    names = (("magic", 4), ("version", 4), ("backing_file_offset", 8), ("backing_file_size", 4), ("mtime", 4),
             ("size", 8), ("cluster_bits", 1), ("l2_bits", 1), ("padding", 2), ("crypt_method", 4),
             ("l1_table_offset", 8))  # fmt: skip
    values = (0x514649FB, 1, 48 if name else 0, len(name), 0, SIZE, cluster_bits, l2_bits, 0, 0, l1)
    offset = 0
    for (field_name, n_field), value in zip(names, values, strict=True):
        subject.put(f"header.{field_name}", offset, n_field, value)
        offset += n_field
    subject.put_bytes("backing_name", 48, name)
    subject.room(l1 + 8 * n_l1)
    for number in range(n_l1):
        l2 = subject.allocate(8 << l2_bits)
        subject.put(f"l1[{number}]", l1 + 8 * number, 8, l2)
        for index in range(1 << l2_bits):
            guest = (number << l2_bits) + index
            entry = 0
            if guest < -(-SIZE // size) and guest % 2 == 0:
                data = contents(guest, size)
                if packed and guest % 4 == 0:
                    data = _pack(data, 0)
                    entry = 1 << 63 | len(data) << 63 - cluster_bits
                offset = subject.allocate(len(data))
                subject.data[offset : offset + len(data)] = data
                entry |= offset
            subject.put(f"l2[{number}][{index}]", l2 + 8 * index, 8, entry)
    return subject


def build_luks_header() -> Subject:
    """The first 592 bytes of a LUKS area, keys of 64 bytes for AES in XTS; nobody has the passphrase."""
    subject = Subject()
    put_luks_header(subject, 0, key_bytes=64, slot_sectors=504)
    return subject


def put_luks_header(subject: Subject, start: int, *, key_bytes: int, slot_sectors: int) -> None:
    """A LUKS header at ``start``, with room for eight keys behind it, the first of which is in use."""
    subject.put_bytes("luks.magic", start, b"LUKS\xba\xbe")
    subject.put("luks.version", start + 6, 2, 1)
    for name, place, text in (("cipher", 8, b"aes"), ("mode", 40, b"xts-plain64"), ("hash", 72, b"sha256")):
        subject.put_bytes(f"luks.{name}", start + place, text)
    for name, place, value in (
        ("payload", 104, 8 + 8 * slot_sectors),
        ("key_bytes", 108, key_bytes),
        ("iterations", 164, 1000),
    ):
        subject.put(f"luks.{name}", start + place, 4, value)
    subject.put_bytes("luks.uuid", start + 168, b"8c3aa3a6-0000-4000-8000-000000000000")
    for number in range(8):
        place = start + 208 + 48 * number
        values = (0x00AC71F3 if number == 0 else 0xDEAD, 1000, 8 + slot_sectors * number, 4000)
        for name, at, value in zip(
            ("state", "iterations", "key_sector", "stripes"), (0, 4, 40, 44), values, strict=True
        ):
            subject.put(f"luks.slot[{number}].{name}", place + at, 4, value)


_DATA: tuple[Kind, ...] = ("data", "none", "data", "zero", "zero-data")
_PACKED: tuple[Kind, ...] = ("packed", "packed", "none", "data", "packed", "zero")
_V2: tuple[Kind, ...] = ("data", "none", "data")
_FEATURES = struct.pack(">BB46s", 0, 7, b"seven") + struct.pack(">BB46s", 1, 0, b"lazy refcounts")
IMAGES: dict[str, Callable[[], Subject]] = {
    "v3-512": lambda: build_qcow2(Qcow2(extensions=((0x6803F857, _FEATURES), (0x11223344, b"unknown")))),
    "v3-4k": lambda: build_qcow2(Qcow2(cluster_bits=12, kinds=_DATA, order=6)),
    "v3-refcount-1": lambda: build_qcow2(Qcow2(order=0)),
    "v3-refcount-2-snapshot": lambda: build_qcow2(Qcow2(order=1, snapshots=1)),
    "v3-snapshots": lambda: build_qcow2(Qcow2(cluster_bits=10, snapshots=2)),
    "v3-bitmaps": lambda: build_qcow2(Qcow2(cluster_bits=10, bitmaps=2)),
    "v3-backing": lambda: build_qcow2(Qcow2(cluster_bits=10, backing=True)),
    "v3-data-file": lambda: build_qcow2(Qcow2(cluster_bits=10, data_file=True, kinds=("data", "none", "zero"))),
    "v3-deflate": lambda: build_qcow2(Qcow2(cluster_bits=12, kinds=_PACKED, snapshots=1)),
    "v3-zstd": lambda: build_qcow2(Qcow2(cluster_bits=12, kinds=_PACKED, compression=1)),
    "v3-extended": lambda: build_qcow2(Qcow2(cluster_bits=14, extended=True, size=4 * SIZE)),
    "v3-extended-packed": lambda: build_qcow2(Qcow2(cluster_bits=14, extended=True, size=4 * SIZE, kinds=_PACKED)),
    "v2": lambda: build_qcow2(Qcow2(version=2, kinds=_V2)),
    "v2-snapshot-4k": lambda: build_qcow2(Qcow2(version=2, cluster_bits=12, kinds=_V2, snapshots=1)),
    "v1": lambda: build_qcow1(cluster_bits=9, l2_bits=6),
    "v1-4k": lambda: build_qcow1(cluster_bits=12, l2_bits=9),
    "v1-deflate": lambda: build_qcow1(cluster_bits=12, l2_bits=9, packed=True),
    "v1-backing": lambda: build_qcow1(cluster_bits=10, l2_bits=6, backing=True),
}
"""Whole images, by name."""
ENCRYPTED: dict[str, Callable[[], Subject]] = {
    "v3-luks": lambda: build_qcow2(Qcow2(cluster_bits=12, kinds=_DATA, crypt=2)),
    "v3-luks-snapshot": lambda: build_qcow2(Qcow2(cluster_bits=12, crypt=2, snapshots=1)),
    "v2-aes": lambda: build_qcow2(Qcow2(version=2, cluster_bits=10, kinds=_V2, crypt=1)),
}
"""Whole images that the passphrase of :mod:`.encrypted` opens, by name."""
TEXTS = {
    "options": b"ro,allow_other,allow-dir=/srv\\,x,uid=0,x-systemd.automount,backing_format=raw,noatime,name=d",
    "configuration": b"# bases\nallow-dir = /srv/bases\n\nallow-dir=/mnt/\xc3\xa4\nother = 1\n",
    "command-line": b"-f\0a.qcow2\0/mnt/x\0-o\0ro,allow_other,umask=022\0--l2-cache-size\0" + b"64M\0--name=d",
    "names": b"f\0a/../f\0b\0../in/f\0l1\0l0/./f\0/",
    "requests": b'[1, "check_served", [4096, true]]\n[2, "adopt", []]\n[3, "mend_served", [1, 0, 1, 0]]',
}
"""What is no image."""


@cache
def subject(name: str) -> Subject:
    """The image, ``luks``, a disk with partitions, or one of :data:`TEXTS`; not to be changed."""
    from .disks import DISKS  # it builds on this module

    if name == "luks":
        return build_luks_header()
    if name in TEXTS:
        return Subject(bytearray(TEXTS[name]))
    return (IMAGES | ENCRYPTED | DISKS)[name]()
