"""A test for each known attack by an image on programs of this kind, by its number; what it was there, and what is
true here.

Commands run with a limit of memory and processor time, far above what they take: a bomb ends them.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from qcowfuse.cli.img.exit_codes import ImgExit
from qcowfuse.cli.img.main import main
from qcowfuse.format.extensions import EXTENSION_BACKING_FORMAT, EXTENSION_DATA_FILE

REPOSITORY = Path(__file__).parents[2]
MAX_MEMORY = 1 << 30
MAX_SECONDS = 60
SECRET = b"a secret of the host".ljust(65536, b".")
FAILED_OR_DONE = set(map(int, ImgExit))
CLUSTER = 65536


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder ``in`` of an image, beside a file that is none of its business."""
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(SECRET)
    monkeypatch.chdir(tmp_path / "in")
    return tmp_path / "in"


FIELDS = {
    "backing_offset": (8, ">Q"),
    "backing_size": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "l1_size": (36, ">I"),
    "l1_offset": (40, ">Q"),
    "table_offset": (48, ">Q"),
    "table_clusters": (56, ">I"),
    "n_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible": (72, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
}


def qcow2(
    path: Path,
    *,
    backing: bytes = b"",
    extensions: Mapping[int, bytes] | None = None,
    length: int = 1 << 20,
    **fields: int,
) -> Path:
    """A version 3 image of a disk of 1 MiB with nothing in it, and ``fields`` of the header as they are given."""
    main(["create", "-q", "--force", str(path), "1M"])
    data = bytearray(path.read_bytes()[: 3 * CLUSTER])
    more = b""
    for magic, contents in (extensions or {}).items():
        more += struct.pack(">II", magic, len(contents)) + contents.ljust(-(-len(contents) // 8) * 8, b"\0")
    more += bytes(8)
    data[112:CLUSTER] = (more + backing).ljust(CLUSTER - 112, b"\0")
    struct.pack_into(">I", data, 100, 112)
    if backing:
        fields = {"backing_offset": 112 + len(more), "backing_size": len(backing), **fields}
    for name, value in fields.items():
        place, form = FIELDS[name]
        struct.pack_into(form, data, place, value)
    path.write_bytes(data)
    os.truncate(path, max(length, 4 * CLUSTER))
    return path


def qcow1(path: Path, *, size: int = 1 << 20, cluster_bits: int = 12, l2_bits: int = 9, backing: bytes = b"") -> Path:
    """A version 1 image with nothing in it."""
    place = 48 if backing else 0
    head = struct.pack(
        *(">4sIQIIQBBHIQ", b"QFI\xfb", 1, place, len(backing), 0, size, cluster_bits, l2_bits, 0, 0, 4096)
    )
    path.write_bytes(head + backing)
    os.truncate(path, 1 << 20)
    return path


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A script with ``main`` of qcowfuse-img, in a process with limits."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))

    return subprocess.run(
        [sys.executable, "-c", f"import json, os, sys\nfrom qcowfuse.cli.img.main import main\n{script}", *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )


def img(*words: str) -> subprocess.CompletedProcess[str]:
    """qcowfuse-img with limits."""
    return run("sys.exit(main())", *words)


def must_end_well(path: Path) -> None:
    """Every command that reads or changes an image ends with an exit code of its own and without a traceback."""
    commands = [["info"], ["map"], ["check"], ["check", "-r", "all"], ["snapshot", "-c", "x"], ["resize", "-q"]]
    words = [[*command, str(path), *(["+1M"] if command[0] == "resize" else [])] for command in commands]
    script = (
        "codes = [int(main(words)) for words in json.loads(sys.argv[1])]\nprint('', json.dumps(codes), sep='\\n')"
    )
    done = run(script, json.dumps(words))
    assert done.returncode == 0, done.stderr[-1000:]
    assert "Traceback" not in done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert set(codes) <= FAILED_OR_DONE, dict(zip(map(str, commands), codes, strict=True))


def must_not_show(path: Path, *options: str) -> str:
    """The chain is refused, for reading and for writing, in one line, which is returned."""
    for words in (["map"], ["resize", "+1M"]):
        done = img(words[0], *options, str(path), *words[1:])
        assert done.returncode == ImgExit.FAILED, done.stdout
        assert done.stderr.count("\n") == 1
    return done.stderr


MAX32, MAX64 = (1 << 32) - 1, (1 << 64) - 1
BOMBS: dict[str, Callable[[Path], Path]] = {
    "CVE-2014-0142 no cluster size": lambda path: qcow2(path, cluster_bits=0),
    "CVE-2014-0143 L1 table of 2^32 entries": lambda path: qcow2(path, l1_size=MAX32),
    "CVE-2014-0143 L1 table of 2^29 entries": lambda path: qcow2(path, l1_size=1 << 29),
    "CVE-2014-0143 disk of 2^63 bytes": lambda path: qcow2(path, size=1 << 63),
    "CVE-2014-0144 clusters of 2^63 bytes": lambda path: qcow2(path, cluster_bits=63),
    "CVE-2014-0144 clusters of 256 bytes": lambda path: qcow2(path, cluster_bits=8),
    "CVE-2014-0144 header of 2^32 bytes": lambda path: qcow2(path, header_length=MAX32),
    "CVE-2014-0144 header of no bytes": lambda path: qcow2(path, header_length=0),
    "CVE-2014-0144 backing name of 2^32 bytes": lambda path: qcow2(path, backing=b"x", backing_size=MAX32),
    "CVE-2014-0144 backing name at 2^64": lambda path: qcow2(path, backing=b"x", backing_offset=MAX64),
    "CVE-2014-0144 extension of 2^32 bytes": lambda path: qcow2(path, extensions={EXTENSION_BACKING_FORMAT: b"raw"}),
    "CVE-2014-0144 refcounts of 2^255 bits": lambda path: qcow2(path, refcount_order=255),
    "CVE-2014-0145 2^32 snapshots": lambda path: qcow2(path, n_snapshots=MAX32, snapshots_offset=5 * CLUSTER),
    "CVE-2014-0145 65536 snapshots": lambda path: qcow2(path, n_snapshots=65536, snapshots_offset=5 * CLUSTER),
    "CVE-2014-0146 snapshots past the end": lambda path: qcow2(path, n_snapshots=1, snapshots_offset=1 << 40),
    "CVE-2014-0147 L1 table of negative size": lambda path: qcow2(path, l1_size=0x80000000),
    "CVE-2014-0147 refcount table of 2^32 clusters": lambda path: qcow2(path, table_clusters=MAX32),
    "CVE-2014-0147 refcount table past the end": lambda path: qcow2(path, table_offset=1 << 50),
    "CVE-2014-0147 refcount table on the header": lambda path: qcow2(path, table_offset=0),
    "CVE-2014-0222 L2 tables of 2^255 entries": lambda path: qcow1(path, l2_bits=255),
    "CVE-2014-0222 L2 tables of 32 entries": lambda path: qcow1(path, l2_bits=5),
    "CVE-2014-0222 clusters of 2^255 bytes": lambda path: qcow1(path, cluster_bits=255),
    "CVE-2014-0223 disk of 2^63 bytes": lambda path: qcow1(path, size=1 << 63),
    "CVE-2014-0223 disk of 2^64 - 1 bytes": lambda path: qcow1(path, size=MAX64, cluster_bits=16, l2_bits=13),
    "CVE-2015-5162 tiny petabyte": lambda path: qcow2(path, size=1 << 50, l1_size=1 << 21, length=64 << 20),
}
"""By number and by what is in the header."""


@pytest.mark.parametrize("name", BOMBS)
def test_header_bombs(name: str, place: Path) -> None:
    """CVE-2014-0142 to 0147, 0222, 0223, 2015-5162: sizes in a header that overflowed, ran over buffers or filled
    memory. Each command ends, with an exit code and without a traceback."""
    path = BOMBS[name](place / "image")
    if "extension of" in name:
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), struct.pack(">I", MAX32), 116)
    must_end_well(path)


@pytest.mark.parametrize("version", [1, 3])
def test_cve_2011_3147_and_2013_1922_guest_written_headers(version: int, place: Path) -> None:
    """A guest writes an image header into its raw disk; the host probes the disk, and opens what that names. Here a
    backing file of unnamed format is never probed, and one that looks like an image is not even taken for raw."""
    qcow2(place / "disk.raw", backing=bytes(place.parent / "secret"))
    path = qcow1(place / "i", backing=b"disk.raw") if version == 1 else qcow2(place / "i", backing=b"disk.raw")
    assert "--backing-format" in must_not_show(path)
    done = img("map", "--backing-format", "raw", "--output=json", str(path))
    assert done.returncode == ImgExit.OK
    assert {Path(entry.get("filename", "disk.raw")).name for entry in json.loads(done.stdout)} == {"disk.raw"}


def test_cve_2015_1850_and_1851_the_named_format_is_believed(place: Path) -> None:
    """Formats guessed by signature, against what the administrator had said. Here raw is raw, whatever is in it: the
    overlay has the file's length, not that of a disk in a header in it."""
    qcow2(place / "disk.raw", size=1 << 40, backing=bytes(place.parent / "secret"))
    length = (place / "disk.raw").stat().st_size
    assert main(["create", "-q", "-b", "disk.raw", "-F", "raw", str(place / "i")]) == ImgExit.OK
    info = json.loads(img("info", "--output=json", str(place / "i")).stdout)
    assert info["virtual-size"] == length
    assert img("map", str(place / "i")).returncode == ImgExit.OK


@pytest.mark.parametrize(
    "name", [b"../secret", b"a/../../secret", b"{in}/../secret", b"link", b"../../../../etc/passwd"]
)
def test_cve_2015_5163_a_backing_file_of_the_host(name: bytes, place: Path) -> None:
    """A file of the host, named as backing file, came out of a conversion. Here nothing outside of the image's folder
    is opened, by dots, absolute names or links."""
    os.symlink("../secret", place / "link")
    (place / "a").mkdir()
    path = qcow2(
        place / "i",
        backing=name.replace(b"{in}", bytes(place)),
        extensions={EXTENSION_BACKING_FORMAT: b"raw"},
    )
    assert "outside of its own folder" in must_not_show(path)


def test_cve_2015_5163_a_name_that_ends_early(place: Path) -> None:
    """A NUL in the name: what stands before it is another file than what a check of the whole saw."""
    path = qcow2(place / "i", backing=b"a\0/../secret", extensions={EXTENSION_BACKING_FORMAT: b"raw"})
    must_not_show(path)


def test_cve_2022_47951_a_descriptor_with_extents(place: Path) -> None:
    """A VMDK descriptor, named as backing file, whose extents are files of the host. Here other formats are refused
    by name, and the descriptor without a format is bytes of a raw disk."""
    text = f'# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW 128 FLAT "{place.parent}/secret" 0\n'
    (place / "d.vmdk").write_text(text.ljust(1024, "\n"))
    path = qcow2(place / "i", backing=b"d.vmdk", extensions={EXTENSION_BACKING_FORMAT: b"vmdk"})
    assert "backing format vmdk" in must_not_show(path)
    path = qcow2(place / "i", backing=b"d.vmdk")
    found = json.loads(img("map", "--output=json", str(path)).stdout)
    assert [entry["length"] for entry in found if entry["data"]] == [1024]


@pytest.mark.parametrize("name", [b"../secret", b"{in}/../secret", b"link", b"/proc/self/mem", b"/etc/passwd"])
def test_cve_2024_32498_a_data_file_of_the_host(name: bytes, place: Path) -> None:
    """Any file of the host, named as data file, read and written. Here it is refused like a backing file."""
    os.symlink("../secret", place / "link")
    names = {EXTENSION_DATA_FILE: name.replace(b"{in}", bytes(place))}
    assert "outside of its own folder" in must_not_show(qcow2(place / "i", incompatible=4, extensions=names))
    assert (place.parent / "secret").read_bytes() == SECRET


@pytest.mark.parametrize(
    "name",
    [b'json:{"driver":"file","filename":"%s"}', b"file:%s", b"nbd+unix:///?socket=%s", b'json:{"driver":"null-co"}'],
)
def test_cve_2024_4467_a_description_instead_of_a_name(name: bytes, place: Path) -> None:
    """A data file called ``json:{...}`` was a device of the attacker's choice, opened even to print information. Here
    names are plain paths, and info opens nothing: it says what is there even where a FIFO would make it wait."""
    if b"%s" in name:
        name %= bytes(place.parent / "secret")
    path = qcow2(place / "i", incompatible=4, extensions={EXTENSION_DATA_FILE: name})
    must_not_show(path)
    found = json.loads(img("info", "--output=json", str(path)).stdout)
    assert found["format-specific"]["data"]["data-file"] == os.fsdecode(name)
    os.mkfifo(place / "fifo")
    path = qcow2(place / "i", incompatible=4, extensions={EXTENSION_DATA_FILE: b"fifo"})
    assert img("info", str(path)).returncode == ImgExit.OK
    assert "a FIFO" in must_not_show(path)


def test_cve_2026_24708_a_header_in_a_raw_disk_and_a_resize(place: Path) -> None:
    """A guest writes a header with a backing file into its raw disk, and the host resizes the disk as an image. Here
    neither the raw disk below an overlay, nor what a header in it names, is touched by a resize."""
    qcow2(place / "disk.raw", backing=bytes(place.parent / "secret"))
    before = (place / "disk.raw").read_bytes()
    for format_name in (b"raw", b""):
        named = {EXTENSION_BACKING_FORMAT: format_name} if format_name else {}
        path = qcow2(place / "i", backing=b"disk.raw", extensions=named)
        done = img("resize", str(path), "+1M")
        assert done.returncode == (ImgExit.OK if format_name else ImgExit.FAILED), done.stderr
    assert "outside of its own folder" in img("resize", str(place / "disk.raw"), "+1M").stderr
    assert (place / "disk.raw").read_bytes() == before
    assert (place.parent / "secret").read_bytes() == SECRET
