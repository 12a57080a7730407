"""The LUKS header (version 1) of an encrypted image: parse, validate, serialise; ciphers and hashes by name.

1. What QEMU refuses to open is refused here: its checks of the key slots are all here.
2. Every number is bounded before anything is made or computed from it: iterations are time, the rest is memory.
3. All offsets are relative to the start of the LUKS area, which is whole clusters of the image file.

Sources: LUKS1 on-disk format specification 1.2.3; QEMU's crypto/block-luks.c.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from itertools import pairwise

from ..errors import FormatError, UnsupportedFeatureError
from .extensions import EXTENSION_LUKS_HEADER, HeaderExtension, find_extension, text_of
from .geometry import SECTOR_SIZE, divide_up, round_up

HASHES = {
    "md5": 16,
    "sha1": 20,
    "sha224": 28,
    "sha256": 32,
    "sha384": 48,
    "sha512": 64,
    "ripemd160": 20,
    "sm3": 32,
}
"""Bytes of a digest by QEMU's name. The last two are there where the OpenSSL that Python stands on has them."""
CIPHER_MODES = ("xts", "cbc", "ctr", "ecb")
IV_GENERATORS = ("plain", "plain64", "essiv")
BLOCK_SIZES = {"aes": 16, "cast5": 8, "serpent": 16, "twofish": 16}
CIPHERS = {"cast5-128": ("cast5", 16)} | {
    f"{name}-{8 * n_bytes}": (name, n_bytes) for name in ("aes", "serpent", "twofish") for n_bytes in (16, 24, 32)
}
"""Name in LUKS and bytes of a key, by the name that QEMU's options have."""
FOREIGN_CIPHERS = frozenset({"serpent", "twofish"})
"""Ciphers that QEMU has and the ``cryptography`` package has not: they are there with libgcrypt."""

HEADER_LENGTH = 592
N_KEY_SLOTS = 8
STRIPES = 4000
"""The only number of anti-forensic stripes that QEMU accepts."""
KEY_MATERIAL_ALIGNMENT = 4096
DIGEST_BYTES = 20
SALT_BYTES = 32
MAX_ITERATIONS = 1 << 27
"""Of PBKDF2, for one key slot or the digest: some minutes. The field could ask for hours."""
MAX_LUKS_AREA = 16 << 20
"""Bytes of the LUKS area. Eight slots of the largest keys need 2 MiB."""

_MAGIC = b"LUKS\xba\xbe"
_VERSION = 1
_HEAD = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
_POINTER = struct.Struct(">QQ")
_ENABLED = 0x00AC71F3
_DISABLED = 0x0000DEAD


@dataclass(frozen=True, slots=True)
class CipherSpec:
    """Cipher (``aes-256``), mode, IV generator and its hash, which only ``essiv`` uses."""

    cipher: str
    mode: str
    iv_generator: str
    iv_hash: str | None = None

    @property
    def key_bytes(self) -> int:
        """Bytes of the master key: two keys for XTS."""
        return CIPHERS[self.cipher][1] * (2 if self.mode == "xts" else 1)

    @property
    def mode_name(self) -> str:
        """As LUKS writes it: ``cbc-essiv:sha256``."""
        return f"{self.mode}-{self.iv_generator}" + (f":{self.iv_hash}" if self.iv_hash else "")

    def problem(self) -> str | None:
        """What QEMU would not do either, or None."""
        name, n_bytes = CIPHERS[self.cipher]
        if self.mode == "xts" and BLOCK_SIZES[name] != 16:
            return f"mode xts with cipher {self.cipher}, whose blocks are not of 16 bytes"
        if self.iv_generator != "essiv":
            return None
        if self.iv_hash is None:
            return "IV generator essiv without its hash"
        digest_size = HASHES[self.iv_hash]
        if digest_size != n_bytes and (name == "cast5" or digest_size not in (16, 24, 32)):
            return f"IV generator essiv with hash {self.iv_hash}, whose {digest_size} bytes are no key of {name}"
        return None

    def missing(self) -> list[str]:
        """The names of the ciphers and hashes that this header needs and the installed libraries lack."""
        missing = []
        name, key_bytes = CIPHERS[self.cipher]
        if name in FOREIGN_CIPHERS:
            from . import libgcrypt

            if not libgcrypt.is_there():
                missing.append(f"LUKS cipher {self.cipher}, which needs libgcrypt (Debian package libgcrypt20)")
            elif not libgcrypt.has_cipher(name, key_bytes):
                missing.append(f"LUKS cipher {self.cipher}, which this libgcrypt has not got")
        if self.iv_generator == "essiv" and self.iv_hash is not None and not has_hash(self.iv_hash):
            missing.append(f"LUKS IV hash {self.iv_hash}")
        return missing


