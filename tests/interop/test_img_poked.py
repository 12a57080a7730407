"""qcowfuse-img against qemu-img over images with poked headers: JSON field by field, and exit codes.

``QCOWFUSE_POKED_IMAGES`` says how many (300 take half a minute); each has its number as its seed. Differences that
are meant are in :data:`MEANT`.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qcowfuse.cli.img.main import main
from qcowfuse.cli.json_text import as_unicode
from tests.support import qemu

N_IMAGES = int(os.environ.get("QCOWFUSE_POKED_IMAGES", "60"))
N_GROUPS = 6
MAX_MAPPED = {"qcow": 1 << 33, "qcow2": 1 << 39}
"""Virtual bytes; with more ``qemu-img map`` takes long."""

FIELDS = {
    "qcow2": (
        *((8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8)),
        *((72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1)),
    ),
    "qcow": ((8, 8), (16, 4), (20, 4), (24, 8), (32, 1), (33, 1), (34, 2), (36, 4), (40, 8)),
}
"""Offset and length of each field of a header."""
VALUES = (
    *(0, 1, 2, 3, 7, 8, 0xFF, 0x200, 0xFFF, 0x1000, 0x10000, 0x20000, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40),
    *((1 << 56) - 512, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
)
MEANT = (
    # The metadata can be checked without the data.
    ("check", re.compile("'data-file' is required|Could not open '[^']*': No such file"), re.compile("")),
    # An image without its LUKS area still has metadata.
    ("*", re.compile("Missing CRYPTO header"), re.compile("")),
    # A name that is part of the header's own fields.
    ("info", re.compile(""), re.compile("backing file name at 0x.*, expected behind the header")),
    # Bitmaps are only looked into by whoever writes.
    ("*", re.compile("Could not read bitmap"), re.compile("")),
    # The table of snapshots is only read when it is needed.
    ("map", re.compile("You can force-remove this extra metadata"), re.compile("")),
    # Version 1: what can't be a place is an error, QEMU reads zeroes there.
    ("map", re.compile(""), re.compile("L[12] entry: 0x")),
    # Version 2: a flag that it has not is an error of its own, see ``walk``.
    ("check", re.compile(""), re.compile("has the zero flag, which this image cannot have")),
)
"""By command: what QEMU complains of, and what we do, where the answers differ."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program said: the JSON, its exit code, and its last line about what is wrong."""

    code: int
    found: Any
    complaint: str


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def theirs(command: str, format_name: str, path: Path) -> Answer:
    done = qemu.run("qemu-img", command, "-f", format_name, "--output=json", path.name, cwd=path.parent)
    return Answer(done.code, parsed(done.stdout), done.stderr.strip())


def ours(command: str, path: Path, capsys: pytest.CaptureFixture[str]) -> Answer:
    code = main([command, "--output=json", path.name])
    said = capsys.readouterr()
    return Answer(code, parsed(said.out), said.err.strip())


