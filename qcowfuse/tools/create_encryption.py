"""What makes a new image an encrypted one: how, and the LUKS area with a fresh master key.

1. Defaults are qemu-img's.
2. Only what can be opened again is made: here, and by QEMU.
3. The number of iterations is measured, for the time that the user wants an attacker's guess to take on this machine.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UnsupportedFeatureError
from ..format.geometry import SECTOR_SIZE
from ..format.header_fields import CRYPT_AES, CRYPT_LUKS
from ..format.luks import CIPHER_MODES as CIPHER_MODES  # cli takes these from here
from ..format.luks import CIPHERS as CIPHERS
from ..format.luks import HASHES as HASHES
from ..format.luks import IV_GENERATORS as IV_GENERATORS
from ..format.luks import (
    MAX_ITERATIONS,
    SALT_BYTES,
    STRIPES,
    has_hash,
    serialise_luks_header,
)
from ..format.luks import CipherSpec as CipherSpec
from .new_file import CreateError

MAX_ITER_TIME = 600_000
"""Milliseconds: what takes longer to make would take longer to open, too."""
_MEASURED_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Encryption:
    """How to encrypt; without a ``spec``, by the old AES method. ``iter_time`` in milliseconds; ``iterations`` takes
    its place."""

    spec: CipherSpec | None = None
    hash_name: str = "sha256"
    iter_time: int = 2000
    iterations: int | None = None

    @property
    def crypt_method(self) -> int:
        """For the header."""
        return CRYPT_AES if self.spec is None else CRYPT_LUKS


@dataclass(frozen=True, slots=True, repr=False)
class LuksArea:
    """The LUKS area of a new image: ``length`` bytes; ``parts``: place in it and bytes of what is not zero."""

    length: int
    parts: tuple[tuple[int, bytes], ...]


def require_possible(spec: CipherSpec, hash_name: str) -> None:
    """Raises CreateError for what cannot be, or not here."""
    problem = spec.problem()
    missing = spec.missing() + ([] if has_hash(hash_name) else [f"LUKS hash {hash_name}"])
    if problem is None and missing:
        problem = f"no library here offers {', '.join(missing)}"
    if problem is None and spec.key_bytes * STRIPES % SECTOR_SIZE:
        problem = f"cipher {spec.cipher} in mode {spec.mode} cannot be used: QEMU fails on its key material"
    if problem is not None:
        raise CreateError(problem)


def check_passphrase(passphrase: bytes | bytearray) -> None:
    """Raises CreateError for one that protects nothing, or that QEMU could not be given."""
    if not passphrase:
        raise CreateError("the passphrase is empty, and would protect nothing")
    try:
        is_text = b"\0" not in passphrase and passphrase.decode() is not None
    except UnicodeDecodeError:
        is_text = False
    if not is_text:
        raise CreateError("the passphrase is not UTF-8 text without NUL bytes: QEMU would not take it")


def make_area(encryption: Encryption, passphrase: bytes | bytearray) -> LuksArea:
    """A LUKS area that ``passphrase`` opens. Takes its time: to be run in a thread. Raises CreateError."""
    from ..format.luks_keys import MIN_ITERATIONS, LuksRandomness, make_luks_area

    spec = encryption.spec
    assert spec is not None
    wanted = encryption.iterations
    if wanted is None:
        per_second = _iterations_per_second(encryption.hash_name, spec.key_bytes)
        wanted = int(per_second * encryption.iter_time / 1000)
    randomness = LuksRandomness(
        master_key=secrets.token_bytes(spec.key_bytes),
        split=os.urandom(spec.key_bytes * (STRIPES - 1)),
        digest_salt=os.urandom(SALT_BYTES),
        slot_salt=os.urandom(SALT_BYTES),
        uuid=uuid.uuid4(),
    )
    try:
        header, material = make_luks_area(
            spec,
            encryption.hash_name,
            passphrase,
            randomness,
            slot_iterations=min(max(wanted, MIN_ITERATIONS), MAX_ITERATIONS),
            # An eighth, as cryptsetup and QEMU have it.
            digest_iterations=min(max(wanted // 8, MIN_ITERATIONS), MAX_ITERATIONS),
        )
    except UnsupportedFeatureError as error:
        raise CreateError(str(error)) from error
    return LuksArea(
        header.payload_offset, ((0, serialise_luks_header(header)), (header.slots[0].key_offset, material))
    )


def _iterations_per_second(hash_name: str, key_bytes: int, clock: Callable[[], float] = time.thread_time) -> float:
    n_iterations = 1000
    while True:
        start = clock()
        hashlib.pbkdf2_hmac(hash_name, b"passphrase", bytes(SALT_BYTES), n_iterations, key_bytes)
        seconds = clock() - start
        if seconds >= _MEASURED_SECONDS:
            return n_iterations / seconds
        n_iterations *= 2
