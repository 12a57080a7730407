"""Loop devices on the served file: every kind of attachment, partitions, read-only, and two layers served at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support import loops, qemu
from tests.support.images import pattern
from tests.support.loops import served
from tests.support.oracle import reference_bytes

pytestmark = [pytest.mark.mount, pytest.mark.root]

SIZE = 48 << 20
GPT = "label: gpt\nsize=8M\nsize=16M\nsize=+\n"


def make(path: Path, kind: str, size: int = SIZE) -> Path:
    """An empty image; ``kind`` is ``v1`` or the options of a QCOW2 image."""
    if kind == "v1":
        qemu.create(path, "qcow", size)
    else:
        qemu.create(path, "qcow2", size, options=kind)
    return path


def write_durably(device: Path, data: bytes) -> None:
    """Write at the start of a device and wait for it."""
    with open(device, "r+b") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def assert_consistent(image: Path, kind: str) -> None:
    """QEMU finds nothing wrong; it has no check for version 1."""
    if kind != "v1":
        result = qemu.check(image)
        assert result.clean, result.text


@pytest.mark.parametrize(
    ("kind", "sector_size", "direct_io"),
    [
        ("v1", 512, False),
        ("v1", 4096, True),
        ("compat=0.10", 512, True),
        ("compat=1.1", 512, False),
        ("compat=1.1", 512, True),
        ("compat=1.1", 4096, True),
        ("cluster_size=512", 512, True),
        ("cluster_size=512", 4096, False),
        ("cluster_size=2M", 4096, True),
    ],
)
def test_partitions_keep_their_contents(tmp_path: Path, kind: str, sector_size: int, direct_io: bool) -> None:
    """Partitions made on a loop device are there again after everything was undone, with what was written to them."""
    image = make(tmp_path / "i.qcow2", kind)
    contents = [pattern(5 << 20, seed=seed, fill=0.9) for seed in range(3)]
    with (
        served(image) as mount,
        loops.loop_device(mount.file, sector_size=sector_size, direct_io=direct_io) as device,
    ):
        assert loops.loop_setting(device, "LOG-SEC") == str(sector_size)
        assert loops.loop_setting(device, "DIO") == str(int(direct_io))
        parts = loops.partition_into(device, GPT)
        assert len(parts) == 3
        for part, data in zip(parts, contents, strict=True):
            with open(part, "r+b") as stream:
                stream.write(data)
    assert_consistent(image, kind)
    with served(image, "-r") as mount:
        with loops.loop_device(mount.file, sector_size=sector_size, direct_io=direct_io, read_only=True) as device:
            parts = loops.partitions_of(device)
            found = [part.read_bytes()[: 5 << 20] for part in parts]
        served_sum = loops.sha256_of(mount.file)
    assert found == contents
    raw = tmp_path / "i.raw"
    qemu.convert(image, raw, "raw", source_format="qcow" if kind == "v1" else "qcow2")
    assert loops.sha256_of(raw) == served_sum


def test_read_only_mount_makes_a_read_only_device(tmp_path: Path) -> None:
    """A loop device on a read-only mount is read-only by itself, and what is written to it is refused."""
    image = make(tmp_path / "i.qcow2", "compat=1.1")
    before = image.read_bytes()
    with served(image, "-r") as mount:
        # losetup falls back to read-only by itself
        with loops.loop_device(mount.file) as device:
            assert loops.loop_setting(device, "RO") == "1"
            with pytest.raises(OSError):
                write_durably(device, b"x" * 4096)
    assert image.read_bytes() == before


def test_end_while_attached_waits_for_the_device(tmp_path: Path) -> None:
    """SIGTERM while a loop device uses the file takes nothing away: the daemon ends after the device has gone."""
    image = make(tmp_path / "i.qcow2", "compat=1.1")
    data = pattern(8 << 20, seed=5, fill=1.0)
    with served(image) as mount:
        with loops.loop_device(mount.file) as device:
            mount.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert mount.is_alive
            with open(device, "r+b") as stream:
                stream.write(data)
        mount.wait_for_end()
    assert_consistent(image, "compat=1.1")
    assert reference_bytes(image, "qcow2")[: len(data)] == data
