"""The LUKS header, its keys, and the sector ciphers, on plain bytes."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
from dataclasses import replace
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from qcowfuse.errors import FormatError, UnsupportedFeatureError
from qcowfuse.format import libgcrypt, luks
from qcowfuse.format.crypto import legacy_aes_cipher, make_sector_cipher
from qcowfuse.format.extensions import EXTENSION_LUKS_HEADER, HeaderExtension
from qcowfuse.format.luks import CipherSpec, KeySlot, LuksHeader, parse_luks_header, serialise_luks_header
from qcowfuse.format.luks_keys import LuksRandomness, af_merge, af_split, make_luks_area, unlock_slot

LENGTH = 4096 + 8 * 0x3F000
SPEC = CipherSpec("aes-256", "xts", "plain64")
HEADER = LuksHeader(
    spec=SPEC,
    hash_name="sha256",
    payload_offset=LENGTH,
    key_digest=bytes(range(20)),
    digest_salt=bytes(range(32)),
    digest_iterations=1000,
    uuid="a" * 36,
    slots=tuple(KeySlot(number == 2, 1000, bytes([number]) * 32, 4096 + number * 0x3F000) for number in range(8)),
)
SPECS = [
    CipherSpec(cipher, mode, *generator)
    for cipher in ("aes-128", "aes-192", "aes-256", "cast5-128", "serpent-192", "serpent-256", "twofish-128")
    for mode in luks.CIPHER_MODES
    for generator in (("plain",), ("plain64",), ("essiv", "md5"), ("essiv", "sha256"))
]
USABLE = [spec for spec in SPECS if spec.problem() is None and not spec.missing()]
OF_BOTH = [spec for spec in USABLE if spec.cipher.startswith("aes")]
needs_libgcrypt = pytest.mark.skipif(not libgcrypt.is_there(), reason="libgcrypt is not installed")


@pytest.fixture
def without_libgcrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library had not been found."""
    monkeypatch.setattr(libgcrypt, "_functions", None)
    monkeypatch.setattr(libgcrypt, "has_cipher", lambda name, key_bytes: False)


def patched(place: int, data: bytes) -> bytes:
    """The header's bytes with some of them changed."""
    raw = bytearray(serialise_luks_header(HEADER))
    raw[place : place + len(data)] = data
    return bytes(raw)


def test_a_header_survives_the_round_trip() -> None:
    """What is serialised is parsed as the same header, 592 bytes long."""
    raw = serialise_luks_header(HEADER)
    assert len(raw) == luks.HEADER_LENGTH
    assert parse_luks_header(raw, LENGTH) == HEADER


@pytest.mark.parametrize(
    ("place", "data", "message"),
    [
        (0, b"LUKX", "magic"),
        (8, b"x" * 32, "without an end"),
        (40, b"xts\0", "MODE-GENERATOR"),
        (104, b"\0\0\0\x01", "payload at sector 1"),
        (104, b"\xff\xff\xff\xff", "payload"),
        (164, bytes(4), "0 iterations"),
        (164, b"\xff\xff\xff\xff", "iterations"),
        (208, b"\x12\x34\x56\x78", "key slot 0 has state 0x12345678"),
        (208 + 2 * 48 + 4, b"\xff\xff\xff\xff", "key slot 2 has 4294967295 iterations"),
        (208 + 2 * 48 + 4, bytes(4), "key slot 2 has 0 iterations"),
        (208 + 40, b"\0\0\0\x01", "key slot 0 at sectors 1"),
        (208 + 40, b"\xff\xff\xff\xff", "key slot 0"),
        (208 + 44, b"\0\0\0\x01", "1 stripes"),
        (208 + 40, b"\0\0\x02\0", "overlap"),
    ],
)
def test_impossible_headers_are_refused(place: int, data: bytes, message: str) -> None:
    """Each number and name is compared with what it may be, and the error names it."""
    with pytest.raises(FormatError, match=message) as caught:
        parse_luks_header(patched(place, data), LENGTH)
    assert caught.value.structure == "LUKS header"


