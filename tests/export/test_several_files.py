"""The files of partitions beside the disk: each request reaches the file that it names."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import cast

import pytest
from pyfuse3 import ROOT_INODE, FUSEError, RequestContext

from qcowfuse.driver.partition_window import PartitionWindow, partition_windows
from qcowfuse.fuse.attributes import Ownership
from qcowfuse.fuse.several_files import SeveralFiles
from qcowfuse.partitions.values import Partition
from tests.support.memory_image import MemoryImage
from tests.support.partition_tables import Entry, gpt_disk

NOW = 1_700_000_000_000_000_000
CONTEXT = cast(RequestContext, SimpleNamespace(pid=1))


def make(image: MemoryImage) -> SeveralFiles:
    windows = {
        b"disk.p1": PartitionWindow(image, Partition(1, 4096, 8192, "83", "Linux"), is_alone=False),
        b"disk.p5": PartitionWindow(image, Partition(5, 65536, 65536, "83", "Linux"), is_alone=False),
    }
    return SeveralFiles(
        image, windows, file_name=b"disk", ownership=Ownership(1000, 1000, 0o600), mtime_ns=NOW, growable=True
    )


async def inode_of(files: SeveralFiles, name: bytes) -> int:
    entry = await files.lookup(ROOT_INODE, name, CONTEXT)
    return entry.st_ino


async def test_each_name_leads_to_its_file() -> None:
    """Inodes and sizes of their own; what is written to one is in the others where they share it."""
    image = MemoryImage(1 << 20)
    files = make(image)
    inodes = [await inode_of(files, name) for name in (b"disk", b"disk.p1", b"disk.p5")]
    assert len(set(inodes)) == 3
    sizes = [(await files.getattr(inode, CONTEXT)).st_size for inode in inodes]
    assert sizes == [1 << 20, 8192, 65536]
    opened = [await files.open(inode, os.O_RDWR, CONTEXT) for inode in inodes]
    assert all(info.direct_io and not info.keep_cache for info in opened)
    disk, first, second = (info.fh for info in opened)
    assert files.n_open == 3
    assert await files.write(first, 0, b"first") == 5
    assert await files.write(second, 65531, b"second"[:5]) == 5
    assert await files.write(disk, 4096 + 8187, b"third") == 5
    assert bytes(await files.read(disk, 4096, 5)) == b"first"
    assert bytes(await files.read(disk, 65536 + 65531, 10)) == b"secon\0\0\0\0\0"
    assert bytes(await files.read(first, 8187, 100)) == b"third"
    with pytest.raises(FUSEError) as caught:
        await files.write(first, 8192, b"x")
    assert caught.value.errno == errno.ENOSPC
    await files.flush(second)
    await files.fsync(first, False)
    assert image.n_flushes == 2
    for fh in (disk, first, second):
        await files.release(fh)
    assert files.n_open == 0


async def test_what_is_asked_by_inode_is_of_that_file() -> None:
    """Holes and space; an inode that is none is stale; a partition does not grow with the disk."""
    image = MemoryImage(1 << 20, cluster_size=4096)
    files = make(image)
    first = await inode_of(files, b"disk.p1")
    image.data[:] = b"x" * len(image.data)
    await files.file_of(first).fallocate(3, 0, 4096)
    assert image.data[4095:8193] == b"x" + bytes(4096) + b"x"
    with pytest.raises(FUSEError) as caught:
        await files.file_of(first).fallocate(0, 8192, 4096)
    assert caught.value.errno == errno.ENOSPC
    await files.file_of(await inode_of(files, b"disk")).fallocate(0, 1 << 20, 4096)
    assert image.size == (1 << 20) + 4096
    assert await files.file_of(first).lseek(0, os.SEEK_DATA) == 4096
    for name in (b"disk.p2", b"", b"disk.p1\0"):
        with pytest.raises(FUSEError) as caught:
            await inode_of(files, name)
        assert caught.value.errno == errno.ENOENT
    with pytest.raises(FUSEError) as caught:
        await files.getattr(99, CONTEXT)
    assert caught.value.errno == errno.ESTALE


async def test_windows_of_what_can_be_used(caplog: pytest.LogCaptureFixture) -> None:
    """Those that have no problem, by number; the others are named in the log."""
    image = MemoryImage(512 * 4096)
    image.data[:] = gpt_disk(4096, [Entry(100, 199), None, Entry(300, 399), Entry(350, 360)])
    windows = await partition_windows(image)
    assert {name: window.size for name, window in windows.items()} == {"p1": 100 * 512}
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(": ", 1)[1] for message in messages] == [
        "partition 3 is not served: it lies over partition 4",
        "partition 4 is not served: it lies over partition 3",
    ]
    assert await partition_windows(MemoryImage()) == {}
