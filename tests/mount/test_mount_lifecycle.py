"""Start and end: daemon and foreground, signals, unmounting, crashes, waiting for users, locks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.container import lacks
from tests.support.mounting import (
    Mounted,
    check_image_file,
    command,
    create_image,
    environment,
    is_mounted,
    loop_device,
    run_qcowfuse,
    wait_until,
)

pytestmark = pytest.mark.mount


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return create_image(tmp_path / "disk.qcow2", "64M")


@pytest.fixture
def mount_point(tmp_path: Path) -> Path:
    path = tmp_path / "mount point"
    path.mkdir()
    return path


def write(mount: Mounted, data: bytes) -> None:
    """Write without closing first: the data is in the page cache when the end comes."""
    with mount.file.open("r+b") as file:
        file.write(data)


def assert_image_begins_with(image: Path, data: bytes) -> None:
    """The image is free, sound, and holds the data."""
    check_image_file(image)
    raw = image.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    with raw.open("rb") as file:
        assert file.read(len(data)) == data


@pytest.mark.parametrize("end", ["SIGTERM", "SIGINT", "SIGHUP", "fusermount3", "umount"])
def test_clean_end_in_the_foreground(image: Path, mount_point: Path, end: str) -> None:
    """Signals and unmounting end it with code 0, everything written, the lock given up and the mount gone."""
    if end == "umount" and os.geteuid() != 0:
        pytest.skip("needs to be root")
    data = os.urandom(1 << 20)
    with Mounted(image, mount_point) as mount:
        write(mount, data)
        if end.startswith("SIG"):
            mount.send_signal(signal.Signals[end])
        else:
            subprocess.run([*(["umount"] if end == "umount" else ["fusermount3", "-u"]), mount_point], check=True)
        log = mount.wait_for_end(0)
        assert "ERROR" not in log
        assert not is_mounted(mount_point)
        assert_image_begins_with(image, data)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_daemon_ends_on_signals(image: Path, mount_point: Path, end: signal.Signals) -> None:
    """A daemon ends as cleanly, and is not disturbed by SIGHUP."""
    data = os.urandom(1 << 20)
    with Mounted(image, mount_point, foreground=False) as mount:
        write(mount, data)
        mount.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert mount.is_alive
        mount.send_signal(end)
        mount.wait_for_end()
        assert not is_mounted(mount_point)
        assert_image_begins_with(image, data)


def test_daemon_leaves_the_session(image: Path, mount_point: Path) -> None:
    """The daemon has a session of its own, / as directory, and holds none of the starter's streams."""
    with Mounted(image, mount_point, foreground=False) as mount:
        assert os.getsid(mount.pid) == mount.pid
        assert os.readlink(f"/proc/{mount.pid}/cwd") == "/"
        assert {os.readlink(f"/proc/{mount.pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}


def test_relative_paths(image: Path, mount_point: Path) -> None:
    """Relative names are those of the directory where it was started."""
    done = run_qcowfuse(image.name, mount_point.name, cwd=image.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert (mount_point / "disk.raw").stat().st_size == 64 << 20
    subprocess.run(["fusermount3", "-u", mount_point], check=True)


def test_start_right_after_an_unmount_waits_for_the_lock(image: Path, mount_point: Path) -> None:
    """A daemon that still writes back holds the image; the next one waits for it instead of failing."""
    data = os.urandom(24 << 20)
    for _ in range(3):
        with Mounted(image, mount_point, foreground=False) as mount:
            write(mount, data)
            subprocess.run(["fusermount3", "-u", mount_point], check=True)
            with Mounted(image, mount_point, foreground=False):
                assert not mount.is_alive
    assert_image_begins_with(image, data)


def test_image_in_use_is_refused_after_the_wait(image: Path, mount_point: Path, tmp_path: Path) -> None:
    """A second qcowfuse on a writable image fails with the code for locks, and one line that names the image."""
    other = tmp_path / "other"
    other.mkdir()
    with Mounted(image, mount_point):
        start = time.monotonic()
        done = run_qcowfuse("--lock-wait", "0.5", image, other)
        assert time.monotonic() - start >= 0.5
        assert done.returncode == 4
        assert str(image) in done.stderr
        assert done.stderr.count("\n") == 1
        refused = subprocess.run(["qemu-io", "-c", "read 0 1", image], capture_output=True, check=False)
        assert refused.returncode != 0


def test_killed_daemon_leaves_a_dead_mount(image: Path, mount_point: Path, tmp_path: Path) -> None:
    """After kill -9 the mount point answers ENOTCONN, a new start says so, and the flushed data is there."""
    data = os.urandom(1 << 20)
    with Mounted(image, mount_point) as mount:
        write(mount, data)
        mount.send_signal(signal.SIGKILL)
        mount.wait_for_end(-signal.SIGKILL)
        with pytest.raises(OSError) as caught:
            mount.file.stat()
        assert caught.value.errno == errno.ENOTCONN
        done = run_qcowfuse(image, mount_point)
        assert done.returncode == 5
        assert "fusermount3 -u" in done.stderr
        subprocess.run(["fusermount3", "-u", mount_point], check=True)
        with Mounted(image, mount_point), mount.file.open("rb") as file:
            assert file.read(len(data)) == data


@pytest.mark.root
def test_aborted_connection_is_a_failure(image: Path, mount_point: Path) -> None:
    """A connection aborted from outside leaves a dead mount and a code that says so."""
    with Mounted(image, mount_point) as mount:
        minor = os.minor(mount_point.stat().st_dev)
        connections = Path("/sys/fs/fuse/connections")
        if not connections.joinpath(str(minor)).exists():
            subprocess.run(["mount", "-t", "fusectl", "none", connections], check=True)
        connections.joinpath(str(minor), "abort").write_text("1")
        assert "aborted" in mount.wait_for_end(5)
        with pytest.raises(OSError) as caught:
            mount.file.open("rb")
        assert caught.value.errno == errno.ENOTCONN
        subprocess.run(["fusermount3", "-u", mount_point], check=True)


def unmount_what_was_killed(mount_point: Path) -> None:
    """Unmount, unless the last try to end the mount, which a daemon had begun before it was killed, came through."""
    subprocess.run(["fusermount3", "-u", "-z", mount_point], check=False, capture_output=True)
    assert mount_point.stat().st_dev == mount_point.parent.stat().st_dev


def test_stop_while_in_use_waits_for_the_users(image: Path, mount_point: Path) -> None:
    """SIGTERM while the file is open takes nothing away: it says who uses it, goes on, and ends when it is free."""
    data = os.urandom(1 << 20)
    with Mounted(image, mount_point) as mount:
        with mount.file.open("r+b", buffering=0) as file:
            mount.send_signal(signal.SIGTERM)
            wait_until(lambda: f"pid {os.getpid()}" in mount.log, "the log to say who uses it")
            assert mount.is_alive
            file.write(data)
            assert os.pread(file.fileno(), len(data), 0) == data
        mount.wait_for_end(0)
        assert_image_begins_with(image, data)


def test_stop_while_in_use_flushes(image: Path, mount_point: Path) -> None:
    """What was written before and during the wait survives a kill a moment later."""
    early, late = os.urandom(1 << 20), os.urandom(1 << 20)
    with Mounted(image, mount_point) as mount:
        fd = os.open(mount.file, os.O_RDWR)
        os.write(fd, early)
        mount.send_signal(signal.SIGTERM)
        time.sleep(1)
        os.write(fd, late)
        time.sleep(3)
        mount.send_signal(signal.SIGKILL)
        mount.wait_for_end(-signal.SIGKILL)
        with pytest.raises(OSError):
            os.close(fd)
        unmount_what_was_killed(mount_point)
        with Mounted(image, mount_point), mount.file.open("rb") as file:
            assert file.read(2 << 20) == early + late


@pytest.mark.root
def test_stop_under_a_loop_device_waits_for_it(image: Path, mount_point: Path) -> None:
    """A loop device keeps its disk after SIGTERM, the log names it, and its last writes arrive."""
    data = os.urandom(1 << 20)
    with Mounted(image, mount_point) as mount:
        with loop_device(mount.file) as device:
            mount.send_signal(signal.SIGTERM)
            time.sleep(1)
            with open(device, "r+b", buffering=0) as disk:
                disk.write(data)
        assert device in mount.wait_for_end(0)
        assert_image_begins_with(image, data)


def test_kill_while_it_asks_its_own_mount(image: Path, mount_point: Path) -> None:
    """A daemon that is killed while it waits for the file that it serves is gone at once, and the mount is dead."""
    slow = ("--debug-io-delay", "500ms")  # each flush takes seconds
    with Mounted(image, mount_point, *slow) as mount:
        fd = os.open(mount.file, os.O_RDWR)
        os.write(fd, os.urandom(1 << 20))
        mount.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        mount.send_signal(signal.SIGKILL)
        mount.wait_for_end(-signal.SIGKILL)
        with pytest.raises(OSError) as caught:
            os.close(fd)
        # EIO where the kernel still had to write data back.
        assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
        unmount_what_was_killed(mount_point)


def test_lazy_unmount_serves_the_last_user(image: Path, mount_point: Path) -> None:
    """After fusermount3 -u -z whoever has the file open goes on, and the end comes with the close."""
    data = os.urandom(1 << 20)
    with Mounted(image, mount_point) as mount:
        with mount.file.open("r+b", buffering=0) as file:
            subprocess.run(["fusermount3", "-u", "-z", mount_point], check=True)
            file.write(data)
            assert os.pread(file.fileno(), len(data), 0) == data
            assert mount.is_alive
        mount.wait_for_end(0)
        assert_image_begins_with(image, data)


def test_lazily_unmounted_file_below_is_left_alone(image: Path, tmp_path: Path) -> None:
    """A write past the end after a lazy unmount does not touch the plain file that the mount had hidden."""
    below = tmp_path / "below"
    below.write_bytes(b"precious")
    with Mounted(image, below) as mount:
        fd = os.open(below, os.O_RDWR)
        subprocess.run(["fusermount3", "-u", "-z", below], check=True)
        os.pwrite(fd, b"x" * 4096, 64 << 20)
        with pytest.raises(OSError):
            os.fsync(fd)
        os.close(fd)
        mount.wait_for_end(0)
    assert below.read_bytes() == b"precious"


def test_mounting_over_the_image_itself(image: Path) -> None:
    """The image file can be its own mount point."""
    with Mounted(image, image) as mount:
        assert image.stat().st_size == 64 << 20
        write(mount, b"over itself")
    assert_image_begins_with(image, b"over itself")


def test_statistics_on_sigusr1(image: Path, mount_point: Path) -> None:
    """SIGUSR1 prints the counters to the log, and the service goes on."""
    with Mounted(image, mount_point) as mount:
        mount.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        assert mount.file.exists()
        mount.close()
        assert "backend.reads=" in mount.log


def test_log_file(image: Path, mount_point: Path, tmp_path: Path) -> None:
    """With --log-file a daemon's log is there."""
    log = tmp_path / "log"
    with Mounted(image, mount_point, "--log-file", log, foreground=False) as mount:
        mount.send_signal(signal.SIGUSR1)
        wait_until(lambda: "backend.reads=" in log.read_text(), "the statistics")
    assert "closed" in log.read_text()


@pytest.mark.root
def test_sequential_readers_are_read_ahead_of(image: Path, mount_point: Path) -> None:
    """Mounted by root, the kernel reads a whole MiB ahead."""
    with Mounted(image, mount_point) as mount:
        device = mount.file.stat().st_dev
        setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        if os.statvfs(setting).f_flag & os.ST_RDONLY:
            lacks("a writable /sys")
        assert int(setting.read_text()) >= 1024


def test_idle_daemon_uses_no_processor_time(image: Path, mount_point: Path) -> None:
    """After work, a daemon with nothing to do does nothing."""

    def ticks(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    with Mounted(image, mount_point) as mount:
        with mount.file.open("rb") as file:
            file.read()
        time.sleep(0.5)
        before = ticks(mount.pid)
        time.sleep(1.5)
        assert ticks(mount.pid) - before <= 1


def test_readiness_is_told_to_systemd(image: Path, mount_point: Path, tmp_path: Path) -> None:
    """With NOTIFY_SOCKET set: READY=1 and a status when it serves, STOPPING=1 when told to end."""
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(20)
        process = subprocess.Popen(
            command("-f", image, mount_point),
            stderr=subprocess.DEVNULL,
            env=environment(NOTIFY_SOCKET=str(tmp_path / "notify")),
        )
        ready = listener.recv(4096).decode()
        assert ready.startswith("READY=1\nSTATUS=")
        assert str(image) in ready
        assert is_mounted(mount_point)
        process.terminate()
        assert listener.recv(4096).decode().startswith("STOPPING=1\n")
        assert process.wait(20) == 0


UNTUNED = """
import sys
from qcowfuse.fuse.libfuse import session_hook
session_hook.SESSION_NEW = {"no_such_function": ()}
from qcowfuse.cli.mount.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_untuned_session_serves_all_the_same(image: Path, tmp_path: Path, kind: str) -> None:
    """Where pyfuse3 is not what the hook knows: no write-back cache, said once, and nothing else is lost."""
    mount_point = tmp_path / "untuned"
    mount_point.mkdir() if kind == "directory" else mount_point.touch()
    file = mount_point / "disk.raw" if kind == "directory" else mount_point
    log = tmp_path / "log"
    start: list[str | Path] = [sys.executable, "-c", UNTUNED, "--log-file", log, image, mount_point]
    subprocess.run(start, check=True, env=environment())
    data = os.urandom(1 << 20)
    try:
        with file.open("wb") as stream:
            assert os.fstat(stream.fileno()).st_size == 64 << 20
            stream.write(data)
        assert file.stat().st_size == 64 << 20
        assert log.read_text().count("not tuned") == 1
    finally:
        subprocess.run(["fusermount3", "-u", mount_point], check=True)
    wait_until(lambda: "closed" in log.read_text(), "the end")
    assert_image_begins_with(image, data)


def test_names_with_odd_characters(tmp_path: Path) -> None:
    """Blanks, commas, backslashes and letters beyond ASCII in the names of image and mount point."""
    folder = tmp_path / "a, b\\c ä"
    folder.mkdir()
    image = create_image(folder / "i, \\054 é.qcow2", "1M")
    mount_point = folder / "m, ü"
    mount_point.mkdir()
    with Mounted(image, mount_point, "--name", "ö, x.raw", name="ö, x.raw") as mount:
        assert os.listdir(mount_point) == ["ö, x.raw"]
        line = next(line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "m,\\040ü" in line)
        source = line.split(" - ")[1].split()[1].replace("\\040", " ").replace("\\134", "\\")
        assert source == str(image)
        mount.send_signal(signal.SIGTERM)
        mount.wait_for_end(0)
