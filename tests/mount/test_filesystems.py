"""File systems on loop devices on the served file: made, written, checked, and the same again after a remount."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import loops, qemu
from tests.support.loops import BTRFS, EXT4, XFS, FileSystem, served
from tests.support.mounting import run_qcowfuse

pytestmark = [pytest.mark.mount, pytest.mark.root]

N_BYTES = 6 << 20
BASE_SEED = 1000


@dataclass(frozen=True)
class Case:
    """An image, a file system on it, and how the loop device is attached. ``base`` is the format of a backing file
    that has the file system already; ``compressed`` is for the base, or for the image itself where there is none."""

    name: str
    file_system: FileSystem = EXT4
    options: str | None = "compat=1.1"
    base: str | None = None
    compressed: bool = False
    direct_io: bool = False
    sector_size: int = 512

    @property
    def format_name(self) -> str:
        """What QEMU calls it; version 1 has no options."""
        return "qcow" if self.options is None else "qcow2"


CASES = [
    Case("v3-ext4"),
    Case("v3-ext4-direct", direct_io=True),
    Case("v3-ext4-4k-sectors", direct_io=True, sector_size=4096),
    Case("v3-xfs", XFS),
    Case("v3-xfs-direct", XFS, direct_io=True),
    Case("v3-btrfs", BTRFS),
    Case("v3-btrfs-direct", BTRFS, direct_io=True),
    Case("v2-ext4-direct", options="compat=0.10", direct_io=True),
    Case("512-byte-clusters-ext4-direct", options="cluster_size=512", direct_io=True),
    Case("2M-clusters-ext4-direct", options="cluster_size=2M", direct_io=True),
    Case("2M-clusters-btrfs", BTRFS, options="cluster_size=2M"),
    Case("preallocated-ext4", options="preallocation=metadata"),
    Case("lazy-refcounts-ext4", options="lazy_refcounts=on"),
    Case("refcounts-of-1-bit-ext4", options="refcount_bits=1"),
    Case("extended-l2-ext4-direct", options="extended_l2=on", direct_io=True),
    Case("extended-l2-overlay-btrfs", BTRFS, options="extended_l2=on,cluster_size=128k", base="qcow2"),
    Case("v1-ext4", options=None),
    Case("v1-btrfs-direct", BTRFS, options=None, direct_io=True),
    Case("overlay-on-raw-ext4-direct", base="raw", direct_io=True),
    Case("overlay-on-v1-ext4", base="qcow"),
    Case("overlay-on-compressed-ext4-direct", base="qcow2", compressed=True, direct_io=True),
    Case("overlay-of-512-byte-clusters-ext4", options="cluster_size=512", base="qcow2"),
    Case("v1-overlay-on-qcow2-ext4", options=None, base="qcow2", direct_io=True),
    Case("compressed-xfs", XFS, compressed=True),
    Case("compressed-zstd-ext4-direct", options="compression_type=zstd", compressed=True, direct_io=True),
]


def raw_with_file_system(path: Path, case: Case) -> dict[str, str]:
    """A raw image with the file system of ``case`` and some files in it; their sums."""
    with open(path, "wb") as stream:
        stream.truncate(case.file_system.min_size)
    with loops.loop_device(path, sector_size=case.sector_size) as device:
        qemu.must_run(*case.file_system.make, device)
        with loops.mounted_file_system(device, path.with_name("point")) as point:
            return loops.write_files(point, seed=BASE_SEED, n_bytes=N_BYTES)


def prepare(folder: Path, case: Case) -> tuple[Path, dict[str, str]]:
    """The image of ``case``, and the sums of the files that its file system holds already, if it has one."""
    image, raw = folder / "image", folder / "start.raw"
    if not case.base and not case.compressed:
        qemu.create(image, case.format_name, case.file_system.min_size, options=case.options or "")
        return image, {}
    sums = raw_with_file_system(raw, case)
    if not case.base:
        qemu.convert(raw, image, case.format_name, source_format="raw", options=case.options or "", compressed=True)
        return image, sums
    base = folder / "base"
    qemu.convert(raw, base, case.base, source_format="raw", compressed=case.compressed)
    qemu.create(image, case.format_name, options=case.options or "", backing="base", backing_format=case.base)
    return image, sums


def use_file_system(file: Path, case: Case, folder: Path, sums: dict[str, str], *, seed: int) -> None:
    """See that the files of ``sums`` are there, delete one in three, trim, write new ones, and check the file system.
    ``sums`` is brought up to date."""
    system = case.file_system
    with loops.loop_device(file, direct_io=case.direct_io, sector_size=case.sector_size) as device:
        if not sums:
            qemu.must_run(*system.make, device)
        with loops.mounted_file_system(device, folder / "point") as point:
            assert loops.file_sums(point) == sums
            for name in sorted(sums)[::3]:
                (point / name).unlink()
                del sums[name]
            qemu.must_run("fstrim", point)
            sums |= loops.write_files(point, seed=seed, n_bytes=N_BYTES)
            assert loops.file_sums(point) == sums
        qemu.must_run(*system.check, device)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_file_system_survives(tmp_path: Path, case: Case) -> None:
    """A file system on a loop device keeps its files over two mounts and for QEMU; fsck and qemu-img check pass."""
    image, sums = prepare(tmp_path, case)
    base = tmp_path / "base"
    base_sum = loops.sha256_of(base) if case.base else ""
    for seed in (1, 2):
        version_1 = "--backing-format=qcow2"  # which cannot name it; others do, and are not asked
        with served(image, version_1) as mount:
            use_file_system(mount.file, case, tmp_path, sums, seed=seed)
        if case.format_name == "qcow2":
            result = qemu.check(image)
            assert result.clean, result.text
    raw = tmp_path / "end.raw"
    qemu.convert(image, raw, "raw", source_format=case.format_name)
    with loops.loop_device(raw, sector_size=case.sector_size, read_only=True) as device:
        with loops.mounted_file_system(device, tmp_path / "point", "ro") as point:
            assert loops.file_sums(point) == sums
    if case.base:
        assert loops.sha256_of(base) == base_sum


def test_file_system_of_a_shared_base_seen_by_two_daemons(tmp_path: Path) -> None:
    """Two overlays on one base are served at once, each with its own changes; the base is not to be written then."""
    case = Case("shared", base="qcow2", compressed=True, direct_io=True)
    first, sums = prepare(tmp_path, case)
    second = tmp_path / "second"
    qemu.create(second, "qcow2", backing="base", backing_format="qcow2")
    base_sum = loops.sha256_of(tmp_path / "base")
    first_sums, second_sums = dict(sums), dict(sums)
    with served(first) as one, served(second) as two:
        use_file_system(one.file, case, tmp_path, first_sums, seed=1)
        use_file_system(two.file, case, tmp_path, second_sums, seed=2)
        refused = run_qcowfuse("--lock-wait", "0", tmp_path / "base", tmp_path / "point")
        assert refused.returncode == 4
        assert str(tmp_path / "base") in refused.stderr
        with served(tmp_path / "base", "-r") as below:
            with loops.loop_device(below.file, read_only=True) as device:
                with loops.mounted_file_system(device, tmp_path / "point", "ro") as point:
                    assert loops.file_sums(point) == sums
    for image in (first, second):
        assert qemu.check(image).clean
    assert loops.sha256_of(tmp_path / "base") == base_sum
