"""Loop devices, partitions and file systems on top of a served file: the real use, with everything undone again.

1. Whoever detaches a loop device or unmounts a file system here waits until the kernel has really done it.
2. Partitions are read by ``partx``, since a kernel without partition parsers ignores ``losetup -P``.
3. In a container, whose /dev is not the kernel's, the device nodes of partitions are made and removed here.
"""

from __future__ import annotations

import hashlib
import os
import random
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from . import qemu
from .container import lacks, need_loop_devices
from .mounting import Mounted, wait_until


@contextmanager
def served(image: Path, *options: str, patch: str = "") -> Iterator[Mounted]:
    """Serve ``image`` in a folder next to it; the end must be a good one, with no bug reported in the log.

    ``patch`` is as for :class:`Mounted`. Nothing is left of the folder, because the image may be a device in /dev.
    """
    point = image.with_name(image.name + ".mnt")
    point.mkdir(exist_ok=True)
    try:
        with Mounted(image, point, *options, patch=patch) as mount:
            yield mount
    finally:
        with suppress(OSError):
            point.rmdir()
    assert "Traceback" not in mount.log, mount.log


def backing_file(device: Path) -> str:
    """The path of the file that a loop device has, empty when it has none."""
    try:
        return Path(f"/sys/block/{device.name}/loop/backing_file").read_text().rstrip("\n")
    except OSError:
        return ""


@contextmanager
def loop_device(
    file: Path, *, direct_io: bool = False, sector_size: int = 512, read_only: bool = False
) -> Iterator[Path]:
    """Attach ``file`` to a free loop device with its partitions looked for, and detach it at the end."""
    need_loop_devices()
    words = ["losetup", "-fP", "--show", "--sector-size", str(sector_size)]
    words += [f"--direct-io={'on' if direct_io else 'off'}"]
    if read_only:
        words.append("-r")
    device = Path(qemu.must_run(*words, file).strip())
    try:
        yield device
    finally:
        qemu.must_run("losetup", "-d", device)
        # Another program may have got the same device by now.
        wait_until(lambda: backing_file(device) != str(file), f"{device} to be detached")
        for part in device.parent.glob(f"{device.name}p*"):
            if not _in_sysfs(part).exists():
                part.unlink(missing_ok=True)


def loop_setting(device: Path, column: str) -> str:
    """One column of ``losetup --list``, such as DIO, LOG-SEC, RO."""
    return qemu.must_run("losetup", "-nl", "-O", column, device).strip()


def partition_into(device: Path, script: str) -> list[Path]:
    """Write the partition table that ``script`` tells sfdisk, and give the devices of the partitions."""
    words = ["sfdisk", "-q", "--no-reread", "--no-tell-kernel", str(device)]
    subprocess.run(words, input=script, text=True, check=True, timeout=qemu.TIMEOUT)
    return partitions_of(device)


def partitions_of(device: Path) -> list[Path]:
    """The partitions of ``device`` as its table has them now, as devices that are there."""
    qemu.run("partx", "-u", device)  # fails where the kernel has done it
    numbers = [int(line) for line in qemu.must_run("partx", "-g", "-o", "NR", device).split()]
    parts = [device.with_name(f"{device.name}p{number}") for number in numbers]
    wait_until(lambda: all(_in_sysfs(part).exists() for part in parts), f"partitions of {device}")
    if not _is_dev_of_the_kernel():
        for part in parts:
            _make_node(part)
    wait_until(lambda: all(_is_block_device(part) for part in parts), f"partitions of {device}")
    return parts


def _in_sysfs(device: Path) -> Path:
    return Path("/sys/class/block") / device.name


def _is_dev_of_the_kernel() -> bool:
    return qemu.must_run("findmnt", "-n", "-o", "FSTYPE", "--target", "/dev").strip() == "devtmpfs"


def _make_node(device: Path) -> None:
    """The device node of a partition, as the kernel numbers it now."""
    major, minor = (_in_sysfs(device) / "dev").read_text().split(":")
    device.unlink(missing_ok=True)
    try:
        os.mknod(device, stat.S_IFBLK | 0o600, os.makedev(int(major), int(minor)))
    except PermissionError:
        lacks("device nodes of partitions, and the right to make them")


def _is_block_device(path: Path) -> bool:
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except FileNotFoundError:
        return False


@dataclass(frozen=True, slots=True)
class FileSystem:
    """How to make and to check a file system; ``min_size`` is the smallest device in bytes that is used here."""

    name: str
    make: tuple[str, ...]
    check: tuple[str, ...]
    min_size: int


EXT4 = FileSystem("ext4", ("mkfs.ext4", "-q", "-F"), ("e2fsck", "-fn"), 32 << 20)
XFS = FileSystem("xfs", ("mkfs.xfs", "-q", "-f"), ("xfs_repair", "-n"), 320 << 20)
BTRFS = FileSystem("btrfs", ("mkfs.btrfs", "-q", "-f"), ("btrfs", "check", "--readonly"), 128 << 20)


@contextmanager
def mounted_file_system(device: Path, point: Path, *options: str) -> Iterator[Path]:
    """Mount ``device`` at ``point`` (which is made), unmount it at the end."""
    point.mkdir(exist_ok=True)
    qemu.must_run("mount", *(["-o", ",".join(options)] if options else []), device, point)
    try:
        yield point
    finally:
        qemu.must_run("umount", point)


def write_files(folder: Path, *, seed: int, n_bytes: int) -> dict[str, str]:
    """Write files of 1 byte to 1 MiB until there are ``n_bytes``, fsync some of them; their SHA-256 by name."""
    chooser = random.Random(seed)
    sums: dict[str, str] = {}
    while n_bytes > 0:
        name = f"{seed}-{len(sums)}"
        data = chooser.randbytes(min(n_bytes, chooser.choice((1, 511, 4096, 70000, 1 << 20))))
        with open(folder / name, "wb") as file:
            file.write(data)
            if len(sums) % 4 == 0:
                file.flush()
                os.fsync(file.fileno())
        sums[name] = hashlib.sha256(data).hexdigest()
        n_bytes -= len(data)
    return sums


def file_sums(folder: Path) -> dict[str, str]:
    """SHA-256 by name of all regular files right in ``folder``."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def sha256_of(file: Path) -> str:
    """SHA-256 of a file of any size."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
