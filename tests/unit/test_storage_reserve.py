"""Space that is kept free beside an image on a copy-on-write file system."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfuse.storage import file_systems
from qcowfuse.storage.file import open_file_storage


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


async def test_elsewhere_nothing_is_kept(tmp_path: Path) -> None:
    """A file system that writes in place needs no reserve, and no file is made for one."""
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    storage = await open_file_storage(str(path), writable=True)
    assert not await storage.keep_free(1 << 20)
    await storage.aclose()


@pytest.mark.root
async def test_space_is_kept_and_given_up(small_tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept can't be had by others until it is given up, or the storage closed; no name of it is seen."""
    monkeypatch.setattr(file_systems, "COPY_ON_WRITE_FILE_SYSTEMS", frozenset({"tmpfs"}))
    path = small_tmpfs / "image"
    path.write_bytes(bytes(4096))
    storage = await open_file_storage(str(path), writable=True)
    assert await storage.keep_free(512 << 10)
    assert os.listdir(small_tmpfs) == ["image"]
    with pytest.raises(OSError, match="No space left"):
        await storage.pwritev(4096, [b"x" * (600 << 10)])
    await storage.truncate(4096)
    assert await storage.keep_free(0)
    await storage.pwritev(4096, [b"x" * (600 << 10)])
    with pytest.raises(OSError, match="No space left") as caught:
        await storage.keep_free(512 << 10)
    assert caught.value.errno == errno.ENOSPC
    before = storage.free_bytes()
    assert before > 400 << 10
    assert await storage.keep_free(300 << 10)
    await storage.aclose()
    status = os.statvfs(small_tmpfs)
    assert status.f_bavail * status.f_frsize == before


@pytest.mark.root
async def test_a_folder_that_may_not_be_written(small_tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is kept, and the image is opened all the same."""
    monkeypatch.setattr(file_systems, "COPY_ON_WRITE_FILE_SYSTEMS", frozenset({"tmpfs"}))
    path = small_tmpfs / "image"
    path.write_bytes(bytes(4096))
    real_open = os.open

    def refuse(name: str, flags: int, *arguments: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EACCES, "no")
        return real_open(name, flags, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    storage = await open_file_storage(str(path), writable=True)
    monkeypatch.undo()
    assert not await storage.keep_free(4096)
    await storage.aclose()
