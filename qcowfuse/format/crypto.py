"""Sector ciphers: what an encrypted image does to each 512 bytes of guest data, and how a sector gets its IV.

1. The ciphers are libgcrypt's where it is there and has them: one call for a sector is all it takes. Else they are
   the ``cryptography`` package's, a context for a sector. What is here is only how sectors are mapped onto them: the
   IV generators of LUKS, and modes that the package has not got for a cipher, made from its ECB.
2. Data is whole sectors, numbered from ``first_sector``; what a sector number means is the caller's matter.
3. Nothing here keeps a key but the cipher objects themselves, and no ``repr`` shows one.
4. This module takes its time to import, so it is imported only where an image is encrypted.

Sources: LUKS1 on-disk format 1.2.3; QEMU's crypto/block-luks.c, ivgen-*.c and block-qcow.c. dm-crypt does the same.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from ..buffer import Buffer
from ..errors import UnsupportedFeatureError
from . import libgcrypt
from .geometry import SECTOR_SIZE
from .luks import BLOCK_SIZES, CIPHERS, CipherSpec

_LEGACY_KEY_BYTES = 16


class SectorCipher(Protocol):
    """Encrypts and decrypts whole sectors."""

    def encrypt(self, data: Buffer, first_sector: int) -> bytes | bytearray:
        """``data``, a multiple of 512 bytes, encrypted."""

    def decrypt(self, data: Buffer, first_sector: int) -> bytes | bytearray:
        """``data``, a multiple of 512 bytes, decrypted."""

    def encrypt_in_place(self, buffer: bytearray | memoryview, first_sector: int) -> None:
        """Encrypt what is in ``buffer``, a multiple of 512 bytes."""

    def decrypt_in_place(self, buffer: bytearray | memoryview, first_sector: int) -> None:
        """Decrypt what is in ``buffer``, a multiple of 512 bytes."""


def make_sector_cipher(spec: CipherSpec, key: bytes | bytearray) -> SectorCipher:
    """The cipher for a spec without problem and a key of ``spec.key_bytes``.

    Raises UnsupportedFeatureError for XTS with two equal keys, which OpenSSL refuses.
    """
    name, key_bytes = CIPHERS[spec.cipher]
    half = len(key) // 2
    if spec.mode == "xts" and key[:half] == key[half:]:
        raise UnsupportedFeatureError(["XTS with two equal keys"])
    if libgcrypt.has_cipher(name, key_bytes):
        if spec.mode == "ecb":
            return _GcryptBlocks(name, key)
        return _GcryptSectors(spec, name, key)
    return _without_libgcrypt(spec, name, key)


def _without_libgcrypt(spec: CipherSpec, name: str, key: bytes | bytearray) -> SectorCipher:
    if spec.mode == "ecb":
        return _EcbSectors(name, key)
    generator = _iv_generator(spec, name, key)
    if spec.mode == "cbc":
        return _CbcSectors(name, key, generator)
    if spec.mode == "ctr":
        return _CtrSectors(name, key, generator)
    return XtsByBlocks(key, generator) if len(key) == 48 else _XtsSectors(key, generator)


def legacy_aes_cipher(passphrase: bytes | bytearray) -> SectorCipher:
    """Encryption method 1: AES-128-CBC, the key is the passphrase itself, cut or padded to 16 bytes."""
    key = bytes(passphrase[:_LEGACY_KEY_BYTES]).ljust(_LEGACY_KEY_BYTES, b"\0")
    return make_sector_cipher(CipherSpec("aes-128", "cbc", "plain64"), key)


IvGenerator = Callable[[int, int], Sequence[bytes]]
"""``(first_sector, n_sectors)`` to the IVs."""


def _plain_generator(n_bytes: int, mask: int) -> IvGenerator:
    def ivs(first_sector: int, n_sectors: int) -> list[bytes]:
        return [
            (sector & mask).to_bytes(n_bytes, "little") for sector in range(first_sector, first_sector + n_sectors)
        ]

    return ivs


def _essiv_generator(name: str, n_bytes: int, key: bytes | bytearray, hash_name: str) -> IvGenerator:
    encrypt = _block_encryptor(name, hashlib.new(hash_name, key).digest())
    plain = _plain_generator(n_bytes, (1 << 64) - 1)

    def ivs(first_sector: int, n_sectors: int) -> list[bytes]:
        encrypted = encrypt(b"".join(plain(first_sector, n_sectors)))
        return [encrypted[place : place + n_bytes] for place in range(0, len(encrypted), n_bytes)]

    return ivs


def _iv_generator(spec: CipherSpec, name: str, key: bytes | bytearray) -> IvGenerator:
    n_bytes = BLOCK_SIZES[name]
    if spec.iv_generator == "essiv":
        assert spec.iv_hash is not None
        return _essiv_generator(name, n_bytes, key, spec.iv_hash)
    return _plain_generator(n_bytes, (1 << (32 if spec.iv_generator == "plain" else 64)) - 1)


def _block_encryptor(name: str, key: bytes) -> Callable[[bytes], bytes]:
    if not libgcrypt.has_cipher(name, len(key)):
        return Cipher(_algorithm(name, key), modes.ECB()).encryptor().update
    cipher = libgcrypt.BlockCipher(name, "ecb", key)

    def encrypt(data: bytes) -> bytes:
        encrypted = bytearray(data)
        cipher.crypt_blocks(encrypted, encrypt=True)
        return bytes(encrypted)

    return encrypt


def _algorithm(name: str, key: bytes | bytearray) -> algorithms.AES | CAST5:
    return algorithms.AES(bytes(key)) if name == "aes" else CAST5(bytes(key))


def xor(left: Buffer, right: Buffer) -> bytes:
    """Both, bit by bit; of the same length."""
    return (int.from_bytes(left, "little") ^ int.from_bytes(right, "little")).to_bytes(len(left), "little")


class _InPlace(ABC):
    """What is made from ciphers that work in place."""

    @abstractmethod
    def encrypt_in_place(self, buffer: bytearray | memoryview, first_sector: int) -> None:
        """See SectorCipher."""

    @abstractmethod
    def decrypt_in_place(self, buffer: bytearray | memoryview, first_sector: int) -> None:
        """See SectorCipher."""

    def encrypt(self, data: Buffer, first_sector: int) -> bytearray:
        """See SectorCipher."""
        encrypted = bytearray(data)
        self.encrypt_in_place(encrypted, first_sector)
        return encrypted

    def decrypt(self, data: Buffer, first_sector: int) -> bytearray:
        """See SectorCipher."""
        decrypted = bytearray(data)
        self.decrypt_in_place(decrypted, first_sector)
        return decrypted


class _GcryptBlocks(_InPlace):
    """Every block on its own; nothing for a sector number to do."""

    def __init__(self, name: str, key: bytes | bytearray) -> None:
        self._cipher = libgcrypt.BlockCipher(name, "ecb", key)

    def encrypt_in_place(self, buffer: bytearray | memoryview, first_sector: int) -> None:
        """See SectorCipher."""
        self._cipher.crypt_blocks(buffer, encrypt=True)

    def decrypt_in_place(self, buffer: bytearray | memoryview, first_sector: int) -> None:
        """See SectorCipher."""
        self._cipher.crypt_blocks(buffer, encrypt=False)


class _GcryptSectors(_InPlace):
    """Modes with an IV for each sector. In XTS the library counts by itself, where IVs are consecutive numbers."""

    def __init__(self, spec: CipherSpec, name: str, key: bytes | bytearray) -> None:
        self._cipher = libgcrypt.BlockCipher(name, spec.mode, key)
        self._ivs = _iv_generator(spec, name, key)
        self._n_counted = 0
        """Sector numbers below this are their own IVs, and counted up by the library."""
        if spec.mode == "xts" and spec.iv_generator != "essiv":
            self._n_counted = 1 << (32 if spec.iv_generator == "plain" else 64)

    def _crypt(self, buffer: bytearray | memoryview, first_sector: int, *, encrypt: bool) -> None:
        n_sectors = len(buffer) // SECTOR_SIZE
        if first_sector + n_sectors <= self._n_counted:
            self._cipher.crypt_numbered(buffer, first_sector.to_bytes(16, "little"), encrypt=encrypt)
        else:
            self._cipher.crypt_sectors(buffer, self._ivs(first_sector, n_sectors), encrypt=encrypt)

    def encrypt_in_place(self, buffer: bytearray | memoryview, first_sector: int) -> None:
        """See SectorCipher."""
        self._crypt(buffer, first_sector, encrypt=True)

    def decrypt_in_place(self, buffer: bytearray | memoryview, first_sector: int) -> None:
        """See SectorCipher."""
        self._crypt(buffer, first_sector, encrypt=False)


class _Copying(ABC):
    """What is made from ciphers that return new bytes."""

    @abstractmethod
    def encrypt(self, data: Buffer, first_sector: int) -> bytes | bytearray:
        """See SectorCipher."""

    @abstractmethod
    def decrypt(self, data: Buffer, first_sector: int) -> bytes | bytearray:
        """See SectorCipher."""

    def encrypt_in_place(self, buffer: bytearray | memoryview, first_sector: int) -> None:
        """See SectorCipher."""
        buffer[:] = self.encrypt(buffer, first_sector)

    def decrypt_in_place(self, buffer: bytearray | memoryview, first_sector: int) -> None:
        """See SectorCipher."""
        buffer[:] = self.decrypt(buffer, first_sector)


class _EcbSectors(_Copying):
    """Every block on its own; nothing for a sector number to do."""

    def __init__(self, name: str, key: bytes | bytearray) -> None:
        cipher = Cipher(_algorithm(name, key), modes.ECB())
        self._encryptor, self._decryptor = cipher.encryptor(), cipher.decryptor()

    def encrypt(self, data: Buffer, first_sector: int) -> bytes:
        """See SectorCipher."""
        return self._encryptor.update(data)

    def decrypt(self, data: Buffer, first_sector: int) -> bytes:
        """See SectorCipher."""
        return self._decryptor.update(data)


class _CbcSectors(_Copying):
    """One context goes over all sectors. What it chains into the first block of each is put right by an XOR: that
    costs a fifth of a context for each sector."""

    def __init__(self, name: str, key: bytes | bytearray, generator: IvGenerator) -> None:
        self._block = BLOCK_SIZES[name]
        self._cipher = Cipher(_algorithm(name, key), modes.CBC(bytes(self._block)))
        self._ivs = generator

    def encrypt(self, data: Buffer, first_sector: int) -> bytes:
        """See SectorCipher."""
        view, block = memoryview(data), self._block
        update = self._cipher.encryptor().update
        parts: list[bytes] = []
        chained = bytes(block)
        for number, iv in enumerate(self._ivs(first_sector, len(view) // SECTOR_SIZE)):
            place = number * SECTOR_SIZE
            parts.append(update(xor(xor(view[place : place + block], iv), chained)))
            parts.append(rest := update(view[place + block : place + SECTOR_SIZE]))
            chained = rest[-block:]
        return b"".join(parts)

    def decrypt(self, data: Buffer, first_sector: int) -> bytearray:
        """See SectorCipher."""
        view, block = memoryview(data), self._block
        plain = bytearray(self._cipher.decryptor().update(view))
        for number, iv in enumerate(self._ivs(first_sector, len(view) // SECTOR_SIZE)):
            place = number * SECTOR_SIZE
            first = xor(plain[place : place + block], iv)
            plain[place : place + block] = xor(first, view[place - block : place]) if number else first
        return plain


class _CtrSectors(_Copying):
    """A sector's IV is its first counter; counters are big endian, whatever the generator is."""

    def __init__(self, name: str, key: bytes | bytearray, generator: IvGenerator) -> None:
        self._block = BLOCK_SIZES[name]
        self._update = Cipher(_algorithm(name, key), modes.ECB()).encryptor().update
        self._ivs = generator

    def encrypt(self, data: Buffer, first_sector: int) -> bytes:
        """See SectorCipher."""
        block, mask = self._block, (1 << 8 * self._block) - 1
        counters: list[bytes] = []
        for iv in self._ivs(first_sector, len(data) // SECTOR_SIZE):
            first = int.from_bytes(iv, "big")
            counters += [
                (counter & mask).to_bytes(block, "big") for counter in range(first, first + SECTOR_SIZE // block)
            ]
        return xor(data, self._update(b"".join(counters)))

    def decrypt(self, data: Buffer, first_sector: int) -> bytes:
        """See SectorCipher."""
        return self.encrypt(data, first_sector)


class _XtsSectors(_Copying):
    """AES-XTS with keys of 128 and 256 bits. A context for each sector: measured, as fast as one pass over all blocks
    with the tweaks made and applied here, and much simpler. libgcrypt takes an eighth of the time."""

    def __init__(self, key: bytes | bytearray, generator: IvGenerator) -> None:
        self._algorithm = algorithms.AES(bytes(key))
        self._ivs = generator

    def encrypt(self, data: Buffer, first_sector: int) -> bytes:
        """See SectorCipher."""
        algorithm, xts, view, place = self._algorithm, modes.XTS, memoryview(data), 0
        parts: list[bytes] = []
        for iv in self._ivs(first_sector, len(view) // SECTOR_SIZE):
            end = place + SECTOR_SIZE
            parts.append(Cipher(algorithm, xts(iv)).encryptor().update(view[place:end]))
            place = end
        return b"".join(parts)

    def decrypt(self, data: Buffer, first_sector: int) -> bytes:
        """See SectorCipher."""
        algorithm, xts, view, place = self._algorithm, modes.XTS, memoryview(data), 0
        parts: list[bytes] = []
        for iv in self._ivs(first_sector, len(view) // SECTOR_SIZE):
            end = place + SECTOR_SIZE
            parts.append(Cipher(algorithm, xts(iv)).decryptor().update(view[place:end]))
            place = end
        return b"".join(parts)


class XtsByBlocks(_Copying):
    """AES-XTS with keys of 192 bits, which OpenSSL has not got as a mode of its own."""

    def __init__(self, key: bytes | bytearray, generator: IvGenerator) -> None:
        half = len(key) // 2
        cipher = Cipher(algorithms.AES(bytes(key[:half])), modes.ECB())
        self._encryptor, self._decryptor = cipher.encryptor(), cipher.decryptor()
        self._tweaks_of = Cipher(algorithms.AES(bytes(key[half:])), modes.ECB()).encryptor().update
        self._ivs = generator

    def encrypt(self, data: Buffer, first_sector: int) -> bytes:
        """See SectorCipher."""
        return self._crypt(data, first_sector, self._encryptor)

    def decrypt(self, data: Buffer, first_sector: int) -> bytes:
        """See SectorCipher."""
        return self._crypt(data, first_sector, self._decryptor)

    def _crypt(self, data: Buffer, first_sector: int, context: CipherContext) -> bytes:
        first_tweaks = self._tweaks_of(b"".join(self._ivs(first_sector, len(data) // SECTOR_SIZE)))
        tweaks: list[bytes] = []
        for place in range(0, len(first_tweaks), 16):
            tweak = int.from_bytes(first_tweaks[place : place + 16], "little")
            for _ in range(SECTOR_SIZE // 16):
                tweaks.append(tweak.to_bytes(16, "little"))
                # Times x in GF(2^128), modulo x^128 + x^7 + x^2 + x + 1.
                tweak = (tweak << 1) ^ ((1 << 128 | 0x87) if tweak >> 127 else 0)
        mask = b"".join(tweaks)
        return xor(context.update(xor(data, mask)), mask)
