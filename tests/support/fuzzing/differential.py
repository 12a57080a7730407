"""The same image for QEMU and for qcowfuse: who opens it, what it reads as, whether it stays clean.

1. Both read all of a small disk. Where both can, the bytes must be the same.
2. Where one opens or reads and the other does not, the difference must be one that was decided on: ``DECISIONS``
   says which, and why. Anything else is a finding.
3. What QEMU's check calls clean, it calls clean after the steps of the case.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import trio

from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import OpenOptions
from qcowfuse.errors import QcowFuseError
from qcowfuse.storage.base import Storage

from ..bounded_storage import BoundedStorage
from ..memory_storage import MemoryStorage
from .cases import Case, changed
from .subjects import Subject
from .whole import TOP, BrokenError, run_steps, verdict

MAX_DISK = 4 << 20
"""Bytes of a disk that is compared."""
TIMEOUT = 20.0


class Decision(NamedTuple):
    """``ours`` and ``theirs``: patterns of what each says, empty for one that opens and reads the image."""

    name: str
    ours: str
    theirs: str
    reason: str


READ = "reads it"
_BITMAP = (
    "[Bb]itmap (directory|extra|'.*' doesn't satisfy|extension)|bitmaps found than specified|bitmap_table"
    "|Could not read .* from image"
    "|[Bb]itmaps? .*(size|offset)|number of bitmaps|bitmap table"
)
DECISIONS = (
    Decision(
        "damaged bitmaps",
        "",
        _BITMAP,
        "bitmaps say what a backup has to copy, not what the disk is: it is served, and a write drops them",
    ),
    Decision(
        "damaged snapshot table",
        "",
        "snapshot table|[Ss]napshot.*(too large|extra|L1)|Too much extra metadata",
        "the disk needs no snapshot: it can be read and saved. Whatever needs the table refuses it",
    ),
    Decision(
        "version 1: tables and clusters beyond 2^56",
        "(L1|L2) entry: .*beyond 2\\^56",
        "",
        "no file is as long, so that the entry is damaged; QEMU reads zeroes there, which hides the damage",
    ),
    Decision(
        "version 1: a backing name of no bytes, at a place that no file has",
        "",
        "^qemu-i.*: can't open( device top)?: Could not open 'top': Input/output error$",
        "the name is empty, there is nothing to read; QEMU reads its 0 bytes at a negative place",
    ),
    Decision(
        "backing name inside of the header",
        "backing file name at 0x[0-9a-f]+, expected behind the header of [0-9]+",
        "",
        "no writer puts the name there, and the bytes have another meaning: a field is damaged",
    ),
    Decision(
        "version 1: backing name far behind the header",
        "backing file name at 0x[0-9a-f]+, expected in the first 2 MiB",
        "",
        "the bytes that a header may make us read are bounded; no writer puts the name there",
    ),
)


def run_qemu(case: Case) -> None:
    """Compare. Raises BrokenError for a difference that nobody decided on."""
    given = changed(case)
    ours, size = trio.run(_read_ours, given)
    if size is not None and size > MAX_DISK:
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        theirs = _read_theirs(given, folder)
        if isinstance(ours, bytes) and isinstance(theirs, bytes):
            if ours != theirs:
                raise BrokenError(f"other bytes than QEMU's{_where(ours, theirs)}")
        elif isinstance(ours, bytes) != isinstance(theirs, bytes):
            _must_be_decided(READ if isinstance(ours, bytes) else ours, READ if isinstance(theirs, bytes) else theirs)
        if not case.steps or given.data[4:8] == b"\0\0\0\1" or verdict(given.data) != 0 or _check(folder):
            return
        after = run_steps(case)
        data, files, was_full = after
        _write(folder, Subject(bytearray(data), {}, files))
        code = _check(folder)
        if code not in ((0, 3) if was_full else (0,)):
            raise BrokenError(f"QEMU's check was clean and is {code}")


def _must_be_decided(ours: str, theirs: str) -> None:
    if decision(ours, theirs) is None:
        raise BrokenError(f"nobody decided on: we: {ours}; QEMU: {theirs}")


def decision(ours: str, theirs: str) -> Decision | None:
    """The decision that says why we and QEMU differ."""
    for found in DECISIONS:
        if all(
            re.search(pattern, said) if pattern else said == READ
            for pattern, said in ((found.ours, ours), (found.theirs, theirs))
        ):
            return found
    return None


async def _read_ours(given: Subject) -> tuple[bytes | str, int | None]:
    async def opener(path: str, writable: bool, options: OpenOptions) -> Storage:
        if path == TOP:
            return BoundedStorage(given.data, writable=writable)
        name = path.rpartition("/")[2]
        if name not in given.files:
            raise FileNotFoundError(2, "No such file or directory", path)
        return MemoryStorage(given.files[name], writable=writable)

    try:
        image = await open_image(TOP, OpenOptions(read_only=True), opener=opener)
        try:
            if image.size > MAX_DISK:
                return "too large", image.size
            return bytes(await image.read(0, image.size)), image.size
        finally:
            await image.aclose()
    except (QcowFuseError, OSError) as error:
        return str(error), None


def _write(folder: Path, given: Subject) -> None:
    (folder / "top").write_bytes(given.data)
    for name, data in given.files.items():
        (folder / name).write_bytes(data)


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=folder, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False
    )


def _read_theirs(given: Subject, folder: Path) -> bytes | str:
    """The disk, or what QEMU says."""
    _write(folder, given)
    kind = "qcow" if given.data[4:8] == b"\0\0\0\1" else "qcow2"
    size = _run(folder, "qemu-io", "-r", "-f", kind, "-c", "length", "top")
    if size.returncode:
        return (size.stderr + size.stdout).strip()
    done = _run(folder, "qemu-io", "-r", "-f", kind, "-c", "read 0 512", "top") if _is_long(size.stdout) else None
    if done is not None:
        return "too large"
    done = _run(folder, "qemu-img", "convert", "-f", kind, "-O", "raw", "top", "out")
    if done.returncode:
        return (done.stderr + done.stdout).strip()
    return (folder / "out").read_bytes()


def _is_long(text: str) -> bool:
    """Whether qemu-io's ``length`` is more than is compared."""
    found = re.match(r"([\d.]+) (bytes|KiB|MiB|GiB|TiB|PiB|EiB)", text)
    if found is None:
        return True
    unit = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB").index(found[2])
    return float(found[1]) > MAX_DISK / 1024.0**unit


def _check(folder: Path) -> int:
    return _run(folder, "qemu-img", "check", "-f", "qcow2", "top").returncode


def _where(found: bytes, wanted: bytes) -> str:
    if len(found) != len(wanted):
        return f": {len(found)} bytes, expected {len(wanted)}"
    return f" from byte {next(i for i in range(len(found)) if found[i] != wanted[i]):#x} on"
