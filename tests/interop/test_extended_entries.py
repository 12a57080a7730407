"""Extended L2 entries with bits that mean nothing there: read, written and checked as QEMU does it.

The one difference: a compressed cluster with a subcluster bitmap is read by both, but QEMU's check takes its clusters
for leaked, and its repair frees them. Here they are counted, and the repair clears the bitmap.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from qcowfuse.cli.img.main import main
from qcowfuse.driver.chain import open_image
from tests.support import battery, qemu

CLUSTER = 16384
SUB = CLUSTER // 32
SIZE = 16 * CLUSTER
OFFSET = (1 << 56) - 512
BITMAPS = {"all": (1 << 64) - 1, "allocated": (1 << 32) - 1, "zero": 0xFFFF << 40, "mixed": 0x0F0F_0000_0000_F0F0}
ENTRIES = {"full": 0, "compressed": 1, "partly": 2, "zero": 3, "none": 4, "shared": 5}
"""Guest clusters of the image by what they are."""


@pytest.fixture
def image(image_folder: Path) -> Path:
    """One guest cluster of each kind, and behind them others without a cluster."""
    path = image_folder / "image.qcow2"
    qemu.create(path, "qcow2", SIZE, options=f"cluster_size={CLUSTER},extended_l2=on")
    qemu.io(path, [f"write -P 7 {5 * CLUSTER} {CLUSTER}"])
    qemu.must_run("qemu-img", "snapshot", "-c", "s", path)
    commands = [f"write -P 1 0 {CLUSTER}", f"write -c -P 2 {CLUSTER} {CLUSTER}"]
    commands += [f"write -P 3 {2 * CLUSTER + 4 * SUB} {4 * SUB}", f"write -z {3 * CLUSTER} {CLUSTER}"]
    qemu.io(path, commands)
    return path


def poke(path: Path, cluster: int, *, bit_0: bool = False, bitmap: int | None = None) -> None:
    """Change an entry of the first L2 table."""
    data = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", data, 40)
    position = (struct.unpack_from(">Q", data, l1)[0] & OFFSET) + 16 * cluster
    entry, old = struct.unpack_from(">QQ", data, position)
    struct.pack_into(">QQ", data, position, entry | bit_0, old if bitmap is None else bitmap)
    path.write_bytes(data)


CASES: list[tuple[str, bool, int | None]] = [(kind, True, None) for kind in ENTRIES if kind != "compressed"]
CASES += [("compressed", False, bitmap) for bitmap in BITMAPS.values()]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("what", ["read", "part", "whole", "across", "zero", "discard"])
async def test_the_same_bytes_as_qemu(case: tuple[str, bool, int | None], what: str, image: Path) -> None:
    """After one operation on the odd entry, guest bytes are those that QEMU has after the same one."""
    kind, bit_0, bitmap = case
    cluster = ENTRIES[kind]
    poke(image, cluster, bit_0=bit_0, bitmap=bitmap)
    theirs = image.with_name("theirs.qcow2")
    theirs.write_bytes(image.read_bytes())
    start = cluster * CLUSTER
    ranges = {
        "part": (start + SUB + 100, 5 * SUB),
        "whole": (start, CLUSTER),
        "across": (max(start - 1000, 0), CLUSTER + 2000),
        "zero": (start, CLUSTER),
        "discard": (start, CLUSTER),
    }
    opened = await open_image(str(image))
    if what in ("zero", "discard"):
        await opened.write_zeroes(*ranges[what], unmap=what == "discard")
        qemu.io(theirs, [f"write -z{'u' * (what == 'discard')} {ranges[what][0]} {ranges[what][1]}"])
    elif what != "read":
        await opened.write(ranges[what][0], b"x" * ranges[what][1])
        qemu.io(theirs, [f"write -P 0x78 {ranges[what][0]} {ranges[what][1]}"])
    found = await battery.read(opened, 0, SIZE)
    await opened.aclose()
    for path in (theirs, image):
        raw = image.with_name("out.raw")
        qemu.must_run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
        assert raw.read_bytes() == found, path.name
    if (kind, what) != ("compressed", "read"):
        assert qemu.check(image).code == 0


@pytest.mark.parametrize("kind", [kind for kind in ENTRIES if kind != "compressed"])
def test_check_passes_over_bit_0(kind: str, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As qemu-img check does. In a compressed entry it is a part of the address."""
    poke(image, ENTRIES[kind], bit_0=True)
    assert qemu.check(image).code == 0
    assert main(["check", str(image)]) == 0, capsys.readouterr()


def test_a_bitmap_of_a_compressed_cluster_is_mended(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One corruption for both programs; ``-r leaks`` frees nothing that is in use, ``-r all`` clears the bitmap."""
    poke(image, ENTRIES["compressed"], bitmap=BITMAPS["mixed"])
    before = image.with_name("before.raw")
    qemu.must_run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, before)
    theirs = json.loads(qemu.run("qemu-img", "check", "-f", "qcow2", "--output=json", image).stdout)
    assert main(["check", "--output=json", str(image)]) == 2
    ours = json.loads(capsys.readouterr().out)
    assert ours["corruptions"] == theirs["corruptions"] == 1
    assert ours.get("leaks", 0) == 0
    data = image.read_bytes()
    assert main(["check", "-r", "leaks", str(image)]) == 2
    assert image.read_bytes() == data
    assert main(["check", "-r", "all", str(image)]) == 0
    assert qemu.check(image).code == 0
    after = image.with_name("after.raw")
    qemu.must_run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, after)
    assert after.read_bytes() == before.read_bytes()
