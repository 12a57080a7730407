"""open_image(): what may be opened, the backing chain, loops and depth.

1. The image that the user named must be QCOW. It is opened for writing unless asked otherwise; everything below
   it is opened read-only, and all of it is locked the way QEMU locks it.
2. A name found inside an image is followed as far as :mod:`~qcowfuse.driver.files` allows.
3. The format of a backing file is the one that the image names. An image that names none (version 1 never does) is
   believed to mean raw, so a backing file that looks like QCOW is then refused rather than probed: a guest that
   writes to a raw disk could make it look like QCOW and have a file of the host shown. The user can say which it is,
   or that the content shall decide (``OpenOptions.backing_format``). An external data file
   (:mod:`~qcowfuse.driver.layers.data_file`) is opened with its image, and as it is.
4. A chain is at most :data:`~qcowfuse.driver.options.MAX_BACKING_DEPTH` deep and meets no file twice.
5. Whatever fails, everything that was opened is closed again.
6. Encrypted layers are unlocked when all of the chain is open, all with the same passphrase.
7. A snapshot is the same image with another L1 table and size: the top layer's header says so before anything
   else looks at it. The table of snapshots is not read unless one is asked for.
8. What only some images need is imported here, when the header says that this one does: start-up is quick, and
   nothing is left to be imported while a mount serves, when a file to import might lie on that very mount.
"""

from __future__ import annotations

from array import array
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..consistency.lost_end import warn_of_lost_end
from ..errors import BackingChainError, FormatError, ImageUsageError, UnsupportedFeatureError
from ..format.entries import Table, entry_format
from ..format.extensions import EXTENSION_BITMAPS, find_extension
from ..format.geometry import Geometry
from ..format.header import Qcow1Header, Qcow2Header
from ..format.header_fields import (
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_RAW_DATA_FILE,
    CRYPT_NONE,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    INCOMPATIBLE_EXTENDED_L2,
    MAX_L1_SIZE,
)
from ..format.header_parsing import probe_format
from ..storage.base import Storage, pread
from ..tables.header import read_header
from ..tables.paged_table import PagedTable, TableParts
from ..tables.snapshot_table import check_snapshot_l1_table, find_stored_snapshot, load_any_l1_table, open_l1_table
from .files import ChainFile, ChainFiles, StorageOpener, plain_name
from .layers.data_file import (
    DataClusters,
    DataFileMapping,
    check_length,
    has_data_file,
    has_raw_data_file,
    open_data_file,
)
from .layers.mapping import Layer, Mapping, RawLayer
from .layers.table_cache import TableCache
from .options import MAX_BACKING_DEPTH, L2CacheSize, OpenOptions
from .qcow_image import QcowImage
from .reading.decoding import CompressedSource
from .writing.changes import WritableParts
from .writing.feature_bits import FeatureBits
from .writing.host_clusters import load_host_clusters
from .writing.refcount_allocation import RefcountAllocator

if TYPE_CHECKING:
    from .layers.encryption import EncryptedData
    from .writing.dirty_bitmaps import DirtyBitmaps

DEFAULT_L2_CACHE_BYTES = 32 << 20
_RAW_FORMATS = frozenset({"raw", "file", "host_device"})


@dataclass(slots=True)
class _Opened:
    path: str
    storage: Storage
    header: Qcow1Header | Qcow2Header | None
    """None for raw."""
    l1_table: Table | PagedTable
    data: Storage | None = None
    """The external data file."""
    encrypted: EncryptedData | None = None


async def open_image(
    path: str, options: OpenOptions | None = None, *, opener: StorageOpener | None = None
) -> QcowImage:
    """Open a QCOW image and its backing chain. ``opener`` stands in for files: see :mod:`~qcowfuse.driver.files`.

    Raises FormatError (not QCOW, damaged), UnsupportedFeatureError, ImageLockedError, BackingChainError,
    ImageUsageError (cannot be repaired, has no such snapshot, wants a key), OSError. A writable image with the dirty
    bit is repaired first, which may take a while, and the log says so.
    """
    options = options or OpenOptions()
    if options.snapshot is not None:
        options = options._replace(read_only=True)
    async with AsyncExitStack() as stack:
        parts = TableParts()
        layers = await _open_chain(path, options, opener, stack, parts)
        if options.snapshot is not None:
            layers[0] = await _at_snapshot(layers[0], options.snapshot, parts)
        await _unlock_layers(layers, options)
        if not options.read_only:
            layers[0] = await _ready_to_write(path, layers[0])
        image = await _assemble(path, layers, options)
        stack.pop_all()
    return image


