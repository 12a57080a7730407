"""A partition served as the file: file systems in it by a loop device, and by a user without any rights."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import loops, qemu
from tests.support.loops import loop_device, served
from tests.support.mounting import run_qcowfuse, wait_until
from tests.support.users import NOBODY, as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]

MIB = 1 << 20
SIZE = 64 * MIB
START, N_BYTES = 9 * MIB, 24 * MIB
SCRIPT = 'label: gpt\nsize=8M, name="boot"\nsize=24M, name="root"\nsize=+, name="rest"\n'


def make_image(path: Path, script: str = SCRIPT) -> Path:
    """Three partitions; noise all around the second, in which is an empty ext4."""
    raw, part = path.with_suffix(".raw"), path.with_suffix(".part")
    raw.write_bytes(os.urandom(SIZE))
    with raw.open("r+b") as file:
        file.write(bytes(MIB))
        file.seek(-MIB, os.SEEK_END)
        file.write(bytes(MIB))
    words = ["sfdisk", "-q", "--no-reread", "--no-tell-kernel", str(raw)]
    subprocess.run(words, input=script, text=True, check=True, timeout=qemu.TIMEOUT)
    with part.open("wb") as file:
        file.truncate(N_BYTES)
    qemu.must_run("mkfs.ext4", "-q", "-F", "-E", "root_owner=65534:65534", part)
    with raw.open("r+b") as file:
        file.seek(START)
        file.write(part.read_bytes())
    qemu.must_run("qemu-img", "convert", "-O", "qcow2", raw, path)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """See :func:`make_image`."""
    return make_image(tmp_path / "disk.qcow2")


def assert_only_the_partition_has_changed(image: Path) -> None:
    """QEMU finds no fault, and what is around the partition is what it was; fsck likes what is in it."""
    assert qemu.check(image).clean
    before, after = image.with_suffix(".raw"), image.with_suffix(".after")
    qemu.must_run("qemu-img", "convert", "-O", "raw", image, after)
    for start, end in ((0, START), (START + N_BYTES, SIZE)):
        with before.open("rb") as one, after.open("rb") as other:
            one.seek(start)
            other.seek(start)
            assert one.read(end - start) == other.read(end - start)
    part = image.with_suffix(".part")
    with after.open("rb") as file:
        file.seek(START)
        part.write_bytes(file.read(N_BYTES))
    qemu.must_run("e2fsck", "-fn", part)


@contextmanager
def mounted(device: Path, folder: Path) -> Iterator[Path]:
    """The file system on ``device``."""
    folder.mkdir(exist_ok=True)
    qemu.must_run("mount", device, folder)
    try:
        yield folder
    finally:
        qemu.must_run("umount", folder)


@pytest.mark.parametrize("wanted", ["2", "root"])
def test_a_file_system_in_a_partition_on_a_loop_device(image: Path, tmp_path: Path, wanted: str) -> None:
    """Written by one mount, read by the next; nothing else on the disk has changed."""
    data = os.urandom(3 * MIB)
    with served(image, "--partition", wanted) as mount:
        assert mount.file.stat().st_size == N_BYTES
        assert "qcow2, partition 2, 25165824 bytes" in mount.log
        with loop_device(mount.file, direct_io=True) as device, mounted(device, tmp_path / "fs") as folder:
            (folder / "file").write_bytes(data)
    assert_only_the_partition_has_changed(image)
    with served(image, "-r", "-o", f"partition={wanted}") as mount:
        with loop_device(mount.file, read_only=True) as device, mounted(device, tmp_path / "fs") as folder:
            assert (folder / "file").read_bytes() == data


def test_a_file_system_in_a_partition_for_a_user(users_folder: Path) -> None:
    """An ordinary user writes and reads files in partition 2: no loop device, no kernel's driver, no root."""
    image = make_image(users_folder / "disk.qcow2")
    os.chown(image, NOBODY, NOBODY)
    script = """
        mkdir mnt files
        $qcowfuse --partition 2 disk.qcow2 mnt
        fuse2fs -o fakeroot mnt/disk.raw files
        {}
        fusermount3 -u files
        n=0; until fusermount3 -u mnt 2>/dev/null; do n=$((n+1)); [ $n -lt 100 ]; sleep 0.1; done
        rmdir mnt files
    """
    done = as_user(script.format("echo hello >files/greeting; mkdir files/sub; echo 2 >files/sub/x"), users_folder)
    assert done.returncode == 0, done.stderr
    done = as_user(script.format("cat files/greeting files/sub/x"), users_folder)
    assert (done.returncode, done.stdout) == (0, "hello\n2\n"), done.stderr
    assert_only_the_partition_has_changed(image)


