"""Encrypted images: what QEMU made we read and write, what we wrote QEMU reads, with the ciphers that both have."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import trio

from qcowfuse.cli.img.create_options import parse_create_options
from qcowfuse.cli.img.main import main
from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import OpenOptions
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.errors import BackingChainError, FormatError, ImageUsageError, WrongKeyError
from qcowfuse.tools.create import CreateError, create_image
from tests.support import qemu
from tests.support.images import PASSPHRASE, image_arguments, passphrase, secret_arguments
from tests.support.starting import read_at_once, write_at_once

MIB = 1 << 20
SIZE = MIB + 512 * 3
LUKS = "encrypt.format=luks,encrypt.iter-time=1"
AES = "encrypt.format=aes"
# Every cipher and mode that both have, every generator with some, and every hash once.
COMBINATIONS = [
    "aes-128 xts plain sha1",
    "aes-128 cbc essiv:md5 sha224",
    "aes-128 ctr plain64 sha256",
    "aes-128 ecb plain sha384",
    "aes-192 xts essiv:sha256 sha512",
    "aes-256 xts plain64 ripemd160",
    "aes-256 xts essiv:sha256 sm3",
    "aes-256 cbc plain md5",
    "aes-256 cbc essiv:sm3 sha256",
    "aes-256 ctr essiv:md5 sha1",
    "aes-256 ecb plain64 sha256",
    "cast5-128 cbc plain64 sha256",
    "cast5-128 ctr essiv:md5 sha512",
    "cast5-128 ecb plain sha256",
    "serpent-128 xts essiv:sha256 sha1",
    "serpent-192 xts plain sha256",
    "serpent-256 xts plain64 sha512",
    "serpent-256 cbc essiv:md5 sha256",
    "serpent-128 ctr plain64 sha256",
    "serpent-256 ecb plain sha256",
    "twofish-128 xts plain sha256",
    "twofish-256 xts plain64 sha256",
    "twofish-256 cbc essiv:sha256 sha1",
    "twofish-128 ctr essiv:md5 sha256",
    "twofish-256 ecb plain64 sha256",
]
WITH_KEY = OpenOptions(passphrase=passphrase)


def create(path: Path, format_name: str, options: str, *, backing: str | None = None) -> None:
    """An empty encrypted image by QEMU, which measures for seconds how many iterations it can do."""
    words = ["qemu-img", "create", "-q", *secret_arguments(), "-f", format_name]
    options = f"{options},encrypt.key-secret=key"
    # Without a look into the backing file, which would take its secret.
    words += ["-u", "-b", backing, "-F", "qcow2"] if backing else []
    qemu.must_run(*words, "-o", options, path, str(SIZE))


async def create_here(path: Path, options: str, format_name: str = "qcow2", *, backing: str | None = None) -> None:
    """The same by us."""
    backing_format = "qcow2" if backing else None
    chosen = parse_create_options(
        format_name, [options], size=str(SIZE), backing_file=backing, backing_format=backing_format
    )
    await create_image(str(path), chosen, overwrite=True, passphrase=bytearray(PASSPHRASE))


def opts(path: Path, format_name: str = "qcow2", *, backing: bool = False) -> list[str]:
    """What names the image to a QEMU tool; ``backing``: it has an encrypted backing file."""
    words = image_arguments(format_name, str(path), encrypted=True)
    return [*words[:-1], words[-1] + ",backing.encrypt.key-secret=key"] if backing else words


def read_by_qemu(path: Path, format_name: str = "qcow2", *, backing: bool = False) -> bytes:
    """The guest's bytes."""
    raw = path.with_suffix(".raw")
    qemu.must_run("qemu-img", "convert", "-O", "raw", *opts(path, format_name, backing=backing), raw)
    return raw.read_bytes()


def write_by_qemu(path: Path, format_name: str = "qcow2", *, backing: bool = False) -> None:
    """Data over cluster borders, and zeroes."""
    commands = ["write -P 0x41 1000 130k", "write -P 0x42 700k 64k", "write -z 64k 64k"]
    words = [word for command in commands for word in ("-c", command)]
    qemu.must_run("qemu-io", "-t", "unsafe", *words, *opts(path, format_name, backing=backing))


async def read(image: QcowImage, guest_offset: int, n_bytes: int) -> bytes:
    """As the mount reads."""
    return bytes(await image.read(guest_offset, n_bytes))


