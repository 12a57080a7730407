"""A whole image in memory through everything that can be done with it, and what must hold throughout.

1. Only the errors of ``errors`` and OSError come out.
2. An image that a check calls clean stays clean, at every close and after every change from outside, and reads as
   what was written to it. Where the storage is full, leaks are allowed.
3. What is opened read-only is not changed, everything that was opened is closed.
4. Where a damaged image could be read, it reads the same until it is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from functools import partial
from unittest.mock import patch

import trio

from qcowfuse.consistency.compare import check_storage
from qcowfuse.consistency.repair import repair_storage
from qcowfuse.consistency.result import Fix
from qcowfuse.driver.chain import open_image, open_layers
from qcowfuse.driver.options import OpenOptions
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.errors import FormatError, ImageUsageError, QcowFuseError
from qcowfuse.format.bitmap_directory import bitmap_directory_place, parse_bitmap_directory
from qcowfuse.format.header import Qcow2Header
from qcowfuse.format.header_fields import CRYPT_LUKS
from qcowfuse.format.header_parsing import parse_header
from qcowfuse.format.luks import luks_area
from qcowfuse.storage.base import Storage
from qcowfuse.tables.header import read_header
from qcowfuse.tools import extent_map, info
from qcowfuse.tools.extent_map import is_preallocated
from qcowfuse.tools.info import describing
from qcowfuse.tools.snapshot_edit import apply_snapshot, create_snapshot, delete_snapshot

from ..battery import read, write
from ..bounded_storage import BoundedStorage
from ..checker import check_image_bytes
from ..memory_storage import MemoryStorage
from .cases import Case, Step, changed
from .encrypted import PASSPHRASE

TOP = "/fuzz/top"
MAX_DISK = 1 << 20
"""Bytes of a disk that is read as a whole."""
MAX_L1 = 1 << 17
"""Entries of an L1 table that the checker is shown."""
ALLOWED = (QcowFuseError, OSError)


class BrokenError(Exception):
    """An invariant does not hold."""


def run_whole(case: Case) -> None:
    """Run the steps of a case. Raises BrokenError, or whatever should not have come out."""
    run_steps(case)


def run_steps(case: Case) -> tuple[bytes, dict[str, bytes], bool]:
    """As :func:`run_whole`; the files as they are then, and whether the storage failed meanwhile."""
    session = _Session(case)
    with patch.object(hashlib, "pbkdf2_hmac", _quick_pbkdf2_hmac):
        trio.run(session.run)
    files = {path.rpartition("/")[2]: bytes(storage.data) for path, storage in session.files.items()}
    return session.data, files, session.was_full


def verdict(data: bytes | bytearray) -> int | None:
    """0 clean, 2 damaged, 3 leaks, as the independent checker has it; None where it is not for it to say."""
    if not _can_be_checked(data):
        return None
    try:
        report = check_image_bytes(data)
        if report.exit_code:
            return report.exit_code
        return 0 if not report.behind_end and _has_valid_bitmaps(bytes(data)) else None
    except (struct.error, ValueError, AssertionError, UnicodeDecodeError, IndexError, MemoryError):
        return None


def _has_valid_bitmaps(data: bytes) -> bool:
    """Bitmaps that make no sense are dropped when the image is written, and leak."""
    try:
        header = parse_header(data[: 2 << 20], len(data))
        place = bitmap_directory_place(header) if isinstance(header, Qcow2Header) else None
        if isinstance(header, Qcow2Header) and place is not None:
            host_offset, n_bytes, n_bitmaps = place
            directory = data[host_offset : host_offset + n_bytes]
            parse_bitmap_directory(directory, n_bitmaps, 1 << header.cluster_bits)
    except FormatError:
        return False
    return True


def _can_be_checked(data: bytes | bytearray) -> bool:
    """Whether the numbers in an image are small enough for a checker that trusts them."""
    if len(data) < 112 or data[:4] != b"QFI\xfb":
        return False
    (version,) = struct.unpack_from(">I", data, 4)
    if version == 1:
        (size,) = struct.unpack_from(">Q", data, 24)
        return data[32] in range(9, 17) and data[33] in range(6, 14) and size >> data[32] + data[33] < MAX_L1
    if version not in (2, 3):
        return False
    cluster_bits, _, crypt, l1_size = struct.unpack_from(">IQII", data, 20)
    n_table, n_snapshots, snapshots_offset = struct.unpack_from(">IIQ", data, 56)
    if cluster_bits not in range(9, 22) or l1_size > MAX_L1 or n_table << cluster_bits > 1 << 20:
        return False
    if version == 3 and (struct.unpack_from(">I", data, 96)[0] > 6 or data[79] & 3):
        return False  # dirty or corrupt: not clean, whatever the counts
    if crypt > CRYPT_LUKS or (crypt == CRYPT_LUKS and not _has_plausible_luks_area(bytes(data))):
        return False
    position = snapshots_offset
    if n_snapshots > 64:
        return False
    for _ in range(n_snapshots):
        if position + 40 > len(data):
            return False
        n_l1, id_size, name_size = struct.unpack_from(">IHH", data, position + 8)
        (extra,) = struct.unpack_from(">I", data, position + 36)
        if n_l1 > MAX_L1 or extra > 1024:
            return False
        position = (position + 40 + extra + id_size + name_size + 7) // 8 * 8
    return True


def _has_plausible_luks_area(data: bytes) -> bool:
    """A checker that trusts the header would count all of an area of terabytes."""
    try:
        header = parse_header(data[: 2 << 20], len(data))
        return isinstance(header, Qcow2Header) and sum(luks_area(header.extensions)) <= len(data)
    except FormatError:
        return False


def _passphrase(_path: str) -> bytearray:
    return bytearray(PASSPHRASE)


_pbkdf2_hmac = hashlib.pbkdf2_hmac


def _quick_pbkdf2_hmac(hash_name: str, secret: bytes, salt: bytes, n_rounds: int, n_bytes: int) -> bytes:
    """In a time that is no matter of the image: a user may wait for hours, or end it; a case may not."""
    return _pbkdf2_hmac(hash_name, secret, salt, min(n_rounds, 2000), n_bytes)


class _Session:
    def __init__(self, case: Case) -> None:
        start = changed(case)
        self.steps = case.steps
        self.suspend = case.suspend
        self.data = bytes(start.data)
        self.clean = verdict(self.data) == 0
        self.was_full = False
        self.is_written = False
        self.files = {f"/fuzz/{name}": MemoryStorage(data) for name, data in start.files.items()}
        self.top: BoundedStorage | None = None
        self.opened: list[MemoryStorage] = []
        self.image: QcowImage | None = None
        self.model: bytearray | None = None

    async def opener(self, path: str, writable: bool, options: OpenOptions) -> Storage:
        if path == TOP:
            storage = BoundedStorage(self.data, writable=writable, suspend=self.suspend, name=path)
            self.top = storage
        elif path in self.files:
            storage = BoundedStorage(b"", writable=writable, suspend=self.suspend, name=path)
            storage.data = self.files[path].data
        else:
            raise FileNotFoundError(2, "No such file or directory", path)
        self.opened.append(storage)
        return storage

    async def run(self) -> None:
        self.model = await self.disk()
        for step in self.steps:
            name = step[0].replace("-", "_")
            if name in ("rw", "ro"):
                await self.close()
                await self.open(read_only=name == "ro")
            elif hasattr(self, f"do_{name}"):
                if self.image is not None:
                    await self.online(step)
            else:
                await self.close()
                await self.offline(step[0])
        await self.close()
        if self.model is not None and (self.clean or not self.is_written):
            found = await self.disk()
            if found != self.model:
                raise BrokenError(f"the disk reads otherwise at the end{_where(found, self.model)}")

    async def disk(self) -> bytearray | None:
        """All of a small disk, None where it can't be read as a whole."""
        with contextlib.suppress(*ALLOWED):
            image = await open_image(TOP, OpenOptions(read_only=True, passphrase=_passphrase), opener=self.opener)
            try:
                if image.size <= MAX_DISK:
                    return bytearray(await image.read(0, image.size))
            finally:
                await self.shut(image)
        self.all_closed()
        return None

    async def open(self, *, read_only: bool) -> None:
        try:
            options = OpenOptions(read_only=read_only, passphrase=_passphrase)
            self.image = await open_image(TOP, options, opener=self.opener)
            if self.top is not None and self.top.data != self.data:
                self.is_written = True  # it was dirty, and has been repaired
        except ALLOWED as error:
            self.take_over(error)
            self.all_closed()
            if self.clean and self.model is not None and not self.was_full and read_only:
                raise BrokenError("a clean image that could be read can't be opened any more") from None

    async def shut(self, image: QcowImage) -> None:
        try:
            await image.aclose()
        except ALLOWED as error:
            self.note(error)
        self.all_closed()

    async def close(self) -> None:
        if self.image is not None:
            read_only = not self.top.writable if self.top else True
            await self.shut(self.image)
            self.image = None
            self.take_over(None, read_only=read_only)

    def take_over(self, error: BaseException | None, *, read_only: bool = False) -> None:
        """What the file is now; it must be as clean as it was."""
        assert self.top is not None or error is not None
        if self.top is None:
            return
        after = bytes(self.top.data)
        if not self.top.writable and after != self.data:
            raise BrokenError("an image that was opened read-only has been written")
        self.data = after
        if error is not None:
            self.note(error)
        self.must_be_clean("closing")

    def must_be_clean(self, what: str) -> None:
        if self.clean:
            now = verdict(self.data)
            if now is None and not _can_be_checked(self.data):
                self.clean = False  # grown beyond what the checker is shown
            elif now != 0 and not (now == 3 and self.was_full):
                errors = check_image_bytes(self.data).errors[:2] if now is not None else "unreadable"
                raise BrokenError(f"{what} made a clean image {now}: {errors}")

    def note(self, error: BaseException) -> None:
        if isinstance(error, OSError):
            self.was_full = True

    def all_closed(self) -> None:
        if not all(storage.closed for storage in self.opened):
            raise BrokenError("a file was left open")
        self.opened.clear()

    async def online(self, step: Step) -> None:
        try:
            await getattr(self, f"do_{step[0]}")(*step[1:])
        except ImageUsageError:
            return
        except ALLOWED as error:
            self.note(error)
            if step[0] in ("write", "zero", "discard", "grow"):
                self.model = None
            if step[0] == "read" and self.clean and self.model is not None:
                raise BrokenError(f"reading a clean image gave {error}") from None

    async def do_read(self, offset: int, n_bytes: int) -> None:
        assert self.image is not None
        found = await read(self.image, offset, n_bytes)
        if len(found) != n_bytes:
            raise BrokenError(f"{len(found)} bytes, asked for {n_bytes}")
        if self.model is not None and (self.clean or not self.is_written):
            wanted = self.model[offset : offset + n_bytes]
            if found != wanted:
                raise BrokenError(f"reading {n_bytes} bytes at {offset:#x} differs{_where(found, wanted)}")

    async def do_write(self, offset: int, n_bytes: int, byte: int) -> None:
        assert self.image is not None
        self.check_room(offset, n_bytes)
        self.is_written = True
        await write(self.image, offset, bytes([byte]) * n_bytes)
        if self.model is not None:
            self.model[offset : offset + n_bytes] = bytes([byte]) * n_bytes

    async def do_zero(self, offset: int, n_bytes: int, unmap: bool = False) -> None:
        assert self.image is not None
        n_bytes = max(0, min(n_bytes, self.image.size - offset))
        self.check_room(offset, n_bytes)
        self.is_written = True
        await self.image.write_zeroes(offset, n_bytes, unmap=unmap)
        if self.model is not None:
            self.model[offset : offset + n_bytes] = bytes(n_bytes)

    async def do_discard(self, offset: int, n_bytes: int) -> None:
        await self.do_zero(offset, n_bytes, True)

    def check_room(self, offset: int, n_bytes: int) -> None:
        """A write that can't be done is refused, and leaves the model as it is."""
        assert self.image is not None
        if self.image.read_only or offset + n_bytes > self.image.size:
            raise ImageUsageError("not to be written")

    async def do_flush(self) -> None:
        assert self.image is not None
        await self.image.flush()

    async def do_extent(self, offset: int, n_bytes: int) -> None:
        assert self.image is not None
        if offset + n_bytes > self.image.size:
            return
        is_data, length = await self.image.find_extent(offset, n_bytes)
        if not 0 < length <= n_bytes:
            raise BrokenError(f"an extent of {length} bytes in {n_bytes}")
        is_known = self.model is not None and (self.clean or not self.is_written)
        if is_known and not is_data and self.model is not None and any(self.model[offset : offset + length]):
            raise BrokenError(f"a hole of {length} bytes at {offset:#x} has data")

    async def do_grow(self, size: int) -> None:
        assert self.image is not None
        old_size = self.image.size
        self.is_written = True
        await self.image.grow(size)
        if self.image.size != max(size, old_size):
            raise BrokenError(f"grown to {self.image.size}, not {size}")
        if self.model is not None:
            self.model.extend(bytes(max(0, size - old_size)) if size <= MAX_DISK else b"")
            self.model = self.model if size <= MAX_DISK else None

    async def offline(self, name: str) -> None:
        """What needs the image for itself."""
        self.top = None
        failed, before = False, self.data
        try:
            await getattr(self, f"off_{name.partition('-')[0]}")(name)
        except ALLOWED as error:
            failed = True
            self.note(error)
        self.all_closed()
        if self.top is not None:
            self.data = bytes(self.top.data)
            if not self.top.writable and before != self.data:
                raise BrokenError(f"{name} has written")
        self.must_be_clean(name)
        if name == "apply" and not failed:
            self.model = await self.disk()
        if name in ("create", "delete") and failed and self.clean and not self.was_full and before != self.data:
            raise BrokenError(f"{name} failed and changed the image")
        if name.startswith("repair") and not self.clean:
            self.model = await self.disk()

    async def off_create(self, _: str) -> None:
        await create_snapshot(TOP, "new", opener=self.opener)

    async def off_apply(self, _: str) -> None:
        await apply_snapshot(TOP, "1", opener=self.opener)

    async def off_delete(self, _: str) -> None:
        await delete_snapshot(TOP, "1", opener=self.opener)

    async def off_check(self, _: str) -> None:
        storage = await self.opener(TOP, False, OpenOptions())
        try:
            header = await read_header(storage, for_check=True)
            if not isinstance(header, Qcow2Header):
                return
            result = await check_storage(storage, header, _ignore, None)
            await is_preallocated(storage)
        finally:
            await storage.aclose()
        if self.clean and not result.is_clean and not self.was_full:
            raise BrokenError(f"our check of a clean image: {result}")

    async def off_repair(self, name: str) -> None:
        fix = Fix.ALL if name == "repair-all" else Fix.LEAKS
        storage = await self.opener(TOP, True, OpenOptions())
        try:
            result = await repair_storage(storage, fix, report=_ignore)
        finally:
            await storage.aclose()
        assert self.top is not None
        self.is_written = True
        has_data_file = self.top.data[79] & 4  # there the checker wants more than QEMU does
        if result.is_clean and not has_data_file and verdict(self.top.data) in (2, 3):
            found = check_image_bytes(self.top.data)
            # Tables that share a cluster, each with its reference counted, stay as they are: as in QEMU.
            errors = [error for error in found.errors if "of metadata is used" not in error]
            if errors or found.leaks:
                raise BrokenError(f"repaired, and still damaged: {found.leaks} leaks, {errors[:2]}")

    async def off_info(self, _: str) -> None:
        with patch.object(info, "open_storage", self.opener):
            async with describing(TOP) as described:
                async for _snapshot in described.snapshots():
                    pass
                async for _bitmap in described.bitmaps():
                    pass

    async def off_map(self, _: str) -> None:
        with patch.object(extent_map, "open_layers", partial(open_layers, opener=self.opener)):
            end = 0
            async with extent_map.map_image(TOP) as batches:
                async for entries in batches:
                    for entry in entries:
                        if entry.guest_offset != end or (entry.n_bytes <= 0 and end) or entry.n_bytes < 0:
                            raise BrokenError(f"map has {entry} behind {end:#x}")
                        end += entry.n_bytes
                    if end > MAX_DISK:
                        break


def _ignore(_: str) -> None:
    pass


def _where(found: bytes | bytearray | None, wanted: bytes | bytearray) -> str:
    if found is None:
        return ": it can't be read"
    if len(found) != len(wanted):
        return f": {len(found)} bytes, expected {len(wanted)}"
    place = next(index for index in range(len(found)) if found[index] != wanted[index])
    return f" from byte {place:#x} on"


__all__ = ["ALLOWED", "BrokenError", "run_steps", "run_whole", "verdict"]
