"""Small images for driver tests: made by QEMU, held as bytes, opened from memory.

1. An image is described by an :class:`ImageSpec` and built once per session. (One with LUKS is made by qcowfuse-img.)
2. The guest contents are known from the spec, not from reading the image.
3. The files of a chain live under made-up paths; :func:`open_memory_image` serves them from memory.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import DetectZeroes, L2CacheSize, OpenOptions
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.storage.base import Storage

from .memory_storage import MemoryStorage

REPOSITORY = Path(__file__).parents[2]
FOLDER = "/qcowfuse-test-images"
TOP = f"{FOLDER}/top.img"
BASE = f"{FOLDER}/base.img"
DATA = f"{FOLDER}/data.img"
PASSPHRASE = b"correct horse"
"""Of every encrypted image here."""

Backing = Literal["raw", "qcow", "qcow2"]
StorageKind = Literal["file", "used", "device"]
"""What the image and its data file lie on; see :mod:`.old_bytes`."""


@dataclass(frozen=True)
class ImageSpec:
    """What to build; sizes in bytes. ``version`` 1 takes ``l2_bits`` and any cluster size QEMU reads.

    ``fill`` is the share of 4 KiB guest blocks that hold data. ``zeroes`` puts plain and preallocated zero
    clusters over the second half. ``backing_size`` may be smaller than ``size``. ``data_file``: an external one,
    with ``data_behind`` bytes of something else behind the disk.
    """

    version: int = 3
    cluster_size: int = 512
    refcount_bits: int = 16
    size: int = 256 << 10
    fill: float = 0.0
    compression: Literal["zlib", "zstd"] | None = None
    snapshot: bool = False
    zeroes: bool = False
    extended_l2: bool = False
    encryption: Literal["luks", "aes"] | None = None
    backing: Backing | None = None
    backing_size: int = 0
    l2_bits: int = 6
    data_file: Literal["plain", "raw"] | None = None
    data_behind: int = 0
    seed: int = 1


@dataclass(frozen=True)
class BuiltImage:
    """The files of a chain by path, the guest contents, and those of the snapshot ``s1`` if there is one."""

    spec: ImageSpec
    files: Mapping[str, bytes]
    contents: bytes
    snapshot_contents: bytes | None = None
    zero_ranges: tuple[tuple[int, int], ...] = field(default=())
    storage: StorageKind = "file"

    @property
    def top(self) -> bytes:
        """The image file itself."""
        return self.files[TOP]


def pattern(size: int, *, seed: int, fill: float, block: int = 4096) -> bytes:
    """Guest bytes in which ``fill`` of the blocks hold data that compresses well, the others zeroes."""
    chooser = random.Random(seed)
    parts = []
    for position in range(0, size, block):
        n_bytes = min(block, size - position)
        if chooser.random() < fill:
            word = struct.pack(">II", seed, position) + chooser.randbytes(24)
            parts.append((word * (n_bytes // len(word) + 1))[:n_bytes])
        else:
            parts.append(bytes(n_bytes))
    return b"".join(parts)


def run_tool(*arguments: str, cwd: str | None = None) -> str:
    """Run a tool, QEMU's or ours; its standard output. Raises AssertionError with what it said on standard error."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise AssertionError(f"{' '.join(arguments)}: exit {result.returncode}: {result.stderr or result.stdout}")
    return result.stdout


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder in RAM where there is one."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)


