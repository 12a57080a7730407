"""The images that are measured, made with qemu-img; one folder for each kind, copied for each contender."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .tools import run

MIB = 1 << 20
PASSPHRASE = "passphrase"
"""Name, in the folder of an encrypted image, of the file with its passphrase."""
IMAGE = "disk.qcow2"
"""Name, in its folder, of the image that is served."""


def _raw(folder: Path, size_mib: int, *, compressible: bool) -> Path:
    """A raw file without a zero block; if ``compressible``, to about half of its size."""
    generator = random.Random(size_mib)
    words = [generator.randbytes(generator.randint(3, 12)).hex().encode() for _ in range(2000)]
    path = folder / "source.raw"
    with path.open("wb") as file:
        for _ in range(size_mib):
            if compressible:
                text = b" ".join(generator.choices(words, k=MIB // 32))[: MIB // 2].ljust(MIB // 2, b".")
                noise = generator.randbytes(MIB // 2)
                step = 2048
                file.write(b"".join(text[at : at + step] + noise[at : at + step] for at in range(0, MIB // 2, step)))
            else:
                file.write(generator.randbytes(MIB))
    return path


def _convert(source: Path, image: Path, *options: str) -> None:
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, str(source), str(image))


def full(folder: Path, size_mib: int) -> None:
    """Every cluster is allocated."""
    source = _raw(folder, size_mib, compressible=False)
    _convert(source, folder / IMAGE)
    source.unlink()


def _compressed(folder: Path, size_mib: int, kind: str) -> None:
    source = _raw(folder, size_mib, compressible=True)
    _convert(source, folder / IMAGE, "-c", "-o", f"compression_type={kind}")
    source.unlink()


def zlib(folder: Path, size_mib: int) -> None:
    """Every cluster is compressed with deflate, to about half."""
    _compressed(folder, size_mib, "zlib")


def zstd(folder: Path, size_mib: int) -> None:
    """Every cluster is compressed with zstd, to about half."""
    _compressed(folder, size_mib, "zstd")


def chain(folder: Path, size_mib: int) -> None:
    """Three images: a full one, and two that each hold every fourth MiB anew."""
    source = _raw(folder, size_mib, compressible=False)
    _convert(source, folder / "base.qcow2")
    source.unlink()
    below = "base.qcow2"
    for number, name in enumerate(("middle.qcow2", IMAGE)):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", name, cwd=folder)
        commands = [f"write -q -P {number + 1} {at}M 1M" for at in range(number, size_mib, 4)]
        run("qemu-io", "-f", "qcow2", *(part for command in commands for part in ("-c", command)), name, cwd=folder)
        below = name


def half(folder: Path, size_mib: int) -> None:
    """Every second cluster of 64 KiB is allocated."""
    empty(folder, size_mib)
    writes = [f"write -q -P 5 {at}k 64k" for at in range(0, size_mib << 10, 128)]
    for start in range(0, len(writes), 2000):
        commands = (part for command in writes[start : start + 2000] for part in ("-c", command))
        run("qemu-io", "-f", "qcow2", *commands, str(folder / IMAGE))


def luks(folder: Path, size_mib: int) -> None:
    """Encrypted, and every cluster is allocated. The passphrase is in :data:`PASSPHRASE` beside it."""
    luks_empty(folder, size_mib)
    source = _raw(folder, size_mib, compressible=False)
    run(
        "qemu-img",
        "convert",
        "-n",
        "-f",
        "raw",
        *_secret(folder),
        "--target-image-opts",
        str(source),
        _opened(folder),
    )
    source.unlink()


def luks_empty(folder: Path, size_mib: int) -> None:
    """Encrypted with AES-XTS, nothing is allocated."""
    (folder / PASSPHRASE).write_text("passphrase")
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    image = str(folder / IMAGE)
    run("qemu-img", "create", "-q", *_secret(folder), "-f", "qcow2", "-o", options, image, f"{size_mib}M")


def _secret(folder: Path) -> tuple[str, str]:
    return "--object", f"secret,id=key,file={folder / PASSPHRASE}"


def _opened(folder: Path) -> str:
    return f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=key,file.filename={folder / IMAGE}"


def extended(folder: Path, size_mib: int) -> None:
    """Extended L2 entries with 32 subclusters; nothing is allocated."""
    options = ("-o", "extended_l2=on,cluster_size=128k")
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, str(folder / IMAGE), f"{size_mib}M")


def clusters_of_4_kib(folder: Path, size_mib: int) -> None:
    """Nothing is allocated."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", str(folder / IMAGE), f"{size_mib}M")


def empty(folder: Path, size_mib: int) -> None:
    """Nothing is allocated."""
    run("qemu-img", "create", "-q", "-f", "qcow2", str(folder / IMAGE), f"{size_mib}M")


def sparse_16_tib(folder: Path, size_mib: int) -> None:
    """A disk of 16 TiB that holds a MiB in a few places."""
    image = folder / IMAGE
    run("qemu-img", "create", "-q", "-f", "qcow2", str(image), "16T")
    places = [f"write -q -P 7 {number}T 1M" for number in range(16)]
    run("qemu-io", "-f", "qcow2", *(part for command in places for part in ("-c", command)), str(image))


def mapped(folder: Path, size_mib: int) -> None:
    """Every cluster is mapped, none has ever been written: all of the tables, and next to no data."""
    options = ("-o", "preallocation=metadata")
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, str(folder / IMAGE), f"{size_mib}M")


def copy(template: Path, target: Path) -> Path:
    """Copy a folder of images, holes and all; gives the image to serve."""
    run("cp", "-r", "--sparse=always", str(template), str(target))
    return target / IMAGE


@contextmanager
def on_device(image: Path) -> Iterator[Path]:
    """A loop device that holds ``image``, which is as large as it has to be: nothing is allocated."""
    device = run("losetup", "--find", "--show", str(image)).strip()
    try:
        yield Path(device)
    finally:
        run("losetup", "--detach", device)


Maker = Callable[[Path, int], None]
