"""Feature bits on images by QEMU: what is refused, by which name, and what a write does to the rest."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import trio

from qcowfuse.cli.img.main import main as img_main
from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import MAX_BACKING_DEPTH, OpenOptions
from qcowfuse.errors import BackingChainError, ImageUsageError, QcowFuseError, UnsupportedFeatureError
from tests.support import battery, qemu
from tests.support.matrix import MIB, Built, forget_backing_format, set_feature, unknown_header_parts
from tests.support.oracle import reference_bytes

READ_ONLY = OpenOptions(read_only=True)
INCOMPATIBLE, COMPATIBLE, AUTOCLEAR = 72, 80, 88


def make(folder: Path, options: str = "", name: str = "image.qcow2") -> Path:
    """A 2 MiB image with one pattern in it."""
    path = folder / name
    qemu.create(path, "qcow2", 2 * MIB, options=options)
    qemu.io(path, ["write -P 17 64k 128k"])
    return path


def features(path: Path) -> tuple[int, int, int]:
    """Incompatible, compatible and autoclear bits on disk."""
    found = struct.unpack(">QQQ", path.read_bytes()[72:96])
    return found[0], found[1], found[2]


def set_bit(path: Path, field: int, bit: int) -> None:
    """Set one feature bit on disk."""
    set_feature(field, bit)(Built(path, "qcow2", 0))


async def test_unserved_features_are_refused_by_name(image_folder: Path) -> None:
    """An image that needs a feature which nobody here serves is refused with the feature's name, untouched."""
    path = image_folder / "image.qcow2"
    words = ["qemu-img", "create", "-q", "--object", "secret,id=key,data=abc", "-f", "qcow2"]
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    qemu.must_run(*words, "-o", options, path, "2M")
    before = path.read_bytes().replace(b"LUKS\xba\xbe\0\1aes\0", b"LUKS\xba\xbe\0\1rc6\0", 1)
    path.write_bytes(before)
    for read_only in (True, False):
        with pytest.raises(UnsupportedFeatureError, match="LUKS cipher rc6"):
            await open_image(str(path), OpenOptions(read_only=read_only))
    assert path.read_bytes() == before


async def test_unknown_incompatible_bit_without_a_name(image_folder: Path) -> None:
    """An incompatible bit that nobody knows is refused by its number, as QEMU refuses it."""
    path = make(image_folder)
    set_bit(path, INCOMPATIBLE, 44)
    with pytest.raises(UnsupportedFeatureError, match="incompatible feature bit 44"):
        await open_image(str(path), READ_ONLY)
    assert qemu.run("qemu-img", "info", path).code == 1


async def test_unknown_incompatible_bit_is_named_by_the_image(image_folder: Path) -> None:
    """The image's own feature table names the bit in the refusal."""
    path = make(image_folder)
    data = bytearray(path.read_bytes()[:512])
    place = data.index(b"\x01\x00lazy refcounts")
    data[place : place + 48] = struct.pack(">BB46s", 0, 44, b"time travel")
    with path.open("r+b") as file:
        file.write(data)
    set_bit(path, INCOMPATIBLE, 44)
    with pytest.raises(UnsupportedFeatureError) as caught:
        await open_image(str(path), READ_ONLY)
    assert caught.value.names == ("time travel",)
    assert "time travel" in qemu.run("qemu-img", "info", path).stderr


async def test_unknown_compatible_bit_is_kept(image_folder: Path) -> None:
    """A compatible bit that nobody knows stays set through writes, and QEMU finds nothing wrong."""
    path = make(image_folder)
    set_bit(path, COMPATIBLE, 37)
    image = await open_image(str(path))
    await battery.write(image, 0, b"new" * 1000)
    await image.aclose()
    assert features(path) == (0, 1 << 37, 0)
    assert qemu.check(path).clean


