"""We write and QEMU checks, then both in turn, on every image of the matrix."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qcowfuse.driver.chain import open_image
from qcowfuse.driver.image import Image
from tests.support import battery, qemu
from tests.support.matrix import MIB, BuiltImage, ImageSpec, all_specs, build
from tests.support.oracle import DiskModel, first_difference, reference_bytes, reference_window

SPECS = all_specs()
SMALL = [spec for spec in SPECS if not spec.large]
LARGE = [spec for spec in SPECS if spec.large]
IN_TURN = [spec for number, spec in enumerate(SMALL) if number % 3 == 0 or "snapshot" in spec.id]


def must_be_sound(spec: ImageSpec, built: BuiltImage) -> None:
    """qemu-img check finds nothing."""
    if spec.format_name == "qcow":
        return  # version 1 has nothing that could be checked
    found = qemu.check(built.path)
    assert found.corruptions == 0, found.text
    assert found.clean, found.text


def must_show(spec: ImageSpec, built: BuiltImage, model: DiskModel) -> None:
    """QEMU shows the bytes of the model, and so does a raw data file."""
    assert not first_difference(reference_bytes(built.path, built.format_name), model.data)
    if spec.has_raw_data_file:
        assert built.data_path is not None
        assert not first_difference(built.data_path.read_bytes()[: model.size], model.data)


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.id)
async def test_qemu_finds_what_we_wrote(spec: ImageSpec, image_folder: Path) -> None:
    """The whole battery, then QEMU: no leak, no corruption, the same bytes; the files below are untouched."""
    built = build(spec, image_folder)
    expected = reference_bytes(built.path, spec.format_name)
    below = [path.read_bytes() for path in built.backing_paths]

    async def open_it() -> Image:
        return await open_image(str(built.path), built.options)

    model = await battery.check_image(open_it, expected)
    must_be_sound(spec, built)
    must_show(spec, built, model)
    assert [path.read_bytes() for path in built.backing_paths] == below


@pytest.mark.parametrize("spec", IN_TURN, ids=lambda spec: spec.id)
async def test_writing_in_turn_with_qemu(spec: ImageSpec, image_folder: Path) -> None:
    """Three rounds: we write and flush, QEMU checks and writes, we read QEMU's bytes."""
    built = build(spec, image_folder)
    model = DiskModel(reference_bytes(built.path, spec.format_name))
    rng = random.Random(spec.id)
    for number in range(3):
        image = await open_image(str(built.path), built.options)
        try:
            await battery.check_reads(image, model.data, seed=number, n_random=20)
            await battery.check_writes(image, model, seed=number, n_writes=12)
        finally:
            await image.aclose()
        must_be_sound(spec, built)
        commands = []
        for _ in range(6 if model.size else 0):
            n_sectors = rng.randint(1, min(200, model.size // 512))
            place = rng.randrange(model.size // 512 - n_sectors + 1) * 512
            value = rng.randrange(1, 256)
            commands.append(f"write -P {value} {place} {n_sectors * 512}")
            model.write(place, bytes([value]) * (n_sectors * 512))
        if commands:
            qemu.io(built.path, commands, spec.format_name)
        must_be_sound(spec, built)
        must_show(spec, built, model)


@pytest.mark.parametrize("spec", LARGE, ids=lambda spec: spec.id)
async def test_writes_to_large_images(spec: ImageSpec, image_folder: Path) -> None:
    """Writes at both ends and in the middle of a disk of up to 64 TiB are what QEMU reads."""
    built = build(spec, image_folder)
    models = {
        place: bytearray(reference_window(built.path, spec.format_name, guest_offset=place, n_bytes=MIB))
        for place in spec.windows
    }
    rng = random.Random(spec.id)
    image = await open_image(str(built.path), built.options)
    try:
        for place, model in models.items():
            for guest_offset, n_bytes in battery.random_ranges(rng, MIB, 12):
                data = rng.randbytes(n_bytes)
                await battery.write(image, place + guest_offset, data)
                model[guest_offset : guest_offset + n_bytes] = data
        await image.flush()
        for place, model in models.items():
            assert not first_difference(await battery.read(image, place, MIB), model)
    finally:
        await image.aclose()
    must_be_sound(spec, built)
    for place, model in models.items():
        found = reference_window(built.path, spec.format_name, guest_offset=place, n_bytes=MIB)
        assert not first_difference(found, model)


@pytest.mark.parametrize("version", ["0.10", "1.1"])
async def test_snapshots_keep_their_bytes(version: str, image_folder: Path) -> None:
    """Writing over clusters that a snapshot shares leaves the snapshot as it was."""
    path = image_folder / "snapshots.qcow2"
    qemu.create(path, "qcow2", 2 * MIB, options=f"compat={version},cluster_size=4k")
    qemu.io(path, [f"write -P 5 0 {MIB}"])
    qemu.must_run("qemu-img", "snapshot", "-c", "kept", path)
    expected = reference_bytes(path, "qcow2")
    image = await open_image(str(path))
    model = DiskModel(expected)
    try:
        await battery.check_writes(image, model, seed=3)
    finally:
        await image.aclose()
    assert qemu.check(path).clean
    assert not first_difference(reference_bytes(path, "qcow2"), model.data)
    qemu.must_run("qemu-img", "snapshot", "-a", "kept", path)
    assert qemu.check(path).clean
    assert not first_difference(reference_bytes(path, "qcow2"), expected)


async def test_fills_a_disk_to_the_last_byte(image_folder: Path) -> None:
    """Every byte of an image with tiny clusters is written, so that refcount blocks and their table must grow."""
    path = image_folder / "full.qcow2"
    size = 24 * MIB
    qemu.create(path, "qcow2", size, options="cluster_size=512,refcount_bits=64")
    rng = random.Random(8)
    model = DiskModel(bytes(size))
    image = await open_image(str(path))
    try:
        for place in range(0, size, MIB):
            data = rng.randbytes(MIB)
            await battery.write(image, place, data)
            model.write(place, data)
        await image.flush()
    finally:
        await image.aclose()
    assert qemu.check(path).clean
    assert not first_difference(reference_bytes(path, "qcow2"), model.data)
