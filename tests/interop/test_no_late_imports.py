"""Once an image of any kind is open, nothing is imported any more: the file of a module could lie on the very mount,
memory for it could depend on it, and the sandbox lets no file be opened."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import qemu
from tests.support.matrix import all_specs, build
from tests.support.mounting import REPOSITORY, environment

KINDS = (
    "v3-cluster-512",
    "v2-zero-writes",
    "v3-refcount-1-cluster-4k",
    "v3-zstd-cluster-64k-compressed-rewritten",
    "v2-deflate-cluster-64k-compressed",
    "v3-extended-16k-snapshot",
    "v3-data-file-cluster-4k",
    "v3-data-file-raw-extended-64k",
    "v3-bitmaps",
    "v3-snapshots",
    "v3-over-v1-compressed",
    "v1-over-odd-raw",
    "v1-compressed-rewritten",
    "chain-512-64k-4k",
    "over-snapshots",
    "v3-unknown-bits",
)
SPECS = {spec.id: spec for spec in all_specs()}
ENCRYPTED = {"luks": "qcow2", "aes": "qcow2", "aes of version 1": "qcow"}
USE = """
import os, sys
import trio
import qcowfuse.cli.mount.serving as serving
from qcowfuse.cli.mount.arguments import parse_arguments
from qcowfuse.cli.mount.failures import describe

class NoImports:
    def find_spec(self, name, path=None, target=None):
        raise AssertionError(f"{name} is imported while the disk is in use")

given = parse_arguments([*sys.argv[3:], "mount"])
given.mount_settings()

def key(path):
    return bytearray(b"correct horse")

def fails(*_):
    raise OSError(5, "Input/output error")

async def use():
    options = given.open_options._replace(passphrase=key)
    image = await serving.open_image(given.image, options)
    sys.meta_path.insert(0, NoImports())
    size = image.size
    for start in range(0, size, 1 << 20):
        await image.read(start, min(1 << 20, size - start))
    if not (options.read_only or options.snapshot):
        for start in range(0, size - 70000, 300001):
            await image.write(start, b"x" * 70000)
        await image.write_zeroes(0, size // 2 // 512 * 512, unmap=False)
        await image.write_zeroes(0, size // 3 // 512 * 512, unmap=True)
        await image.write(1, b"y")
        if sys.argv[2] == "sound":
            await image.flush()
    await image.count_allocated()
    image.statistics()
    if sys.argv[2] == "broken":
        os.fdatasync = os.fsync = fails
        try:
            await image.flush()
        except OSError as error:
            assert "output" in describe(error, given, has_served=True)
        else:
            raise AssertionError("a flush that fails is an error")
    try:
        await image.aclose()
    except Exception as error:
        assert sys.argv[2] == "broken", error
        describe(error, given, has_served=True)

trio.run(use)
"""


def use(disk: str, *words: str) -> None:
    """Read, write, zero, flush and close an image, in a process in which nothing is imported after it is open.
    ``disk``: "sound", or "broken" where it fails to flush."""
    done = subprocess.run(
        [sys.executable, "-c", USE, "use", disk, *words],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("disk", ["sound", "broken"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image(kind: str, disk: str, image_folder: Path) -> None:
    """Also where a flush fails, and what is said of it."""
    built = build(SPECS[kind], image_folder)
    use(disk, *built.words, str(built.path))


@pytest.mark.parametrize("kind", ENCRYPTED)
def test_encrypted_images(kind: str, tmp_path: Path) -> None:
    """Of each method."""
    image = tmp_path / "image"
    secret = ("--object", "secret,id=s,data=correct horse")
    options = f"encrypt.format={kind.split()[0]},encrypt.key-secret=s"
    options += ",encrypt.iter-time=10" if kind == "luks" else ""
    qemu.must_run("qemu-img", "create", "-q", *secret, "-f", ENCRYPTED[kind], "-o", options, image, "4M")
    use("sound", str(image))


def test_a_served_snapshot(image_folder: Path) -> None:
    """It is read-only, and found by the table of snapshots when the image is opened."""
    built = build(SPECS["v3-snapshots"], image_folder)
    name = qemu.must_run("qemu-img", "snapshot", "-l", built.path).splitlines()[2].split()[0]
    use("sound", "--snapshot", name, str(built.path))
