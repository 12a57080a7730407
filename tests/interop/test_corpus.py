"""Images that no QEMU and no qcowfuse made: the same answer as qemu-img, or a refusal that says why.

1. All is tested on the images of ``tests.support.foreign``, which are laid out byte by byte.
2. Where the corpus of images from other projects lies beside the checkout, they are tested in addition.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import OpenOptions
from qcowfuse.errors import BackingChainError, FormatError, QcowFuseError
from tests.support import battery, foreign, qemu
from tests.support.oracle import DiskModel, first_difference, reference_bytes

CORPUS = Path(__file__).parents[3] / "shared" / "corpus"
_IN_CORPUS = (
    "cdi-fs-overhead.qcow2",
    "dfvfs-ext2.qcow2",
    "qemu-bios-tables-test.aarch64.iso.qcow2",
    "qemu-bios-tables-test.arm.iso.qcow2",
    "vasi-test.qcow2",
)
_REFUSED_IN_CORPUS: dict[str, type[QcowFuseError]] = {
    "cdi-invalid-qcow-backing-file.img": FormatError,
    "cdi-invalid-qcow-large-memory.img": FormatError,
    "cdi-cirros-snapshot1.qcow2": BackingChainError,
    "libvirt-loop-1.qcow2": BackingChainError,
    "libvirt-loop-2.qcow2": BackingChainError,
    "libvirt-loop-self.qcow2": BackingChainError,
    "libvirt-qcow2-protocol-backing-file.qcow2": BackingChainError,
    "libvirt-qcow2-protocol-backing-nbd.qcow2": BackingChainError,
    "libvirt-qcow2_qcow2-auto.qcow2": BackingChainError,
    "libvirt-qcow2_raw-raw-relative.qcow2": BackingChainError,
    "libvirt-datafile.qcow2": BackingChainError,
    "libvirt-datafile-emptystr.qcow2": FormatError,
    "libvirt-qcow2datafile-datafile.qcow2": BackingChainError,
}
_CORPUS = CORPUS.is_dir()
SOUND = (*foreign.SOUND, *(_IN_CORPUS if _CORPUS else ()))
READABLE = (*SOUND, "no_disk", *(["shared-mime-info-disk.qcow2"] if _CORPUS else ()))
REFUSED: dict[str, type[QcowFuseError]] = {
    **dict.fromkeys(foreign.WRONG, FormatError),
    **dict.fromkeys(foreign.INCOMPLETE, BackingChainError),
    **(_REFUSED_IN_CORPUS if _CORPUS else {}),
}
LARGE = ("old_version_of_152_tib", *(["cdi-invalid-qcow-large-size.img"] if _CORPUS else ()))
"""Version 1, 152 TiB in a kilobyte: QEMU opens them."""
BROKEN_SNAPSHOTS = ("many_broken_snapshots", *(["cdi-invalid-qcow-large-json.img"] if _CORPUS else ()))


def copy(name: str, folder: Path) -> Path:
    """A writable copy of one image, made or of the corpus."""
    if maker := foreign.ALL.get(name):
        path = folder / f"{name}.qcow2"
        maker(path)
        return path
    return Path(shutil.copyfile(CORPUS / name, folder / name))


def loops(name: str, folder: Path) -> Iterator[Path]:
    """Beside ``name``: the images with which it makes a loop."""
    if name in foreign.ALL:
        for other in foreign.INCOMPLETE:
            if other.startswith("loop"):
                yield copy(other, folder)
    else:
        for path in CORPUS.glob("libvirt-loop-*"):
            yield copy(path.name, folder).rename(folder / path.name.removeprefix("libvirt-"))


@pytest.mark.parametrize("name", READABLE)
async def test_shows_what_qemu_shows(name: str, image_folder: Path) -> None:
    """A foreign image reads as QEMU reads it."""
    path = copy(name, image_folder)
    expected = reference_bytes(path, "qcow2")
    image = await open_image(str(path), OpenOptions(read_only=True))
    try:
        await battery.check_reads(image, expected)
    finally:
        await image.aclose()


@pytest.mark.parametrize("name", SOUND)
async def test_writes_to_foreign_images(name: str, image_folder: Path) -> None:
    """A foreign image that QEMU finds sound is sound after our writes."""
    path = copy(name, image_folder)
    assert qemu.check(path).clean
    model = DiskModel(reference_bytes(path, "qcow2"))
    image = await open_image(str(path))
    try:
        await battery.check_writes(image, model)
        await battery.check_concurrency(image, model)
    finally:
        await image.aclose()
    assert qemu.check(path).clean
    assert not first_difference(reference_bytes(path, "qcow2"), model.data)


@pytest.mark.parametrize(("name", "error"), REFUSED.items())
@pytest.mark.parametrize("read_only", [True, False])
async def test_refuses(name: str, error: type[QcowFuseError], read_only: bool, image_folder: Path) -> None:
    """A hostile, incomplete or unserved image is refused with one line that names the cause, and not changed."""
    if "loop" in name:
        assert len(list(loops(name, image_folder))) == 3
    path = copy(name, image_folder)
    before = path.read_bytes()
    with pytest.raises(error) as caught:
        await open_image(str(path), OpenOptions(read_only=read_only))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", LARGE)
async def test_a_large_disk_reads_as_in_qemu(name: str, image_folder: Path) -> None:
    """Both ends of the disk are there, and nothing of the file is changed."""
    path = copy(name, image_folder)
    before = path.read_bytes()
    image = await open_image(str(path), OpenOptions(read_only=True))
    try:
        for guest_offset in (0, image.size - 512):
            said = qemu.must_run("qemu-io", "-r", "-f", "qcow", "-c", f"read -P 0 {guest_offset} 512", path)
            assert "read 512/512" in said
            assert "Pattern verification failed" not in said
            assert bytes(await image.read(guest_offset, 512)) == bytes(512)
    finally:
        await image.aclose()
    assert path.read_bytes() == before


def chain(of_corpus: bool, folder: Path) -> Path:
    """The uppermost image of a chain that is complete."""
    if not of_corpus:
        foreign.small_file_system(folder / "missing.qcow2")
        return copy("missing_qcow2", folder)
    (folder / "cirros.raw").write_bytes(bytes(range(256)) * 4096)
    copy("cdi-cirros-snapshot1.qcow2", folder).rename(folder / "cirros-snapshot1.qcow2")
    return copy("cdi-cirros-snapshot2.qcow2", folder)


@pytest.mark.parametrize("of_corpus", [False, True] if _CORPUS else [False])
async def test_chain_of_foreign_images(of_corpus: bool, image_folder: Path) -> None:
    """A chain whose parts are foreign opens once its missing lowest file is there."""
    path = chain(of_corpus, image_folder)
    expected = reference_bytes(path, "qcow2")
    assert any(expected)
    image = await open_image(str(path), OpenOptions(read_only=True))
    try:
        await battery.check_reads(image, expected, n_random=200)
    finally:
        await image.aclose()


@pytest.mark.parametrize("name", BROKEN_SNAPSHOTS)
async def test_many_broken_snapshots(name: str, image_folder: Path) -> None:
    """An image with 65536 empty snapshots opens read-only and shows a disk of the size that its header names."""
    path = copy(name, image_folder)
    image = await open_image(str(path), OpenOptions(read_only=True))
    try:
        assert image.size == int.from_bytes(path.read_bytes()[24:32], "big")
        assert not any(await battery.read(image, 0, min(image.size, 65536)))
    finally:
        await image.aclose()
