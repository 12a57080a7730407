"""Unmounting while the daemon looks at its own mount, and while somebody elsewhere still has it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.container import need_user_namespaces
from tests.support.mounting import REPOSITORY, Mounted, check_image_file, create_image, run_qcowfuse, wait_until
from tests.support.users import AS_NOBODY, as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]

SLOW_SIZE = """
import sys, trio
sys.path.insert(0, {repository!r})
from qcowfuse.fuse.operations import Operations
usual = Operations.setattr
calls = 0
async def setattr(self, inode, attr, fields, fh, ctx):
    global calls
    calls += fields.update_size
    if calls > 1:
        await trio.sleep(3)
    return await usual(self, inode, attr, fields, fh, ctx)
Operations.setattr = setattr
"""


def write_past_end(file: Path, size: int) -> None:
    """As ``cp`` of what is too large does: the error comes with the write or the fsync."""
    with file.open("r+b", buffering=0) as disk:
        disk.seek(size - 4096)
        disk.write(bytes(1 << 20))
        os.fsync(disk.fileno())


@pytest.mark.parametrize("over", ["folder", "file"])
def test_a_look_from_outside_does_not_keep_the_mount_busy(tmp_path: Path, over: str) -> None:
    """The daemon puts the size right by a truncate that waits for itself: meanwhile fusermount3 -u goes through."""
    image = create_image(tmp_path / "image.qcow2", "4M")
    mount_point = tmp_path / "mnt"
    mount_point.mkdir() if over == "folder" else mount_point.touch()
    with Mounted(image, mount_point, patch=SLOW_SIZE.format(repository=str(REPOSITORY))) as mounted:
        with pytest.raises(OSError):
            write_past_end(mounted.file, 4 << 20)
        time.sleep(1)
        subprocess.run(["fusermount3", "-u", mount_point], check=True)
        mounted.wait_for_end()
    check_image_file(image)


def test_a_look_by_a_user_does_not_either(users_folder: Path) -> None:
    """Without root's rights the look goes through a user namespace."""
    need_user_namespaces(AS_NOBODY)
    patch = SLOW_SIZE.format(repository=str(REPOSITORY))
    patch += "import runpy\nrunpy.run_module('qcowfuse', run_name='__main__')\n"
    (users_folder / "patched.py").write_text(patch)
    done = as_user(
        f"""
        qemu-img create -q -f qcow2 disk.qcow2 4M
        mkdir m
        {sys.executable} patched.py disk.qcow2 m
        dd if=/dev/zero of=m/disk.raw bs=1M seek=3 count=2 conv=notrunc,fsync 2>/dev/null && exit 8
        sleep 1
        fusermount3 -u m
        for i in $(seq 100); do qemu-img check -q disk.qcow2 2>/dev/null && exit 0; sleep 0.1; done
        exit 9
        """,
        users_folder,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """A function that starts a process with a mount namespace of its own, a copy of this one, and gives its pid."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> int:
        process = subprocess.Popen(["unshare", "-m", "--propagation", "private", "sleep", "1000"])
        started.append(process)
        ours = os.readlink("/proc/self/ns/mnt")
        wait_until(lambda: os.readlink(f"/proc/{process.pid}/ns/mnt") != ours, "the namespace")
        return process.pid

    yield start
    for process in started:
        process.kill()
        process.wait()


def write_by(pid: int, file: Path, data: bytes) -> None:
    """Write to a file as the process with that mount namespace sees it, without an fsync."""
    command = ["nsenter", "-t", str(pid), "-m", "dd", f"of={file}", "bs=1M", "conv=notrunc", "status=none"]
    subprocess.run(command, input=data, check=True)


def contents(image: Path) -> bytes:
    raw = image.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    return raw.read_bytes()


def test_another_namespace_is_named_and_can_be_cut_off(tmp_path: Path, elsewhere: Callable[[], int]) -> None:
    """After the unmount here, a container still has the mount: log and refusal name it, and the second SIGTERM ends
    it, with all that it had written in the image."""
    image = create_image(tmp_path / "image.qcow2", "4M")
    mount_point = tmp_path / "mnt"
    mount_point.mkdir()
    with Mounted(image, mount_point) as mounted:
        pid = elsewhere()
        subprocess.run(["fusermount3", "-u", mount_point], check=True)
        data = os.urandom(2 << 20)
        write_by(pid, mounted.file, data)
        place = f"the mount namespace of sleep (pid {pid}), at {mount_point}"
        wait_until(lambda: f"unmounted, but still in use by {place}" in mounted.log, "the warning")
        refused = run_qcowfuse("--lock-wait", "0", image, mount_point)
        assert refused.returncode == 4
        assert f"still mounted at {mount_point} in the mount namespace of sleep (pid {pid})" in refused.stderr
        mounted.send_signal(signal.SIGTERM)
        wait_until(lambda: f"in use by {place}; another SIGTERM cuts them off" in mounted.log, "the announcement")
        assert mounted.is_alive
        mounted.send_signal(signal.SIGTERM)
        mounted.wait_for_end(0)
        seen = subprocess.run(
            ["nsenter", "-t", str(pid), "-m", "cat", mounted.file], capture_output=True, check=False
        )
        assert b"not connected" in seen.stderr
    check_image_file(image)
    assert contents(image)[: 2 << 20] == data


def test_another_namespace_that_ends_is_the_end(tmp_path: Path, elsewhere: Callable[[], int]) -> None:
    """The image is closed when the last namespace is gone; nothing needs to be done."""
    image = create_image(tmp_path / "image.qcow2", "4M")
    mount_point = tmp_path / "mnt"
    mount_point.mkdir()
    with Mounted(image, mount_point) as mounted:
        pid = elsewhere()
        subprocess.run(["fusermount3", "-u", mount_point], check=True)
        wait_until(lambda: "still in use by" in mounted.log, "the warning")
        os.kill(pid, signal.SIGKILL)
        mounted.wait_for_end(0)
    check_image_file(image)


def test_a_file_open_in_a_detached_mount(tmp_path: Path) -> None:
    """After umount -l stop signals flush and take nothing away, however many, until the log has said what the next
    one does."""
    image = create_image(tmp_path / "image.qcow2", "4M")
    mount_point = tmp_path / "mnt"
    mount_point.mkdir()
    with Mounted(image, mount_point) as mounted:
        disk = os.open(mounted.file, os.O_RDWR)
        subprocess.run(["umount", "-l", mount_point], check=True)
        mounted.send_signal(signal.SIGTERM)
        mounted.send_signal(signal.SIGINT)
        os.pwrite(disk, b"still there", 0)
        wait_until(lambda: "another SIGTERM cuts them off" in mounted.log, "the announcement")
        assert f"(pid {os.getpid()})" in mounted.log
        os.pwrite(disk, b", and here", 11)
        mounted.send_signal(signal.SIGTERM)
        mounted.wait_for_end(0)
        with pytest.raises(OSError):
            os.pread(disk, 1, 2 << 20)
        with pytest.raises(OSError):
            os.close(disk)
    check_image_file(image)
    assert contents(image).startswith(b"still there, and here")
