"""Bad input: each kind gives one clear line, the documented exit code, and leaves everything as it was."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounting import Mounted, command, create_image, environment, is_mounted, run_qcowfuse

pytestmark = pytest.mark.mount

IMAGE, MOUNT, SYSTEM = 3, 5, 6


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return create_image(tmp_path / "disk.qcow2", "1M")


@pytest.fixture
def mount_point(tmp_path: Path) -> Path:
    path = tmp_path / "m"
    path.mkdir()
    return path


@pytest.fixture(params=["daemon", "foreground"])
def how(request: pytest.FixtureRequest) -> list[str]:
    """Both ways of starting must fail alike."""
    return ["-f"] if request.param == "foreground" else []


def assert_refused(arguments: list[str | Path], code: int, *words: str) -> None:
    """One line on standard error that has the words, and the code."""
    done = run_qcowfuse(*arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("qcowfuse: ")
    for word in words:
        assert word in done.stderr


def test_not_an_image(tmp_path: Path, mount_point: Path, how: list[str]) -> None:
    """A file that is no QCOW image."""
    other = tmp_path / "other"
    other.write_bytes(os.urandom(100_000))
    assert_refused([*how, other, mount_point], IMAGE, str(other))
    assert not is_mounted(mount_point)


@pytest.mark.parametrize("n_bytes", [0, 3, 60, 200])
def test_truncated_image(image: Path, mount_point: Path, how: list[str], n_bytes: int) -> None:
    """An image that ends in its header, or before its refcounts."""
    os.truncate(image, n_bytes)
    assert_refused([*how, image, mount_point], IMAGE, str(image))


def test_directory(tmp_path: Path, mount_point: Path, how: list[str]) -> None:
    """A directory instead of an image."""
    assert_refused([*how, tmp_path, mount_point], SYSTEM, str(tmp_path), "directory")


def test_no_such_image(tmp_path: Path, mount_point: Path, how: list[str]) -> None:
    """An image that does not exist."""
    assert_refused([*how, tmp_path / "none", mount_point], SYSTEM, "none", "No such file")


def test_missing_backing_file(tmp_path: Path, mount_point: Path, how: list[str]) -> None:
    """A backing file that does not exist is named."""
    image = create_image(tmp_path / "top.qcow2", "1M", "-u", "-b", "gone.raw", "-F", "raw")
    assert_refused([*how, image, mount_point], IMAGE, "gone.raw")


def test_missing_mount_point(image: Path, tmp_path: Path, how: list[str]) -> None:
    """A mount point that does not exist."""
    assert_refused([*how, image, tmp_path / "none"], MOUNT, str(tmp_path / "none"), "does not exist")


def test_mount_point_that_is_not_empty(image: Path, mount_point: Path, how: list[str]) -> None:
    """A directory with something in it is refused, unless it is asked for."""
    (mount_point / "something").touch()
    assert_refused([*how, image, mount_point], MOUNT, str(mount_point), "is not empty, it holds something (")
    with Mounted(image, mount_point, "-o", "nonempty"):
        assert os.listdir(mount_point) == ["disk.raw"]


def test_mount_point_of_another_kind(image: Path, tmp_path: Path, how: list[str]) -> None:
    """A socket is no mount point."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert_refused([*how, image, tmp_path / "socket"], MOUNT, "neither a directory nor a regular file")


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_already_mounted(image: Path, tmp_path: Path, how: list[str], kind: str) -> None:
    """A mount point that qcowfuse serves already; the image behind it is named."""
    mount_point = tmp_path / "busy"
    mount_point.mkdir() if kind == "directory" else mount_point.touch()
    other = create_image(tmp_path / "other.qcow2", "1M")
    with Mounted(image, mount_point):
        assert_refused([*how, other, mount_point], MOUNT, "already mounted", str(image))


@contextmanager
def hidden_by(path: str, source: str | Path) -> Iterator[list[str]]:
    """A command prefix under which ``source`` lies over ``path``, in a mount namespace of its own."""
    yield ["unshare", "-m", "sh", "-c", f'mount --bind "{source}" {path} && exec "$@"', "sh"]


def run_under(prefix: list[str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *command(*arguments)], capture_output=True, text=True, check=False, env=environment(), timeout=60
    )


@pytest.mark.root
def test_no_fuse_device(image: Path, mount_point: Path, tmp_path: Path, how: list[str]) -> None:
    """Without /dev/fuse it says what to do."""
    empty = tmp_path / "dev"
    empty.mkdir()
    with hidden_by("/dev", empty) as prefix:
        done = run_under(prefix, *how, image, mount_point)
    assert done.returncode == MOUNT
    assert "/dev/fuse does not exist" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.root
def test_fuse_device_that_is_none(image: Path, mount_point: Path, how: list[str]) -> None:
    """A /dev/fuse that is something else gives one line with libfuse's words."""
    with hidden_by("/dev/fuse", "/dev/null") as prefix:
        done = run_under(prefix, *how, image, mount_point)
    assert done.returncode == MOUNT
    assert done.stderr.count("\n") == 1
    assert str(mount_point) in done.stderr


@pytest.mark.root
def test_read_only_file_system(image: Path, tmp_path: Path, mount_point: Path, how: list[str]) -> None:
    """An image on a read-only file system: -r is suggested, and works."""
    folder = tmp_path / "frozen"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    try:
        frozen = create_image(folder / "disk.qcow2", "1M")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        assert_refused([*how, frozen, mount_point], SYSTEM, "Read-only file system", "-r")
        with Mounted(frozen, mount_point, "-r") as mount:
            assert mount.file.stat().st_size == 1 << 20
    finally:
        subprocess.run(["umount", folder], check=True)
