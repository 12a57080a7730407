"""QEMU writes and we read: every image of the matrix shows the bytes that QEMU shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import L2CacheSize
from qcowfuse.format.header_bytes import serialise_header
from qcowfuse.format.header_parsing import header_length_needed, parse_header
from tests.support import battery, qemu
from tests.support.matrix import MIB, ImageSpec, all_specs, build
from tests.support.oracle import first_difference, reference_bytes, reference_window

SPECS = all_specs()
SMALL = [spec for spec in SPECS if not spec.large]
LARGE = [spec for spec in SPECS if spec.large]


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.id)
async def test_reads_what_qemu_wrote(spec: ImageSpec, image_folder: Path) -> None:
    """A read-only image shows QEMU's bytes in every way of asking, refuses writes, and leaves the file as it was."""
    built = build(spec, image_folder)
    before = built.path.read_bytes()
    image = await open_image(str(built.path), built.options._replace(read_only=True))
    try:
        expected = reference_bytes(built.path, spec.format_name)
        assert image.format_name == spec.format_name
        await battery.check_reads(image, expected)
    finally:
        await image.aclose()
    assert built.path.read_bytes() == before


@pytest.mark.parametrize("spec", SMALL[::6], ids=lambda spec: spec.id)
async def test_reads_with_a_starved_cache(spec: ImageSpec, image_folder: Path) -> None:
    """With no L2 cache to speak of the bytes are the same."""
    built = build(spec, image_folder)
    expected = reference_bytes(built.path, spec.format_name)
    options = built.options._replace(read_only=True, l2_cache_size=L2CacheSize(n_bytes=0))
    image = await open_image(str(built.path), options)
    try:
        await battery.check_reads(image, expected, seed=5)
    finally:
        await image.aclose()


@pytest.mark.parametrize("spec", SMALL[::2], ids=lambda spec: spec.id)
async def test_opening_for_writing_writes_nothing(spec: ImageSpec, image_folder: Path) -> None:
    """Open for writing, read, flush and close leave the file as it was, byte for byte."""
    built = build(spec, image_folder)
    before = built.path.read_bytes()
    image = await open_image(str(built.path), built.options)
    try:
        await battery.read(image, 0, min(image.size, 70_000))
        await image.flush()
    finally:
        await image.aclose()
    assert built.path.read_bytes() == before


@pytest.mark.parametrize("spec", LARGE, ids=lambda spec: spec.id)
async def test_reads_large_images(spec: ImageSpec, image_folder: Path) -> None:
    """A disk of up to 64 TiB has QEMU's size and bytes where there is data and at both ends."""
    built = build(spec, image_folder)
    windows = {
        place: reference_window(built.path, spec.format_name, guest_offset=place, n_bytes=MIB)
        for place in spec.windows
    }
    image = await open_image(str(built.path), built.options._replace(read_only=True))
    try:
        assert image.size == qemu.info(built.path)["virtual-size"]
        for place, expected in windows.items():
            assert any(expected)
            found = await battery.read(image, place, MIB)
            assert not first_difference(found, expected)
        assert not any(await battery.read(image, image.size // 5, 300_000))
    finally:
        await image.aclose()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_header_survives_a_round_trip(spec: ImageSpec, image_folder: Path) -> None:
    """parse and serialise give back a header by QEMU byte for byte, and its fields say what qemu-img info says."""
    built = build(spec, image_folder)
    with built.path.open("rb") as file:
        start = file.read(2 * MIB)
    file_size = built.path.stat().st_size
    header = parse_header(start[: header_length_needed(start)], file_size)
    written = serialise_header(header)
    assert start[: len(written)] == written
    assert parse_header(written, len(written)) == header
    said = qemu.info(built.path, spec.format_name)
    assert header.virtual_size == said["virtual-size"]
    assert 1 << header.cluster_bits == said["cluster-size"]
    assert header.backing_file == said.get("backing-filename")
