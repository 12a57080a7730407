"""A daemon with little memory under a loop device whose file system writes back much more than that."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import qemu
from tests.support.container import lacks
from tests.support.loops import loop_device, mounted_file_system, served

pytestmark = [pytest.mark.mount, pytest.mark.root]

MIB = 1 << 20
LIMIT = 72 * MIB
WRITTEN = 384 * MIB


@contextmanager
def memory_group() -> Iterator[tuple[Path, Path]]:
    """A control group that may use LIMIT bytes: its folder, and the file that counts how often that was reached."""
    version_1, version_2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    is_version_1 = (version_1 / "memory.limit_in_bytes").exists()
    group = (version_1 if is_version_1 else version_2) / f"qcowfuse-test-{uuid.uuid4().hex[:8]}"
    try:
        if not is_version_1:
            (version_2 / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
    except OSError as error:
        lacks(f"control groups of memory: {error}")
    try:
        (group / ("memory.limit_in_bytes" if is_version_1 else "memory.max")).write_text(str(LIMIT))
        yield group, group / ("memory.failcnt" if is_version_1 else "memory.events")
    finally:
        group.rmdir()


def times_reached(counter: Path) -> int:
    """How often the limit made somebody look for memory."""
    words = counter.read_text().split()
    return int(words[0]) if len(words) == 1 else int(words[words.index("max") + 1])


@pytest.mark.parametrize("direct_io", [False, True])
def test_little_memory_does_not_stop_the_disk(tmp_path: Path, direct_io: bool) -> None:
    """ext4 writes back five times of what the daemon may use, image pages and all: no standstill, nothing lost."""
    image = tmp_path / "disk.qcow2"
    qemu.must_run("qemu-img", "create", "-q", "-f", "qcow2", image, "2G")
    with memory_group() as (group, counter):
        with served(image) as mount:
            (group / "cgroup.procs").write_text(str(mount.pid))
            with loop_device(mount.file, direct_io=direct_io) as device:
                qemu.must_run("mkfs.ext4", "-q", "-F", device)
                with mounted_file_system(device, tmp_path / "tree") as tree:
                    block = os.urandom(MIB)
                    with open(tree / "file", "wb", buffering=0) as file:
                        for _ in range(WRITTEN // MIB):
                            file.write(block)
                        os.fsync(file.fileno())
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    with open(tree / "file", "rb", buffering=0) as file:
                        assert all(file.read(MIB) == block for _ in range(WRITTEN // MIB))
                qemu.must_run("e2fsck", "-fn", device)
            assert times_reached(counter) > 100, "the limit was never reached"
    assert subprocess.run(["qemu-img", "check", "-q", image], check=False).returncode == 0
