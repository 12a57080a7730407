"""qcowfuse list, status and umount on real mounts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import qemu
from tests.support.loops import EXT4, loop_device, mounted_file_system
from tests.support.mounting import (
    Mounted,
    check_image_file,
    command,
    create_image,
    environment,
    is_alive,
    is_mounted,
    run_qcowfuse,
    wait_until,
)
from tests.support.users import as_user

pytestmark = pytest.mark.mount


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return create_image(tmp_path / "disk.qcow2", "64M")


@pytest.fixture
def point(tmp_path: Path) -> Path:
    folder = tmp_path / "m"
    folder.mkdir()
    return folder


def listed(image: Path) -> list[dict[str, Any]]:
    """What list says of an image."""
    done = run_qcowfuse("list", "--output=json")
    assert (done.returncode, done.stderr) == (0, "")
    return [mount for mount in json.loads(done.stdout) if mount["image"] == str(image)]


def holder_of(file: Path) -> subprocess.Popen[bytes]:
    """A process that has the file open."""
    script = "import sys; file = open(sys.argv[1], 'rb'); print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder


def test_list_and_status(image: Path, point: Path) -> None:
    """What is mounted, by whom, how large, and what it has counted; a target is the place, its file or the image."""
    assert listed(image) == []
    with Mounted(image, point) as mount:
        mount.file.open("r+b").write(bytes(range(256)) * 4096)
        (found,) = listed(image)
        expected = {
            "mount-point": str(point),
            "file": str(mount.file),
            "state": "serving",
            "read-only": False,
            "virtual-size": 64 << 20,
            "actual-size": 1 << 20,
            "open-files": 0,
            "pid": mount.pid,
            "uid": os.getuid(),
        }
        assert {name: found[name] for name in expected} == expected
        table = run_qcowfuse("list").stdout.splitlines()
        line = next(line for line in table if str(point) in line)
        assert {str(image), "MiB", "rw", str(mount.pid), "serving"} <= set(line.split())
        for target in (point, mount.file, image):
            done = run_qcowfuse("status", "--output=json", target)
            said = json.loads(done.stdout)
            assert said["pid"] == mount.pid
            assert said["counters"]["backend.written_bytes"] >= 1 << 20
            assert said["l2-cache-hit-rate"] is not None
        text = run_qcowfuse("status", point).stdout
        assert "L2 cache:" in text
        assert f"({64 << 20} bytes)" in text
        holder = holder_of(mount.file)
        assert listed(image)[0]["open-files"] == 1
        holder.communicate()


def test_watch(image: Path, point: Path) -> None:
    """A line of JSON for each interval, with rates of what has happened in it; it ends with the mount."""
    words = command("status", "--watch", "--interval", "0.1", "--output=json", point)
    with Mounted(image, point) as mount:
        watch = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment())
        assert watch.stdout is not None
        json.loads(watch.stdout.readline())
        with mount.file.open("r+b") as file:
            file.write(bytes(1 << 20))
            os.fsync(file.fileno())
        while json.loads(watch.stdout.readline())["rates"]["written-bytes"] == 0:
            pass
        mount.close()
    watch.communicate(timeout=60)
    assert watch.returncode == 0


def test_umount_returns_when_the_image_is_closed(image: Path, point: Path) -> None:
    """At once after it, the image is whole, unlocked, and no process has it."""
    mount = Mounted(image, point, foreground=False)
    with mount.file.open("r+b") as file:
        file.write(os.urandom(8 << 20))
    done = run_qcowfuse("umount", point)
    assert (done.returncode, done.stderr) == (0, "")
    assert not is_alive(mount.pid)
    check_image_file(image)
    refused = run_qcowfuse("umount", point)
    assert (refused.returncode, refused.stderr.count("\n")) == (5, 1)


def test_umount_by_image_ends_every_mount(image: Path, tmp_path: Path) -> None:
    """All of them."""
    points = [tmp_path / name for name in ("one", "two")]
    for folder in points:
        folder.mkdir()
        assert run_qcowfuse("-r", image, folder).returncode == 0
    assert len(listed(image)) == 2
    assert run_qcowfuse("umount", image).returncode == 0
    assert not any(map(is_mounted, points))


def test_umount_names_who_holds_it(image: Path, point: Path, tmp_path: Path) -> None:
    """It takes nothing away, until it is told to: then what was written is flushed before."""
    with Mounted(image, point) as mount:
        holder = holder_of(mount.file)
        with mount.file.open("r+b") as file:
            file.write(b"kept" * 1000)
        done = run_qcowfuse("umount", "--timeout", "0", point)
        assert done.returncode == 4
        assert f"{point}: in use by python" in done.stderr
        assert f"(pid {holder.pid})" in done.stderr
        assert is_mounted(point)
        done = run_qcowfuse("umount", "--timeout", "0", "--force", point)
        assert (done.returncode, done.stderr) == (0, "")
        mount.wait_for_end()
        holder.communicate()
    check_image_file(image)
    raw = tmp_path / "raw"
    qemu.must_run("qemu-img", "convert", "-O", "raw", image, raw)
    assert raw.read_bytes()[:4000] == b"kept" * 1000


@pytest.mark.root
def test_umount_names_loop_devices_and_what_is_on_them(image: Path, point: Path, tmp_path: Path) -> None:
    """The device, and where it is mounted."""
    with Mounted(image, point) as mount, loop_device(mount.file) as device:
        qemu.must_run(*EXT4.make, device)
        with mounted_file_system(device, tmp_path / "d") as folder:
            done = run_qcowfuse("umount", "--timeout", "0", image)
        assert done.returncode == 4
        assert f"{device} (mounted at {folder})" in done.stderr


def test_a_detached_mount_is_listed(image: Path, point: Path) -> None:
    """After umount -l with the file open no table has it; the image is listed, and its name is that of a mount."""
    with Mounted(image, point) as mount:
        holder = holder_of(mount.file)
        subprocess.run(["fusermount3", "-u", "-z", point], check=True)
        (found,) = listed(image)
        assert found["pid"] == mount.pid
        assert found["state"].startswith("unmounted")
        done = run_qcowfuse("umount", "--timeout", "0", image)
        assert done.returncode == 4
        assert f"(pid {holder.pid})" in done.stderr
        holder.communicate()
        mount.wait_for_end()
    assert listed(image) == []


def test_a_daemon_that_does_not_answer(image: Path, point: Path) -> None:
    """It is listed with its pid, and hangs nobody; once it is killed the mount is dead, and umount removes that."""
    with Mounted(image, point) as mount:
        mount.send_signal(signal.SIGSTOP)
        (found,) = listed(image)
        assert (found["state"], found["pid"]) == ("no answer", mount.pid)
        mount.send_signal(signal.SIGKILL)
        mount.wait_for_end(-signal.SIGKILL)
        wait_until(lambda: listed(image)[0]["state"] == "dead", "a dead mount")
        assert run_qcowfuse("status", point).returncode == 5
        for inside in (point, point / "x/y"):
            said = f"a dead mount is there, its daemon was killed (fusermount3 -u {point} removes it)\n"
            assert run_qcowfuse(image, inside).stderr == f"qcowfuse: {inside}: {said}"
        done = run_qcowfuse("umount", point)
        assert done.returncode == 0
        assert "removed a dead mount" in done.stderr
        assert not is_mounted(point)


def test_an_image_that_is_deleted_meanwhile(image: Path, point: Path) -> None:
    """It is said to be, while what is on the disk can still be copied."""
    with Mounted(image, point) as mount:
        assert listed(image)[0]["state"] == "serving"
        image.unlink()
        assert listed(image)[0]["state"] == "its image is deleted"
        assert "state:          its image is deleted\n" in run_qcowfuse("status", point).stdout
        with mount.file.open("r+b", buffering=0) as file:
            file.write(b"there")
            assert os.pread(file.fileno(), 5, 0) == b"there"


@pytest.mark.root
def test_mounts_of_a_user(users_folder: Path) -> None:
    """The user sees and ends the mount, an encrypted one too; root sees into it though it is the user's alone."""
    image = users_folder / "disk.qcow2"
    done = as_user("qemu-img create -q -f qcow2 disk.qcow2 4M; mkdir m; $qcowfuse disk.qcow2 m", users_folder)
    assert (done.returncode, done.stderr) == (0, "")
    (found,) = listed(image)
    assert (found["user"], found["state"], found["virtual-size"]) == ("nobody", "serving", 4 << 20)
    done = as_user("$qcowfuse list; $qcowfuse umount m; qemu-img check -q disk.qcow2", users_folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert f" {found['pid']} " in done.stdout
    script = """
        printf secret >key
        $qcowfuse-img create -q -o encrypt.format=luks,encrypt.iter-time=1 --key-file key luks.qcow2 4M
        $qcowfuse --key-file key luks.qcow2 m
        $qcowfuse list --output=json
        $qcowfuse umount luks.qcow2
        """
    img = f"{sys.executable} -c 'from qcowfuse.cli.entry import *; qcowfuse_img()'"
    script = script.replace("$qcowfuse-img", img)
    done = as_user(script, users_folder)
    assert (done.returncode, done.stderr) == (0, "")
    (mount,) = [mount for mount in json.loads(done.stdout) if mount["image"].endswith("luks.qcow2")]
    assert mount["state"] == "serving"
    assert mount["pid"] is not None
