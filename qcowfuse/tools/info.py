"""Looking at an image without serving it: what its header, its snapshot table and its bitmap directory say.

1. Everything is read-only, and opens the one file, never its backing file.
2. The answers have the fields of ``qemu-img info``.
3. With ``force_share`` no lock is taken, so an image in use can be looked at; what is seen may then be torn.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

from ..driver.files import open_storage
from ..driver.options import OpenOptions
from ..format.bitmap_directory import AUTO as AUTO
from ..format.bitmap_directory import IN_USE as IN_USE
from ..format.bitmap_directory import BitmapEntry as BitmapEntry
from ..format.extensions import EXTENSION_DATA_FILE, find_extension
from ..format.geometry import SECTOR_SIZE, round_up
from ..format.header import Qcow1Header, Qcow2Header
from ..format.header_fields import (
    AUTOCLEAR_RAW_DATA_FILE,
    COMPATIBLE_LAZY_REFCOUNTS,
    COMPRESSION_ZSTD,
    CRYPT_AES,
    CRYPT_LUKS,
    CRYPT_NONE,
    INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_EXTENDED_L2,
)
from ..format.header_parsing import probe_format
from ..storage.base import Storage
from ..tables.bitmap_listing import each_bitmap
from ..tables.header import read_header
from ..tables.snapshot_table import each_snapshot, require_snapshots

if TYPE_CHECKING:
    from ..format.luks import LuksHeader as LuksHeader
    from ..format.snapshots import Snapshot as Snapshot


class ImageInfo(NamedTuple):
    """What an image says about itself; sizes in bytes, None where the format has no such thing."""

    path: str
    format_name: str
    virtual_size: int
    cluster_size: int
    file_length: int
    actual_size: int
    is_block_device: bool
    dirty: bool
    encryption: str | None
    backing_file: str | None
    backing_format: str | None
    full_backing_file: str | None
    version: int
    compression: str | None = None
    lazy_refcounts: bool | None = None
    refcount_bits: int | None = None
    corrupt: bool | None = None
    extended_l2: bool | None = None
    data_file: str | None = None
    data_file_raw: bool | None = None
    n_snapshots: int = 0
    n_bitmaps: int = 0
    luks: LuksHeader | None = None


async def is_version_1(path: str, *, force_share: bool = False) -> bool:
    """Whether the image is of version 1. Raises FormatError, also for a header of version 1 that makes no sense,
    ImageLockedError, OSError."""
    storage = await open_storage(path, False, OpenOptions(read_only=True, force_share=force_share))
    try:
        if probe_format(bytes(await storage.pread(0, min(8, storage.size())))) != "qcow":
            return False
        await read_header(storage)
        return True
    finally:
        await storage.aclose()


class Description(NamedTuple):
    """``info`` with what there may be very many of, which is read entry by entry."""

    info: ImageInfo
    storage: Storage
    header: Qcow1Header | Qcow2Header

    async def snapshots(self) -> AsyncGenerator[Snapshot]:
        """The snapshots. To be closed by ``aclosing`` unless it is run to its end. Raises FormatError, OSError."""
        if self.info.n_snapshots and isinstance(self.header, Qcow2Header):
            async with aclosing(each_snapshot(self.storage, self.header)) as entries:
                async for snapshot, _ in entries:
                    yield snapshot

    async def bitmaps(self) -> AsyncGenerator[BitmapEntry]:
        """The persistent bitmaps that are valid; to be closed as the snapshots. Raises FormatError, OSError."""
        if self.info.n_bitmaps and isinstance(self.header, Qcow2Header):
            async with aclosing(each_bitmap(self.storage, self.header)) as bitmaps:
                async for bitmap in bitmaps:
                    yield bitmap


@asynccontextmanager
async def describing(path: str, *, force_share: bool = False) -> AsyncIterator[Description]:
    """What the image at ``path`` says about itself, all of which has been read once and is sound.

    Raises FormatError, UnsupportedFeatureError (features that nobody here knows), ImageLockedError, OSError.
    """
    storage = await open_storage(path, False, OpenOptions(read_only=True, force_share=force_share))
    try:
        header = await read_header(storage, for_info=True)
        info = _describe(path, storage, header)
        if isinstance(header, Qcow2Header):
            n_bitmaps = 0
            n_snapshots = await require_snapshots(storage, header)
            if header.incompatible_features & INCOMPATIBLE_DATA_FILE:
                n_snapshots = 0  # to QEMU an external data file knows none, whatever the table says
            if header.crypt_method == CRYPT_LUKS:
                from ..driver.layers.encryption import load_luks_header

                luks, _ = await load_luks_header(storage, header)
                info = info._replace(luks=luks)
            async for _ in each_bitmap(storage, header):
                n_bitmaps += 1
            info = info._replace(n_snapshots=n_snapshots, n_bitmaps=n_bitmaps)
        yield Description(info, storage, header)
    finally:
        await storage.aclose()


@asynccontextmanager
async def listing_snapshots(
    path: str, *, force_share: bool = False
) -> AsyncIterator[tuple[int, AsyncGenerator[Snapshot]]]:
    """How many snapshots an image has, none for version 1, and each of them; their table has been read once and is
    sound. Raises FormatError, ImageLockedError, OSError."""
    storage = await open_storage(path, False, OpenOptions(read_only=True, force_share=force_share))
    try:
        header = await read_header(storage)
        n_snapshots = await require_snapshots(storage, header) if isinstance(header, Qcow2Header) else 0
        async with aclosing(_listed(storage, header)) as snapshots:
            yield n_snapshots, snapshots
    finally:
        await storage.aclose()


async def _listed(storage: Storage, header: Qcow1Header | Qcow2Header) -> AsyncGenerator[Snapshot]:
    if isinstance(header, Qcow2Header):
        async with aclosing(each_snapshot(storage, header)) as entries:
            async for snapshot, _ in entries:
                yield snapshot


def _describe(path: str, storage: Storage, header: Qcow1Header | Qcow2Header) -> ImageInfo:
    encryption = None
    if header.crypt_method != CRYPT_NONE:
        encryption = "aes" if header.crypt_method == CRYPT_AES else "luks"
    is_device = os.path.exists(path) and not os.path.isfile(path)
    info = ImageInfo(
        path=path,
        format_name="qcow" if isinstance(header, Qcow1Header) else "qcow2",
        virtual_size=header.virtual_size if isinstance(header, Qcow1Header) else round_up(header.size, SECTOR_SIZE),
        cluster_size=1 << header.cluster_bits,
        file_length=storage.size(),
        actual_size=0 if is_device else storage.allocated_bytes(),  # of a device QEMU says so
        is_block_device=is_device,
        dirty=False,
        encryption=encryption,
        backing_file=header.backing_file,
        backing_format=None if isinstance(header, Qcow1Header) else header.backing_format,
        full_backing_file=None if header.backing_file is None else _full_name(path, header.backing_file),
        version=1,
    )
    if isinstance(header, Qcow1Header):
        return info
    info = info._replace(
        version=header.version,
        virtual_size=header.virtual_size,
        dirty=header.dirty,
        compression="zstd" if header.compression_type == COMPRESSION_ZSTD else "zlib",
        refcount_bits=1 << header.refcount_order,
    )
    if header.version < 3:
        return info
    data_file = find_extension(header.extensions, EXTENSION_DATA_FILE)
    has_data_file = bool(header.incompatible_features & INCOMPATIBLE_DATA_FILE)
    return info._replace(
        lazy_refcounts=bool(header.compatible_features & COMPATIBLE_LAZY_REFCOUNTS),
        corrupt=header.corrupt,
        extended_l2=bool(header.incompatible_features & INCOMPATIBLE_EXTENDED_L2),
        data_file=None if data_file is None else os.fsdecode(data_file.partition(b"\0")[0]),
        data_file_raw=bool(header.autoclear_features & AUTOCLEAR_RAW_DATA_FILE) if has_data_file else None,
    )


def _full_name(path: str, backing_file: str) -> str:
    protocol, colon, _ = backing_file.partition(":")
    if colon and "/" not in protocol:
        return backing_file
    return os.path.join(os.path.dirname(path), backing_file)
