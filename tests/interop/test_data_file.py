"""External data files: which file is taken, what is refused, and what QEMU finds in both files afterwards."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import OpenOptions
from qcowfuse.errors import BackingChainError, CorruptImageError, FormatError, ImageLockedError, ImageUsageError
from tests.support import battery, qemu
from tests.support.matrix import KIB, MIB
from tests.support.oracle import DiskModel, first_difference, reference_bytes

READ_ONLY = OpenOptions(read_only=True)
KINDS = ["", ",data_file_raw=on", ",extended_l2=on", ",extended_l2=on,data_file_raw=on"]


@pytest.fixture(autouse=True)
def _in_the_folder(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU looks for a data file of relative name from where it was started."""
    monkeypatch.chdir(image_folder)


def make(folder: Path, options: str = "", *, name: str = "data.raw", size: int = 2 * MIB) -> Path:
    """An image with a data file of relative ``name``, both in ``folder``, and some data at 64 KiB."""
    path = folder / "image.qcow2"
    qemu.must_run(
        *("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={name}{options}", path.name, str(size)),
        cwd=folder,
    )
    qemu.must_run("qemu-io", "-c", "write -P 17 64k 128k", path.name, cwd=folder)
    return path


def rename_data_file(path: Path, old: bytes, new: bytes) -> None:
    """Put another name, of the same length, into the image."""
    assert len(old) == len(new)
    data = path.read_bytes()
    path.write_bytes(data.replace(old, new, 1))


async def write_somewhere(path: Path, options: OpenOptions | None = None) -> None:
    image = await open_image(str(path), options)
    try:
        await image.write(5000, b"x" * 3000)
    finally:
        await image.aclose()


@pytest.mark.parametrize("options", KINDS)
async def test_writes_are_where_qemu_reads_them(options: str, image_folder: Path) -> None:
    """Random writes, zeroes and discards, closed and opened again; the raw bit stays set and true."""
    path = make(image_folder, options)
    model = DiskModel(reference_bytes(path, "qcow2"))
    for seed in range(3):
        image = await open_image(str(path))
        try:
            await battery.check_writes(image, model, seed=seed)
            await battery.check_reads(image, model.data, seed=seed, n_random=20)
        finally:
            await image.aclose()
        assert qemu.check(path).clean
        assert not first_difference(reference_bytes(path, "qcow2"), model.data)
    is_raw = "raw" in options
    assert qemu.info(path)["format-specific"]["data"]["data-file-raw"] is is_raw
    if is_raw:
        assert not first_difference((image_folder / "data.raw").read_bytes()[: model.size], model.data)


@pytest.mark.parametrize("options", KINDS)
async def test_discard_gives_space_back(options: str, image_folder: Path) -> None:
    """A discard makes holes in the data file, and what was discarded reads as zeroes, here and in QEMU."""
    path = make(image_folder, options)
    data_path = image_folder / "data.raw"
    with data_path.open("r+b") as file:  # as a file system that was used before
        file.seek(64 * KIB)
        file.write(b"\x11" * 128 * KIB)
    before = data_path.stat().st_blocks
    image = await open_image(str(path))
    try:
        await image.write_zeroes(64 * KIB, 128 * KIB, unmap=True)
        assert not any(await image.read(0, MIB))
    finally:
        await image.aclose()
    assert data_path.stat().st_blocks <= before - 128 * 2
    assert qemu.check(path).clean


async def test_a_relative_name_starts_from_the_images_folder(image_folder: Path) -> None:
    """Not from the working directory, even where it has such a file."""
    path = make(image_folder)
    image = await open_image(str(path), READ_ONLY)
    assert set(await image.read(64 * KIB, 512)) == {17}
    await image.aclose()
    (image_folder / "sub").mkdir()
    path = path.rename(image_folder / "sub" / "image.qcow2")
    with pytest.raises(BackingChainError, match=r"cannot open its data file .*sub/data.raw.*--data-file"):
        await open_image(str(path), READ_ONLY)
    image = await open_image(str(path), OpenOptions(data_file=str(image_folder / "data.raw")))
    assert set(await image.read(64 * KIB, 512)) == {17}
    await image.aclose()


async def test_data_file_option_needs_a_data_file(image_folder: Path) -> None:
    """The option means nothing for an image without one, and is refused."""
    path = image_folder / "image.qcow2"
    qemu.create(path, "qcow2", MIB)
    with pytest.raises(ImageUsageError, match="has no external data file"):
        await open_image(str(path), OpenOptions(data_file="x"))


@pytest.mark.parametrize("name", [b"nbd:host", b"json:{}x", b"http:abc"])
async def test_protocols_are_refused(name: bytes, image_folder: Path) -> None:
    """A name from inside an image is a plain path, whatever it looks like, even where such a file exists."""
    path = make(image_folder, name="data.raw")
    rename_data_file(path, b"data.raw", name)
    (image_folder / os.fsdecode(name)).write_bytes(bytes(MIB))
    for options in (None, READ_ONLY):
        with pytest.raises(BackingChainError, match="is not a plain local path"):
            await open_image(str(path), options)


async def test_an_image_without_the_name_is_refused(image_folder: Path) -> None:
    """The bit without the extension: an error that says so, unless the user names the file."""
    path = make(image_folder)
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack(">I", 0x44415441), struct.pack(">I", 0x44415442), 1))
    with pytest.raises(FormatError, match="data file without its name"):
        await open_image(str(path))
    await write_somewhere(path, OpenOptions(data_file=str(image_folder / "data.raw")))


