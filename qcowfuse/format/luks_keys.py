"""Master keys of LUKS: taken out of a key slot with a passphrase, and put into a new one.

1. Work is in plain functions that take as long as the header asks for: callers run them in a thread.
2. Keys are ``bytes`` and let go of at once; a passphrase belongs to the caller, which overwrites it.
3. Randomness comes from the caller.

Sources: LUKS1 on-disk format specification 1.2.3, "AF splitter", "PBKDF2"; QEMU's crypto/afsplit.c, block-luks.c.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from uuid import UUID

from ..errors import UnsupportedFeatureError
from .crypto import make_sector_cipher, xor
from .geometry import SECTOR_SIZE, round_up
from .luks import (
    DIGEST_BYTES,
    KEY_MATERIAL_ALIGNMENT,
    N_KEY_SLOTS,
    SALT_BYTES,
    STRIPES,
    CipherSpec,
    KeySlot,
    LuksHeader,
    key_material_length,
)

MIN_ITERATIONS = 1000


def af_merge(material: bytes | bytearray, key_bytes: int, stripes: int, hash_name: str) -> bytes:
    """The key from its ``stripes`` pieces of ``key_bytes`` each."""
    block = bytes(key_bytes)
    for stripe in range(stripes - 1):
        block = _diffuse(xor(block, material[stripe * key_bytes : (stripe + 1) * key_bytes]), hash_name)
    return xor(block, material[(stripes - 1) * key_bytes : stripes * key_bytes])


def af_split(key: bytes, stripes: int, hash_name: str, randomness: bytes) -> bytes:
    """The reverse of :func:`af_merge`; ``randomness`` of ``len(key) * (stripes - 1)`` bytes is most of the result."""
    key_bytes = len(key)
    block = bytes(key_bytes)
    for stripe in range(stripes - 1):
        block = _diffuse(xor(block, randomness[stripe * key_bytes : (stripe + 1) * key_bytes]), hash_name)
    return randomness + xor(block, key)


def _diffuse(block: bytes, hash_name: str) -> bytes:
    digest_size = hashlib.new(hash_name).digest_size
    parts: list[bytes] = []
    for number, place in enumerate(range(0, len(block), digest_size)):
        piece = block[place : place + digest_size]
        parts.append(hashlib.new(hash_name, number.to_bytes(4, "big") + piece).digest()[: len(piece)])
    return b"".join(parts)


def unlock_slot(header: LuksHeader, slot: KeySlot, material: bytes, passphrase: bytes | bytearray) -> bytes | None:
    """The master key, None where the passphrase is not the slot's. ``material``: what the slot refers to."""
    key_bytes = header.key_bytes
    slot_key = hashlib.pbkdf2_hmac(header.hash_name, passphrase, slot.salt, slot.iterations, key_bytes)
    split = make_sector_cipher(header.spec, slot_key).decrypt(material, 0)
    key = af_merge(split, key_bytes, slot.stripes, header.hash_name)
    digest = hashlib.pbkdf2_hmac(header.hash_name, key, header.digest_salt, header.digest_iterations, DIGEST_BYTES)
    return key if hmac.compare_digest(digest, header.key_digest) else None


@dataclass(frozen=True, slots=True, repr=False)
class LuksRandomness:
    """What makes a new LUKS area its own. ``split`` has ``key_bytes * (STRIPES - 1)`` bytes."""

    master_key: bytes
    split: bytes
    digest_salt: bytes
    slot_salt: bytes
    uuid: UUID


def make_luks_area(
    spec: CipherSpec,
    hash_name: str,
    passphrase: bytes | bytearray,
    randomness: LuksRandomness,
    *,
    slot_iterations: int,
    digest_iterations: int,
) -> tuple[LuksHeader, bytes]:
    """A header and the material of its one active slot. The layout is cryptsetup's and QEMU's."""
    if spec.key_bytes * STRIPES % SECTOR_SIZE:
        # QEMU ends with a failed assertion here, making or opening such an image.
        raise UnsupportedFeatureError([f"cipher {spec.cipher} in mode {spec.mode}: key material of broken sectors"])
    key = randomness.master_key
    distance = round_up(key_material_length(spec.key_bytes), KEY_MATERIAL_ALIGNMENT)
    digest = hashlib.pbkdf2_hmac(hash_name, key, randomness.digest_salt, digest_iterations, DIGEST_BYTES)
    slots = tuple(
        KeySlot(
            active=number == 0,
            iterations=0 if number else slot_iterations,
            salt=bytes(SALT_BYTES) if number else randomness.slot_salt,
            key_offset=KEY_MATERIAL_ALIGNMENT + number * distance,
        )
        for number in range(N_KEY_SLOTS)
    )
    header = LuksHeader(
        spec=spec,
        hash_name=hash_name,
        payload_offset=KEY_MATERIAL_ALIGNMENT + N_KEY_SLOTS * distance,
        key_digest=digest,
        digest_salt=randomness.digest_salt,
        digest_iterations=digest_iterations,
        uuid=str(randomness.uuid),
        slots=slots,
    )
    slot_key = hashlib.pbkdf2_hmac(hash_name, passphrase, slots[0].salt, slot_iterations, spec.key_bytes)
    split = af_split(key, STRIPES, hash_name, randomness.split)
    return header, bytes(make_sector_cipher(spec, slot_key).encrypt(split, 0))
