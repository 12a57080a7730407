"""Mounts whose writes go to another file than the image: several at once, how they end, and where they can't be."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support import loops, qemu
from tests.support.loops import EXT4
from tests.support.mounting import Mounted, check_image_file, create_image, is_mounted, run_qcowfuse, wait_until
from tests.support.oracle import reference_bytes

pytestmark = pytest.mark.mount
MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image in a folder of its own, filled with sevens."""
    (tmp_path / "images").mkdir()
    path = create_image(tmp_path / "images/disk.qcow2", "16M")
    qemu.io(path, ["write -P 7 0 16M"])
    return path


@pytest.fixture
def points(tmp_path: Path) -> list[Path]:
    """Two mount points."""
    points = [tmp_path / "m1", tmp_path / "m2"]
    for point in points:
        point.mkdir()
    return points


def put(file: Path, place: int, data: bytes) -> None:
    """Write, and wait until it is in the overlay."""
    fd = os.open(file, os.O_WRONLY)
    try:
        assert os.pwrite(fd, data, place) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


def held_without_name(pid: int, folder: Path) -> list[str]:
    """The open files of a process that have no name in ``folder``."""
    names = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    return [name for name in names if name.startswith(f"{folder}/#")]


@contextmanager
def small_file_system(folder: Path, n_bytes: int) -> Iterator[Path]:
    """An ext4 of its own."""
    disk = folder / "small.raw"
    with open(disk, "wb") as stream:
        stream.truncate(n_bytes)
    qemu.must_run(*EXT4.make, "-m", "0", "-b", "1024", disk)
    with loops.loop_device(disk) as device, loops.mounted_file_system(device, folder / "small") as point:
        yield point


def test_two_at_once_beside_a_reader(image: Path, points: list[Path], tmp_path: Path) -> None:
    """Each has its own writes, in the image's folder or in another one, a reader has none; nothing is left."""
    before = loops.sha256_of(image)
    other, third = tmp_path / "other", tmp_path / "m3"
    other.mkdir()
    third.mkdir()
    with (
        Mounted(image, points[0], "-x", foreground=False) as first,
        Mounted(image, points[1], "-o", f"ephemeral={other}") as second,
        Mounted(image, third, "-r") as reader,
    ):
        put(first.file, 5, b"first")
        put(second.file, 5, b"other")
        assert first.file.read_bytes()[:11] == b"\7" * 5 + b"first\7"
        assert second.file.read_bytes()[:11] == b"\7" * 5 + b"other\7"
        assert reader.file.read_bytes() == b"\7" * (16 * MIB)
        assert len(held_without_name(first.pid, image.parent)) == 1
        assert len(held_without_name(second.pid, other)) == 1
        assert subprocess.run(["findmnt", "-n", "-o", "SOURCE", points[1]], capture_output=True, text=True,
                              check=True).stdout.strip() == str(image)  # fmt: skip
        listed = run_qcowfuse("list", "--output=json").stdout
        assert [each["image"] for each in json.loads(listed) if str(tmp_path) in each["image"]] == [str(image)] * 3
        (tmp_path / "m4").mkdir()
        refused = run_qcowfuse("--lock-wait=0", image, tmp_path / "m4")
        assert (refused.returncode, refused.stderr.count("\n")) == (4, 1)
        assert os.listdir(image.parent) == ["disk.qcow2"]
        assert os.listdir(other) == []
    assert loops.sha256_of(image) == before
    assert os.listdir(image.parent) == ["disk.qcow2"]


