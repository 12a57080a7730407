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
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import BackingChainError, FormatError, ImageUsageError, UnsupportedFeatureError
from ..format.header import Qcow1Header, Qcow2Header
from ..format.header_fields import (
    CRYPT_LUKS,
    CRYPT_NONE,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    MAGIC,
    MAX_L1_SIZE,
)
from ..format.header_parsing import probe_format
from ..storage.base import pread
from ..tables.header import read_header
from ..tables.paged_table import PagedTable, TableParts
from ..tables.snapshot_table import check_snapshot_l1_table, find_stored_snapshot, load_any_l1_table, open_l1_table
from .files import ChainFile, ChainFiles, StorageOpener, plain_name
from .layers.data_file import has_data_file, open_data_file
from .opened_layers import OpenedLayer, geometry_of, layers_of
from .options import MAX_BACKING_DEPTH, OpenOptions

if TYPE_CHECKING:
    from ..format.luks import LuksHeader
    from .layers.encryption import Passphrase
    from .layers.mapping import Layer
    from .overlay import Overlay
    from .qcow_image import QcowImage

_RAW_FORMATS = frozenset({"raw", "file", "host_device"})


async def open_image(
    path: str,
    options: OpenOptions | None = None,
    *,
    opener: StorageOpener | None = None,
    overlay: Overlay | None = None,
) -> QcowImage:
    """Open a QCOW image and its backing chain. ``opener`` stands in for files: see :mod:`~qcowfuse.driver.files`.
    ``overlay``: it takes the writes, and the image, or its snapshot, is only read.

    Raises FormatError (not QCOW, damaged), UnsupportedFeatureError, ImageLockedError, BackingChainError,
    ImageUsageError (cannot be repaired, has no such snapshot, wants a key), OSError. A writable image with the dirty
    bit is repaired first, which may take a while, and the log says so.
    """
    options = options or OpenOptions()
    if options.snapshot is not None and overlay is None:
        options = options._replace(read_only=True)
    below = options if overlay is None else options._replace(read_only=True)
    async with AsyncExitStack() as stack:
        parts = TableParts()
        with ChainFiles(below, opener) as files, _Unlocking(options) as unlocking:
            layers = await _open_chain(path, below, files, stack, parts)
            if options.snapshot is not None:
                layers[0] = await _at_snapshot(layers[0], options.snapshot, parts)
            await unlocking.unlock(layers, top=layers[0])
            if overlay is not None:
                top = await _open_overlay(overlay, files, layers, unlocking, stack, parts, not options.read_only)
                layers.insert(0, top)
        if not options.read_only:
            layers[0] = await _ready_to_write(layers[0])
        from .assembly import assemble

        image = await assemble(layers, options)
        stack.pop_all()
    return image


@asynccontextmanager
async def open_layers(
    path: str, options: OpenOptions, *, opener: StorageOpener | None = None
) -> AsyncIterator[Sequence[Layer]]:
    """The layers of a chain, the image itself first, to look at their tables alone: nothing is unlocked, nothing
    written. Raises what :func:`open_image` raises."""
    options = options._replace(read_only=True, tables_only=True)
    async with AsyncExitStack() as stack:
        parts = TableParts()
        with ChainFiles(options, opener) as files, _Unlocking(options) as unlocking:
            opened = await _open_chain(path, options, files, stack, parts)
            if options.snapshot is not None:
                opened[0] = await _at_snapshot(opened[0], options.snapshot, parts)
            await unlocking.unlock(opened, top=opened[0])
        layers, _ = await layers_of(opened, options)
        yield layers


async def first_encrypted_layer(path: str, options: OpenOptions) -> str | None:
    """The path of the first layer of a chain that needs a key, None when no layer does.

    Raises what :func:`open_image` raises.
    """
    options = options._replace(read_only=True)
    async with AsyncExitStack() as stack:
        with ChainFiles(options, None) as files:
            for layer in await _open_chain(path, options, files, stack, TableParts()):
                if _is_encrypted(layer):
                    return layer.path
    return None


def _is_encrypted(layer: OpenedLayer) -> bool:
    return layer.header is not None and layer.header.crypt_method != CRYPT_NONE


class _Unlocking:
    """Unlocks layers, all with one passphrase, which is asked for when the first of them needs it. A context manager:
    the passphrase is overwritten at the end."""

    def __init__(self, options: OpenOptions) -> None:
        self._options = options
        self._passphrase: Passphrase | None = None

    def __enter__(self) -> _Unlocking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._passphrase is not None:
            self._passphrase.wipe()

    def passphrase(self) -> Passphrase:
        from .layers.encryption import Passphrase

        if self._passphrase is None:
            self._passphrase = Passphrase(self._options.passphrase)
        return self._passphrase

    async def unlock(self, layers: Sequence[OpenedLayer], top: OpenedLayer) -> None:
        """Raises WrongKeyError for ``top``, BackingChainError for another one, ImageUsageError, OSError."""
        for layer in layers:
            if layer.header is None or not _is_encrypted(layer):
                continue
            from .layers.encryption import locked, unlock

            data = layer.data or layer.storage
            if self._options.tables_only:
                layer.encrypted = locked(layer.path, data)
                continue
            try:
                layer.encrypted = await unlock(layer.path, layer.storage, data, layer.header, self.passphrase())
            except FormatError as error:
                if layer is top:
                    raise
                raise BackingChainError(layer.path, f"backing file of {top.path}: {error}") from error