async def test_unknown_autoclear_bits_go_with_the_first_write(image_folder: Path) -> None:
    """Opening for writing keeps unknown autoclear bits; the first write, in place or not, clears them."""
    for name, guest_offset in (("in-place", 64 * 1024), ("allocating", 0)):
        path = make(image_folder, name=name)
        set_bit(path, AUTOCLEAR, 41)
        for options in (READ_ONLY, OpenOptions()):
            image = await open_image(str(path), options)
            await battery.read(image, 0, 300_000)
            await image.flush()
            await image.aclose()
            assert features(path) == (0, 0, 1 << 41)
        image = await open_image(str(path))
        await battery.write(image, guest_offset, b"x")
        assert features(path) == (0, 0, 0)  # before the data's flush: rule R5
        await image.aclose()
        assert qemu.check(path).clean


async def test_a_write_keeps_bitmaps(image_folder: Path) -> None:
    """The bit that says that they are to be trusted stays set, for they are kept right."""
    path = make(image_folder)
    qemu.must_run("qemu-img", "bitmap", "--add", path, "b0")
    image = await open_image(str(path))
    await battery.write(image, 0, b"x" * 100)
    await image.aclose()
    assert features(path)[2] == 1
    assert qemu.check(path).clean
    assert "bitmaps" in qemu.info(path)["format-specific"]["data"]


@pytest.mark.parametrize("bits", [(1,), (0, 1)])
async def test_corrupt_images_are_read_only(bits: tuple[int, ...], image_folder: Path) -> None:
    """A corrupt image is refused for writing with what to do about it, and read like any other."""
    path = make(image_folder)
    for bit in bits:
        set_bit(path, INCOMPATIBLE, bit)
    before = path.read_bytes()
    with pytest.raises(ImageUsageError, match=r"corrupt.*qcowfuse-img check -r all"):
        await open_image(str(path))
    image = await open_image(str(path), READ_ONLY)
    assert await battery.read(image, 64 * 1024, 1000) == bytes([17]) * 1000
    await image.aclose()
    assert path.read_bytes() == before


async def test_lazy_refcounts_stay_sound(image_folder: Path) -> None:
    """An image that allows lazy refcounts is written without being dirty, and is clean after a close."""
    path = make(image_folder, "lazy_refcounts=on")
    image = await open_image(str(path))
    await battery.write(image, MIB, b"lazy" * 5000)
    await image.flush()
    assert features(path) == (0, 1, 0)
    await image.aclose()
    assert qemu.check(path).clean


@pytest.mark.parametrize("backing_format", ["qcow2", "raw"])
async def test_a_missing_backing_file_is_named(backing_format: str, image_folder: Path) -> None:
    """A backing file that is not there is refused with both names."""
    base = image_folder / "base"
    qemu.create(base, backing_format, MIB)
    top = image_folder / "top.qcow2"
    qemu.create(top, "qcow2", MIB, backing="base", backing_format=backing_format)
    base.unlink()
    with pytest.raises(QcowFuseError, match="base") as caught:
        await open_image(str(top))
    assert "top.qcow2" in str(caught.value)


async def test_loops_are_refused(image_folder: Path) -> None:
    """A chain that comes back to itself is refused, directly, over another image, and through another name."""
    first, second = image_folder / "first.qcow2", image_folder / "second.qcow2"
    qemu.create(first, "qcow2", MIB)
    qemu.create(second, "qcow2", MIB, backing="first.qcow2", backing_format="qcow2")
    for target in ("first.qcow2", "second.qcow2", "./../" + image_folder.name + "/first.qcow2", "link"):
        link = image_folder / "link"
        if target == "link":
            link.symlink_to("first.qcow2")
        qemu.must_run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", target, first)
        for path in (first, second):
            with pytest.raises(QcowFuseError, match="chain"):
                await open_image(str(path), READ_ONLY)