@pytest.mark.parametrize(
    ("place", "data", "name"),
    [
        (6, b"\0\x02", "LUKS version 2"),
        (8, b"rot13\0", "LUKS cipher rot13"),
        (40, b"gcm-plain64\0", "cipher mode gcm-plain64"),
        (40, b"xts-benbi\0", "cipher mode xts-benbi"),
        (72, b"whirlpool\0", "LUKS hash whirlpool"),
        (108, b"\0\0\0\x28", "key of 40 bytes"),
        (108, b"\x7f\0\0\0", "key of 2130706432 bytes"),
    ],
)
def test_what_nobody_serves_is_named(place: int, data: bytes, name: str) -> None:
    """Ciphers, modes, hashes and key sizes beyond QEMU's are refused by name."""
    with pytest.raises(UnsupportedFeatureError, match=name):
        parse_luks_header(patched(place, data), LENGTH)


@pytest.mark.parametrize("cipher", ["serpent-256", "twofish-128"])
@pytest.mark.usefixtures("without_libgcrypt")
def test_what_libgcrypt_would_have_is_refused_by_its_name(cipher: str) -> None:
    """Without libgcrypt, images with Serpent and Twofish can be described, and using them is refused in one line that
    says what to install; AES needs no libgcrypt."""
    header = replace(HEADER, spec=replace(SPEC, cipher=cipher))
    parsed = parse_luks_header(serialise_luks_header(header), LENGTH)
    assert parsed.spec.cipher == cipher
    with pytest.raises(UnsupportedFeatureError, match=f"LUKS cipher {cipher}, which needs libgcrypt .*libgcrypt20"):
        luks.require_available(parsed)
    luks.require_available(HEADER)


def test_a_key_size_that_libgcrypt_lacks_is_refused() -> None:
    """twofish-192 is refused by its own name, whether the library is there or not."""
    with pytest.raises(UnsupportedFeatureError, match="LUKS cipher twofish-192, which"):
        luks.require_available(replace(HEADER, spec=replace(SPEC, cipher="twofish-192")))


@needs_libgcrypt
@pytest.mark.parametrize("cipher", ["serpent-128", "serpent-192", "serpent-256", "twofish-128", "twofish-256"])
def test_what_libgcrypt_has_is_used(cipher: str) -> None:
    """With libgcrypt nothing of these ciphers is missing."""
    luks.require_available(replace(HEADER, spec=replace(SPEC, cipher=cipher)))


@needs_libgcrypt
def test_twofish_with_the_vectors_of_its_authors() -> None:
    """A key and a block of zeroes, from the submission to the AES contest (ECB_TBL.TXT)."""
    for cipher, n_bytes, expected in (
        ("twofish-128", 16, "9f589f5cf6122c32b6bfec2f2ae8c35a"),
        ("twofish-256", 32, "57ff739d4dc92c1bd7fc01700cc8216f"),
    ):
        sectors = make_sector_cipher(CipherSpec(cipher, "ecb", "plain"), bytes(n_bytes))
        assert bytes(sectors.encrypt(bytes(512), 0)) == bytes.fromhex(expected) * 32


