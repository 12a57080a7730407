"""Encryption of subjects, written from the specifications of LUKS 1 and of QCOW's old method: nothing of the package.

The keys derive in 1,000 rounds, so that opening such an image takes a fraction of a millisecond.
"""

from __future__ import annotations

import hashlib
import random
from functools import cache

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

PASSPHRASE = b"fuzz"
_ROUNDS = 1000
_STRIPES = 4000
_KEY_BYTES = 32
_SLOT_SECTORS = 256
LUKS_SECTORS = 8 + 8 * _SLOT_SECTORS
"""Of a LUKS area: the header and room for eight keys."""


def _bytes(name: str, n_bytes: int) -> bytes:
    return random.Random(name).randbytes(n_bytes)


def _xts(key: bytes, data: bytes, first_sector: int) -> bytes:
    found = b""
    for start in range(0, len(data), 512):
        tweak = (first_sector + start // 512).to_bytes(16, "little")
        cipher = Cipher(algorithms.AES(key), modes.XTS(tweak)).encryptor()
        found += cipher.update(data[start : start + 512]) + cipher.finalize()
    return found


def _split(key: bytes) -> bytes:
    """The anti-forensic splitter: the key is the last stripe, exclusive or what all others come to."""
    rest = _bytes("stripes", _KEY_BYTES * (_STRIPES - 1))
    block = bytes(_KEY_BYTES)
    for stripe in range(_STRIPES - 1):
        mixed = bytes(map(int.__xor__, block, rest[stripe * _KEY_BYTES : (stripe + 1) * _KEY_BYTES]))
        block = hashlib.sha256(bytes(4) + mixed).digest()
    return rest + bytes(map(int.__xor__, block, key))


@cache
def luks_key() -> tuple[bytes, bytes, bytes]:
    """What is in a LUKS area: digest of the master key and its salt, salt of slot 0, material of slot 0."""
    key, digest_salt, slot_salt = _bytes("key", _KEY_BYTES), _bytes("digest", 32), _bytes("slot", 32)
    digest = hashlib.pbkdf2_hmac("sha256", key, digest_salt, _ROUNDS, 20)
    slot_key = hashlib.pbkdf2_hmac("sha256", PASSPHRASE, slot_salt, _ROUNDS, _KEY_BYTES)
    return digest + digest_salt, slot_salt, _xts(slot_key, _split(key), 0)


def encrypt(method: int, data: bytes, host_offset: int, guest_offset: int) -> bytes:
    """Guest data as it lies in an image: 2 for LUKS, whose sectors have their number in the file, and 1 for AES-CBC
    with the passphrase as key, whose sectors have their number in the disk."""
    if method == 2:
        return _xts(_bytes("key", _KEY_BYTES), data, host_offset // 512)
    found = b""
    for start in range(0, len(data), 512):
        iv = ((guest_offset + start) // 512).to_bytes(16, "little")
        cipher = Cipher(algorithms.AES(PASSPHRASE.ljust(16, b"\0")), modes.CBC(iv)).encryptor()
        found += cipher.update(data[start : start + 512]) + cipher.finalize()
    return found
