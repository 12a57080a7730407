"""Guest data of an encrypted layer: read and decrypted, encrypted and written; and how a layer is unlocked.

1. The unit is the sector of 512 bytes. LUKS numbers sectors by their place in the file that holds the data, the old
   AES method by their place on the virtual disk.
2. A write of part of a sector reads the rest first. While a sector is being written nobody else reads or writes
   it, and while it is being read nobody writes it: half a sector's new bytes would decrypt to neither old nor new.
   Nobody waits for a second range while holding one, so there is nothing to deadlock. What is read or written at
   once, without an await, needs no claim of its own, but minds those of others.
3. Ciphers run in the trio thread: most of their time goes into a call for each sector, which holds the interpreter's
   lock, so that threads would gain nothing. They work where the data lies. Key derivation runs in a thread.
4. LUKS numbers sectors so that their place is all that a cipher needs: the data of such a layer can be read and
   written as that of a storage (``places``), and requests go the same short ways as those to a plain disk.
5. Compressed clusters are not encrypted: QEMU neither writes such images nor decrypts what it finds in them.
6. A passphrase is asked for when the first encrypted layer is met, kept while the chain is opened, then overwritten.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio

from ...buffer import Buffer
from ...errors import ImageUsageError, WrongKeyError
from ...format.geometry import SECTOR_SIZE, divide_up
from ...format.header import Qcow1Header, Qcow2Header
from ...format.header_fields import CRYPT_AES
from ...format.luks import (
    HEADER_LENGTH,
    LuksHeader,
    key_material_length,
    luks_area,
    parse_luks_header,
    require_available,
)
from ...storage.base import Deliver, OnEnd, Storage, of_whole_pages, pread
from ..options import PassphraseSource
from .range_claims import Claim, Claims

if TYPE_CHECKING:
    from ...format.crypto import SectorCipher

_SECTOR_MASK = SECTOR_SIZE - 1
_MANY_ITERATIONS = 10_000_000
"""Some seconds of one processor."""

_log = logging.getLogger(__name__)


class EncryptedData:
    """The guest data in ``storage``; ``by_guest_offset``: sectors are numbered by guest offset."""

    def __init__(self, storage: Storage, cipher: SectorCipher, *, by_guest_offset: bool) -> None:
        self._storage = storage
        self._cipher = cipher
        self._by_guest_offset = by_guest_offset
        self.places = None if by_guest_offset else EncryptedPlaces(self)
        """The same data for callers without a guest offset; None where sectors are numbered by it (rule 4)."""
        self._writes = Claims()
        self._reads = Claims()
        self._scratch = bytearray()
        """What is written at once is encrypted here: new memory for each write would cost as much as the cipher."""
        self._too_long = sys.maxsize
        """A write of as many bytes was once declined by the storage: it is not encrypted in vain again."""

    def _sector(self, *, host_offset: int, guest_offset: int) -> int:
        return (guest_offset if self._by_guest_offset else host_offset) // SECTOR_SIZE

    def try_read_into(self, part: memoryview, *, host_offset: int, guest_offset: int) -> bool:
        """Fill ``part`` with what is at ``host_offset``, or return False when that would block."""
        skip = guest_offset & _SECTOR_MASK
        n_bytes = skip + len(part) + _SECTOR_MASK & ~_SECTOR_MASK
        if self._writes.taken and self._conflict(self._writes, host_offset - skip, n_bytes) is not None:
            return False
        if n_bytes == len(part):
            if not self._storage.try_pread_into(host_offset, part):
                return False
            self._cipher.decrypt_in_place(part, self._sector(host_offset=host_offset, guest_offset=guest_offset))
            return True
        data = self._storage.try_pread(host_offset - skip, n_bytes)
        if data is None:
            return False
        self._decrypt_into(part, data, skip, host_offset=host_offset - skip, guest_offset=guest_offset - skip)
        return True

    async def read_into(self, part: memoryview, *, host_offset: int, guest_offset: int) -> None:
        """Fill ``part`` with what is at ``host_offset``. Raises OSError."""
        skip = guest_offset & _SECTOR_MASK
        n_bytes = divide_up(skip + len(part), SECTOR_SIZE) * SECTOR_SIZE
        while (conflict := self._conflict(self._writes, host_offset - skip, n_bytes)) is not None:
            await conflict.released.wait()
        claim = self._claim(self._reads, host_offset - skip, n_bytes)
        try:
            if n_bytes == len(part):
                if not self._storage.try_pread_into(host_offset, part):
                    await self._storage.pread_into(host_offset, part)
            else:
                data = await pread(self._storage, host_offset - skip, n_bytes)
        finally:
            self._reads.release(claim)
        if n_bytes == len(part):
            self._cipher.decrypt_in_place(part, self._sector(host_offset=host_offset, guest_offset=guest_offset))
        else:
            self._decrypt_into(part, data, skip, host_offset=host_offset - skip, guest_offset=guest_offset - skip)

    def may_write_at_once(self, n_bytes: int) -> bool:
        """Whether it makes sense to call :meth:`try_write`."""
        return n_bytes < self._too_long

    def try_write(self, buffers: Sequence[Buffer], *, host_offset: int, guest_offset: int) -> bool:
        """:meth:`write`, or return False where that would have to wait: nothing is written then. Raises OSError."""
        n_new = sum(map(len, buffers))
        skip = guest_offset & _SECTOR_MASK
        host_offset, guest_offset = host_offset - skip, guest_offset - skip
        n_bytes = skip + n_new + _SECTOR_MASK & ~_SECTOR_MASK
        if (
            n_bytes >= self._too_long
            or (self._writes.taken and self._conflict(self._writes, host_offset, n_bytes))
            or (self._reads.taken and self._conflict(self._reads, host_offset, n_bytes))
        ):
            return False
        if len(self._scratch) < n_bytes:
            self._scratch = bytearray(n_bytes)
        whole = memoryview(self._scratch)[:n_bytes]
        if n_bytes != n_new:
            for place in self._edges(skip, n_new, n_bytes):
                old = self._storage.try_pread(host_offset + place, SECTOR_SIZE)
                if old is None:
                    return False
                self._decrypt_sector(whole, place, old, host_offset=host_offset, guest_offset=guest_offset)
        place = skip
        for part in buffers:
            whole[place : place + len(part)] = part
            place += len(part)
        self._cipher.encrypt_in_place(whole, self._sector(host_offset=host_offset, guest_offset=guest_offset))
        if self._storage.try_pwritev(host_offset, [whole]):
            return True
        if of_whole_pages(host_offset, n_bytes):
            self._too_long = n_bytes
        return False

    async def write(self, buffers: Sequence[Buffer], *, host_offset: int, guest_offset: int) -> None:
        """Write the buffers back to back; any offset and length. Raises OSError."""
        data = bytearray().join(buffers)
        skip = guest_offset & _SECTOR_MASK
        host_offset, guest_offset = host_offset - skip, guest_offset - skip
        n_bytes = divide_up(skip + len(data), SECTOR_SIZE) * SECTOR_SIZE
        while (
            conflict := self._conflict(self._writes, host_offset, n_bytes)
            or self._conflict(self._reads, host_offset, n_bytes)
        ) is not None:
            await conflict.released.wait()
        claim = self._claim(self._writes, host_offset, n_bytes)
        try:
            if n_bytes != len(data):
                whole = bytearray(n_bytes)
                for place in self._edges(skip, len(data), n_bytes):
                    old = await pread(self._storage, host_offset + place, SECTOR_SIZE)
                    self._decrypt_sector(
                        memoryview(whole), place, old, host_offset=host_offset, guest_offset=guest_offset
                    )
                whole[skip : skip + len(data)] = data
                data = whole
            self._cipher.encrypt_in_place(data, self._sector(host_offset=host_offset, guest_offset=guest_offset))
            if not self._storage.try_pwritev(host_offset, [data]):
                await self._storage.pwritev(host_offset, [data])
        finally:
            self._writes.release(claim)

    @staticmethod
    def _edges(skip: int, n_new: int, n_bytes: int) -> list[int]:
        """Places, in whole sectors of ``n_bytes``, of those that ``n_new`` bytes at byte ``skip`` fill in part."""
        last = n_bytes - SECTOR_SIZE
        places = [0] if skip else []
        if (skip + n_new) & _SECTOR_MASK and (last or not places):
            places.append(last)
        return places

    def _decrypt_sector(
        self, whole: memoryview, place: int, data: Buffer, *, host_offset: int, guest_offset: int
    ) -> None:
        """Put what ``data`` decrypts to at byte ``place`` of ``whole``, which lies at the two offsets."""
        sector = whole[place : place + SECTOR_SIZE]
        self._decrypt_into(sector, data, 0, host_offset=host_offset + place, guest_offset=guest_offset + place)

    def _decrypt_into(
        self, part: memoryview, data: Buffer, skip: int, *, host_offset: int, guest_offset: int
    ) -> None:
        plain = self._cipher.decrypt(data, self._sector(host_offset=host_offset, guest_offset=guest_offset))
        part[:] = plain if len(plain) == len(part) else memoryview(plain)[skip : skip + len(part)]

    # Version 1 may have clusters at any offset: a range is every sector of the file that it touches.

    def _conflict(self, claims: Claims, host_offset: int, n_bytes: int) -> Claim | None:
        return claims.first_conflict(host_offset // SECTOR_SIZE, divide_up(host_offset + n_bytes, SECTOR_SIZE))

    def _claim(self, claims: Claims, host_offset: int, n_bytes: int) -> Claim:
        return claims.take(host_offset // SECTOR_SIZE, divide_up(host_offset + n_bytes, SECTOR_SIZE))


class EncryptedPlaces:
    """The data of a LUKS layer by its place in the file alone, as a storage that gives and takes it decrypted."""

    def __init__(self, encrypted: EncryptedData) -> None:
        self._encrypted = encrypted

    def try_pread(self, host_offset: int, n_bytes: int) -> Buffer | None:
        """See Storage."""
        data = bytearray(n_bytes)
        if n_bytes and not self._encrypted.try_read_into(
            memoryview(data), host_offset=host_offset, guest_offset=host_offset
        ):
            return None
        return data

    async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
        """See Storage. Raises OSError."""
        data = bytearray(n_bytes)
        await self._encrypted.read_into(memoryview(data), host_offset=host_offset, guest_offset=host_offset)
        return data

    def start_delivery(self, host_offset: int, n_bytes: int, deliver: Deliver, on_end: OnEnd) -> bool:
        """False: ciphers run in the trio thread."""
        return False

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """See Storage. Raises OSError."""
        return self._encrypted.try_write(buffers, host_offset=host_offset, guest_offset=host_offset)

    async def pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """See Storage. Raises OSError."""
        await self._encrypted.write(buffers, host_offset=host_offset, guest_offset=host_offset)


class Passphrase:
    """The passphrase of a chain, asked for at most once; its owner calls :meth:`wipe` in the end."""

    def __init__(self, source: PassphraseSource | None) -> None:
        self._source = source
        self._secret: bytearray | None = None

    def get(self, path: str) -> bytearray:
        """The passphrase, for the layer at ``path``. Raises ImageUsageError where there is none, OSError."""
        if self._secret is None:
            if self._source is None:
                raise ImageUsageError(f"{path}: is encrypted and needs a key")
            self._secret = self._source(path)
        return self._secret

    def wipe(self) -> None:
        """Overwrite it."""
        if self._secret is not None:
            self._secret[:] = bytes(len(self._secret))
            self._secret = None


class _LockedCipher:
    """Stands where there is no key."""

    def __init__(self, path: str) -> None:
        self._path = path

    def decrypt(self, data: Buffer, first_sector: int) -> bytes:
        """Refuse."""
        raise ImageUsageError(f"{self._path}: is encrypted and was opened without its key")

    encrypt = decrypt

    def decrypt_in_place(self, buffer: bytearray | memoryview, first_sector: int) -> None:
        """Refuse."""
        self.decrypt(buffer, first_sector)

    encrypt_in_place = decrypt_in_place


def locked(path: str, data_storage: Storage) -> EncryptedData:
    """The guest data of an encrypted layer that nobody will read."""
    return EncryptedData(data_storage, _LockedCipher(path), by_guest_offset=False)


async def load_luks_header(storage: Storage, header: Qcow2Header) -> tuple[LuksHeader, int]:
    """The LUKS header of an image and the host offset of its LUKS area. Raises FormatError, OSError."""
    host_offset, length = luks_area(header.extensions)
    return parse_luks_header(bytes(await storage.pread(host_offset, HEADER_LENGTH)), length), host_offset


async def unlock(
    path: str, storage: Storage, data_storage: Storage, header: Qcow1Header | Qcow2Header, passphrase: Passphrase
) -> EncryptedData:
    """The guest data of the encrypted layer at ``path``; ``storage`` holds its header, ``data_storage`` its data.

    Raises WrongKeyError, ImageUsageError, FormatError, UnsupportedFeatureError, OSError.
    """
    if header.crypt_method == CRYPT_AES or isinstance(header, Qcow1Header):
        from ...format.crypto import legacy_aes_cipher

        return EncryptedData(data_storage, legacy_aes_cipher(passphrase.get(path)), by_guest_offset=True)
    luks, area_offset = await load_luks_header(storage, header)
    require_available(luks)
    return EncryptedData(
        data_storage, await _unlock_luks(path, storage, area_offset, luks, passphrase), by_guest_offset=False
    )


async def _unlock_luks(
    path: str, storage: Storage, area_offset: int, luks: LuksHeader, passphrase: Passphrase
) -> SectorCipher:
    from ...format.crypto import make_sector_cipher
    from ...format.luks_keys import unlock_slot

    active = [slot for slot in luks.slots if slot.active]
    if not active:
        raise ImageUsageError(f"{path}: no key can unlock this image: none of its LUKS key slots is in use")
    secret = passphrase.get(path)
    n_bytes = key_material_length(luks.key_bytes)
    for number, slot in enumerate(active, 1):
        if slot.iterations > _MANY_ITERATIONS:
            _log.info(
                "%s: LUKS key slot %d of %d wants %d rounds of PBKDF2, which takes a while",
                path,
                number,
                len(active),
                slot.iterations,
            )
        material = bytes(await storage.pread(area_offset + slot.key_offset, n_bytes))
        # A stop must not wait for what an image asks for: the thread is left behind, and ends with the process.
        key = await trio.to_thread.run_sync(unlock_slot, luks, slot, material, secret, abandon_on_cancel=True)
        if key is not None:
            return make_sector_cipher(luks.spec, key)
    raise WrongKeyError(f"{path}: this is not the key of this image: it opens none of the LUKS key slots in use")