@pytest.fixture(scope="module")
def whole_images(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    """Formats and images of all kinds, to be poked; files below them are in the same folder."""
    folder = tmp_path_factory.mktemp("whole")
    found: list[tuple[str, Path]] = []

    def make(name: str, options: str, *commands: str, format_name: str = "qcow2", **keywords: str) -> Path:
        path = folder / name
        qemu.create(path, format_name, "4M", options=options, **keywords)
        qemu.io(path, ["write -P 1 0 300k", *commands], format_name)
        found.append((format_name, path))
        return path

    qemu.create(folder / "base.raw", "raw", "1M")
    first = make("plain", "")
    qemu.must_run("qemu-img", "snapshot", "-c", "one", first)
    qemu.must_run("qemu-img", "bitmap", "--add", first, "nightly")
    make("overlay", "", backing="base.raw", backing_format="raw")
    make("extended", "extended_l2=on")
    old = make("old", "compat=0.10")
    qemu.must_run("qemu-img", "snapshot", "-c", "one", old)
    make("zstd", "compression_type=zstd,cluster_size=4k", "write -c -P 1 1M 4k")
    make("version1", "", format_name="qcow")
    for name, option in (("data", ""), ("raw", ",data_file_raw=on")):
        # A relative name means the image's folder to us and the working directory to QEMU: here both are the same.
        path = make(name, f"data_file={folder / (name + '.raw')}{option}")
        data = path.read_bytes()
        long, short = os.fsencode(folder / f"{name}.raw"), os.fsencode(f"{name}.raw")
        path.write_bytes(data.replace(long, short.ljust(len(long), b"\0")))
    return found


def poke(data: bytearray, format_name: str, chooser: random.Random) -> str:
    """Change the header in one place or two; says where."""
    where = []
    for _ in range(chooser.choice((1, 1, 1, 2))):
        kind = chooser.randrange(4)
        if kind == 0:
            place, bit = chooser.randrange(4, 160 if format_name == "qcow2" else 48), chooser.randrange(8)
            data[place] ^= 1 << bit
            where.append(f"bit {bit} of byte {place}")
        elif kind == 1 and format_name == "qcow2":
            place = chooser.randrange(104, 480)
            data[place] = chooser.choice((0, 0xFF, 0xE9, ord("x")))
            where.append(f"byte {place} = {data[place]:#x}")
        else:
            place, length = chooser.choice(FIELDS[format_name])
            value = chooser.choice(VALUES) & (1 << 8 * length) - 1
            data[place : place + length] = value.to_bytes(length, "big")
            where.append(f"{length} bytes at {place} = {value:#x}")
    return ", ".join(where)


def is_meant(command: str, expected: Answer, found: Answer) -> bool:
    """Whether a difference is one of those that are meant."""
    return any(
        wanted in ("*", command)
        and their_complaint.search(expected.complaint)
        and our_complaint.search(found.complaint)
        for wanted, their_complaint, our_complaint in MEANT
    )


@pytest.mark.parametrize("group", range(N_GROUPS))
def test_poked_headers(
    group: int,
    whole_images: list[tuple[str, Path]],
    image_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """info, map and check give the answers and exit codes of qemu-img."""
    monkeypatch.chdir(image_folder)
    for name in ("base.raw", "data.raw", "raw.raw"):
        shutil.copy(whole_images[0][1].parent / name, image_folder)
    path = image_folder / "poked"
    n_opened = 0
    for seed in range(group, N_IMAGES, N_GROUPS):
        chooser = random.Random(seed)
        format_name, whole = chooser.choice(whole_images)
        data = bytearray(whole.read_bytes())
        where = f"image {seed}, {whole.name}: {poke(data, format_name, chooser)}"
        path.write_bytes(data)
        for command in ("info", "map", "check"):
            if command == "map" and int.from_bytes(data[24:32], "big") > MAX_MAPPED[format_name]:
                continue
            expected, found = theirs(command, format_name, path), ours(command, path, capsys)
            n_opened += expected.code == 0
            same = (expected.code, expected.found) == (found.code, found.found)
            assert same or is_meant(command, expected, found), f"{where}: {command}: {expected}, {found}"
    assert n_opened, "nothing was compared"


@pytest.mark.parametrize(
    "raw",
    [
        b"plain",
        "äß€😀".encode(),
        b"a\xffb",
        b"a\xe9b",
        b"\xc3",
        b"\xe2\x82",
        b"\xe2\x82x",
        b"\xed\xa0\x80",
        b"\xc0\xaf",
        b"\xf4\x90\x80\x80",
        b"\xf8\x88\x80\x80\x80",
        b"\xfe\x80",
        b"\x80\x80",
        b"\x7f\x01",
    ],
)
def test_names_are_the_text_that_qemu_makes_of_them(
    raw: bytes, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a snapshot, a bitmap, and a backing file; valid, cut short, overlong, surrogates, out of range."""
    path = image_folder / "disk.qcow2"
    place = b"name-of-12-b"
    qemu.create(path, "qcow2", "1M")
    qemu.must_run("qemu-img", "snapshot", "-c", place.decode(), path)
    qemu.must_run("qemu-img", "bitmap", "--add", path, place.decode())
    qemu.must_run("qemu-img", "rebase", "-u", "-b", place.decode(), "-F", "raw", path)
    data = path.read_bytes()
    assert data.count(place) >= 3
    path.write_bytes(data.replace(place, raw.ljust(len(place), b"\0")))
    expected = qemu.info(path, "qcow2")
    assert main(["info", "--output=json", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.isascii()
    assert json.loads(said) == expected
    assert as_unicode([raw.decode("utf-8", "surrogateescape")]) == [expected["snapshots"][0]["name"]]
    assert main(["info", str(path)]) == 0
    json.dumps(capsys.readouterr().out, ensure_ascii=False).encode()


def test_what_has_no_meaning_without_a_data_file(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name of a data file, and the bit for a raw one, in an image without data file: info looks at it, nobody
    opens the one with the bit."""
    path = image_folder / "disk.qcow2"
    qemu.create(path, "qcow2", "1M", options=f"data_file={image_folder / 'data.raw'},data_file_raw=on")
    data = bytearray(path.read_bytes())
    data[79] &= ~4
    path.write_bytes(data)
    assert main(["info", "--output=json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == qemu.info(path, "qcow2")
    assert main(["map", str(path)]) == qemu.run("qemu-img", "map", "-f", "qcow2", path).code == 1
    assert "raw external data without an external data file" in capsys.readouterr().err
    data[95] &= ~2
    path.write_bytes(data)
    assert main(["info", "--output=json", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == qemu.info(path, "qcow2")
    assert found["format-specific"]["data"]["data-file"] == str(image_folder / "data.raw")