async def test_a_hard_link_to_itself_is_refused(image_folder: Path) -> None:
    """A loop over a second hard link of the same file is refused: one file is one file."""
    first, other = image_folder / "first.qcow2", image_folder / "other.qcow2"
    qemu.create(first, "qcow2", MIB)
    other.hardlink_to(first)
    qemu.must_run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", "other.qcow2", first)
    with pytest.raises(QcowFuseError):
        await open_image(str(first), READ_ONLY)


def chain_of(folder: Path, n_layers: int) -> Path:
    """A chain of ``n_layers`` images by numbers, the lowest full of 0x63; QEMU makes two, the rest are copies."""
    qemu.create(folder / "000", "qcow2", MIB, options="cluster_size=4k")
    qemu.io(folder / "000", ["write -P 99 0 1M"])
    overlay = folder / "001"
    qemu.create(overlay, "qcow2", MIB, options="cluster_size=4k", backing="000", backing_format="qcow2")
    data = overlay.read_bytes()
    for number in range(2, n_layers):
        (folder / f"{number:03}").write_bytes(data.replace(b"000", f"{number - 1:03}".encode(), 1))
    return folder / f"{n_layers - 1:03}"


async def test_deep_chains(image_folder: Path) -> None:
    """A chain of 60 opens and reads through to its bottom, and is written at its top."""
    top = chain_of(image_folder, 60)
    image = await open_image(str(top))
    try:
        assert await battery.read(image, 5000, 5000) == bytes([99]) * 5000
        await battery.write(image, 6000, b"top")
        assert await battery.read(image, 5999, 5) == b"ctopc"
    finally:
        await image.aclose()
    assert qemu.check(top).clean


async def test_endless_chains_are_refused(image_folder: Path) -> None:
    """A chain deeper than the limit is refused with its limit, and every file of it is closed again."""
    top = chain_of(image_folder, MAX_BACKING_DEPTH + 2)
    n_open = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BackingChainError, match=str(MAX_BACKING_DEPTH)):
        await open_image(str(top), READ_ONLY)
    assert len(os.listdir("/proc/self/fd")) == n_open


async def test_protocols_in_backing_names_are_refused(image_folder: Path) -> None:
    """A backing name that is a protocol or a json: description is refused and opens nothing."""
    path = image_folder / "image.qcow2"
    secret = image_folder / "secret"
    secret.write_bytes(b"s" * 65536)
    names = ("nbd://example.invalid/x", f'json:{{"driver":"file","filename":"{secret}"}}', "nbd:unix:/x", "ssh://h/x")
    for name in names:
        qemu.must_run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", name, path, "1M")
        with pytest.raises(BackingChainError, match="plain local path"):
            await open_image(str(path), READ_ONLY)


async def test_raw_backing_is_never_probed(image_folder: Path) -> None:
    """A raw backing file whose guest wrote a QCOW header into it is shown as the bytes that it is."""
    inner = make(image_folder, name="inner.qcow2")
    raw = image_folder / "base.raw"
    raw.write_bytes(inner.read_bytes())
    top = image_folder / "top.qcow2"
    qemu.create(top, "qcow2", 2 * MIB, backing="base.raw", backing_format="raw")
    image = await open_image(str(top), READ_ONLY)
    try:
        assert await battery.read(image, 0, 4096) == raw.read_bytes()[:4096]
    finally:
        await image.aclose()


async def overlay_without_format(folder: Path) -> tuple[Path, bytes]:
    """An overlay on a QCOW2 file whose format it does not name, and what QEMU, which probes, sees of it."""
    base = make(folder, name="base.qcow2")
    top = folder / "top.qcow2"
    qemu.create(top, "qcow2", 2 * MIB, backing=str(base), backing_format="qcow2")
    qemu.io(top, ["write -P 18 1M 64k"])
    forget_backing_format(Built(top, "qcow2", 0))
    return top, reference_bytes(top, "qcow2")


