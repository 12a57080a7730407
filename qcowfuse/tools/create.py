"""Making an empty image: QCOW2 of version 2 or 3, or QCOW version 1, optionally over a backing file.

1. What can't be is refused before anything is made or overwritten.
2. The layout is header, refcount table, refcount blocks, L1 table, LUKS area and, with preallocation, L2 tables and
   data, without gaps; only what is not zero is written.
3. The rules of :mod:`~qcowfuse.tools.new_file` hold, for an external data file too. Its name is relative to the
   image's folder.
4. Raw external data means that the metadata is preallocated: QEMU trusts the tables, not the file, to tell what is
   there. With extended L2 entries preallocated clusters have no subcluster yet, so that a backing file shows.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ..errors import BackingChainError
from ..format.entries import COPIED, serialise_table
from ..format.extensions import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    EXTENSION_FEATURE_NAMES,
    FEATURE_KIND_AUTOCLEAR,
    FEATURE_KIND_COMPATIBLE,
    FEATURE_KIND_INCOMPATIBLE,
    HeaderExtension,
    serialise_extensions,
)
from ..format.geometry import MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, SECTOR_SIZE, WORD_SIZE, divide_up, round_up
from ..format.header import Qcow1Header, Qcow2Header
from ..format.header_bytes import serialise_header
from ..format.header_fields import (
    AUTOCLEAR_RAW_DATA_FILE,
    COMPATIBLE_LAZY_REFCOUNTS,
    CRYPT_NONE,
    EXTENDED_L2_MIN_CLUSTER_BITS,
    INCOMPATIBLE_COMPRESSION,
    INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_EXTENDED_L2,
    MAX_BACKING_NAME,
    MAX_L1_SIZE,
    MAX_REFCOUNT_TABLE_SIZE,
    MAX_V1_L1_SIZE,
    OFFSET_LIMIT,
    V1_HEADER_LENGTH,
    V2_HEADER_LENGTH,
    V3_KNOWN_HEADER_LENGTH,
)
from ..format.header_fields import COMPRESSION_DEFLATE as COMPRESSION_DEFLATE
from ..format.header_fields import COMPRESSION_ZSTD as COMPRESSION_ZSTD
from ..format.refcounts import empty_refcounts, entries_per_block, serialise_refcounts
from ..storage.opened import length_of_path
from ..system.alone import run_blocking
from .new_file import CreateError as CreateError
from .new_file import NewFile, Progress, open_new_file
from .new_file import Preallocation as Preallocation

if TYPE_CHECKING:
    from .create_encryption import Encryption, LuksArea

MAX_DISK_SIZE = OFFSET_LIMIT - SECTOR_SIZE
"""Bytes."""

_FEATURE_NAMES = (
    (FEATURE_KIND_INCOMPATIBLE, 0, "dirty bit"),
    (FEATURE_KIND_INCOMPATIBLE, 1, "corrupt bit"),
    (FEATURE_KIND_INCOMPATIBLE, 2, "external data file"),
    (FEATURE_KIND_INCOMPATIBLE, 3, "compression type"),
    (FEATURE_KIND_INCOMPATIBLE, 4, "extended L2 entries"),
    (FEATURE_KIND_COMPATIBLE, 0, "lazy refcounts"),
    (FEATURE_KIND_AUTOCLEAR, 0, "bitmaps"),
    (FEATURE_KIND_AUTOCLEAR, 1, "raw external data"),
)
_MIN_CLUSTER_SIZE_FOR_NAMES = 8192
_BACKING_FORMATS = ("raw", "qcow", "qcow2")


class CreateOptions(NamedTuple):
    """What to make. ``size`` in bytes, None: that of the backing file."""

    format_name: str = "qcow2"
    size: int | None = None
    cluster_bits: int = 16
    version: int = 3
    refcount_order: int = 4
    extended_l2: bool = False
    lazy_refcounts: bool = False
    compression_type: int = COMPRESSION_DEFLATE
    backing_file: str | None = None
    backing_format: str | None = None
    preallocation: Preallocation = Preallocation.OFF
    data_file: str | None = None
    data_file_raw: bool = False
    encryption: Encryption | None = None

    def require_possible(self) -> None:
        """Raises CreateError for what cannot be."""
        if self.backing_file is None:
            _require(self.backing_format is None, "a backing format needs a backing file (-b)")
            _require(self.size is not None, "the size is missing")
        else:
            _require(
                self.backing_format in _BACKING_FORMATS,
                f"backing format {self.backing_format or 'is missing'} (-F): expected {', '.join(_BACKING_FORMATS)}",
            )
            n_bytes = len(os.fsencode(self.backing_file))
            _require(0 < n_bytes <= MAX_BACKING_NAME, f"backing file name of {n_bytes} bytes: expected 1 to 1023")
        _require(
            MIN_CLUSTER_BITS <= self.cluster_bits <= MAX_CLUSTER_BITS,
            "cluster_size: expected a power of two from 512 to 2M",
        )
        if self.version < 3:
            for is_wanted, name in (
                (self.refcount_order != 4, "refcount_bits other than 16"),
                (self.extended_l2, "extended_l2"),
                (self.lazy_refcounts, "lazy_refcounts"),
                (self.compression_type != COMPRESSION_DEFLATE, "compression_type zstd"),
                (self.data_file is not None, "data_file"),
            ):
                _require(not is_wanted, f"{name} needs compat=1.1")
        if self.extended_l2:
            _require(
                self.cluster_bits >= EXTENDED_L2_MIN_CLUSTER_BITS, "extended_l2 needs a cluster_size of 16k at least"
            )

        _require(self.data_file is not None or not self.data_file_raw, "data_file_raw needs a data_file")
        _require(self.encryption is None or not self.data_file_raw, "data_file_raw does not go with encryption")
        if self.backing_file is not None:
            _require(not self.data_file_raw, "data_file_raw does not go with a backing file")
            _require(
                self.preallocation is Preallocation.OFF or self.extended_l2,
                "preallocation over a backing file needs extended_l2",
            )

    @property
    def effective_preallocation(self) -> Preallocation:
        """What is preallocated, asked for or not."""
        if self.data_file_raw and self.preallocation is Preallocation.OFF:
            return Preallocation.METADATA
        return self.preallocation


class _Layout(NamedTuple):
    """``parts``: what of the image is not zero, about ``n_bytes``; ``length`` of the file."""

    parts: Iterable[tuple[int, bytes]]
    length: int
    n_bytes: int = 0


def _no_progress(n_done: int, n_all: int) -> None:
    pass


async def create_image(
    path: str,
    options: CreateOptions,
    *,
    overwrite: bool = False,
    progress: Progress = _no_progress,
    passphrase: bytes | bytearray | None = None,
    mode: int | None = None,
) -> int:
    """Make the image; its virtual size in bytes is returned. ``passphrase``: for an encrypted one. ``overwrite``: a
    file that exists, or a block device. ``mode``: the most that new files may have of
    the usual permissions.

    Raises FileExistsError, CreateError, BackingChainError, ImageLockedError, OSError.
    """
    options.require_possible()
    size = options.size
    if options.backing_file is not None:
        backing_size = await _backing_size(path, options.backing_file, options.backing_format)
        size = backing_size if size is None else size
    assert size is not None
    size = round_up(size, SECTOR_SIZE)
    luks: LuksArea | None = None
    if options.encryption is not None:
        from .create_encryption import check_passphrase, make_area

        if passphrase is None:
            raise CreateError("an encrypted image needs a passphrase (--key-file)")
        check_passphrase(passphrase)
        if options.encryption.spec is not None:
            luks = await run_blocking(make_area, options.encryption, passphrase)
    layout = _layout_v1(size, options) if options.format_name == "qcow" else _layout_v2(size, options, luks)
    await _write(path, layout, options, size, overwrite=overwrite, progress=progress, mode=mode)
    return size


async def fill_image(
    file: NewFile, size: int, cluster_bits: int, backing_file: str | None, backing_format: str
) -> None:
    """Make an empty QCOW2 image over a backing file in ``file``, which stays open. None: the backing file has no name
    that could be written down. ``size``: of the disk, in bytes. Raises CreateError, OSError."""
    options = CreateOptions(
        size=size,
        cluster_bits=cluster_bits,
        backing_file=backing_file,
        backing_format=None if backing_file is None else backing_format,
    )
    options.require_possible()
    layout = _layout_v2(size, options, None)
    await file.reserve(layout.length, Preallocation.OFF, _no_progress)
    await file.write(layout.parts, layout.n_bytes, _no_progress)


async def _backing_size(path: str, name: str, format_name: str | None) -> int:
    backing_path = os.path.join(os.path.dirname(path), name)
    try:
        if os.path.exists(path) and os.path.samefile(path, backing_path):
            raise BackingChainError(path, "the image would be its own backing file")
        if format_name == "raw":
            return await run_blocking(length_of_path, backing_path)
        from .info import describing

        async with describing(backing_path, force_share=True) as described:
            return described.info.virtual_size
    except OSError as error:
        raise BackingChainError(path, f"cannot open its backing file {backing_path}: {error.strerror}") from error


def _layout_v1(size: int, options: CreateOptions) -> _Layout:
    _require(size > 0, "version 1 has no disks of 0 bytes")
    name = os.fsencode(options.backing_file or "")
    # Small clusters over a backing file: less to copy. QEMU's choice.
    cluster_bits, l2_bits = (9, 12) if name else (12, 9)
    l1_table_offset = round_up(V1_HEADER_LENGTH + len(name), WORD_SIZE)
    header = Qcow1Header(
        backing_file_offset=V1_HEADER_LENGTH if name else 0,
        backing_file_size=len(name),
        mtime=0,
        size=size,
        cluster_bits=cluster_bits,
        l2_bits=l2_bits,
        crypt_method=CRYPT_NONE if options.encryption is None else options.encryption.crypt_method,
        l1_table_offset=l1_table_offset,
        backing_file=options.backing_file,
    )
    l1_bytes = header.n_l1_entries * WORD_SIZE
    _require(l1_bytes <= MAX_V1_L1_SIZE, f"a disk of {size} bytes is too large for version 1")
    return _Layout([(0, serialise_header(header))], round_up(l1_table_offset + l1_bytes, SECTOR_SIZE))


def _layout_v2(size: int, options: CreateOptions, luks: LuksArea | None) -> _Layout:
    cluster_bits, order = options.cluster_bits, options.refcount_order
    cluster_size = 1 << cluster_bits
    l2_bits = cluster_bits - (4 if options.extended_l2 else 3)
    # QEMU stores at least one entry, so that an empty disk has an L1 table too.
    l1_size = max(divide_up(size, 1 << cluster_bits + l2_bits), 1)
    _require(
        l1_size * WORD_SIZE <= MAX_L1_SIZE,
        f"a disk of {size} bytes is too large for clusters of {cluster_size} bytes: use a larger cluster_size",
    )
    l1_clusters = divide_up(l1_size * WORD_SIZE, cluster_size)
    is_preallocated = options.effective_preallocation is not Preallocation.OFF
    n_guest_clusters = divide_up(size, cluster_size) if is_preallocated else 0
    n_tables = divide_up(n_guest_clusters, 1 << l2_bits)
    n_data = n_guest_clusters if options.data_file is None else 0
    luks_clusters = 0 if luks is None else divide_up(luks.length, cluster_size)
    n_per_block = entries_per_block(cluster_bits, order)
    n_blocks = table_clusters = 1
    while True:
        n_clusters = 1 + table_clusters + n_blocks + l1_clusters + luks_clusters + n_tables + n_data
        needed = divide_up(n_clusters, n_per_block)
        needed_table = divide_up(needed * WORD_SIZE, cluster_size)
        if needed <= n_blocks and needed_table <= table_clusters:
            break
        n_blocks, table_clusters = max(needed, n_blocks), max(needed_table, table_clusters)
    _require(table_clusters << cluster_bits <= MAX_REFCOUNT_TABLE_SIZE, "the refcount table would be too large")
    first_block = 1 + table_clusters
    l1_cluster = first_block + n_blocks
    luks_offset = l1_cluster + l1_clusters << cluster_bits
    first_table = l1_cluster + l1_clusters + luks_clusters
    pointer: HeaderExtension | None = None
    if luks is not None:
        from ..format.luks import luks_pointer

        pointer = luks_pointer(luks_offset, luks.length)
    header = serialise_header(
        _header_v2(size, options, l1_size=l1_size, l1_cluster=l1_cluster, table_clusters=table_clusters, luks=pointer)
    )

    def parts() -> Iterator[tuple[int, bytes]]:
        yield 0, header
        blocks = array("Q", range(first_block << cluster_bits, l1_cluster << cluster_bits, cluster_size))
        yield cluster_size, serialise_table(blocks, 0, len(blocks))
        yield from _refcount_blocks(first_block, n_clusters, options)
        for place, data in luks.parts if luks is not None else ():
            yield luks_offset + place, data
        if n_tables:
            end = first_table + n_tables << cluster_bits
            tables = array("Q", range(COPIED + (first_table << cluster_bits), COPIED + end, cluster_size))
            yield l1_cluster << cluster_bits, serialise_table(tables, 0, n_tables)
            first_data = 0 if options.data_file is not None else end
            yield from _l2_tables(first_table, n_guest_clusters, first_data, l2_bits, options)

    return _Layout(parts(), n_clusters << cluster_bits, (n_blocks + n_tables) << cluster_bits)


def _refcount_blocks(first_block: int, n_clusters: int, options: CreateOptions) -> Iterator[tuple[int, bytes]]:
    """The blocks in which the first ``n_clusters`` are in use."""
    cluster_bits, order = options.cluster_bits, options.refcount_order
    n_per_block = entries_per_block(cluster_bits, order)
    full = b""
    for number in range(divide_up(n_clusters, n_per_block)):
        n_here = min(n_clusters - number * n_per_block, n_per_block)
        data = full
        if n_here < n_per_block or not full:
            counts = empty_refcounts(cluster_bits, order)
            counts[:n_here] = array(counts.typecode, [1]) * n_here
            data = serialise_refcounts(counts, order, 0, n_per_block)
            full = data if n_here == n_per_block else full
        yield first_block + number << cluster_bits, data


def _l2_tables(
    first_table: int, n_guest_clusters: int, data_offset: int, l2_bits: int, options: CreateOptions
) -> Iterator[tuple[int, bytes]]:
    """L2 tables in which the data clusters follow each other from ``data_offset`` on. But for the last one, each is
    the one before with the same number added to all entries."""
    cluster_bits = options.cluster_bits
    n_full, n_rest = divmod(n_guest_clusters, 1 << l2_bits)
    if n_full:
        table = int.from_bytes(_l2_table(data_offset, 1 << l2_bits, options), "big")
        ones = array("Q", [1, 0] if options.extended_l2 else [1]) * (1 << l2_bits)
        step = int.from_bytes(serialise_table(ones, 0, len(ones)), "big") << cluster_bits + l2_bits
        for number in range(n_full):
            yield first_table + number << cluster_bits, table.to_bytes(8 * len(ones), "big")
            table += step
    if n_rest:
        offset = data_offset + (n_full << l2_bits + cluster_bits)
        yield first_table + n_full << cluster_bits, _l2_table(offset, n_rest, options)


def _l2_table(data_offset: int, n_entries: int, options: CreateOptions) -> bytes:
    start = COPIED + data_offset
    entries = array("Q", range(start, start + (n_entries << options.cluster_bits), 1 << options.cluster_bits))
    if options.extended_l2:
        words = array("Q", bytes(2 * WORD_SIZE * n_entries))
        words[::2] = entries
        entries = words
    return serialise_table(entries, 0, len(entries))


def _header_v2(
    size: int,
    options: CreateOptions,
    *,
    l1_size: int,
    l1_cluster: int,
    table_clusters: int,
    luks: HeaderExtension | None,
) -> Qcow2Header:
    cluster_size = 1 << options.cluster_bits
    incompatible = INCOMPATIBLE_EXTENDED_L2 if options.extended_l2 else 0
    if options.data_file is not None:
        incompatible |= INCOMPATIBLE_DATA_FILE
    if options.compression_type != COMPRESSION_DEFLATE:
        incompatible |= INCOMPATIBLE_COMPRESSION
    extensions: list[HeaderExtension] = []
    if options.backing_format is not None:
        extensions.append(HeaderExtension(EXTENSION_BACKING_FORMAT, options.backing_format.encode()))
    if options.data_file is not None:
        extensions.append(HeaderExtension(EXTENSION_DATA_FILE, os.fsencode(options.data_file)))
    if luks is not None:
        extensions.append(luks)
    if options.version >= 3 and cluster_size >= _MIN_CLUSTER_SIZE_FOR_NAMES:
        names = b"".join(bytes([kind, bit]) + name.encode().ljust(46, b"\0") for kind, bit, name in _FEATURE_NAMES)
        extensions.append(HeaderExtension(EXTENSION_FEATURE_NAMES, names))
    header_length = V3_KNOWN_HEADER_LENGTH if options.version >= 3 else V2_HEADER_LENGTH
    name = os.fsencode(options.backing_file or "")
    name_offset = 0
    if name:
        name_offset = header_length + len(serialise_extensions(extensions)) + 8
    _require(
        header_length + len(serialise_extensions(extensions)) + 8 + len(name) <= cluster_size,
        "the names of the files do not fit into the first cluster: use a larger cluster_size",
    )
    return Qcow2Header(
        version=options.version,
        backing_file_offset=name_offset,
        backing_file_size=len(name),
        cluster_bits=options.cluster_bits,
        size=size,
        crypt_method=CRYPT_NONE if options.encryption is None else options.encryption.crypt_method,
        l1_size=l1_size,
        l1_table_offset=l1_cluster << options.cluster_bits,
        refcount_table_offset=cluster_size,
        refcount_table_clusters=table_clusters,
        n_snapshots=0,
        snapshots_offset=0,
        incompatible_features=incompatible,
        autoclear_features=AUTOCLEAR_RAW_DATA_FILE if options.data_file_raw else 0,
        compatible_features=COMPATIBLE_LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        refcount_order=options.refcount_order,
        header_length=header_length,
        compression_type=options.compression_type,
        extensions=tuple(extensions),
        backing_file=options.backing_file,
    )


async def _write(
    path: str,
    layout: _Layout,
    options: CreateOptions,
    size: int,
    *,
    overwrite: bool,
    progress: Progress,
    mode: int | None,
) -> None:
    files: list[NewFile] = []
    try:
        if options.data_file is not None:
            from ..driver.files import local_path

            data_path = local_path(path, options.data_file, "data file")
            _require(os.path.realpath(data_path) != os.path.realpath(path), "the image would be its own data file")
            files.append(await run_blocking(partial(open_new_file, data_path, overwrite=overwrite, mode=mode)))
        files.append(await run_blocking(partial(open_new_file, path, overwrite=overwrite, mode=mode)))
        image = files[-1]
        if image.is_device and options.format_name == "qcow":
            raise CreateError(f"{path}: version 1 only grows at the end of its file, and a block device has none")
        preallocation = options.effective_preallocation
        if options.data_file is not None:
            is_mapped = preallocation is not Preallocation.OFF
            await files[0].reserve(size, preallocation, progress, may_hold_anything=not is_mapped)
            preallocation = Preallocation.OFF
        await image.reserve(layout.length, preallocation, progress)
        await image.write(layout.parts, layout.n_bytes, progress)
        for file in files:
            await file.publish()
    except BaseException:
        for file in files:
            file.discard()
        raise
    finally:
        for file in files:
            file.close()


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise CreateError(text)
