"""Holes beside a writer: told once the kernel has sent what it holds, else all of the file is data."""

from __future__ import annotations

import errno
import os
from typing import cast

import pytest
import trio
from pyfuse3 import FUSEError, RequestContext

from qcowfuse.errors import MountError
from qcowfuse.fuse import unsent_data
from qcowfuse.fuse.attributes import Ownership
from qcowfuse.fuse.operations import FILE_INODE_IN_DIRECTORY, Operations
from qcowfuse.fuse.unsent_data import WORTHWHILE_HOLE, is_waited_for
from tests.support.memory_image import MemoryImage

FILE = FILE_INODE_IN_DIRECTORY
MIB = 1 << 20
CONTEXT = cast(RequestContext, None)


class Kernel:
    """Holds one cluster with data until it is made to send it; that may fail."""

    def __init__(self, image: MemoryImage, failure: Exception | None, *, hangs: bool, answer: bool) -> None:
        self.n_asked = 0
        self.image = image
        self._failure = failure
        self._hangs = hangs
        self._answer = answer

    async def write_back(self) -> bool:
        """See UnsentData."""
        self.n_asked += 1
        if self._failure is not None:
            raise self._failure
        if self._hangs:
            await trio.sleep_forever()
        if self._answer:
            await self.image.write(4 * MIB, b"x" * 65536)
        return self._answer


def make(monkeypatch: pytest.MonkeyPatch, *, growable: bool = False, **how: object) -> tuple[Operations, Kernel]:
    """With data in the first cluster, and in the third one."""
    monkeypatch.setattr(unsent_data, "is_waited_for", lambda release: True)
    image = MemoryImage(8 * MIB, cluster_size=65536)
    for place in (0, 2 * 65536):
        image.data[place : place + 65536] = b"y" * 65536
    kernel = Kernel(image, **{"failure": None, "hangs": False, "answer": True, **how})  # type: ignore[arg-type]
    operations = Operations(
        image, file_name=b"disk.raw", ownership=Ownership(5, 6, 0o600), mtime_ns=0, growable=growable
    )
    operations.enable_writeback_cache = True
    operations.unsent.serve(kernel.write_back)
    return operations, kernel


async def test_the_kernel_is_made_to_send_it_while_there_is_a_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not before, nor after; holes that are not worth a search are data meanwhile."""
    operations, kernel = make(monkeypatch)
    assert await operations.lseek(0, os.SEEK_HOLE) == 65536
    opened = await operations.open(FILE, os.O_RDWR, CONTEXT)
    assert await operations.lseek(0, os.SEEK_HOLE) == 3 * 65536
    assert kernel.n_asked == 1
    assert await operations.lseek(3 * 65536, os.SEEK_DATA) == 4 * MIB
    assert await operations.lseek(4 * MIB, os.SEEK_HOLE) == 4 * MIB + 65536
    assert await operations.lseek(8 * MIB - 65536, os.SEEK_HOLE) == 8 * MIB - 65536, "the last hole may be short"
    with pytest.raises(FUSEError) as caught:
        await operations.lseek(5 * MIB, os.SEEK_DATA)
    assert caught.value.errno == errno.ENXIO
    assert kernel.n_asked == 5
    await operations.release(opened.fh)
    assert await operations.lseek(65536, os.SEEK_HOLE) == 65536
    assert kernel.n_asked == 5
    assert 2 * 65536 < WORTHWHILE_HOLE <= 2 * MIB


@pytest.mark.parametrize(
    "how",
    [{"failure": OSError(errno.EIO, "")}, {"failure": MountError("gone")}, {"answer": False}, {"hangs": True}],
    ids=["error", "no mount", "refused", "hangs"],
)
@pytest.mark.parametrize("growable", [False, True])
async def test_all_is_data_where_it_can_not_be_made_to(
    how: dict[str, object], growable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a growable disk not even the end is known."""
    monkeypatch.setattr(unsent_data, "FETCH_SECONDS", 0.001)
    operations, kernel = make(monkeypatch, growable=growable, **how)
    await operations.open(FILE, os.O_RDWR, CONTEXT)
    for whence, place in ((os.SEEK_DATA, 70_000), (os.SEEK_HOLE, 8 * MIB)):
        if growable:
            with pytest.raises(FUSEError) as caught:
                await operations.lseek(70_000, whence)
            assert caught.value.errno == errno.EINVAL
        else:
            assert await operations.lseek(70_000, whence) == place
    assert kernel.n_asked == 2
    assert operations.gate.n_slow == 0


async def test_a_look_from_outside_flushes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each search would else be an fsync of what others write."""
    operations, kernel = make(monkeypatch)
    await operations.write(FILE, 0, b"x")
    for flags, n_flushes in ((os.O_RDONLY, 0), (os.O_RDWR, 1)):
        opened = await operations.open(FILE, flags, CONTEXT)
        await operations.flush(opened.fh)
        await operations.release(opened.fh)
        assert kernel.image.n_flushes == n_flushes
    assert operations.n_open == 0


@pytest.mark.parametrize(
    ("release", "waits"),
    [("6.18.44-x", True), ("6.16.0", True), ("6.15.9", False), ("7.0", True), ("5.2", False), ("linux", False)],
)
def test_which_kernels_wait(release: str, waits: bool) -> None:
    """By what uname(2) says."""
    assert is_waited_for(release) is waits
