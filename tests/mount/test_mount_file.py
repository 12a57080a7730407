"""The served file through the kernel: sizes, modes, times, mmap, O_TRUNC, extended attributes."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounting import Mounted, check_image_file, create_image, wait_until

pytestmark = pytest.mark.mount

SIZE = 64 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return create_image(tmp_path / "disk.qcow2", "64M")


@pytest.fixture(params=["directory", "file", "no-writeback-cache"])
def mounted(request: pytest.FixtureRequest, image: Path, tmp_path: Path) -> Iterator[Mounted]:
    """A mount of each kind; unmounted cleanly at the end, the image checked."""
    mount_point = tmp_path / "mount"
    if request.param == "file":
        mount_point.touch()
    else:
        mount_point.mkdir()
    options = ["--no-writeback-cache"] if request.param == "no-writeback-cache" else []
    with Mounted(image, mount_point, *options) as mount:
        yield mount
    check_image_file(image)


def test_bytes_survive_a_remount(image: Path, tmp_path: Path) -> None:
    """What is written is there when it is mounted again, and where QEMU sees it."""
    mount_point = tmp_path / "m"
    mount_point.mkdir()
    data = os.urandom(3 << 20)
    with Mounted(image, mount_point) as mount, mount.file.open("r+b") as file:
        file.seek(12345)
        file.write(data)
    raw = tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    assert raw.read_bytes()[12345 : 12345 + len(data)] == data
    with Mounted(image, mount_point, "-r") as mount, mount.file.open("rb") as file:
        file.seek(12345)
        assert file.read(len(data)) == data


def test_size_and_type(mounted: Mounted) -> None:
    """The file is regular and of the size of the disk."""
    status = mounted.file.stat()
    assert stat.S_ISREG(status.st_mode)
    assert status.st_size == SIZE
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (os.getuid(), 0o600)
    with mounted.file.open("rb") as file:
        assert file.seek(0, os.SEEK_END) == SIZE


def test_du_tells_the_truth(mounted: Mounted) -> None:
    """Blocks are those that the guest has allocated, right after a close."""
    wait_until(lambda: mounted.file.stat().st_blocks == 0, "the first count")
    with mounted.file.open("r+b") as file:
        file.write(os.urandom(1 << 20))
    assert mounted.file.stat().st_blocks == (1 << 20) // 512


def test_statfs_shows_clusters(mounted: Mounted) -> None:
    """statfs has the cluster size and the size of the disk."""
    stats = os.statvfs(mounted.file)
    assert (stats.f_bsize, stats.f_frsize, stats.f_blocks) == (65536, 65536, SIZE // 65536)
    assert 0 < stats.f_bavail <= stats.f_blocks


def test_truncation_zeroes_and_leaves_the_size_alone(mounted: Mounted) -> None:
    """O_TRUNC and ftruncate make the rest read as zeroes and keep the size; more is refused."""
    data = os.urandom(1 << 20)
    with mounted.file.open("r+b") as file:
        file.write(data)
        os.pwrite(file.fileno(), data, SIZE - len(data))
        os.ftruncate(file.fileno(), SIZE)
        os.ftruncate(file.fileno(), SIZE - 1)
        assert os.fstat(file.fileno()).st_size == file.seek(0, os.SEEK_END) == SIZE
        assert os.pread(file.fileno(), len(data), SIZE - len(data)) == data[:-1] + b"\0"
        with pytest.raises(OSError) as caught:
            os.ftruncate(file.fileno(), SIZE + 1)
        assert caught.value.errno == errno.EFBIG
        assert os.pread(file.fileno(), len(data), 0) == data
    with mounted.file.open("wb") as file:
        assert os.fstat(file.fileno()).st_size == SIZE
        os.ftruncate(file.fileno(), 0)
        os.ftruncate(file.fileno(), SIZE)
        assert os.fstat(file.fileno()).st_size == SIZE
    assert mounted.file.stat().st_size == SIZE
    wait_until(lambda: mounted.file.stat().st_blocks == 0, "the space to be given back")
    with mounted.file.open("rb") as file:
        assert not any(file.read())
        assert file.seek(0, os.SEEK_END) == SIZE


def test_copy_of_a_smaller_file(mounted: Mounted, tmp_path: Path) -> None:
    """cp of something smaller leaves what it leaves on a plain file, and zeroes behind that."""
    mounted.file.write_bytes(os.urandom(200_000))
    source = tmp_path / "source"
    source.write_bytes(os.urandom(100_000))
    shutil.copyfile(source, mounted.file)
    assert mounted.file.stat().st_size == SIZE
    with mounted.file.open("rb") as file:
        assert file.read(100_000) == source.read_bytes()
        assert file.read(200_000) == bytes(200_000)


def test_copy_of_a_larger_file_has_no_space(mounted: Mounted, tmp_path: Path) -> None:
    """cp of something too large fails with ENOSPC, and the size is right afterwards."""
    source = tmp_path / "source"
    data = os.urandom(1 << 20)
    with source.open("wb") as file:
        for _ in range(SIZE // len(data) + 2):
            file.write(data)
    done = subprocess.run(["cp", source, mounted.file], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    wait_until(lambda: mounted.file.stat().st_size == SIZE, "the size to be put right", 2)
    with mounted.file.open("rb") as file:
        file.seek(SIZE - len(data))
        assert file.read() == data


def test_write_past_the_end_fails_at_fsync(mounted: Mounted) -> None:
    """A write past the end fails, at fsync at the latest, and the file has its size again."""

    def write_and_sync() -> None:
        os.pwrite(fd, b"x" * 10_000, SIZE + 5000)
        os.fsync(fd)

    fd = os.open(mounted.file, os.O_RDWR)
    try:
        with pytest.raises(OSError) as caught:
            write_and_sync()
        assert caught.value.errno == errno.ENOSPC
    finally:
        os.close(fd)
    with mounted.file.open("rb") as file:
        wait_until(lambda: file.seek(0, os.SEEK_END) == SIZE, "the size to be put right", 2)


def test_shared_mappings(mounted: Mounted) -> None:
    """mmap shared reads and writes the disk, and msync makes it durable."""
    with mounted.file.open("r+b") as file:
        with mmap.mmap(file.fileno(), 1 << 20, mmap.MAP_SHARED, offset=4 << 20) as area:
            area[1000:1005] = b"hello"
            area.flush()
        assert os.pread(file.fileno(), 5, (4 << 20) + 1000) == b"hello"


def test_direct_io(mounted: Mounted) -> None:
    """O_DIRECT reads see buffered writes and the other way round."""
    with mmap.mmap(-1, 65536) as buffer:
        buffer[:] = b"d" * 65536
        fd = os.open(mounted.file, os.O_RDWR | os.O_DIRECT)
        try:
            assert os.pwritev(fd, [buffer], 1 << 20) == 65536
            with mounted.file.open("r+b") as file:
                file.seek(1 << 20)
                assert file.read(65536) == b"d" * 65536
                file.seek(1 << 20)
                file.write(b"e" * 4096)
                file.flush()
                assert os.preadv(fd, [buffer], 1 << 20) == 65536
            assert buffer[:] == b"e" * 4096 + b"d" * 61440
        finally:
            os.close(fd)


def test_mode_owner_and_times(mounted: Mounted) -> None:
    """chmod, chown and utime work; the time of a write is that of the clock."""
    mounted.file.chmod(0o4644)
    os.utime(mounted.file, ns=(10**18, 10**18 + 123456789))
    status = mounted.file.stat()
    assert stat.S_IMODE(status.st_mode) == 0o644
    assert (status.st_atime_ns, status.st_mtime_ns) == (10**18, 10**18 + 123456789)
    if os.geteuid() == 0:
        os.chown(mounted.file, 1234, 4321)
        status = mounted.file.stat()
        assert (status.st_uid, status.st_gid) == (1234, 4321)
    if mounted.file == mounted.mount_point:
        return  # the kernel keeps the time of a file that is the root of a file system with a write-back cache
    with mounted.file.open("r+b") as file:
        file.write(b"x")
    wait_until(lambda: mounted.file.stat().st_mtime_ns > 10**18 + 123456789, "the time of the write")


def test_statistics_are_extended_attributes(mounted: Mounted) -> None:
    """getfattr -d prints counters, and they count."""

    def counters() -> dict[str, int]:
        return {name: int(os.getxattr(mounted.file, name)) for name in os.listxattr(mounted.file)}

    before = counters()
    assert all(name.startswith("user.qcowfuse.") for name in before)
    with mounted.file.open("r+b") as file:
        file.write(b"x" * 65536)
        os.fsync(file.fileno())
    assert counters()["user.qcowfuse.backend.writes"] > before["user.qcowfuse.backend.writes"]
    with pytest.raises(OSError) as caught:
        os.setxattr(mounted.file, "user.qcowfuse.backend.writes", b"0")
    assert caught.value.errno == errno.EROFS


def test_small_writes_are_gathered(image: Path, tmp_path: Path) -> None:
    """With the write-back cache, small writes reach the image in large pieces, without a request for each."""
    mount_point = tmp_path / "m"
    mount_point.mkdir()
    with Mounted(image, mount_point) as mount:
        assert "not tuned" not in mount.log
        with mount.file.open("r+b", buffering=0) as file:
            for _ in range(2000):
                file.write(b"z" * 4096)
            os.fsync(file.fileno())
        assert int(os.getxattr(mount.file, "user.qcowfuse.backend.writes")) < 500


def test_folder_cannot_be_changed(image: Path, tmp_path: Path) -> None:
    """Nothing can be made, removed or renamed in the folder."""
    mount_point = tmp_path / "m"
    mount_point.mkdir()
    with Mounted(image, mount_point) as mount:
        assert os.listdir(mount_point) == ["disk.raw"]
        for attempt in (
            mount.file.unlink,
            (mount_point / "new").touch,
            (mount_point / "new").mkdir,
            lambda: mount.file.rename(mount_point / "new"),
        ):
            with pytest.raises(PermissionError):
                attempt()
        with pytest.raises(FileNotFoundError):
            (mount_point / "new").stat()


def test_read_only(image: Path, tmp_path: Path) -> None:
    """-r serves a file that can be read only, and leaves the image untouched."""
    before = image.read_bytes()
    mount_point = tmp_path / "m"
    mount_point.mkdir()
    with Mounted(image, mount_point, "-r") as mount:
        assert stat.S_IMODE(mount.file.stat().st_mode) == 0o400
        assert mount.file.stat().st_size == SIZE
        with pytest.raises(OSError) as caught:
            mount.file.open("r+b")
        assert caught.value.errno == errno.EROFS
        assert mount.file.open("rb").read(1000) == bytes(1000)
    assert image.read_bytes() == before