async def first_encrypted_layer(path: str, options: OpenOptions) -> str | None:
    """The path of the first layer of a chain that needs a key, None when no layer does.

    Raises what :func:`open_image` raises.
    """
    async with AsyncExitStack() as stack:
        for layer in await _open_chain(path, options._replace(read_only=True), None, stack, TableParts()):
            if _is_encrypted(layer):
                return layer.path
    return None


def _is_encrypted(layer: _Opened) -> bool:
    return layer.header is not None and layer.header.crypt_method != CRYPT_NONE


async def _unlock_layers(layers: list[_Opened], options: OpenOptions) -> None:
    """One passphrase is tried on every encrypted layer. Raises WrongKeyError for the one that it does not open."""
    if not any(map(_is_encrypted, layers)):
        return
    from .layers.encryption import Passphrase, locked, unlock

    passphrase = Passphrase(options.passphrase)
    try:
        for layer in layers:
            if layer.header is None or not _is_encrypted(layer):
                continue
            if options.tables_only:
                layer.encrypted = locked(layer.path, layer.data or layer.storage)
                continue
            try:
                data = layer.data or layer.storage
                layer.encrypted = await unlock(layer.path, layer.storage, data, layer.header, passphrase)
            except FormatError as error:
                if layer is layers[0]:
                    raise
                raise BackingChainError(layer.path, f"backing file of {layers[0].path}: {error}") from error
    finally:
        passphrase.wipe()


async def _open_chain(
    path: str, options: OpenOptions, opener: StorageOpener | None, stack: AsyncExitStack, parts: TableParts
) -> list[_Opened]:
    writable = not options.read_only
    opened: list[_Opened] = []
    with ChainFiles(options, opener) as files:
        file = await files.open_image(path, writable=writable)
        next_format = "qcow"
        while True:
            stack.push_async_callback(file.storage.aclose)
            layer = await _open_below(opened, file, next_format, parts)
            is_top = not opened
            opened.append(layer)
            if isinstance(layer.header, Qcow2Header) and has_data_file(layer.header):
                override = options.data_file if is_top else None
                layer.data = await open_data_file(
                    files, file, layer.header, override=override, writable=is_top and writable
                )
                stack.push_async_callback(layer.data.aclose)
            elif is_top and options.data_file is not None:
                raise ImageUsageError(f"{path}: has no external data file")
            name = None if layer.header is None else layer.header.backing_file
            if not name:
                break
            if len(opened) > MAX_BACKING_DEPTH:
                raise BackingChainError(path, f"the backing chain is deeper than {MAX_BACKING_DEPTH} files")
            holder = file
            if is_top and options.backing_file is not None:
                next_format = _backing_format_of(layer, options.backing_format)
                file = await files.open_given(holder, options.backing_file, "backing file", writable=False)
            else:
                plain_name(holder.path, name, "backing file")  # says more of a protocol than its format does
                next_format = _backing_format_of(layer, options.backing_format)
                file = await files.open_named(holder, name, "backing file", writable=False)
            holder.forget_folder()
    if options.backing_file is not None and len(opened) == 1:
        raise ImageUsageError(f"{path}: has no backing file")
    return opened


async def _open_below(opened: list[_Opened], file: ChainFile, format_name: str, parts: TableParts) -> _Opened:
    """The layer in ``file``, below the others. Raises FormatError for the first one, BackingChainError for others."""
    if not opened:
        return await _open_layer(file.path, file.storage, format_name, parts)
    if format_name == "unnamed":
        start = await pread(file.storage, 0, min(4, file.storage.size()))
        if bytes(start) == b"QFI\xfb":
            detail = (
                f"names backing file {file.path} without its format, and that file looks like QCOW; say what it is: "
                "--backing-format qcow2, or raw if it is a raw disk in which a guest may have written that"
            )
            raise BackingChainError(opened[-1].path, detail)
        format_name = "raw"
    try:
        return await _open_layer(file.path, file.storage, format_name, parts)
    except FormatError as error:
        raise BackingChainError(file.path, f"backing file of {opened[-1].path}: {error}") from error


async def _open_layer(path: str, storage: Storage, format_name: str, parts: TableParts) -> _Opened:
    """Read a layer's header and, unless it is large, its L1 table. ``format_name``: raw, qcow (any version), or auto
    to go by content."""
    if format_name == "raw":
        return _Opened(path, storage, None, array("Q"))
    start = await pread(storage, 0, min(512, storage.size()))
    probed = probe_format(bytes(start))
    if probed is None:
        if format_name == "auto":
            return _Opened(path, storage, None, array("Q"))
        raise FormatError("header", 0, f"no QCOW image: starts with {bytes(start[:4]).hex(' ') or 'nothing'}")
    header = await read_header(storage)
    return _Opened(path, storage, header, await open_l1_table(storage, header, parts))