@pytest.mark.parametrize("kind", ["gpt", "dos"])
def test_a_table_with_sectors_of_4096_bytes(tmp_path: Path, kind: str) -> None:
    """Made on a loop device with such sectors: a GPT says of itself that it is for them. An MBR does not."""
    image = tmp_path / "disk.qcow2"
    qemu.create(image, "qcow2", SIZE)
    with served(image) as mount, loop_device(mount.file, sector_size=4096) as device:
        parts = loops.partition_into(device, f"label: {kind}\nsize=8M\nsize=16M\n")
        assert len(parts) == 2
        parts[1].write_bytes(b"here")
    with served(image, "--partition", "2") as mount:
        if kind == "gpt":
            assert mount.file.stat().st_size == 16 * MIB
            with mount.file.open("rb") as file:
                assert file.read(4) == b"here"


def test_the_size_of_a_partition_stays(image: Path) -> None:
    """Truncating zeroes the rest of the partition; writing or allocating more is refused; holes are found."""
    with served(image, "--partition", "2") as mount:
        with mount.file.open("r+b") as file:
            os.ftruncate(file.fileno(), 5 * MIB)
            assert os.fstat(file.fileno()).st_size == N_BYTES
            assert not any(os.pread(file.fileno(), N_BYTES, 5 * MIB))
            with pytest.raises(OSError, match="No space left"):
                os.posix_fallocate(file.fileno(), N_BYTES - 5, 10)
            with pytest.raises(OSError, match="File too large"):
                os.ftruncate(file.fileno(), N_BYTES + 1)
            os.pwrite(file.fileno(), b"end", N_BYTES - 3)
            os.fsync(file.fileno())
            os.pwrite(file.fileno(), b"x", N_BYTES)  # into the kernel's cache
            with pytest.raises(OSError, match="No space left"):
                os.fsync(file.fileno())
        with mount.file.open("rb") as file:
            assert os.lseek(file.fileno(), 6 * MIB, os.SEEK_DATA) == N_BYTES - 65536
            assert os.lseek(file.fileno(), 6 * MIB, os.SEEK_HOLE) == 6 * MIB
        qemu.must_run("fallocate", "--punch-hole", "-o", "0", "-l", str(N_BYTES), mount.file)
        wait_until(lambda: mount.file.stat().st_blocks == 0, "the space to be given back")
    assert qemu.check(image).clean
    after = image.with_suffix(".after")
    qemu.must_run("qemu-img", "convert", "-O", "raw", image, after)
    expected = bytearray(image.with_suffix(".raw").read_bytes())
    expected[START : START + N_BYTES] = bytes(N_BYTES)
    assert after.read_bytes() == expected


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--partition", "4"), 3, "there is no partition 4 (there are: 1, 2, 3)"),
        (("-o", "partition=home"), 3, "there is no partition home"),
        (("--partition", "2", "--growable"), 2, "--growable and --partition exclude each other"),
        (("--partition="), 2, "partition: expected"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(
    image: Path, tmp_path: Path, words: tuple[str, ...] | str, code: int, said: str
) -> None:
    """With the exit code of what it is; nothing is mounted, and the image is free again."""
    point = tmp_path / "mnt"
    point.mkdir()
    done = run_qcowfuse(*((words,) if isinstance(words, str) else words), image, point)
    assert done.returncode == code
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert qemu.check(image).clean