async def exercise(image: QcowImage, model: bytearray, seed: int, n_steps: int = 50) -> None:
    """Random writes, zeroes and reads of any alignment, compared with the model."""
    chooser = random.Random(seed)
    for step in range(n_steps):
        n_bytes = chooser.choice([1, 100, 512, 4096, 70_000, 200_000])
        start = chooser.randrange(len(model) - n_bytes)
        data = chooser.randbytes(n_bytes)
        if step % 5 == 4:
            await image.write_zeroes(start, n_bytes, unmap=chooser.random() < 0.5)
            data = bytes(n_bytes)
        else:
            await image.write(start, data)
        model[start : start + n_bytes] = data
        start = chooser.randrange(len(model) - n_bytes)
        assert await read(image, start, n_bytes) == model[start : start + n_bytes]
        if step % 16 == 9:
            await image.flush()


def check_by_qemu(path: Path, *, backing: bool = False) -> None:
    """Neither leaks nor corruption."""
    qemu.must_run("qemu-img", "check", *opts(path, backing=backing))


@pytest.mark.parametrize(
    ("format_name", "options"),
    [
        ("qcow2", f"{LUKS},compat=0.10,cluster_size=512,encrypt.cipher-alg=aes-192"),
        ("qcow2", f"{LUKS},extended_l2=on,cluster_size=16k,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv"),
        ("qcow2", f"{LUKS},encrypt.cipher-alg=serpent-256"),
        ("qcow2", f"{LUKS},cluster_size=4k,encrypt.cipher-alg=twofish-256,encrypt.cipher-mode=cbc"),
        ("qcow2", AES),
        ("qcow2", f"{AES},compat=0.10,cluster_size=1k"),
        ("qcow2", f"{AES},extended_l2=on,cluster_size=16k"),
        ("qcow", AES),
    ],
)
async def test_both_read_what_the_other_wrote(format_name: str, options: str, image_folder: Path) -> None:
    """QEMU writes and we read, we write at random and QEMU reads, and checks: the same bytes, nothing leaked."""
    path = image_folder / "image"
    create(path, format_name, options)
    write_by_qemu(path, format_name)
    model = bytearray(read_by_qemu(path, format_name))
    image = await open_image(str(path), WITH_KEY)
    assert await read(image, 0, len(model)) == model
    await exercise(image, model, seed=1)
    await image.aclose()
    assert read_by_qemu(path, format_name) == model
    if format_name == "qcow2":
        check_by_qemu(path)
    assert b"A" * 64 not in path.read_bytes(), "the guest's bytes lie in the image as they are"


@pytest.fixture(params=COMBINATIONS)
def combination(request: pytest.FixtureRequest) -> str:
    """Cipher, mode, generator and hash, of those that QEMU has."""
    if "sm3" in request.param:
        qemu.need((9, 2), "the hash SM3")
    return str(request.param)


async def test_every_cipher_that_both_have(combination: str, image_folder: Path) -> None:
    """Images that we make, with every cipher, mode, generator and hash: written by both, read by both."""
    path = image_folder / "image"
    cipher, mode, generator, hash_name = combination.split()
    generator, _, iv_hash = generator.partition(":")
    options = f"{LUKS},cluster_size=4k,encrypt.cipher-alg={cipher},encrypt.cipher-mode={mode}"
    options += f",encrypt.ivgen-alg={generator},encrypt.hash-alg={hash_name}"
    await create_here(path, options + (f",encrypt.ivgen-hash-alg={iv_hash}" if iv_hash else ""))
    write_by_qemu(path)
    model = bytearray(SIZE)
    for start, length, value in ((1000, 130 << 10, 0x41), (700 << 10, 64 << 10, 0x42), (64 << 10, 64 << 10, 0)):
        model[start : start + length] = bytes([value]) * length
    image = await open_image(str(path), WITH_KEY)
    assert await read(image, 0, len(model)) == model
    await exercise(image, model, seed=1, n_steps=20)
    await image.aclose()
    assert read_by_qemu(path) == model
    check_by_qemu(path)


@pytest.mark.parametrize("format_name", ["qcow", "qcow2"])
async def test_old_method_images_that_we_make(format_name: str, image_folder: Path) -> None:
    """AES images of both formats made here: QEMU writes them and we read."""
    path = image_folder / "image"
    await create_here(path, AES, format_name)
    write_by_qemu(path, format_name)
    image = await open_image(str(path), WITH_KEY)
    assert await read(image, 1000, 5000) == b"A" * 5000
    await image.aclose()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f"{LUKS},encrypt.cipher-alg=twofish-192", "LUKS cipher twofish-192"),
        (f"{LUKS},encrypt.cipher-alg=rot13", "cipher-alg=rot13: expected aes-128"),
        (f"{LUKS},encrypt.cipher-alg=cast5-128", "mode xts with cipher cast5-128"),
        (f"{LUKS},encrypt.cipher-alg=aes-192,encrypt.cipher-mode=cbc", "QEMU fails"),
        (f"{LUKS},encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha1", "20 bytes are no key"),
        (f"{LUKS},encrypt.key-secret=key", "--key-file"),
        ("encrypt.format=luks,encrypt.iter-time=0", "iter-time=0: expected"),
        (f"{AES},encrypt.hash-alg=sha1", "needs encrypt.format=luks"),
        ("encrypt.hash-alg=sha1", "encrypt.format is missing"),
        ("encrypt.format=luks2", "expected aes or luks"),
        (f"{LUKS},data_file=x,data_file_raw=on", "does not go with encryption"),
    ],
)
def test_options_that_cannot_be(options: str, message: str) -> None:
    """What could not be opened again is refused by name before a file is made."""
    with pytest.raises(CreateError, match=message):
        parse_create_options("qcow2", [options], size="1M")