async def _at_snapshot(layer: _Opened, id_or_name: str, parts: TableParts) -> _Opened:
    """The layer as it was when the snapshot was made. An id goes before a name, as in QEMU."""
    header = layer.header
    if not isinstance(header, Qcow2Header):
        raise ImageUsageError(f"{layer.path}: no snapshot {id_or_name!r}: images of version 1 have none")
    if layer.data is not None:
        raise ImageUsageError(f"{layer.path}: no snapshot {id_or_name!r}: an external data file knows none")
    snapshot = await find_stored_snapshot(layer.path, layer.storage, header, id_or_name)
    check_snapshot_l1_table(header, snapshot)
    size = header.size if snapshot.disk_size is None else snapshot.disk_size
    header = header._replace(size=size, l1_table_offset=snapshot.l1_table_offset, l1_size=snapshot.l1_size)
    n_needed = _geometry_of(header).n_l1_entries
    if n_needed * 8 > MAX_L1_SIZE:
        raise FormatError("snapshot table entry", None, f"disk of {size} bytes, more than any L1 table can map")
    # What a table is too short for was never allocated: QEMU, too, takes it for that.
    return replace(layer, header=header, l1_table=await open_l1_table(layer.storage, header, parts, n_needed))


def _backing_format_of(layer: _Opened, unnamed_format: str | None) -> str:
    """The format of a layer's backing file as :func:`_open_layer` takes it; ``unnamed``: nobody says which."""
    named = layer.header.backing_format if isinstance(layer.header, Qcow2Header) else None
    if named is None:
        return {None: "unnamed", "raw": "raw", "auto": "auto"}.get(unnamed_format, "qcow")
    if named in ("qcow", "qcow2"):
        return "qcow"
    if named in _RAW_FORMATS:
        return "raw"
    raise UnsupportedFeatureError([f"backing format {named}"])


async def _assemble(path: str, opened: list[_Opened], options: OpenOptions) -> QcowImage:
    top = opened[0]
    header = top.header
    assert header is not None
    cache = TableCache(0)
    layers: list[Layer] = []
    sources: list[CompressedSource | None] = []
    for number, layer in enumerate(opened):
        if layer.header is None:
            layers.append(RawLayer(layer.storage))
            sources.append(None)
            continue
        mapping = _mapping_of(number, layer, cache)
        is_written = number == 0 and not options.read_only
        if not is_written:
            mask = mapping.entry_format.l1_offset_mask
            warn_of_lost_end(layer.path, layer.storage, layer.header, layer.l1_table, mask)
        if layer.data is not None and isinstance(layer.header, Qcow2Header):
            await check_length(layer.path, layer.header, mapping, writable=is_written)
        layers.append(mapping)
        compression = layer.header.compression_type if isinstance(layer.header, Qcow2Header) else 0
        sources.append(CompressedSource(layer.storage, mapping.entry_format, compression))
    top_mapping = layers[0]
    assert isinstance(top_mapping, Mapping)
    cache.budget = _cache_budget(top_mapping.geometry, options.l2_cache_size)
    return QcowImage(
        path=path,
        format_name="qcow" if isinstance(header, Qcow1Header) else "qcow2",
        layers=layers,
        sources=sources,
        cache=cache,
        storages=[storage for layer in opened for storage in (layer.storage, layer.data) if storage is not None],
        parts=None if options.read_only else await _writable_parts(path, top, top_mapping, options),
    )


async def _writable_parts(path: str, top: _Opened, mapping: Mapping, options: OpenOptions) -> WritableParts:
    header = top.header
    assert header is not None
    assert not isinstance(top.l1_table, PagedTable)
    allocator, metadata, unguarded = await load_host_clusters(
        path, top.storage, header, entry_format=mapping.entry_format, l1_table=top.l1_table
    )
    bitmaps: DirtyBitmaps | None = None
    if isinstance(allocator, RefcountAllocator) and isinstance(header, Qcow2Header) and _may_have_bitmaps(header):
        from .writing.dirty_bitmaps import load_kept_bitmaps

        bitmaps = await load_kept_bitmaps(
            top.storage, header, size=mapping.size, allocator=allocator, metadata=metadata
        )
    data_clusters: DataClusters | None = None
    if top.data is not None:
        cluster_size = 1 << header.cluster_bits
        data_clusters = DataClusters(top.data, cluster_size=cluster_size, is_raw=has_raw_data_file(header))
    return WritableParts(
        allocator=allocator,
        metadata=metadata,
        l1_table_offset=header.l1_table_offset,
        feature_bits=_feature_bits_of(top, header, kept_autoclear=0 if bitmaps is None else AUTOCLEAR_BITMAPS),
        bitmaps=bitmaps,
        unguarded=unguarded,
        data_clusters=data_clusters,
        discard=options.discard,
        detect_zeroes=options.detect_zeroes,
        cache_budget=lambda geometry: _cache_budget(geometry, options.l2_cache_size),
        grow_refusal=_grow_refusal(header),
    )


