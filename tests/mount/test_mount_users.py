"""mount(8), and users who are not root."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounting import (
    REPOSITORY,
    check_image_file,
    create_image,
    daemon_pid,
    is_alive,
    is_mounted,
    run_qcowfuse,
    wait_until,
)
from tests.support.users import NOBODY, as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]

COMMAND = Path("/usr/local/bin/qcowfuse")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return create_image(tmp_path / "disk.qcow2", "4M")


@pytest.fixture
def mount_point(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "m"
    path.mkdir()
    yield path
    if is_mounted(path):
        subprocess.run(["fusermount3", "-u", "-z", path], check=True)


@pytest.fixture
def installed() -> Iterator[None]:
    """A qcowfuse command where mount(8) finds it, made for the test when there is none."""
    if COMMAND.exists():
        yield
        return
    COMMAND.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from qcowfuse.cli.mount.main import main\nsys.exit(main())\n"
    )
    COMMAND.chmod(0o755)
    try:
        yield
    finally:
        COMMAND.unlink()


def mount(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False, timeout=60)


def unmount(mount_point: Path) -> None:
    pid = daemon_pid(mount_point)
    assert pid is not None
    subprocess.run(["umount", mount_point], check=True)
    wait_until(lambda: not is_alive(pid), "the end of the daemon")


@pytest.mark.usefixtures("installed")
def test_mount_command(image: Path, mount_point: Path) -> None:
    """mount -t fuse.qcowfuse returns when it serves; umount ends it."""
    done = mount("-t", "fuse.qcowfuse", image, mount_point)
    assert (done.returncode, done.stderr) == (0, "")
    file = mount_point / "disk.raw"
    file.open("r+b").write(b"by mount")
    unmount(mount_point)
    check_image_file(image)


@pytest.mark.usefixtures("installed")
def test_mount_command_with_options(image: Path, mount_point: Path) -> None:
    """Options of the kernel, of FUSE, of ours and of fstab can be mixed."""
    options = "ro,noatime,nosuid,nodev,allow_other,_netdev,nofail,x-systemd.automount,umask=022"
    options += ",l2-cache-size=1M,name=a b.raw"
    done = mount("-t", "fuse.qcowfuse", "-o", options, image, mount_point)
    assert (done.returncode, done.stderr) == (0, "")
    file = mount_point / "a b.raw"
    assert stat.S_IMODE(file.stat().st_mode) == 0o444
    line = next(line for line in Path("/proc/mounts").read_text().splitlines() if str(mount_point) in line)
    for word in ("fuse.qcowfuse", "ro,", "noatime", "allow_other"):
        assert word in line
    refused = mount("-o", "remount,rw", mount_point)
    assert refused.returncode != 0
    assert "remount" in refused.stderr
    unmount(mount_point)


@pytest.mark.usefixtures("installed")
def test_mount_command_over_a_file(image: Path, tmp_path: Path) -> None:
    """The mount point can be a file for mount(8) as well."""
    file = tmp_path / "disk.raw"
    file.touch()
    assert mount("-t", "fuse.qcowfuse", image, file, "-o", "rw").returncode == 0
    assert file.stat().st_size == 4 << 20
    unmount(file)


@pytest.mark.usefixtures("installed")
def test_mount_command_passes_failures_on(tmp_path: Path, mount_point: Path) -> None:
    """A failure reaches whoever called mount."""
    done = mount("-t", "fuse.qcowfuse", tmp_path / "none", mount_point)
    assert done.returncode != 0
    assert "No such file" in done.stderr
    assert not is_mounted(mount_point)


def as_user_without_privileges(command: str, file: Path) -> subprocess.CompletedProcess[str]:
    """Run a command on a file as nobody."""
    blank = "" if command.endswith("=") else " "
    user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    script: list[str | Path] = ["sh", "-c", f'{command}{blank}"$1" >/dev/null', "sh", file]
    return subprocess.run(["setpriv", *user, *script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_plain_user(users_folder: Path, kind: str) -> None:
    """A user can mount, write and unmount without being root."""
    file = "m/disk.raw" if kind == "directory" else "m"
    done = as_user(
        f"""
        qemu-img create -q -f qcow2 disk.qcow2 4M
        {"mkdir" if kind == "directory" else "touch"} m
        $qcowfuse disk.qcow2 m
        test "$(stat -c %s {file})" = 4194304
        echo "by a user" | dd of={file} conv=notrunc status=none
        head -c 9 {file}
        fusermount3 -u m
        for i in $(seq 100); do qemu-img check -q disk.qcow2 2>/dev/null && exit 0; sleep 0.1; done
        exit 9
        """,
        users_folder,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "by a user", "")


def test_plain_user_ends_it_by_signal(users_folder: Path) -> None:
    """SIGTERM to a user's daemon unmounts through fusermount3."""
    done = as_user(
        """
        qemu-img create -q -f qcow2 disk.qcow2 4M
        mkdir m
        : >log
        $qcowfuse -f disk.qcow2 m 2>>log &
        for i in $(seq 100); do grep -q 'm/disk.raw' log && break; sleep 0.1; done
        kill $!
        wait $!
        test -z "$(ls m)"
        """,
        users_folder,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_plain_user_without_fusermount(users_folder: Path) -> None:
    """Without fusermount3 a user is told what is missing."""
    done = as_user(
        """
        qemu-img create -q -f qcow2 disk.qcow2 4M
        mkdir m
        PATH=/nowhere exec $qcowfuse disk.qcow2 m
        """,
        users_folder,
    )
    assert done.returncode == 5
    assert "fusermount3 is missing" in done.stderr
    assert done.stderr.count("\n") == 1


def test_plain_user_without_permissions(users_folder: Path) -> None:
    """No right to the image, to the device, or to allow_other: one line each, and the code."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", users_folder / "roots.qcow2", "4M"], check=True)
    (users_folder / "roots.qcow2").chmod(0o600)
    done = as_user("mkdir m; exec $qcowfuse roots.qcow2 m", users_folder)
    assert (done.returncode, done.stderr) == (6, "qcowfuse: roots.qcow2: Permission denied\n")
    done = as_user("qemu-img create -q -f qcow2 d.qcow2 4M; exec $qcowfuse --allow-other d.qcow2 m", users_folder)
    assert done.returncode == 5
    assert "user_allow_other" in done.stderr
    assert done.stderr.count("\n") == 1
    os.chmod("/dev/fuse", 0o600)
    done = as_user("exec $qcowfuse d.qcow2 m", users_folder)
    assert done.returncode == 5
    assert "/dev/fuse cannot be opened: Permission denied" in done.stderr
    assert done.stderr.count("\n") == 1


def test_others_are_let_in_only_when_asked(image: Path, mount_point: Path) -> None:
    """Without allow_other no one else gets in; with it the mode of the file decides."""
    for parent in (mount_point, *mount_point.parents[:3]):
        os.chmod(parent, 0o755)
    file = mount_point / "disk.raw"
    for options, readable in (("rw", False), ("allow_other", False), ("allow_other,umask=022", True)):
        assert run_qcowfuse("-o", options, image, mount_point).returncode == 0
        for command, works in (("head -c 1", readable), ("dd if=/dev/zero count=1 conv=notrunc of=", False)):
            done = as_user_without_privileges(command, file)
            assert (done.returncode == 0) == works, done.stderr
        unmount(mount_point)


def test_a_second_user_is_given_the_file(image: Path, mount_point: Path) -> None:
    """With allow_other, chown of the file (libvirt does that by itself) is all that a second user needs; a umask that
    keeps others out counts for the folder as well."""
    for parent in mount_point.parents[:3]:
        os.chmod(parent, 0o755)
    file = mount_point / "disk.raw"
    for options, folder_mode, works in (
        ("allow_other", 0o755, True),
        (f"allow_other,ro,uid={NOBODY}", 0o755, True),
        ("allow_other,umask=077", 0o700, False),
        ("allow_other,umask=022", 0o755, True),
        ("rw", 0o700, False),
    ):
        assert run_qcowfuse("-o", options, image, mount_point).returncode == 0
        if "ro" not in options.split(","):
            os.chown(file, NOBODY, NOBODY)
        assert stat.S_IMODE(mount_point.stat().st_mode) == folder_mode
        assert (as_user_without_privileges("head -c 1", file).returncode == 0) == works
        if not file.stat().st_mode & 0o044:
            done = subprocess.run(
                ["setpriv", f"--reuid={NOBODY - 1}", f"--regid={NOBODY - 1}", "--clear-groups", "head", "-c1", file],
                capture_output=True,
                check=False,
            )
            assert done.returncode != 0
        unmount(mount_point)


def test_the_file_tells_the_pid_of_its_daemon(image: Path, mount_point: Path) -> None:
    """So that a signal reaches that one and no other."""
    assert run_qcowfuse(image, mount_point).returncode == 0
    assert int(os.getxattr(mount_point / "disk.raw", "user.qcowfuse.pid")) == daemon_pid(mount_point)
    unmount(mount_point)