@cache
def build_image(spec: ImageSpec) -> BuiltImage:
    """The image that ``spec`` describes."""
    with scratch_folder() as folder:
        files: dict[str, bytes] = {}
        below = b""
        if spec.backing:
            below = pattern(spec.backing_size, seed=spec.seed + 100, fill=0.7)
            _write(folder, "base.raw", below)
            if spec.backing == "raw":
                os.rename(f"{folder}/base.raw", f"{folder}/base.img")
            else:
                run_tool("qemu-img", "convert", "-f", "raw", "-O", spec.backing, "base.raw", "base.img", cwd=folder)
            files[BASE] = _read(folder, "base.img")
        if spec.version == 1 and not spec.compression:
            _write(folder, "top.img", empty_v1(spec, "base.img" if spec.backing else None))
        else:
            _create(folder, spec)
        contents = bytearray(below[: spec.size].ljust(spec.size, b"\0"))
        if spec.fill:
            own = pattern(spec.size, seed=spec.seed, fill=spec.fill)
            _put(folder, spec, own, contents)
        snapshot_contents = None
        if spec.snapshot:
            run_tool("qemu-img", "snapshot", "-c", "s1", "top.img", cwd=folder)
            snapshot_contents = bytes(contents)
        zero_ranges = []
        if spec.zeroes:
            for start, end, command in _zero_ranges(spec):
                _qemu_io(folder, spec, f"{command} {start} {end - start}")
                contents[start:end] = bytes(end - start)
                zero_ranges.append((start, end))
        files[TOP] = _read(folder, "top.img")
        if spec.data_file:
            behind = b"not of the disk " * (spec.data_behind // 16)
            files[DATA] = _read(folder, "data.img")[: spec.size if behind else None] + behind
    return BuiltImage(spec, files, bytes(contents), snapshot_contents, tuple(zero_ranges))


def empty_v1(spec: ImageSpec, backing_name: str | None) -> bytes:
    """An empty version 1 image of any geometry; QEMU makes them of two geometries only."""
    cluster_bits = spec.cluster_size.bit_length() - 1
    name = (backing_name or "").encode()
    n_l1 = -(-spec.size // (1 << (cluster_bits + spec.l2_bits)))
    l1_offset = (48 + len(name) + 7) // 8 * 8
    header = struct.pack(
        ">4sIQIIQBBHIQ",
        b"QFI\xfb",
        1,
        48 if name else 0,
        len(name),
        0,
        spec.size,
        cluster_bits,
        spec.l2_bits,
        0,
        1 if spec.encryption else 0,
        l1_offset,
    )
    return (header + name).ljust(l1_offset, b"\0") + bytes(8 * n_l1)


def _create(folder: str, spec: ImageSpec) -> None:
    if spec.version == 1:
        run_tool("qemu-img", "create", "-q", "-f", "qcow", "top.img", str(spec.size), cwd=folder)
        return
    compat = "0.10" if spec.version == 2 else "1.1"
    options = f"compat={compat},cluster_size={spec.cluster_size},refcount_bits={spec.refcount_bits}"
    if spec.extended_l2:
        options += ",extended_l2=on"
    if spec.data_file:
        options += f",data_file=data.img,data_file_raw={'on' if spec.data_file == 'raw' else 'off'}"
    if spec.compression:
        options += f",compression_type={spec.compression}"
    arguments = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if spec.encryption == "luks":
        # QEMU measures for two seconds how long its derivation of a key takes. (Images with QEMU's LUKS area are the
        # subject of tests/interop/test_encryption.py.)
        _write(folder, "key", PASSPHRASE)
        program = "import sys; from qcowfuse.cli.img.main import main; sys.exit(main())"
        arguments = [sys.executable, "-c", program, "create", "-q", "--key-file", "key"]
        options += ",encrypt.format=luks,encrypt.iter-time=1"
    elif spec.encryption:
        arguments += secret_arguments()
        options += f",encrypt.format={spec.encryption},encrypt.key-secret=key"
    arguments += ["-o", options]
    if spec.backing:
        arguments += ["-b", "base.img", "-F", spec.backing]
    run_tool(*arguments, "top.img", str(spec.size), cwd=folder)


def _format_name(spec: ImageSpec) -> str:
    return "qcow" if spec.version == 1 else "qcow2"


def _qemu_io(folder: str, spec: ImageSpec, *commands: str) -> None:
    arguments = [part for command in commands for part in ("-c", command)]
    run_tool(
        "qemu-io",
        *image_arguments(_format_name(spec), "top.img", encrypted=bool(spec.encryption)),
        *arguments,
        cwd=folder,
    )


def secret_arguments() -> list[str]:
    """What gives a QEMU tool the passphrase, as the secret ``key``."""
    return ["--object", f"secret,id=key,data={PASSPHRASE.decode()}"]


def image_arguments(format_name: str, path: str, *, encrypted: bool = False) -> list[str]:
    """What names an image to a QEMU tool."""
    if not encrypted:
        return ["-f", format_name, path]
    options = f"driver={format_name},file.filename={path},encrypt.key-secret=key"
    return [*secret_arguments(), "--image-opts", options]


def _put(folder: str, spec: ImageSpec, own: bytes, contents: bytearray) -> None:
    """Write the blocks of ``own`` that hold data, compressed or not, as whole clusters."""
    unit = max(4096, spec.cluster_size)
    commands = []
    for start in range(0, spec.size, unit):
        part = own[start : start + unit]
        if not any(part):
            continue
        _write(folder, f"part{start}", part)
        kind = "write -c" if spec.compression else "write"
        commands.append(f"{kind} -s part{start} {start} {len(part)}")
        contents[start : start + len(part)] = part
    for first in range(0, len(commands), 500):
        _qemu_io(folder, spec, *commands[first : first + 500])


def _zero_ranges(spec: ImageSpec) -> list[tuple[int, int, str]]:
    unit = max(4096, spec.cluster_size)
    half = spec.size // 2 // unit * unit
    ranges = []
    for number, start in enumerate(range(half, spec.size - unit, 2 * unit)):
        ranges.append((start, start + unit, "write -z" if number % 2 else "write -zu"))
    return ranges


def _write(folder: str, name: str, data: bytes) -> None:
    with open(f"{folder}/{name}", "wb") as file:
        file.write(data)


def _read(folder: str, name: str) -> bytes:
    with open(f"{folder}/{name}", "rb") as file:
        return file.read()


Wrapper = Callable[[MemoryStorage], Storage]


def written_at_once(image: QcowImage, offset: int, data: bytes) -> bool:
    """Whether a write was done at once; if not, it was not done."""
    pending = image.start_write(offset, data)
    if pending is not None:
        pending.abandon()
    return pending is None


async def open_memory_image(
    files: Mapping[str, bytes | bytearray | MemoryStorage],
    *,
    suspend: bool = False,
    wrap: Wrapper | None = None,
    wrap_data: Wrapper | None = None,
    cache: L2CacheSize | None = None,
    read_only: bool = False,
    storages: dict[str, Storage] | None = None,
    detect_zeroes: DetectZeroes = DetectZeroes.OFF,
    backing_format: str | None = None,
    snapshot: str | None = None,
) -> QcowImage:
    """Open the chain of ``files`` from memory. ``wrap`` is put around the top storage, ``wrap_data`` around its data
    file; all storages that were made are noted in ``storages``. A MemoryStorage among ``files`` is used as it is."""

    async def opener(path: str, writable: bool, options: OpenOptions) -> Storage:
        data = files.get(path)
        if data is None:
            raise FileNotFoundError(2, "No such file or directory", path)
        memory = (
            data
            if isinstance(data, MemoryStorage)
            else MemoryStorage(data, writable=writable, suspend=suspend, name=path)
        )
        around = {TOP: wrap, DATA: wrap_data}.get(path)
        storage: Storage = memory if around is None else around(memory)
        if storages is not None:
            storages[path] = storage
        return storage

    options = OpenOptions(
        read_only=read_only,
        l2_cache_size=cache,
        passphrase=passphrase,
        detect_zeroes=detect_zeroes,
        backing_format=backing_format,
        snapshot=snapshot,
    )
    return await open_image(TOP, options, opener=opener)


def passphrase(_path: str) -> bytearray:
    """For ``OpenOptions``."""
    return bytearray(PASSPHRASE)


def write_chain(folder: str, files: Mapping[str, bytes | bytearray]) -> str:
    """Put the files of a chain into ``folder``; the path of the top one."""
    for path, data in files.items():
        with open(os.path.join(folder, os.path.basename(path)), "wb") as file:
            file.write(data)
    return os.path.join(folder, os.path.basename(TOP))


def is_encrypted(image: bytes | bytearray) -> bool:
    """Whether the header says so."""
    return any(image[36:40] if image[4:8] == b"\0\0\0\1" else image[32:36])


def qemu_check(files: Mapping[str, bytes | bytearray]) -> tuple[int, str]:
    """Exit code and output of ``qemu-img check`` for a QCOW2 image: 0 clean, 3 leaks only, 2 corrupt."""
    with scratch_folder() as folder:
        path = write_chain(folder, files)
        arguments = ["qemu-img", "check", *image_arguments("qcow2", path, encrypted=is_encrypted(files[TOP]))]
        result = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=folder)
    return result.returncode, result.stdout + result.stderr


def qemu_read(
    files: Mapping[str, bytes | bytearray], *, format_name: str = "qcow2", snapshot: str | None = None
) -> bytes:
    """What QEMU reads from an image, or from one of its snapshots."""
    with scratch_folder() as folder:
        path = write_chain(folder, files)
        extra = ["-l", snapshot] if snapshot else []
        out = os.path.join(folder, "out.raw")
        source = image_arguments(format_name, path, encrypted=is_encrypted(files[TOP]))
        run_tool("qemu-img", "convert", *extra, "-O", "raw", *source, out, cwd=folder)
        return _read(folder, "out.raw")


__all__ = [
    "BASE",
    "DATA",
    "PASSPHRASE",
    "TOP",
    "BuiltImage",
    "ImageSpec",
    "StorageKind",
    "build_image",
    "image_arguments",
    "open_memory_image",
    "passphrase",
    "pattern",
    "qemu_check",
    "qemu_read",
    "replace",
    "run_tool",
    "scratch_folder",
    "secret_arguments",
    "write_chain",
]