async def test_backing_file_of_unnamed_format(image_folder: Path) -> None:
    """Looking like QCOW is no reason to be taken for it: such a backing file is refused until the user says so."""
    top, expected = await overlay_without_format(image_folder)
    with pytest.raises(BackingChainError, match="--backing-format qcow2"):
        await open_image(str(top), READ_ONLY)
    image = await open_image(str(top), OpenOptions(read_only=True, backing_format="qcow2"))
    try:
        await battery.check_reads(image, expected)
    finally:
        await image.aclose()


async def test_unnamed_format_said_to_be_raw(image_folder: Path) -> None:
    """Said to be raw, the same file is shown as it is, header and all."""
    top, _ = await overlay_without_format(image_folder)
    image = await open_image(str(top), OpenOptions(read_only=True, backing_format="raw"))
    try:
        assert bytes(await battery.read(image, 0, 4)) == b"QFI\xfb"
    finally:
        await image.aclose()


async def test_a_named_format_is_believed(image_folder: Path) -> None:
    """What the user says of unnamed formats changes nothing where the image names one."""
    base = image_folder / "base.raw"
    base.write_bytes(b"QFI\xfb" + bytes(MIB - 4))
    top = image_folder / "top.qcow2"
    qemu.create(top, "qcow2", MIB, backing=str(base), backing_format="raw")
    image = await open_image(str(top), OpenOptions(read_only=True, backing_format="qcow2"))
    try:
        assert bytes(await battery.read(image, 0, 4)) == b"QFI\xfb"
    finally:
        await image.aclose()


@pytest.mark.parametrize("is_overlay", [False, True])
async def test_what_nobody_knows_of_a_header_survives_everything(is_overlay: bool, image_folder: Path) -> None:
    """Extra header bytes, unknown extensions and unknown bits: the same after every rewrite, byte for byte."""
    path = make(image_folder)
    if is_overlay:
        path, base = image_folder / "over.qcow2", path
        qemu.create(path, "qcow2", 2 * MIB, backing=base.name, backing_format="qcow2")
    unknown_header_parts(Built(path, "qcow2", 2 * MIB))
    set_bit(path, COMPATIBLE, 63)

    def constant() -> tuple[bytes, bytes, bytes, bytes]:
        """All but sizes and places of tables, the number of snapshots, and bits that are known."""
        data = path.read_bytes()[: 64 * 1024]
        return data[:24], data[32:36], data[80:88], data[96:]

    before = constant()
    assert b"hello world" in before[-1]
    assert bytes(range(0xA0, 0xA0 + 24)) in before[-1]

    async def write(size: int) -> None:
        image = await open_image(str(path))
        await image.write(size - 4096, b"x" * 4096)
        await image.aclose()

    await write(MIB)
    for words in (
        ["snapshot", "-c", "one"],
        ["snapshot", "-a", "one"],
        ["check", "-q", "-r", "all"],
        ["snapshot", "-d", "one"],
    ):
        assert await trio.to_thread.run_sync(img_main, [*words, str(path)]) == 0
        assert constant() == before, words
        await write(2 * MIB)
    image = await open_image(str(path))
    await image.grow(2 << 40)
    await image.aclose()
    await write(2 << 40)
    set_bit(path, INCOMPATIBLE, 0)
    await write(2 * MIB)  # repaired
    assert features(path)[0] == 0
    assert constant() == before
    assert qemu.check(path).clean


@pytest.mark.parametrize("format_name", ["vmdk", "vdi", "vhdx", "vpc", "qed"])
async def test_other_backing_formats_are_refused_by_name(format_name: str, image_folder: Path) -> None:
    """A backing file of another format than raw and QCOW: its format is named, and nothing is written."""
    qemu.create(image_folder / "base", format_name, MIB)
    path = image_folder / "image.qcow2"
    qemu.create(path, "qcow2", backing="base", backing_format=format_name)
    for options in (None, READ_ONLY):
        with pytest.raises(UnsupportedFeatureError, match=f"backing format {format_name}"):
            await open_image(str(path), options)
