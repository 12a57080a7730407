"""Names from images while a disk is served: which files the daemon has, and what its log says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qcowfuse.cli.exit_codes import ExitCode
from tests.support import qemu
from tests.support.matrix import KIB, MIB
from tests.support.mounting import Mounted, create_image, daemon_pid, run_qcowfuse

pytestmark = pytest.mark.mount
EVIL = "data\x1b[2Jx\nforged by a name"


def test_a_base_elsewhere_needs_the_option(tmp_path: Path) -> None:
    """Refused without it, served with it from a mount table's list, and the base is never open for writing."""
    for name in ("vm", "bases", "mnt"):
        (tmp_path / name).mkdir()
    (tmp_path / "bases/base,1.raw").write_bytes(b"base" * (256 * KIB))
    image = tmp_path / "vm/disk.qcow2"
    qemu.create(image, "qcow2", MIB, backing=str(tmp_path / "bases/base,1.raw"), backing_format="raw")
    refused = run_qcowfuse(image, tmp_path / "mnt")
    assert refused.returncode == ExitCode.IMAGE
    assert refused.stderr.count("\n") == 1
    assert f"--allow-dir {tmp_path}/bases allows it" in refused.stderr
    allowing = f"allow-dir={tmp_path}/bases"
    choosing = f"backing-file={tmp_path}/bases/base\\,1.raw"
    for option in (allowing, choosing):
        with Mounted(image, tmp_path / "mnt", "-o", f"noatime,{option}") as mounted:
            assert mounted.file.read_bytes()[4:8] == b"base"
            pid = daemon_pid(tmp_path / "mnt")
            modes = {
                os.path.basename(os.readlink(fd)): os.lstat(fd).st_mode & 0o200
                for fd in Path(f"/proc/{pid}/fd").iterdir()
                if os.readlink(fd).startswith(str(tmp_path))
            }
            assert modes == {"disk.qcow2": 0o200, "base,1.raw": 0}, "no folder is kept open, no base is writable"
            with mounted.file.open("r+b") as file:
                file.write(b"disk")
    assert (tmp_path / "bases/base,1.raw").read_bytes() == b"base" * (256 * KIB)


def test_the_log_of_a_served_disk_has_no_lines_of_others(tmp_path: Path) -> None:
    """A data file whose name holds a newline and an escape sequence, which lost its end: warned of in one line."""
    (tmp_path / "mnt").mkdir()
    image = tmp_path / "disk.qcow2"
    qemu.must_run(
        *("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={EVIL},preallocation=metadata", image.name),
        *("1M",),
        cwd=tmp_path,
    )
    os.truncate(tmp_path / EVIL, 0)
    with Mounted(image, tmp_path / "mnt", "-r", "--log-file", tmp_path / "log", foreground=False) as mounted:
        assert mounted.file.read_bytes() == bytes(MIB)
    lines = (tmp_path / "log").read_text().splitlines()
    assert any("data?[2Jx?forged by a name" in line for line in lines)
    assert all(line.isprintable() and " qcowfuse[" in line for line in lines)


def test_names_in_the_table_of_mounts(tmp_path: Path) -> None:
    """The kernel writes some characters of an image's name, and of a mount point, in other ways than others."""
    point = tmp_path / "a\rb c#d\\e\tf"
    point.mkdir()
    image = create_image(tmp_path / "disk #1\\2.qcow2", "1M")
    with Mounted(image, point, foreground=False):
        listed = run_qcowfuse("list", "--output=json")
        assert (listed.returncode, listed.stderr) == (ExitCode.OK, "")
        assert str(point) in {mount["mount-point"] for mount in json.loads(listed.stdout)}
        (tmp_path / "mnt").mkdir()
        refused = run_qcowfuse("--lock-wait", "0", image, tmp_path / "mnt")
        assert refused.returncode == ExitCode.LOCKED
        assert "(it is mounted at " in refused.stderr
        unmounted = run_qcowfuse("umount", image)
        assert (unmounted.returncode, unmounted.stderr) == (ExitCode.OK, "")
