"""Images that other projects made: the same answer as qemu-img, or a refusal that says why."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import OpenOptions
from qcowfuse.errors import BackingChainError, FormatError, QcowFuseError
from tests.support import battery, qemu
from tests.support.oracle import DiskModel, first_difference, reference_bytes

CORPUS = Path(__file__).parents[3] / "shared" / "corpus"
READABLE = (
    "cdi-fs-overhead.qcow2",
    "dfvfs-ext2.qcow2",
    "qemu-bios-tables-test.aarch64.iso.qcow2",
    "qemu-bios-tables-test.arm.iso.qcow2",
    "shared-mime-info-disk.qcow2",
    "vasi-test.qcow2",
)
SOUND = tuple(name for name in READABLE if name != "shared-mime-info-disk.qcow2")
REFUSED: dict[str, type[QcowFuseError]] = {
    "cdi-invalid-qcow-backing-file.img": FormatError,
    "cdi-invalid-qcow-large-memory.img": FormatError,
    "cdi-invalid-qcow-large-size.img": FormatError,
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

pytestmark = pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus of foreign images is not here")


def copy(name: str, folder: Path) -> Path:
    """A writable copy of one image."""
    return Path(shutil.copyfile(CORPUS / name, folder / name))


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
    for other in CORPUS.glob("libvirt-loop-*"):
        copy(other.name, image_folder).rename(image_folder / other.name.removeprefix("libvirt-"))
    path = copy(name, image_folder)
    before = path.read_bytes()
    with pytest.raises(error) as caught:
        await open_image(str(path), OpenOptions(read_only=read_only))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


async def test_chain_of_foreign_images(image_folder: Path) -> None:
    """A chain whose parts come from another project opens once its missing lowest file is there."""
    (image_folder / "cirros.raw").write_bytes(bytes(range(256)) * 4096)
    first = copy("cdi-cirros-snapshot1.qcow2", image_folder).rename(image_folder / "cirros-snapshot1.qcow2")
    second = copy("cdi-cirros-snapshot2.qcow2", image_folder)
    assert first.exists()
    expected = reference_bytes(second, "qcow2")
    image = await open_image(str(second), OpenOptions(read_only=True))
    try:
        await battery.check_reads(image, expected, n_random=200)
    finally:
        await image.aclose()


async def test_many_broken_snapshots(image_folder: Path) -> None:
    """An image with 65536 empty snapshots opens read-only and shows a disk of the size that its header names."""
    path = copy("cdi-invalid-qcow-large-json.img", image_folder)
    image = await open_image(str(path), OpenOptions(read_only=True))
    try:
        assert image.size == int.from_bytes(path.read_bytes()[24:32], "big")
        assert not any(await battery.read(image, 0, min(image.size, 65536)))
    finally:
        await image.aclose()