@dataclass(frozen=True, slots=True)
class KeySlot:
    """One of eight places for the master key, encrypted with a passphrase. ``key_offset`` in bytes."""

    active: bool
    iterations: int
    salt: bytes
    key_offset: int
    stripes: int = STRIPES


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """A LUKS header. ``payload_offset`` in bytes: the length of the LUKS area, for in a QCOW2 image the payload is
    elsewhere."""

    spec: CipherSpec
    hash_name: str
    payload_offset: int
    key_digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]

    @property
    def key_bytes(self) -> int:
        """Bytes of the master key."""
        return self.spec.key_bytes


def luks_area(extensions: tuple[HeaderExtension, ...]) -> tuple[int, int]:
    """Host offset and length in bytes of the LUKS area of an image. Raises FormatError."""
    data = find_extension(extensions, EXTENSION_LUKS_HEADER)
    if data is None or len(data) != _POINTER.size:
        found = "absent" if data is None else f"{len(data)} bytes"
        raise FormatError("LUKS header pointer", None, f"{found}, expected {_POINTER.size} bytes")
    host_offset, length = _POINTER.unpack(data)
    if not HEADER_LENGTH <= length <= MAX_LUKS_AREA or host_offset % SECTOR_SIZE or host_offset >= 1 << 56:
        detail = f"{length:#x} bytes at {host_offset:#x}, expected {HEADER_LENGTH} to {MAX_LUKS_AREA:#x} and aligned"
        raise FormatError("LUKS header pointer", None, detail)
    return host_offset, length


def luks_pointer(host_offset: int, length: int) -> HeaderExtension:
    """The header extension that :func:`luks_area` reads."""
    return HeaderExtension(EXTENSION_LUKS_HEADER, _POINTER.pack(host_offset, length))


def key_material_length(key_bytes: int) -> int:
    """Bytes of a key slot's material, as they are read and written: whole sectors."""
    return round_up(key_bytes * STRIPES, SECTOR_SIZE)


def has_hash(name: str) -> bool:
    """Whether the hash can be computed here."""
    try:
        hashlib.new(name)
    except ValueError:
        return False
    return True


def require_available(header: LuksHeader) -> None:
    """Raises UnsupportedFeatureError with the names of ciphers and hashes that no library here offers."""
    missing = header.spec.missing()
    if not has_hash(header.hash_name):
        missing.append(f"LUKS hash {header.hash_name}")
    if missing:
        raise UnsupportedFeatureError(missing)


def parse_luks_header(data: bytes, length: int) -> LuksHeader:
    """The header in ``data``, the first 592 bytes of a LUKS area of ``length``.

    Raises FormatError; UnsupportedFeatureError for ciphers, modes and hashes that QEMU has not got either.
    """
    _require(len(data) >= HEADER_LENGTH, 0, f"{len(data)} bytes, expected {HEADER_LENGTH}")
    magic, version, cipher, mode, hash_name, payload, key_bytes, digest, salt, iterations, uuid = _HEAD.unpack_from(
        data
    )
    _require(magic == _MAGIC, 0, f"magic {magic.hex()}, expected {_MAGIC.hex()}")
    if version != _VERSION:
        raise UnsupportedFeatureError([f"LUKS version {version}"])
    spec = _parse_spec(_text(cipher, 8), _text(mode, 40), key_bytes)
    hash_name = _hash(_text(hash_name, 72))
    _require(1 <= iterations <= MAX_ITERATIONS, 164, f"{iterations} iterations, expected 1 to {MAX_ITERATIONS}")
    _require(
        KEY_MATERIAL_ALIGNMENT <= payload * SECTOR_SIZE <= length,
        104,
        f"payload at sector {payload}, expected behind the header and in the {length} bytes of the LUKS area",
    )
    slots = tuple(_parse_slot(data, number, key_bytes, payload) for number in range(N_KEY_SLOTS))
    n_bytes = key_material_length(key_bytes)
    starts = sorted(slot.key_offset for slot in slots)
    for start, following in pairwise(starts):
        _require(start + n_bytes <= following, 208, f"key slots overlap, at {start:#x} and {following:#x}")
    return LuksHeader(
        spec=spec,
        hash_name=hash_name,
        payload_offset=payload * SECTOR_SIZE,
        key_digest=digest,
        digest_salt=salt,
        digest_iterations=iterations,
        uuid=text_of(uuid),
        slots=slots,
    )


