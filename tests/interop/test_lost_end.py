"""Files that end too early: read as QEMU reads them, checked as it checks them, written where that harms nothing."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qcowfuse.cli.img.main import main
from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import OpenOptions
from qcowfuse.errors import CorruptImageError, FormatError, ImageUsageError
from tests.support import battery, qemu
from tests.support.oracle import reference_bytes, reference_window

SIZE = 8 << 20


def fresh(path: Path) -> None:
    """Nothing in it: what is missing was zero, but for the first three tables."""
    qemu.create(path, "qcow2", SIZE, options="cluster_size=4k")


def used(path: Path) -> None:
    """Data behind all tables, which QEMU makes first."""
    qemu.create(path, "qcow2", SIZE, options="cluster_size=4k")
    qemu.io(path, ["write -P 7 0 100k", "write -P 8 6M 20k"])


def version_2(path: Path) -> None:
    """Another length of the header."""
    qemu.create(path, "qcow2", SIZE, options="cluster_size=512,compat=0.10")
    qemu.io(path, ["write -P 7 0 100k"])


def grown(path: Path) -> None:
    """The L1 table and a refcount block lie behind the data."""
    qemu.create(path, "qcow2", 1 << 20, options="cluster_size=512")
    qemu.io(path, ["write -P 7 0 300k"])
    qemu.must_run("qemu-img", "resize", "-q", path, str(SIZE))


def with_snapshot(path: Path) -> None:
    """The snapshot's tables lie in the middle."""
    used(path)
    qemu.must_run("qemu-img", "snapshot", "-c", "one", path)
    qemu.io(path, ["write -P 9 1M 20k"])


def version_1(path: Path) -> None:
    """No refcounts."""
    qemu.create(path, "qcow", SIZE)
    qemu.io(path, ["write -P 7 0 100k", "write -P 8 6M 20k"], "qcow")


def version_1_fresh(path: Path) -> None:
    """The L1 table of 32 bytes is all there is behind the header."""
    qemu.create(path, "qcow", SIZE)


KINDS: dict[str, Callable[[Path], None]] = {
    make.__name__: make for make in (fresh, used, version_2, grown, with_snapshot, version_1, version_1_fresh)
}


def places(path: Path) -> set[int]:
    """Lengths at which a structure begins, ends, or is cut."""
    data = path.read_bytes()
    (version,) = struct.unpack_from(">I", data, 4)
    starts: set[int] = set()
    if version == 1:
        (l1,) = struct.unpack_from(">Q", data, 40)
        starts |= {l1, *struct.unpack_from(">4Q", data, l1)}
        cluster_size = 4096
        lengths = {30, 48}  # between them the L1 table would lie on the header
    else:
        cluster_size = 1 << struct.unpack_from(">I", data, 20)[0]
        l1_size, l1, table = struct.unpack_from(">IQQ", data, 36)
        starts |= {l1, table, struct.unpack_from(">Q", data, 64)[0]}
        starts |= {entry & (1 << 56) - 512 for entry in struct.unpack_from(f">{min(l1_size, 8)}Q", data, l1)}
        starts |= set(struct.unpack_from(">8Q", data, table))
        lengths = {71, 72, 103, 104, 112, 600}
    for start in starts - {0}:
        lengths |= {start, start + 8, start + 12, start + 100, start + cluster_size, start + cluster_size - 1}
    return {length for length in lengths if length <= len(data)} | {len(data) - 1}


async def served(path: Path) -> bytes | None:
    """What we serve read-only; None where we refuse."""
    try:
        image = await open_image(str(path), OpenOptions(read_only=True))
    except FormatError:
        return None
    try:
        return await battery.read(image, 0, image.size)
    except CorruptImageError:
        return None
    finally:
        await image.aclose()


@pytest.mark.parametrize("kind", KINDS)
async def test_reads_as_qemu_does(kind: str, image_folder: Path) -> None:
    """Every length at which something is cut off: the same bytes, and refused where QEMU refuses."""
    whole, path = image_folder / "whole", image_folder / "cut"
    KINDS[kind](whole)
    format_name = "qcow" if kind.startswith("version_1") else "qcow2"
    n_read = 0
    for length in sorted(places(whole)):
        shutil.copy(whole, path)
        os.truncate(path, length)
        try:
            expected = reference_bytes(path, format_name)
        except qemu.QemuError:
            expected = None
        assert await served(path) == expected, f"cut to {length} bytes"
        n_read += expected is not None
    assert n_read > 3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("version_1")])
