"""The sandbox of a daemon that serves: a deliberate break is stopped, and the disk goes on."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from qcowfuse.system import landlock
from tests.support.container import need_landlock
from tests.support.mounting import Mounted, check_image_file, create_image, run_qcowfuse

pytestmark = pytest.mark.mount

BREAK = """
import json, os, socket, sys
import pyfuse3
from qcowfuse.fuse.operations import Operations

def attempt(function):
    try:
        function()
    except OSError as exc:
        return exc.errno
    return 0

usual = Operations.getxattr

async def getxattr(self, inode, name, ctx):
    if name != b"user.break":
        return await usual(self, inode, name, ctx)
    return json.dumps({
        "open": attempt(lambda: open("/etc/shadow")),
        "connect": attempt(lambda: socket.create_connection(("127.0.0.1", 9))),
        "execute": attempt(lambda: os.execv("/bin/true", ["true"])),
        "spawn": attempt(lambda: os.posix_spawn("/bin/true", ["true"], {})),
        "ptrace": attempt(lambda: open(f"/proc/{os.getppid()}/mem", "rb")),
        "write": attempt(lambda: open("/proc/self/comm", "w")),
    }).encode()

Operations.getxattr = getxattr
"""


@pytest.mark.parametrize("options", [[], ["--aio", "threads"], ["-r"]])
def test_a_daemon_that_is_taken_over_reaches_nothing(tmp_path: Path, options: list[str]) -> None:
    """Secrets, sockets, programs and other processes are out of reach, and the disk is used meanwhile."""
    need_landlock()
    image = create_image(tmp_path / "image.qcow2")
    (tmp_path / "mnt").mkdir()
    with Mounted(image, tmp_path / "mnt", *options, patch=BREAK) as mounted:
        data = os.urandom(1 << 20)
        if "-r" not in options:
            with mounted.file.open("r+b") as disk:
                disk.write(data)
        found = json.loads(os.getxattr(mounted.file, "user.break"))
        assert min(found.values()) > 0, found
        with mounted.file.open("rb") as disk:
            assert disk.read(1 << 20) == (bytes(1 << 20) if "-r" in options else data)
    check_image_file(image)


def seccomp_filters(pid: int) -> int:
    """How many filters of system calls a process has; a container may have put one there already."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("Seccomp_filters:")[2].split()[0])


def test_the_state_is_shown_and_can_be_turned_off(tmp_path: Path) -> None:
    """Extended attributes say what was given up; with --no-sandbox nothing was."""
    image = create_image(tmp_path / "image.qcow2")
    mount_point = tmp_path / "mnt"
    mount_point.mkdir()
    with Mounted(image, mount_point) as mounted:
        assert os.getxattr(mounted.file, "user.qcowfuse.sandbox.seccomp") == b"1"
        assert int(os.getxattr(mounted.file, "user.qcowfuse.sandbox.landlock_abi")) == landlock.abi_version()
        status = Path(f"/proc/{mounted.pid}/status").read_text()
        assert "Seccomp:\t2" in status
        assert seccomp_filters(mounted.pid) > seccomp_filters(os.getpid())
        assert "CapEff:\t0000000000000000" in status
    with Mounted(image, mount_point, "--no-sandbox") as mounted:
        with pytest.raises(OSError):
            os.getxattr(mounted.file, "user.qcowfuse.sandbox.seccomp")
        assert seccomp_filters(mounted.pid) == seccomp_filters(os.getpid())


@pytest.mark.root
def test_another_user(tmp_path: Path) -> None:
    """With --user the daemon runs as that user once it serves, the disk works, and a stop still unmounts."""
    image = create_image(tmp_path / "image.qcow2")
    mount_point = tmp_path / "mnt"
    mount_point.mkdir()
    with Mounted(image, mount_point, "--user", "nobody") as mounted:
        assert os.stat(f"/proc/{mounted.pid}").st_uid == 0 or os.stat(f"/proc/{mounted.pid}/task").st_uid > 0
        uids = next(
            line for line in Path(f"/proc/{mounted.pid}/status").read_text().splitlines() if line.startswith("Uid")
        )
        nobody = subprocess.run(["id", "-u", "nobody"], capture_output=True, text=True, check=True).stdout.strip()
        assert uids.split()[1:] == [nobody] * 4
        with mounted.file.open("r+b") as disk:
            disk.write(b"written")
        os.kill(mounted.pid, 15)
        mounted.wait_for_end()
    check_image_file(image)
    refused = run_qcowfuse("--user", "no-such-user", image, mount_point)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "there is no user 'no-such-user'" in refused.stderr
