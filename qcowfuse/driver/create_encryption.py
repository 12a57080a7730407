"""What makes a new image an encrypted one: its options, and the LUKS area with a fresh master key.

1. Options have qemu-img's names, values and defaults; the passphrase never is one of them.
2. Only what can be opened again is made: here, and by QEMU.
3. The number of iterations is measured, for the time that the user wants an attacker's guess to take on this machine.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import UnsupportedFeatureError
from ..format.header import CRYPT_AES, CRYPT_LUKS
from ..format.luks import (
    CIPHER_MODES,
    CIPHERS,
    HASHES,
    IV_GENERATORS,
    MAX_ITERATIONS,
    SALT_BYTES,
    STRIPES,
    CipherSpec,
    has_hash,
    serialise_luks_header,
)
from .new_file import CreateError

OPTIONS = frozenset(
    f"encrypt.{name}"
    for name in str.split("format cipher-alg cipher-mode ivgen-alg ivgen-hash-alg hash-alg iter-time key-secret")
)
MAX_ITER_TIME = 600_000
"""Milliseconds: what takes longer to make would take longer to open, too."""
_MEASURED_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Encryption:
    """How to encrypt; without a ``spec``, by the old AES method. ``iter_time`` in milliseconds."""

    spec: CipherSpec | None = None
    hash_name: str = "sha256"
    iter_time: int = 2000

    @property
    def crypt_method(self) -> int:
        """For the header."""
        return CRYPT_AES if self.spec is None else CRYPT_LUKS


@dataclass(frozen=True, slots=True, repr=False)
class LuksArea:
    """The LUKS area of a new image: ``length`` bytes; ``parts``: place in it and bytes of what is not zero."""

    length: int
    parts: tuple[tuple[int, bytes], ...]


def parse_encryption(format_name: str, given: Mapping[str, str]) -> Encryption | None:
    """From options by name, those that are not about encryption included. Raises CreateError."""
    if "encrypt.key-secret" in given:
        raise CreateError("encrypt.key-secret: secrets are QEMU's; give the passphrase with --key-file")
    chosen = {name.removeprefix("encrypt."): value for name, value in given.items() if name in OPTIONS}
    if not chosen:
        return None
    method = chosen.pop("format", "")
    known = ("aes", "luks") if format_name == "qcow2" else ("aes",)
    if method not in known:
        found = f"encrypt.format={method}" if method else "encrypt.format is missing"
        raise CreateError(f"{found}: expected {' or '.join(known)}")
    if method == "aes":
        if chosen:
            raise CreateError(f"encrypt.{min(chosen)} needs encrypt.format=luks")
        return Encryption()

    def choice(name: str, values: tuple[str, ...], default: str | None) -> str | None:
        value = chosen.get(name, default)
        if value is not None and value not in values:
            raise CreateError(f"encrypt.{name}={value}: expected {', '.join(values)}")
        return value

    generator = choice("ivgen-alg", IV_GENERATORS, "plain64")
    spec = CipherSpec(
        choice("cipher-alg", tuple(sorted(CIPHERS)), "aes-256") or "",
        choice("cipher-mode", CIPHER_MODES, "xts") or "",
        generator or "",
        choice("ivgen-hash-alg", tuple(HASHES), "sha256" if generator == "essiv" else None),
    )
    hash_name = choice("hash-alg", tuple(HASHES), "sha256") or ""
    iter_time = chosen.get("iter-time", "2000")
    if not iter_time.isascii() or not iter_time.isdigit() or not 0 < int(iter_time[:9]) <= MAX_ITER_TIME:
        raise CreateError(f"encrypt.iter-time={iter_time}: expected milliseconds, 1 to {MAX_ITER_TIME}")
    _require_possible(spec, hash_name)
    return Encryption(spec, hash_name, int(iter_time))


def _require_possible(spec: CipherSpec, hash_name: str) -> None:
    problem = spec.problem()
    missing = spec.missing() + ([] if has_hash(hash_name) else [f"LUKS hash {hash_name}"])
    if problem is None and missing:
        problem = f"this is not to be had here: {', '.join(missing)}"
    if problem is None and spec.key_bytes * STRIPES % 512:
        problem = f"cipher {spec.cipher} in mode {spec.mode} cannot be used: QEMU fails on its key material"
    if problem is not None:
        raise CreateError(problem)


def check_passphrase(passphrase: bytes | bytearray) -> None:
    """Raises CreateError for one that QEMU could not be given."""
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
