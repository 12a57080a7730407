"""Version 1 above 8 TiB, up to QEMU's own limit: alone, as a backing file, written, made, and in how much memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from qcowfuse.cli.img.main import main
from qcowfuse.driver.chain import open_image
from qcowfuse.errors import FormatError
from tests.support import qemu
from tests.support.matrix import TIB
from tests.support.mounting import REPOSITORY, environment
from tests.support.oracle import reference_window

BLOCK = 64 * 1024
PLACES = (0, 8 * TIB - BLOCK, 8 * TIB, 9 * TIB - BLOCK)
MEMORY = """
import resource, sys, trio
from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import OpenOptions

async def main():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image = await open_image(sys.argv[1])
    await image.write(image.size - 5000, b"x" * 5000)
    await image.count_allocated()
    print(image.size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    await image.aclose()

trio.run(main)
"""


async def test_reads_and_writes_what_qemu_made(image_folder: Path) -> None:
    """Clusters below and above 8 TiB, theirs and ours, each read by the other one."""
    path = image_folder / "large.qcow"
    qemu.create(path, "qcow", 9 * TIB)
    qemu.io(path, [f"write -P {number + 1} {place} {BLOCK}" for number, place in enumerate(PLACES)], "qcow")
    image = await open_image(str(path))
    try:
        assert image.size == 9 * TIB
        for number, place in enumerate(PLACES):
            assert await image.read(place, BLOCK) == bytes([number + 1]) * BLOCK
            await image.write(place + 1000, b"new" * 1000)
        assert (await image.find_extent(BLOCK, TIB))[0] is False
    finally:
        await image.aclose()
    for number, place in enumerate(PLACES):
        expected = bytearray([number + 1]) * BLOCK
        expected[1000:4000] = b"new" * 1000
        assert reference_window(path, "qcow", guest_offset=place, n_bytes=BLOCK) == expected


async def test_below_an_overlay(image_folder: Path) -> None:
    """As a backing file, which is what such images are for."""
    base, top = image_folder / "base.qcow", image_folder / "top.qcow2"
    qemu.create(base, "qcow", 9 * TIB)
    qemu.io(base, [f"write -P 7 {8 * TIB + BLOCK} {BLOCK}"], "qcow")
    qemu.create(top, "qcow2", 9 * TIB, options="cluster_size=2M", backing="base.qcow", backing_format="qcow")
    image = await open_image(str(top))
    try:
        await image.write(8 * TIB + BLOCK, b"x" * 100)
        assert await image.read(8 * TIB + BLOCK, 200) == b"x" * 100 + b"\7" * 100
    finally:
        await image.aclose()
    assert qemu.check(top).clean


@pytest.mark.parametrize("size", ["9T", "64T"])
def test_takes_little_memory(size: str, image_folder: Path) -> None:
    """An L1 table of 36 or 256 MiB takes what of it is in use; QEMU opens what we made."""
    path = image_folder / "large.qcow"
    assert main(["create", "-q", "-f", "qcow", str(path), size]) == 0
    assert qemu.info(path, "qcow")["virtual-size"] == int(size[:-1]) * TIB
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    n_bytes, more_kib = map(int, done.stdout.split())
    assert n_bytes == int(size[:-1]) * TIB
    assert more_kib < 20 << 10
    assert path.stat().st_blocks * 512 < 1 << 20
    end = n_bytes - BLOCK
    assert reference_window(path, "qcow", guest_offset=end, n_bytes=BLOCK) == bytes(BLOCK - 5000) + b"x" * 5000


def test_the_limit_is_that_of_qemu(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The largest that we make QEMU opens; with one entry more of the L1 table neither it nor we do."""
    path = image_folder / "large.qcow"
    assert main(["create", "-q", "-f", "qcow", str(path), "512T"]) == 1
    assert "too large for version 1" in capsys.readouterr().err
    assert main(["create", "-q", "-f", "qcow", str(path), str(512 * TIB - 64 * 4096 * 512)]) == 0
    assert qemu.run("qemu-img", "info", "-f", "qcow", path).code == 0
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), (512 * TIB - 63 * 4096 * 512).to_bytes(8, "big"), 24)
    assert qemu.run("qemu-img", "info", "-f", "qcow", path).code
    with pytest.raises(FormatError, match="L1 table of 0x7ffffe08 bytes"):
        trio.run(open_image, str(path))


async def test_growing_ends_at_8_tib(image_folder: Path) -> None:
    """The table would have to move: up to 32 MiB of it, no more."""
    path = image_folder / "large.qcow"
    qemu.create(path, "qcow", 9 * TIB)
    image = await open_image(str(path))
    try:
        with pytest.raises(OSError, match="more than 32 MiB"):
            await image.grow(10 * TIB)
        assert image.size == 9 * TIB
    finally:
        await image.aclose()
