"""Odd and huge disks: opening one is quick and costs little memory, whatever its virtual size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qcowfuse.driver.chain import open_image
from tests.support import qemu

GIB = 1 << 30
TIB = 1 << 40
EIB = 1 << 60

_OPEN = """
import json, resource, sys, time, trio
from qcowfuse.driver.chain import open_image

async def main():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    image = await open_image(sys.argv[1])
    await image.count_allocated()
    seconds = time.process_time() - begun
    await image.read(image.size - 4096, 4096)
    await image.write(image.size - 4096, b"x" * 4096)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([seconds, grown << 10, image.size, image.allocated_bytes()]))
    await image.aclose()

trio.run(main)
"""


@pytest.mark.parametrize(
    ("size", "options", "table_bytes"),
    [
        (64 * TIB, "", 1 << 20),
        (EIB, "cluster_size=2M", 16 << 20),
        (EIB, "cluster_size=2M,extended_l2=on", 32 << 20),
        (16 * GIB, "cluster_size=512", 4 << 20),
        (127 * GIB, "cluster_size=512", 32 << 20),
        (EIB, "cluster_size=2M,data_file={}/data.raw", 16 << 20),
    ],
)
def test_opening_is_quick_and_small(size: int, options: str, table_bytes: int, image_folder: Path) -> None:
    """Memory is that of the L1 table and little more; less than half a second for any size."""
    path = image_folder / "disk.qcow2"
    if "data_file" in options:
        size = TIB  # what the file system of the data file takes
        table_bytes = 0
    qemu.create(path, "qcow2", size, options=options.format(image_folder))
    done = subprocess.run([sys.executable, "-c", _OPEN, path], capture_output=True, text=True, check=True)
    seconds, grown, found_size, allocated = json.loads(done.stdout)
    assert found_size == size
    assert allocated == min(4096 if "cluster_size=512" in options else 2 << 20, allocated)
    assert seconds < 1.5
    assert grown < 2 * table_bytes + (16 << 20)
    assert qemu.check(path).clean


@pytest.mark.parametrize("size", [0, 512, 1536, 65536 + 512, (1 << 20) + 512])
@pytest.mark.parametrize("options", ["", "cluster_size=512", "cluster_size=2M", "extended_l2=on"])
async def test_odd_sizes_are_written_to_the_last_byte(size: int, options: str, image_folder: Path) -> None:
    """Disks that end inside a cluster, or have none at all."""
    path = image_folder / "disk.qcow2"
    qemu.create(path, "qcow2", size, options=options)
    image = await open_image(str(path))
    assert image.size == size
    if size:
        await image.write(0, b"a" * size)
        await image.write(size - 100, b"b" * 100)
    else:
        assert not len(await image.read(0, 0))
        await image.write(0, b"")
    await image.write_zeroes(0, min(size, 512), unmap=True)
    await image.flush()
    await image.count_allocated()
    assert image.allocated_bytes() <= size
    await image.aclose()
    assert qemu.check(path).clean
    if size > 512:
        qemu.io(path, ["read -P 0 0 512", f"read -P 0x61 512 {size - 512 - 100}", f"read -P 0x62 {size - 100} 100"])