def _may_have_bitmaps(header: Qcow2Header) -> bool:
    return find_extension(header.extensions, EXTENSION_BITMAPS) is not None


def _grow_refusal(header: Qcow1Header | Qcow2Header) -> str | None:
    """Why this image cannot grow."""
    if isinstance(header, Qcow2Header) and header.version == 2 and header.n_snapshots:
        # A snapshot has no size of its own in version 2; going back to one would find another disk.
        return "an image of version 2 that has internal snapshots cannot be resized"
    return None


async def _ready_to_write(path: str, layer: _Opened) -> _Opened:
    """A writable image that was not closed cleanly is repaired before anything builds on it, as QEMU does. Its L1
    table is in memory as a whole afterwards."""
    header = layer.header
    assert header is not None
    if not isinstance(header, Qcow2Header):
        return await _with_whole_table(layer)
    if header.incompatible_features & INCOMPATIBLE_CORRUPT:
        raise ImageUsageError(
            f"{path}: marked as corrupt; serve it read-only (qcowfuse -r), or repair it: "
            f"qcowfuse-img check -r all {path}"
        )
    if not header.incompatible_features & INCOMPATIBLE_DIRTY:
        return await _with_whole_table(layer)
    from ..consistency.repair import repair_dirty

    await repair_dirty(path, layer.storage)
    repaired = await _open_layer(path, layer.storage, "qcow", TableParts())
    return await _with_whole_table(replace(repaired, data=layer.data, encrypted=layer.encrypted))


async def _with_whole_table(layer: _Opened) -> _Opened:
    if not isinstance(layer.l1_table, PagedTable):
        return layer
    assert layer.header is not None
    return replace(layer, l1_table=await load_any_l1_table(layer.storage, layer.header))


def _mapping_of(number: int, layer: _Opened, cache: TableCache) -> Mapping:
    header = layer.header
    assert header is not None
    if isinstance(header, Qcow1Header):
        entries = entry_format(1, header.cluster_bits)
    else:
        is_extended = bool(header.incompatible_features & INCOMPATIBLE_EXTENDED_L2)
        entries = entry_format(
            header.version, header.cluster_bits, is_extended=is_extended, has_data_file=layer.data is not None
        )
    kind = Mapping if layer.data is None else DataFileMapping
    return kind(
        layer=number,
        geometry=_geometry_of(header),
        entry_format=entries,
        l1_table=layer.l1_table,
        storage=layer.storage,
        cache=cache,
        data=layer.data,
        encrypted=layer.encrypted,
    )


def _geometry_of(header: Qcow1Header | Qcow2Header) -> Geometry:
    size = header.virtual_size
    if isinstance(header, Qcow1Header):
        return Geometry(cluster_bits=header.cluster_bits, l2_bits=header.l2_bits, size=size)
    words = 2 if header.incompatible_features & INCOMPATIBLE_EXTENDED_L2 else 1
    return Geometry(
        cluster_bits=header.cluster_bits, l2_bits=header.cluster_bits - words - 2, size=size, words_per_entry=words
    )


def _feature_bits_of(layer: _Opened, header: Qcow1Header | Qcow2Header, *, kept_autoclear: int) -> FeatureBits | None:
    if isinstance(header, Qcow1Header) or header.version < 3:
        return None
    return FeatureBits(
        layer.storage,
        incompatible=header.incompatible_features,
        autoclear=header.autoclear_features,
        kept_autoclear=kept_autoclear | (AUTOCLEAR_RAW_DATA_FILE if has_raw_data_file(header) else 0),
    )


def _cache_budget(geometry: Geometry, wanted: L2CacheSize | None) -> int:
    """Bytes of L2 entries to keep."""
    if wanted is None:
        whole_disk = geometry.n_l1_entries * geometry.l2_table_size
        return max(min(whole_disk, DEFAULT_L2_CACHE_BYTES), 4 * geometry.slice_size)
    if wanted.n_tables is not None:
        return wanted.n_tables * geometry.l2_table_size
    return wanted.n_bytes or 0