def test_checks_as_qemu_does(kind: str, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same sums and the same exit code."""
    whole, path = image_folder / "whole", image_folder / "cut"
    KINDS[kind](whole)
    for length in sorted(places(whole)):
        shutil.copy(whole, path)
        os.truncate(path, length)
        judged = qemu.run("qemu-img", "check", "-f", "qcow2", "--output=json", path)
        code = main(["check", "--output=json", str(path)])
        said = capsys.readouterr().out
        assert code == judged.code, f"cut to {length} bytes"
        # Of an L1 entry that is cut in two the rest points at the header: we find flags there that version 2 has not.
        if (said or judged.stdout) and not (kind == "version_2" and code == 2):
            assert json.loads(said) == json.loads(judged.stdout), f"cut to {length} bytes"


@pytest.mark.parametrize("kind", KINDS)
async def test_writes_what_lost_nothing(kind: str, image_folder: Path) -> None:
    """Where we write, QEMU would, and finds the image clean afterwards; elsewhere the file is left as it is."""
    whole, path = image_folder / "whole", image_folder / "cut"
    KINDS[kind](whole)
    format_name = "qcow" if kind.startswith("version_1") else "qcow2"
    written: list[int] = []
    for length in sorted(places(whole)):
        shutil.copy(whole, path)
        os.truncate(path, length)
        before = path.read_bytes()
        try:
            expected = bytearray(reference_bytes(path, format_name))
            image = await open_image(str(path))
        except (FormatError, ImageUsageError, qemu.QemuError):
            assert path.read_bytes() == before
            continue
        try:
            for position in (5000, 3 << 20, SIZE - 3000):
                expected[position : position + 3000] = b"n" * 3000
                await image.write(position, b"n" * 3000)
        finally:
            await image.aclose()
        assert reference_bytes(path, format_name) == expected, f"cut to {length} bytes"
        if format_name == "qcow2":
            found = qemu.check(path)
            assert found.clean, f"cut to {length} bytes: {found.text}"
        written.append(length)
    n_bytes = whole.stat().st_size
    if kind in ("fresh", "version_1_fresh"):
        assert written[0] <= n_bytes - 20, "trailing zeroes may be missing"
    if kind in ("grown", "version_2"):
        assert n_bytes - 5000 < written[0], "tables with something in them may not"


@pytest.mark.parametrize("change", ["-c", "-a", "-d"])
def test_snapshots_of_a_cut_image(change: str, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A change of snapshots is refused where a table that it needs is cut off, and the file is left as it is."""
    path = image_folder / "cut"
    with_snapshot(path)
    with path.open("rb") as file:
        file.seek(60)
        (_, table) = struct.unpack(">IQ", file.read(12))
        file.seek(table)
        (l1,) = struct.unpack(">Q", file.read(8))
    for length in (table, l1):
        os.truncate(path, length)
        before = path.read_bytes()
        assert main(["snapshot", change, "one", str(path)]) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert path.read_bytes() == before


async def test_the_log_says_what_is_missing(image_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Serving what is left of an image is not done in silence."""
    path = image_folder / "cut"
    used(path)
    os.truncate(path, 3 * 4096)
    assert await served(path) == bytes(SIZE)
    assert "L1 table at 0x3000 lies past the end of the file (12288 bytes); what is missing reads as zeroes" in (
        caplog.text
    )
    with pytest.raises(ImageUsageError, match=r"truncated, and left as it is; serve it read-only \(qcowfuse -r\)"):
        await open_image(str(path))


async def test_version_1_keeps_clear_of_a_missing_table(image_folder: Path) -> None:
    """The file ends before an L1 table of several clusters: new ones lie behind it, where QEMU puts them into it."""
    path = image_folder / "cut"
    size = 4 << 30
    qemu.create(path, "qcow", size)
    os.truncate(path, 48)
    image = await open_image(str(path))
    places = [*range(0, 40 << 20, 4 << 20), *range(size - (40 << 20), size, 4 << 20)]
    for number, place in enumerate(places):
        await image.write(place, bytes([number + 1]) * 65536)
    await image.aclose()
    for number, place in enumerate(places):
        assert reference_window(path, "qcow", guest_offset=place, n_bytes=65536) == bytes([number + 1]) * 65536