@pytest.mark.parametrize("passphrase", [None, b"a\0b", b"\xff"])
async def test_passphrases_that_qemu_would_not_take(passphrase: bytes | None, image_folder: Path) -> None:
    """No passphrase, or one that is not text, makes no image."""
    path = image_folder / "image"
    with pytest.raises(CreateError, match="passphrase"):
        await create_image(str(path), parse_create_options("qcow2", [LUKS], size="1M"), passphrase=passphrase)
    assert not path.exists()


def info_by_both(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Any, Any]:
    """What info says, by us and by QEMU."""
    assert main(["info", "--output=json", str(path)]) == 0
    ours = json.loads(capsys.readouterr().out)
    if qemu.version() < (9, 0):
        ours.get("format-specific", {}).get("data", {}).get("encrypt", {}).pop("detached-header", None)
    return ours, qemu.info(path)


def test_info_says_what_qemu_img_says(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """info of encrypted images needs no key and has qemu-img's fields, even for ciphers that nobody here can use."""
    for format_name, options in (
        ("qcow2", f"{LUKS},encrypt.ivgen-alg=essiv,encrypt.cipher-alg=twofish-192"),
        ("qcow2", AES),
        ("qcow", AES),
    ):
        path = image_folder / "image"
        create(path, format_name, options)
        ours, theirs = info_by_both(path, capsys)
        assert ours == theirs
    path = image_folder / "luks"
    trio.run(create_here, path, LUKS)
    ours, theirs = info_by_both(path, capsys)
    assert ours == theirs
    assert main(["info", str(path)]) == 0
    said = capsys.readouterr().out
    assert "cipher alg: aes-256" in said
    assert "0: in use" in said


async def test_map_and_check_need_no_key(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """map gives qemu-img's entries, which have no place in the file; check judges as qemu-img does."""
    path = image_folder / "image"
    await create_here(path, LUKS)
    write_by_qemu(path)
    expected = qemu.must_run("qemu-img", "map", "--output=json", *opts(path))

    def by_us() -> str:
        assert main(["map", "--output=json", str(path)]) == 0
        assert main(["check", "-q", str(path)]) == 0
        return capsys.readouterr().out

    assert json.loads(await trio.to_thread.run_sync(by_us)) == json.loads(expected)


@pytest.mark.parametrize(("method", "raw"), [(LUKS, ""), (AES, ""), (AES, ",data_file_raw=on")])
async def test_with_an_external_data_file(method: str, raw: str, image_folder: Path) -> None:
    """The data file holds what is encrypted, at the sector numbers of its own offsets."""
    path = image_folder / "image"
    if raw:
        create(path, "qcow2", f"{method},data_file={image_folder}/data{raw}")  # which we don't make
    else:
        await create_here(path, f"{method},data_file={image_folder}/data")
    write_by_qemu(path)
    model = bytearray(read_by_qemu(path))
    image = await open_image(str(path), WITH_KEY)
    await exercise(image, model, seed=2)
    await image.aclose()
    assert read_by_qemu(path) == model
    check_by_qemu(path)


@pytest.mark.parametrize("place", ["", ",data_file={folder}/data"], ids=["image", "data file"])
async def test_requests_in_place_are_answered_at_once(place: str, image_folder: Path) -> None:
    """Whole sectors and parts of them, wherever the data lies: nothing of it waits."""
    path = image_folder / "image"
    await create_here(path, LUKS + place.format(folder=image_folder))
    image = await open_image(str(path), WITH_KEY)
    chooser = random.Random(7)
    expected = bytearray(chooser.randbytes(image.size))
    await image.write(0, expected)
    for start, n_bytes in ((0, 4096), (65536 - 512, 1024), (700, 60), (900, 512), (image.size - 1, 1), (4096, 0)):
        assert read_at_once(image, start, n_bytes) == expected[start : start + n_bytes]
        data = chooser.randbytes(n_bytes)
        assert not n_bytes or write_at_once(image, start, data)
        expected[start : start + n_bytes] = data
    assert await read(image, 0, image.size) == expected
    await image.aclose()
    assert read_by_qemu(path) == expected


async def test_a_chain_of_encrypted_images(image_folder: Path) -> None:
    """AES over LUKS over a plain file, one passphrase: what is below is decrypted, copied up and encrypted anew."""
    plain, middle, top = (image_folder / name for name in ("plain", "middle", "top"))
    qemu.create(plain, "qcow2", SIZE, options="cluster_size=4k")
    qemu.io(plain, ["write -P 0x50 0 1M"])
    await create_here(middle, LUKS, backing="plain")
    qemu.must_run("qemu-io", "-c", "write -P 0x51 100k 200k", *opts(middle))
    create(top, "qcow2", AES, backing="middle")
    model = bytearray(read_by_qemu(top, backing=True))
    assert model[150_000] == 0x51
    image = await open_image(str(top), WITH_KEY)
    assert await read(image, 0, len(model)) == model
    await exercise(image, model, seed=3)
    await image.aclose()
    assert read_by_qemu(top, backing=True) == model
    check_by_qemu(top, backing=True)
    middle.write_bytes(middle.read_bytes().replace(b"LUKS\xba\xbe", b"LUKSOFF", 1)[: middle.stat().st_size])
    with pytest.raises(BackingChainError, match=f"{middle}: .*LUKS header"):
        await open_image(str(top), WITH_KEY)


async def test_snapshots_of_an_encrypted_image(image_folder: Path) -> None:
    """A snapshot is read through the cipher, and stays as it is when the disk is written."""
    path = image_folder / "image"
    await create_here(path, LUKS)
    write_by_qemu(path)
    old = read_by_qemu(path)
    qemu.must_run("qemu-img", "snapshot", *secret_arguments(), "-c", "s1", "--image-opts", opts(path)[-1])
    model = bytearray(old)
    image = await open_image(str(path), WITH_KEY)
    await exercise(image, model, seed=4)
    await image.aclose()
    image = await open_image(str(path), OpenOptions(passphrase=passphrase, snapshot="s1"))
    assert await read(image, 0, len(old)) == old
    await image.aclose()
    assert read_by_qemu(path) == model
    check_by_qemu(path)


async def test_wrong_key_no_key_and_damage(image_folder: Path) -> None:
    """A wrong key and no key are told apart, damage of the LUKS header is named, and nothing is written."""
    path = image_folder / "image"
    await create_here(path, LUKS)
    before = path.read_bytes()
    asked: list[str] = []

    def wrong(layer: str) -> bytearray:
        asked.append(layer)
        return bytearray(b"wrong")

    with pytest.raises(WrongKeyError, match=f"{path}: this is not the key"):
        await open_image(str(path), OpenOptions(passphrase=wrong))
    assert asked == [str(path)]
    with pytest.raises(ImageUsageError, match="is encrypted and needs a key"):
        await open_image(str(path))
    assert path.read_bytes() == before
    place = before.index(b"LUKS\xba\xbe")
    path.write_bytes(before[: place + 6] + b"\0\x07" + before[place + 8 :])
    with pytest.raises(FormatError, match="LUKS version 7"):
        await open_image(str(path), WITH_KEY)
    path.write_bytes(before[: place + 164] + b"\xff\xff\xff\xff" + before[place + 168 :])
    with pytest.raises(FormatError, match="LUKS header: byte 164: 4294967295 iterations"):
        await open_image(str(path), WITH_KEY)


async def test_the_passphrase_is_overwritten(image_folder: Path) -> None:
    """The bytes that held the passphrase are zeroes once the image is open, and are in no repr."""
    path = image_folder / "image"
    await create_here(path, AES)
    secret = bytearray(b"correct horse")
    options = OpenOptions(passphrase=lambda _: secret)
    image = await open_image(str(path), options)
    assert secret == bytes(len(secret))
    assert "passphrase" not in repr(options)
    await image.aclose()


async def test_growing_an_encrypted_image(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """qcowfuse-img resize takes the key, and what is new reads as zeroes in QEMU."""
    path, key_file = image_folder / "image", image_folder / "key"
    await create_here(path, LUKS)
    key_file.write_bytes(PASSPHRASE)
    write_by_qemu(path)
    before = read_by_qemu(path)

    def resize(key: bytes) -> int:
        key_file.write_bytes(key)
        return main(["resize", "-q", "--key-file", str(key_file), str(path), "5M"])

    assert await trio.to_thread.run_sync(resize, PASSPHRASE + b"\n") == 1
    assert "this is not the key" in capsys.readouterr().err
    assert await trio.to_thread.run_sync(resize, PASSPHRASE) == 0
    assert read_by_qemu(path) == before.ljust(5 * MIB, b"\0")
    check_by_qemu(path)