def _parse_slot(data: bytes, number: int, key_bytes: int, payload: int) -> KeySlot:
    place = _HEAD.size + number * _SLOT.size
    state, iterations, salt, key_sector, stripes = _SLOT.unpack_from(data, place)
    slot = f"key slot {number}"
    _require(state in (_ENABLED, _DISABLED), place, f"{slot} has state {state:#x}, expected enabled or disabled")
    _require(stripes == STRIPES, place + 44, f"{slot} has {stripes} stripes, expected {STRIPES}")
    end = key_sector + divide_up(key_bytes * STRIPES, SECTOR_SIZE)
    _require(
        key_sector * SECTOR_SIZE >= HEADER_LENGTH and end <= payload,
        place + 40,
        f"{slot} at sectors {key_sector} to {end}, expected behind the header and before the payload at {payload}",
    )
    is_active = state == _ENABLED
    _require(
        not is_active or 1 <= iterations <= MAX_ITERATIONS,
        place + 4,
        f"{slot} has {iterations} iterations, expected 1 to {MAX_ITERATIONS}",
    )
    return KeySlot(is_active, iterations, salt, key_sector * SECTOR_SIZE, stripes)


def _parse_spec(cipher: str, mode_name: str, key_bytes: int) -> CipherSpec:
    mode, dash, generator = mode_name.partition("-")
    generator, colon, iv_hash = generator.partition(":")
    _require(bool(dash), 40, f"cipher mode {mode_name!r}, expected MODE-GENERATOR")
    if mode not in CIPHER_MODES or generator not in IV_GENERATORS:
        raise UnsupportedFeatureError([f"LUKS cipher mode {mode_name}"])
    if cipher not in BLOCK_SIZES:
        raise UnsupportedFeatureError([f"LUKS cipher {cipher}"])
    one_key = key_bytes // 2 if mode == "xts" else key_bytes
    names = [name for name, known in CIPHERS.items() if known == (cipher, one_key)]
    if not names or one_key * (2 if mode == "xts" else 1) != key_bytes:
        raise UnsupportedFeatureError([f"LUKS cipher {cipher} in mode {mode} with a key of {key_bytes} bytes"])
    # QEMU reads the name of the hash with any generator, and uses it with one.
    spec = CipherSpec(names[0], mode, generator, _hash(iv_hash) if colon else None)
    problem = spec.problem()
    _require(problem is None, 40, problem or "")
    return spec


def _hash(name: str) -> str:
    if name not in HASHES:
        raise UnsupportedFeatureError([f"LUKS hash {name}"])
    return name


def serialise_luks_header(header: LuksHeader) -> bytes:
    """The 592 bytes of a header."""
    head = _HEAD.pack(
        _MAGIC,
        _VERSION,
        CIPHERS[header.spec.cipher][0].encode(),
        header.spec.mode_name.encode(),
        header.hash_name.encode(),
        header.payload_offset // SECTOR_SIZE,
        header.key_bytes,
        header.key_digest,
        header.digest_salt,
        header.digest_iterations,
        header.uuid.encode(),
    )
    return head + b"".join(
        _SLOT.pack(
            _ENABLED if slot.active else _DISABLED,
            slot.iterations,
            slot.salt,
            slot.key_offset // SECTOR_SIZE,
            slot.stripes,
        )
        for slot in header.slots
    )


def _text(raw: bytes, place: int) -> str:
    _require(b"\0" in raw, place, "name without an end, expected a NUL")
    return text_of(raw)


def _require(condition: bool, place: int, detail: str) -> None:
    if not condition:
        raise FormatError("LUKS header", None, f"byte {place}: {detail}")
