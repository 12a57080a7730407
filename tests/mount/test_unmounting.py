"""Unmounting while the daemon looks at its own mount, and while somebody elsewhere still has it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.mounting import REPOSITORY, Mounted, check_image_file, create_image
from tests.support.users import NOBODY, as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]

SLOW_SIZE = """
import sys, trio
sys.path.insert(0, {repository!r})
from qcowfuse.export.operations import Operations
usual = Operations._set_size
calls = 0
async def _set_size(self, n_bytes):
    global calls
    calls += 1
    if calls > 1:
        await trio.sleep(3)
    await usual(self, n_bytes)
Operations._set_size = _set_size
"""


def write_past_end(file: Path, size: int) -> None:
    """As ``cp`` of what is too large does: the error comes with the write or the fsync."""
    with file.open("r+b", buffering=0) as disk:
        disk.seek(size - 4096)
        disk.write(bytes(1 << 20))
        os.fsync(disk.fileno())


def users_may_have_namespaces() -> bool:
    """Whether a user may be root in a namespace (Ubuntu's AppArmor and most containers forbid it)."""
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return subprocess.run([*user, "unshare", "-Urm", "true"], capture_output=True, check=False).returncode == 0


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
    if not users_may_have_namespaces():
        pytest.skip("users may not make user namespaces here")
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
