"""Requests that are answered without libfuse, on a real mount: the same bytes, whoever is killed meanwhile."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.support import qemu
from tests.support.mounting import Mounted

pytestmark = [pytest.mark.mount, pytest.mark.root]

SIZE = 32 << 20
REFUSED = """
from qcowfuse.fuse.libfuse import direct_requests
def refuse(library):
    raise direct_requests.SlotError('not today')
direct_requests.LoadedObject = refuse
"""


COLLECTED_BEFORE_SERVING = """
import gc
from qcowfuse.fuse.libfuse import direct_requests
init = direct_requests.DirectRequests.__init__
def collect_first(*arguments):
    gc.collect()
    init(*arguments)
direct_requests.DirectRequests.__init__ = collect_first
"""


def verify_with_fio(file: Path, folder: Path) -> None:
    """Random blocks of several sizes, many in flight; then all of them are read, and their checksums verified."""
    options = (
        *("--name=job", f"--filename={file}", "--size=8M", "--offset_increment=8M", "--numjobs=4", "--rw=randwrite"),
        *(
            "--bsrange=512-128k",
            "--direct=1",
            "--ioengine=libaio",
            "--iodepth=16",
            "--verify=crc32c",
            "--do_verify=1",
        ),
        *("--verify_fatal=1", "--allow_file_create=0", "--randrepeat=1"),
    )
    done = subprocess.run(["fio", *options], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("slow", [False, True], ids=["quick", "with-delays"])
@pytest.mark.parametrize("patch", ["", REFUSED], ids=["at-once", "by-libfuse"])
def test_the_bytes_are_the_same_either_way(tmp_path: Path, patch: str, slow: bool) -> None:
    """fio verifies what it wrote, where requests are answered at once, where they can't be, and where both happens.

    By libfuse alone the log says why."""
    image = tmp_path / "image"
    qemu.create(image, "qcow2", SIZE)
    (tmp_path / "mnt").mkdir()
    options = ("--debug-io-delay", "100us") if slow else ()
    with Mounted(image, tmp_path / "mnt", "-d", *options, patch=patch) as mount:
        verify_with_fio(mount.file, tmp_path)
        mount.close()
        answered = re.search(r"(\d+) requests were answered at once", mount.log)
        assert ("not today" in mount.log) is bool(patch)
        assert bool(answered) is not bool(patch)
        if answered and not slow:
            assert int(answered[1]) > 100
    assert qemu.check(image).clean


def test_killed_readers_leave_the_others_alone(tmp_path: Path) -> None:
    """Readers and writers are killed in the middle of their requests, again and again; one that lives on sees its own
    data all the time."""
    image = tmp_path / "image"
    qemu.create(image, "qcow2", SIZE)
    (tmp_path / "mnt").mkdir()
    with Mounted(image, tmp_path / "mnt", "--debug-io-delay", "50us") as mount:
        failures: list[str] = []
        ended = threading.Event()

        def use() -> None:
            with open(mount.file, "r+b", buffering=0) as file:
                number = 0
                while not ended.is_set():
                    number += 1
                    block = number.to_bytes(8, "little") * 512
                    file.seek(number % 256 * 4096)
                    file.write(block)
                    file.seek(number % 256 * 4096)
                    if file.read(4096) != block:
                        failures.append(f"block {number}")

        user = threading.Thread(target=use)
        user.start()
        try:
            for number in range(60):
                source, target = ("/dev/zero", mount.file) if number % 2 else (mount.file, "/dev/null")
                flag = "oflag=direct" if number % 2 else "iflag=direct"
                place = "seek=8" if number % 2 else "skip=8"
                process = subprocess.Popen(
                    ["dd", f"if={source}", f"of={target}", "bs=1M", "count=20", flag, place, "conv=notrunc"],
                    stderr=subprocess.DEVNULL,
                )
                time.sleep(0.003 + number % 7 * 0.003)
                process.kill()
                process.wait(30)
        finally:
            ended.set()
            user.join(30)
        assert not user.is_alive()
        assert not failures
    assert qemu.check(image).clean


def test_what_libfuse_calls_is_no_garbage(tmp_path: Path) -> None:
    """The garbage collector may look at everything after mounting and before the first request."""
    image = tmp_path / "image"
    qemu.create(image, "qcow2", SIZE)
    (tmp_path / "mnt").mkdir()
    with Mounted(image, tmp_path / "mnt", patch=COLLECTED_BEFORE_SERVING) as mount:
        mount.file.read_bytes()
        subprocess.run(["fallocate", "-p", "-l", "64K", mount.file], check=True)


def test_requests_have_up_to_a_mib(tmp_path: Path) -> None:
    """What INIT has settled (max_pages): a direct read or write of 4 MiB is four requests, not 32."""
    image = tmp_path / "disk.qcow2"
    qemu.create(image, "qcow2", "32M")
    qemu.io(image, ["write -P 7 0 32M"])
    point = tmp_path / "mount"
    point.mkdir()
    with Mounted(image, point) as mount, mmap.mmap(-1, 4 << 20) as area:
        descriptor = os.open(mount.file, os.O_RDWR | os.O_DIRECT)
        os.preadv(descriptor, [area], 16 << 20)  # the table is in memory then
        assert area[:] == b"\7" * len(area)
        os.pwritev(descriptor, [area], 16 << 20)  # and what the first write needs is done
        for kind, act in (("reads", os.preadv), ("writes", os.pwritev)):
            name = f"user.qcowfuse.backend.{kind}"
            before = int(os.getxattr(mount.file, name))
            assert act(descriptor, [area], 4 << 20) == 4 << 20
            assert int(os.getxattr(mount.file, name)) - before == 4
        os.close(descriptor)