@needs_libgcrypt
@pytest.mark.parametrize("n_sectors", [1, 3, 8, 17])
@pytest.mark.parametrize("spec", OF_BOTH, ids=lambda spec: f"{spec.cipher}-{spec.mode_name}")
def test_both_libraries_do_the_same(spec: CipherSpec, n_sectors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of sectors, also over the end of the 32 bits that generator plain has: what libgcrypt encrypts is
    what the cryptography package encrypts, and each decrypts what the other did, in place or not."""
    chooser = random.Random(n_sectors)
    key, data = chooser.randbytes(spec.key_bytes), chooser.randbytes(n_sectors * 512)
    ours = make_sector_cipher(spec, key)
    monkeypatch.setattr(libgcrypt, "has_cipher", lambda name, key_bytes: False)
    other = make_sector_cipher(spec, key)
    assert type(ours) is not type(other)
    for first in (0, 1, 77, (1 << 32) - 2, (1 << 32) + 5, 1 << 47):
        encrypted = bytes(other.encrypt(data, first))
        assert bytes(ours.encrypt(data, first)) == encrypted
        assert bytes(ours.decrypt(memoryview(encrypted), first)) == data
        assert bytes(other.decrypt(encrypted, first)) == data
        for cipher in (ours, other):
            buffer = bytearray(b"<" + data + b">")
            inside = memoryview(buffer)[1:-1]
            cipher.encrypt_in_place(inside, first)
            assert buffer == b"<" + encrypted + b">"
            cipher.decrypt_in_place(inside, first)
            assert buffer == b"<" + data + b">"


@given(st.binary(min_size=0, max_size=700), st.integers(0, 1 << 40))
def test_any_bytes_give_a_header_or_a_format_error(data: bytes, length: int) -> None:
    """Nothing but FormatError is raised, whatever stands in the header."""
    for raw in (data, (b"LUKS\xba\xbe\0\x01" + data).ljust(592, b"\0")):
        with contextlib.suppress(FormatError):
            parse_luks_header(raw, length)


@given(st.lists(st.tuples(st.integers(0, 591), st.integers(0, 255)), max_size=6))
def test_a_few_changed_bytes_give_a_header_or_a_format_error(changes: list[tuple[int, int]]) -> None:
    """A header with some bytes changed is refused, or bounded in all that is computed from it."""
    raw = bytearray(serialise_luks_header(HEADER))
    for place, value in changes:
        raw[place] = value
    try:
        header = parse_luks_header(bytes(raw), LENGTH)
    except FormatError:
        return
    assert header.key_bytes <= 64
    assert all(slot.key_offset + luks.key_material_length(header.key_bytes) <= LENGTH for slot in header.slots)
    assert all(slot.iterations <= luks.MAX_ITERATIONS for slot in header.slots if slot.active)


@pytest.mark.parametrize(
    "data", [None, b"", bytes(15), struct.pack(">QQ", 7, 4096), struct.pack(">QQ", 512, 1 << 40)]
)
def test_the_pointer_is_checked(data: bytes | None) -> None:
    """A LUKS header pointer that is absent, cut, not aligned or absurdly long is refused."""
    extensions = () if data is None else (HeaderExtension(EXTENSION_LUKS_HEADER, data),)
    with pytest.raises(FormatError, match="LUKS header pointer"):
        luks.luks_area(extensions)
    assert luks.luks_area((luks.luks_pointer(65536, 2068480),)) == (65536, 2068480)


@pytest.mark.parametrize("hash_name", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("key_bytes", [16, 24, 32, 64])
def test_split_keys_are_merged_again(key_bytes: int, hash_name: str) -> None:
    """Merging undoes splitting, and one changed bit anywhere gives another key."""
    chooser = random.Random(key_bytes)
    key = chooser.randbytes(key_bytes)
    split = bytearray(af_split(key, 20, hash_name, chooser.randbytes(key_bytes * 19)))
    assert len(split) == key_bytes * 20
    assert af_merge(split, key_bytes, 20, hash_name) == key
    split[chooser.randrange(len(split))] ^= 1
    assert af_merge(split, key_bytes, 20, hash_name) != key


def test_merge_diffuses_by_counted_digests() -> None:
    """A vector worked out by hand: two stripes of 24 bytes, SHA-1 over counter and piece, the last piece cut."""
    first, second = bytes(range(24)), bytes(range(100, 124))
    pieces = (b"\0\0\0\0" + first[:20], b"\0\0\0\x01" + first[20:])
    diffused = b"".join(hashlib.sha1(piece).digest() for piece in pieces)[:24]
    merged = bytes(left ^ right for left, right in zip(diffused, second, strict=True))
    assert af_merge(first + second, 24, 2, "sha1") == merged


def test_a_new_area_opens_with_its_passphrase_alone() -> None:
    """The right passphrase gives the master key, another one None."""
    randomness = LuksRandomness(
        b"k" * 32 + b"l" * 32, random.Random(1).randbytes(64 * 3999), b"d" * 32, b"s" * 32, UUID(int=7)
    )
    header, material = make_luks_area(
        SPEC, "sha256", b"right", randomness, slot_iterations=1000, digest_iterations=1000
    )
    header = parse_luks_header(serialise_luks_header(header), header.payload_offset)
    assert unlock_slot(header, header.slots[0], material, bytearray(b"right")) == randomness.master_key
    assert unlock_slot(header, header.slots[0], material, b"right\n") is None
    assert "k" * 8 not in repr(randomness)


@pytest.mark.parametrize("spec", USABLE, ids=lambda spec: f"{spec.cipher}-{spec.mode_name}")
def test_sectors_are_independent(spec: CipherSpec) -> None:
    """Decryption undoes encryption, and many sectors at once are what each is alone."""
    chooser = random.Random(5)
    cipher = make_sector_cipher(spec, chooser.randbytes(spec.key_bytes))
    data = chooser.randbytes(5 * 512)
    encrypted = bytes(cipher.encrypt(memoryview(data), 1000))
    assert bytes(cipher.decrypt(bytearray(encrypted), 1000)) == data
    for number in range(5):
        one = slice(number * 512, number * 512 + 512)
        assert bytes(cipher.encrypt(data[one], 1000 + number)) == encrypted[one]
        assert bytes(cipher.decrypt(encrypted[one], 1000 + number)) == data[one]
    if spec.mode != "ecb":
        assert bytes(cipher.encrypt(data, 1001)) != encrypted


def test_iv_generators() -> None:
    """plain has 32 bits of the sector, plain64 has 64, little endian; essiv encrypts it with the key's digest."""
    key, sector, data = bytes(range(32)), (1 << 32) + 5, bytes(512)

    def by_hand(iv: bytes) -> bytes:
        return Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor().update(data)

    essiv = Cipher(algorithms.AES(hashlib.sha256(key).digest()), modes.ECB()).encryptor()
    ivs = {
        ("plain", None): (5).to_bytes(16, "little"),
        ("plain64", None): sector.to_bytes(16, "little"),
        ("essiv", "sha256"): essiv.update(sector.to_bytes(16, "little")),
    }
    for (generator, iv_hash), iv in ivs.items():
        spec = CipherSpec("aes-256", "cbc", generator, iv_hash)
        assert make_sector_cipher(spec, key).encrypt(data, sector) == by_hand(iv)


@pytest.mark.usefixtures("without_libgcrypt")
def test_192_bit_xts_is_what_the_library_does_for_256() -> None:
    """XTS put together from blocks is XTS: with a 256-bit key it gives what OpenSSL gives."""
    from qcowfuse.format.crypto import XtsByBlocks

    chooser = random.Random(2)
    key, data = chooser.randbytes(64), chooser.randbytes(3 * 512)

    def plain64(first: int, n_sectors: int) -> list[bytes]:
        return [number.to_bytes(16, "little") for number in range(first, first + n_sectors)]

    ours, theirs = XtsByBlocks(key, plain64), make_sector_cipher(SPEC, key)
    assert ours.encrypt(data, 77) == theirs.encrypt(data, 77)
    assert ours.decrypt(data, 77) == theirs.decrypt(data, 77)


def test_the_old_method_cuts_and_pads_the_passphrase() -> None:
    """AES-128-CBC with the first 16 bytes of the passphrase, padded with zeroes, and the sector as IV."""
    data = random.Random(3).randbytes(512)
    for passphrase, key in ((b"short", b"short".ljust(16, b"\0")), (b"x" * 20, b"x" * 16)):
        expected = Cipher(algorithms.AES(key), modes.CBC((9).to_bytes(16, "little"))).encryptor().update(data)
        assert legacy_aes_cipher(passphrase).encrypt(data, 9) == expected


def test_equal_halves_of_an_xts_key_are_refused() -> None:
    """What OpenSSL would refuse at the first sector is refused when the cipher is made."""
    with pytest.raises(UnsupportedFeatureError, match="equal keys"):
        make_sector_cipher(SPEC, bytes(64))


@pytest.mark.parametrize(
    "spec",
    [
        CipherSpec("cast5-128", "xts", "plain64"),
        CipherSpec("aes-256", "cbc", "essiv"),
        CipherSpec("aes-256", "cbc", "essiv", "sha1"),
        CipherSpec("cast5-128", "cbc", "essiv", "sha256"),
    ],
    ids=lambda spec: f"{spec.cipher}-{spec.mode_name}",
)
def test_impossible_combinations_have_a_problem(spec: CipherSpec) -> None:
    """Combinations that QEMU refuses are told before a key is there."""
    assert spec.problem()