@pytest.mark.root
def test_killed_with_throw_away_writes(image: Path, points: list[Path], tmp_path: Path) -> None:
    """kill -9 leaves no file, no lock, and gives the space back."""
    with small_file_system(tmp_path, 24 * MIB) as small:
        free = os.statvfs(small).f_bfree
        with Mounted(image, points[0], f"--ephemeral={small}", foreground=False) as mounted:
            put(mounted.file, 0, os.urandom(8 * MIB))
            used = (free - os.statvfs(small).f_bfree) * os.statvfs(small).f_frsize
            assert used >= 8 * MIB
            mounted.send_signal(signal.SIGKILL)
            wait_until(lambda: not mounted.is_alive, "the end of the daemon")
            subprocess.run(["fusermount3", "-u", points[0]], check=True)
        assert os.listdir(small) in ([], ["lost+found"])
        wait_until(lambda: os.statvfs(small).f_bfree == free, "the space")
    fd = os.open(image, os.O_RDWR)
    try:
        fcntl.fcntl(
            fd,
            fcntl.F_OFD_SETLK,
            b"\1\0" + bytes(6) + (100).to_bytes(8, "little") + (200).to_bytes(8, "little") + bytes(8),
        )
    finally:
        os.close(fd)
    with Mounted(image, points[0]) as mounted:
        assert mounted.file.read_bytes() == b"\7" * (16 * MIB)