async def test_files_of_the_chain_are_no_data_files(image_folder: Path) -> None:
    """Neither the image itself, by whatever name, nor its backing file."""
    path = make(image_folder, name="image.link")
    (image_folder / "image.link").unlink()
    for link in (os.symlink, os.link):
        link(path, image_folder / "image.link")
        for options in (None, READ_ONLY):
            with pytest.raises(BackingChainError, match="part of the chain itself"):
                await open_image(str(path), options)
        (image_folder / "image.link").unlink()
    base = image_folder / "base.raw"
    base.write_bytes(bytes(MIB))
    over = image_folder / "over.qcow2"
    qemu.create(
        over, "qcow2", MIB, options=f"data_file={image_folder}/next.raw", backing="base.raw", backing_format="raw"
    )
    with pytest.raises(BackingChainError, match="is part of the chain already"):
        await open_image(str(over), OpenOptions(data_file=str(base)))


@pytest.mark.parametrize("length", [0, 64 * KIB])
@pytest.mark.parametrize("options", KINDS)
async def test_a_data_file_that_lost_its_end(
    options: str, length: int, image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not written; read, it has zeroes where nothing is left, as in QEMU, and a warning is in the log."""
    path = make(image_folder, options)
    os.truncate(image_folder / "data.raw", length)
    with pytest.raises(ImageUsageError, match="truncated; serve it read-only"):
        await open_image(str(path))
    image = await open_image(str(path), READ_ONLY)
    try:
        assert "truncated" in caplog.text
        assert not any(await image.read(0, MIB))
    finally:
        await image.aclose()


async def test_a_short_data_file_without_data_is_none_that_lost_its_end(image_folder: Path) -> None:
    """A data file only has to reach to the last data."""
    path = make(image_folder)
    os.truncate(image_folder / "data.raw", 192 * KIB)
    image = await open_image(str(path))
    model = DiskModel(bytes(await image.read(0, image.size)))
    await battery.check_writes(image, model, seed=1)
    await image.aclose()
    assert qemu.check(path).clean


async def test_two_writers_are_impossible(image_folder: Path) -> None:
    """Neither QEMU nor another image of ours can write to the data file at the same time."""
    path = make(image_folder)
    other = image_folder / "other.qcow2"
    other.write_bytes(path.read_bytes())
    image = await open_image(str(path))
    try:
        said = qemu.run("qemu-io", "-c", "write 0 4k", other.name, cwd=image_folder)
        assert said.code != 0
        assert "lock" in said.stderr
        said = qemu.run("qemu-io", "-f", "raw", "-c", "write 0 4k", "data.raw", cwd=image_folder)
        assert "lock" in said.stderr
        with pytest.raises(ImageLockedError, match=r"data\.raw"):
            await open_image(str(other))
    finally:
        await image.aclose()
    first, second = await open_image(str(path), READ_ONLY), await open_image(str(other), READ_ONLY)
    await first.aclose()
    await second.aclose()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (1 << 63 | 0x30000, "same offset"),
        (1 << 63 | 0x30001, "same offset"),
        (1 << 62 | 0x30000, "compressed, with an external data file"),
    ],
)
async def test_impossible_entries_are_found(entry: int, said: str, image_folder: Path) -> None:
    """Data or zeroes in a wrong place, and compressed clusters, are corruption: to readers, to writers, to QEMU."""
    path = make(image_folder)
    with path.open("r+b") as file:
        file.seek(40)
        (l1_offset,) = struct.unpack(">Q", file.read(8))
        file.seek(l1_offset)
        (l2_entry,) = struct.unpack(">Q", file.read(8))
        file.seek((l2_entry & 0xFFFFFFFFFFFE00) + 8)
        file.write(entry.to_bytes(8, "big"))
    before = (image_folder / "data.raw").read_bytes()
    refused = qemu.run("qemu-io", "-r", "-f", "qcow2", "-c", "read 65k 512", path.name, cwd=image_folder)
    assert "Input/output error" in refused.stdout + refused.stderr, refused
    for is_write in (False, True):
        image = await open_image(str(path), OpenOptions(read_only=not is_write))
        request = image.write(65 * KIB, b"x") if is_write else image.read(65 * KIB, 10)
        with pytest.raises(CorruptImageError, match=said):
            await request
        await image.aclose()
    assert (image_folder / "data.raw").read_bytes() == before


async def test_unknown_autoclear_bits_go_and_the_raw_bit_stays(image_folder: Path) -> None:
    """The first write clears what nobody keeps true."""
    path = make(image_folder, ",data_file_raw=on")
    with path.open("r+b") as file:
        file.seek(88)
        file.write((1 << 41 | 2).to_bytes(8, "big"))
    await write_somewhere(path)
    assert path.read_bytes()[88:96] == (2).to_bytes(8, "big")


async def test_no_snapshots_with_a_data_file(image_folder: Path) -> None:
    """A snapshot of it can't be served, for its data would have been overwritten."""
    path = make(image_folder)
    with pytest.raises(ImageUsageError, match="external data file"):
        await open_image(str(path), OpenOptions(snapshot="one"))
