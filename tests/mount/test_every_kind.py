"""Images of every kind through a real mount: QEMU's bytes are read, and what is written is what QEMU finds.

A sample of the matrix that the interop tests go through without a mount; QCOWFUSE_WHOLE_MATRIX=1 takes all of it.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from qcowfuse.storage.syscalls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE, fallocate
from tests.support import qemu
from tests.support.matrix import MIB, ImageSpec, all_specs, build
from tests.support.mounting import Mounted
from tests.support.oracle import DiskModel, first_difference, reference_bytes, reference_window

pytestmark = pytest.mark.mount

STEP = 1 if os.environ.get("QCOWFUSE_WHOLE_MATRIX") == "1" else 12
SPECS = all_specs()
SMALL = [spec for spec in SPECS if not spec.large][::STEP]
LARGE = [spec for spec in SPECS if spec.large][:: min(STEP, 2)]


def change(file: Path, model: DiskModel, rng: random.Random) -> None:
    """Writes, holes and zeroed ranges at any byte, some of them synced."""
    fd = os.open(file, os.O_RDWR)
    try:
        for number in range(40):
            n_bytes = min(rng.choice((1, 512, 4096, 70_000, 200_000)), model.size)
            place = rng.randrange(model.size - n_bytes + 1)
            if number % 4 == 3:
                mode = FALLOC_PUNCH_HOLE if number % 8 == 3 else FALLOC_ZERO_RANGE
                fallocate(fd, mode | FALLOC_KEEP_SIZE, place, n_bytes)
                data = bytes(n_bytes)
            else:
                data = rng.randbytes(n_bytes)
                assert os.pwrite(fd, data, place) == n_bytes
            model.write(place, data)
            if number % 16 == 15:
                os.fsync(fd)
    finally:
        os.close(fd)


def must_be_sound(spec: ImageSpec, path: Path) -> None:
    """qemu-img check finds nothing, where the format can be checked."""
    if spec.format_name == "qcow":
        return
    found = qemu.check(path)
    assert found.corruptions == 0, found.text
    assert found.clean, found.text


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.id)
def test_image_through_a_mount(spec: ImageSpec, tmp_path: Path) -> None:
    """The disk reads as QEMU reads it; after writes, holes and an unmount it is sound and still equal."""
    built = build(spec, tmp_path)
    mount_point = tmp_path / "mount point"
    mount_point.mkdir()
    model = DiskModel(reference_bytes(built.path, spec.format_name))
    with Mounted(built.path, mount_point, *built.words) as mounted:
        assert not first_difference(mounted.file.read_bytes(), model.data)
        if model.size:
            change(mounted.file, model, random.Random(spec.id))
        assert not first_difference(mounted.file.read_bytes(), model.data)
    must_be_sound(spec, built.path)
    assert not first_difference(reference_bytes(built.path, spec.format_name), model.data)


@pytest.mark.parametrize("spec", LARGE, ids=lambda spec: spec.id)
def test_large_image_through_a_mount(spec: ImageSpec, tmp_path: Path) -> None:
    """A disk of up to 1 EiB is read and written at its ends and in its middle, at any of its bytes."""
    built = build(spec, tmp_path)
    mount_point = tmp_path / "mnt"
    mount_point.mkdir()
    rng = random.Random(spec.id)
    models = {
        place: DiskModel(reference_window(built.path, spec.format_name, guest_offset=place, n_bytes=MIB))
        for place in spec.windows
    }
    with Mounted(built.path, mount_point, *built.words) as mounted:
        assert mounted.file.stat().st_size == qemu.info(built.path)["virtual-size"]
        fd = os.open(mounted.file, os.O_RDWR)
        try:
            for place, model in models.items():
                assert not first_difference(os.pread(fd, MIB, place), model.data)
                for _ in range(12):
                    n_bytes = rng.choice((1, 4096, 100_000))
                    start = rng.randrange(MIB - n_bytes + 1)
                    data = rng.randbytes(n_bytes)
                    assert os.pwrite(fd, data, place + start) == n_bytes
                    model.write(start, data)
        finally:
            os.close(fd)
    must_be_sound(spec, built.path)
    for place, model in models.items():
        found = reference_window(built.path, spec.format_name, guest_offset=place, n_bytes=MIB)
        assert not first_difference(found, model.data)