@pytest.mark.root
def test_a_full_folder(image: Path, points: list[Path], tmp_path: Path) -> None:
    """Where the overlay finds no room the writer is told, all that was written before is read, and room helps."""
    with small_file_system(tmp_path, 16 * MIB) as small:
        filler = small / "filler"
        with open(filler, "wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, 4 * MIB)
        with Mounted(image, points[0], f"--ephemeral={small}") as mounted:
            fd = os.open(mounted.file, os.O_RDWR | os.O_DSYNC)
            n_written = 0
            block = b"n" * 65536
            try:
                with suppress(OSError):
                    while n_written < 16 * MIB:
                        os.pwrite(fd, block, n_written)
                        n_written += len(block)
                with pytest.raises(OSError, match="No space left"):
                    os.pwrite(fd, block, n_written)
                assert n_written >= 4 * MIB
                assert os.pread(fd, n_written, 0) == b"n" * n_written
                filler.unlink()
                os.pwrite(fd, block, n_written)
                os.fsync(fd)
            finally:
                os.close(fd)


@pytest.mark.root
def test_an_image_on_read_only_media(image: Path, points: list[Path], tmp_path: Path) -> None:
    """An image that nobody may write, in a folder mounted read-only: one line says that a folder is needed."""
    image.chmod(0o444)
    media = tmp_path / "media"
    media.mkdir()
    qemu.must_run("mount", "--bind", image.parent, media)
    try:
        qemu.must_run("mount", "-o", "remount,bind,ro", media)
        refused = run_qcowfuse("-x", media / "disk.qcow2", points[0])
        assert (refused.returncode, refused.stderr.count("\n")) == (6, 1)
        assert f"{media}: Read-only file system; name another folder" in refused.stderr
        assert "--ephemeral=/var/tmp" in refused.stderr
        with Mounted(media / "disk.qcow2", points[0], f"--ephemeral={tmp_path}") as mounted:
            put(mounted.file, 0, b"written")
            assert mounted.file.read_bytes()[:8] == b"written\7"
        with Mounted(media / "disk.qcow2", points[0], "--overlay", tmp_path / "o.qcow2") as mounted:
            put(mounted.file, 0, b"kept")
    finally:
        qemu.must_run("umount", media)
    assert reference_bytes(image, "qcow2") == b"\7" * (16 * MIB)


@pytest.mark.root
def test_a_folder_without_room(image: Path, points: list[Path], tmp_path: Path) -> None:
    """The file system is full from the start: the message says that another one can be named."""
    full = tmp_path / "full"
    full.mkdir()
    qemu.must_run("mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", full)
    try:
        refused = run_qcowfuse(f"--ephemeral={full}", image, points[0])
    finally:
        qemu.must_run("umount", full)
    assert refused.returncode == 6
    assert refused.stderr.endswith(
        f"qcowfuse: {full}/overlay of disk.qcow2: No space left on device "
        "(another folder for what is written to the disk: --ephemeral=/var/tmp)\n"
    )
    assert not is_mounted(points[0])


def test_where_it_cannot_be(image: Path, points: list[Path], tmp_path: Path) -> None:
    """A file system without nameless files (a FUSE one), no folder, no right; and what contradicts. One line each."""
    with Mounted(image, points[0], "-r"):
        refused = run_qcowfuse(f"--ephemeral={points[0]}", image, points[1])
        assert (refused.returncode, refused.stderr.count("\n")) == (6, 1)
        assert "name another folder" in refused.stderr
    refused = run_qcowfuse(f"--ephemeral={tmp_path}/none", image, points[1])
    assert refused.stderr == f"qcowfuse: {tmp_path}/none: No such file or directory\n"
    for words, said in (
        (("-x", "--overlay", "o"), "exclude each other"),
        (("-x", "-r"), "exclude each other"),
        (("-o", "ro,ephemeral"), "exclude each other"),
        (("--overlay", "o", "--snapshot", "s"), "exclude each other"),
        (("--ephemeral=",), "needs a value"),
        (("-o", "overlay"), "needs a value"),
        (("--ephemerall",), "did you mean --ephemeral"),
    ):
        refused = run_qcowfuse(*words, image, points[1])
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert said in refused.stderr
    assert not is_mounted(points[1])


@pytest.mark.root
def test_memory_is_named(image: Path, points: list[Path], tmp_path: Path) -> None:
    """On a tmpfs the log says that it is memory; a block device has no folder to put it into."""
    with Mounted(image, points[0], "--ephemeral=/dev/shm") as mounted:
        put(mounted.file, 0, b"x")
        assert "/dev/shm is in memory (tmpfs)" in mounted.log
    with loops.loop_device(image) as device:
        refused = run_qcowfuse("-x", device, points[0])
        assert (refused.returncode, refused.stderr.count("\n")) == (3, 1)
        assert "is a block device: name a folder" in refused.stderr
        with Mounted(device, points[0], f"--ephemeral={tmp_path}") as mounted:
            put(mounted.file, 0, b"x")
            assert "in memory" not in mounted.log
        with Mounted(device, points[0], "--overlay", tmp_path / "o.qcow2"):
            pass
        assert qemu.info(tmp_path / "o.qcow2")["backing-filename"] == str(device)


@pytest.mark.parametrize("options", [("--partition=1",), ("--partitions",), ("--growable",)])
def test_a_kept_overlay(options: tuple[str, ...], image: Path, points: list[Path], tmp_path: Path) -> None:
    """It is made, used again, grown, and holds what was written; the image stays as it is."""
    script = "label: gpt\nstart=2048, size=4096\nstart=6144, size=4096\n"
    with Mounted(image, points[0]) as mounted:
        subprocess.run(["sfdisk", "-q", mounted.file], input=script, text=True, check=True)
    before = loops.sha256_of(image)
    overlay = tmp_path / "o.qcow2"
    name = "disk.raw.p2" if options == ("--partitions",) else "disk.raw"
    for data in (b"one", b"two"):
        with Mounted(image, points[0], *options, "-o", f"overlay={overlay}") as mounted:
            file = mounted.file.with_name(name)
            if options == ("--growable",):
                os.truncate(file, file.stat().st_size + MIB)
            put(file, 4096 * data[0], data)
            assert file.read_bytes()[4096 * data[0] :][:4] == data + b"\7"
        check_image_file(overlay)
    assert loops.sha256_of(image) == before
    start = {"--partition=1": 2048, "--partitions": 6144}.get("".join(options), 0) * 512
    shown = reference_bytes(overlay, "qcow2")
    assert len(shown) == (18 if options == ("--growable",) else 16) * MIB
    for data in (b"one", b"two"):
        assert shown[start + 4096 * data[0] :][:4] == data + b"\7"


def test_an_overlay_is_not_left_where_the_start_fails(image: Path, points: list[Path], tmp_path: Path) -> None:
    """A mount point that cannot be used is found before the overlay is made; so is an image that is none."""
    (points[0] / "full").write_text("")
    assert run_qcowfuse("--overlay", tmp_path / "o.qcow2", image, points[0]).returncode == 5
    (tmp_path / "text").write_text("no image")
    assert run_qcowfuse("--overlay", tmp_path / "o.qcow2", tmp_path / "text", points[1]).returncode == 3
    assert not (tmp_path / "o.qcow2").exists()