async def _open_chain(
    path: str, options: OpenOptions, files: ChainFiles, stack: AsyncExitStack, parts: TableParts
) -> list[OpenedLayer]:
    writable = not options.read_only
    opened: list[OpenedLayer] = []
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


async def _open_below(opened: list[OpenedLayer], file: ChainFile, format_name: str, parts: TableParts) -> OpenedLayer:
    """The layer in ``file``, below the others. Raises FormatError for the first one, BackingChainError for others."""
    if not opened:
        return await _open_layer(file, format_name, parts)
    if format_name == "unnamed":
        start = await pread(file.storage, 0, min(len(MAGIC), file.storage.size()))
        if bytes(start) == MAGIC:
            detail = (
                f"names backing file {file.path} without its format, and that file looks like QCOW; say what it is: "
                "--backing-format qcow2, or raw if it is a raw disk in which a guest may have written that"
            )
            raise BackingChainError(opened[-1].path, detail)
        format_name = "raw"
    try:
        return await _open_layer(file, format_name, parts)
    except FormatError as error:
        raise BackingChainError(file.path, f"backing file of {opened[-1].path}: {error}") from error


async def _open_layer(file: ChainFile, format_name: str, parts: TableParts) -> OpenedLayer:
    """Read a layer's header and, unless it is large, its L1 table. ``format_name``: raw, qcow (any version), or auto
    to go by content."""
    storage = file.storage
    if format_name == "raw":
        return OpenedLayer(file.path, storage, None, array("Q"), status=file.status)
    start = await pread(storage, 0, min(512, storage.size()))
    probed = probe_format(bytes(start))
    if probed is None:
        if format_name == "auto":
            return OpenedLayer(file.path, storage, None, array("Q"), status=file.status)
        raise FormatError("header", 0, f"no QCOW image: starts with {bytes(start[:4]).hex(' ') or 'nothing'}")
    header = await read_header(storage)
    return OpenedLayer(file.path, storage, header, await open_l1_table(storage, header, parts), status=file.status)


async def _open_overlay(
    overlay: Overlay,
    files: ChainFiles,
    layers: Sequence[OpenedLayer],
    unlocking: _Unlocking,
    stack: AsyncExitStack,
    parts: TableParts,
    writable: bool,
) -> OpenedLayer:
    """What lies over ``layers``, and takes the writes."""
    from .overlay import OverlayBase

    image = layers[0]
    assert image.header is not None
    base = OverlayBase(
        path=image.path,
        format_name="qcow" if isinstance(image.header, Qcow1Header) else "qcow2",
        size=image.header.virtual_size,
        status=image.status,
        is_encrypted=any(map(_is_encrypted, layers)),
        luks=await _luks_of(layers),
    )
    found = await overlay.open(files, base, lambda: unlocking.passphrase().get(image.path))
    stack.push_async_callback(found.file.storage.aclose)
    top = await _open_layer(found.file, "qcow", parts)
    if isinstance(top.header, Qcow2Header) and has_data_file(top.header):
        top.data = await open_data_file(files, found.file, top.header, override=None, writable=writable)
        stack.push_async_callback(top.data.aclose)
    if found.cipher is not None:
        from .layers.encryption import EncryptedData

        top.encrypted = EncryptedData(top.storage, found.cipher, by_guest_offset=False)
    else:
        await unlocking.unlock([top], top)
    return top


async def _luks_of(layers: Sequence[OpenedLayer]) -> LuksHeader | None:
    for layer in layers:
        if isinstance(layer.header, Qcow2Header) and layer.header.crypt_method == CRYPT_LUKS:
            from .layers.encryption import load_luks_header

            return (await load_luks_header(layer.storage, layer.header))[0]
    return None


async def _at_snapshot(layer: OpenedLayer, id_or_name: str, parts: TableParts) -> OpenedLayer:
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
    n_needed = geometry_of(header).n_l1_entries
    if n_needed * 8 > MAX_L1_SIZE:
        raise FormatError("snapshot table entry", None, f"disk of {size} bytes, more than any L1 table can map")
    # What a table is too short for was never allocated: QEMU, too, takes it for that.
    return layer.with_table(header, await open_l1_table(layer.storage, header, parts, n_needed))


def _backing_format_of(layer: OpenedLayer, unnamed_format: str | None) -> str:
    """The format of a layer's backing file as :func:`_open_layer` takes it; ``unnamed``: nobody says which."""
    named = layer.header.backing_format if isinstance(layer.header, Qcow2Header) else None
    if named is None:
        return {None: "unnamed", "raw": "raw", "auto": "auto"}.get(unnamed_format, "qcow")
    if named in ("qcow", "qcow2"):
        return "qcow"
    if named in _RAW_FORMATS:
        return "raw"
    raise UnsupportedFeatureError([f"backing format {named}"])


async def _ready_to_write(layer: OpenedLayer) -> OpenedLayer:
    """A writable image that was not closed cleanly is repaired before anything builds on it, as QEMU does. Its L1
    table is in memory as a whole afterwards."""
    path, header = layer.path, layer.header
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
    repaired = await _open_layer(ChainFile(path, layer.storage, layer.status), "qcow", TableParts())
    repaired.data, repaired.encrypted = layer.data, layer.encrypted
    return await _with_whole_table(repaired)


async def _with_whole_table(layer: OpenedLayer) -> OpenedLayer:
    if not isinstance(layer.l1_table, PagedTable):
        return layer
    assert layer.header is not None
    return layer.with_table(layer.header, await load_any_l1_table(layer.storage, layer.header))
