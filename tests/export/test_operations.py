"""The FUSE operations, called directly on an image in memory."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pyfuse3
import pytest
import trio
from pyfuse3 import EntryAttributes, FUSEError, RequestContext, SetattrFields
from trio.testing import wait_all_tasks_blocked

from qcowfuse.errors import CorruptImageError
from qcowfuse.fuse import sizes
from qcowfuse.fuse.attributes import Ownership
from qcowfuse.fuse.operations import FILE_INODE_IN_DIRECTORY, Operations
from tests.support.memory_image import MemoryImage

CTX = cast(RequestContext, SimpleNamespace(pid=1))
FILE = FILE_INODE_IN_DIRECTORY
ROOT = pyfuse3.ROOT_INODE
MTIME = 1_600_000_000_123_456_789


def serve(image: MemoryImage, *, name: bytes | None = b"disk.raw", **extra: Any) -> Operations:
    return Operations(image, file_name=name, ownership=Ownership(5, 6, 0o600), mtime_ns=MTIME, **extra)


async def errno_from(call: Awaitable[object]) -> int:
    with pytest.raises(FUSEError) as caught:
        await call
    return caught.value.errno


def change(**values: int) -> tuple[EntryAttributes, SetattrFields]:
    """The arguments of setattr that change just these attributes."""
    attributes = EntryAttributes()
    fields = dict.fromkeys((f"update_{n}" for n in ("atime", "mtime", "ctime", "mode", "uid", "gid", "size")), False)
    for name, value in values.items():
        setattr(attributes, f"st_{name}", value)
        fields["update_" + name.removesuffix("_ns")] = True
    return attributes, cast(SetattrFields, SimpleNamespace(**fields))


@pytest.fixture(params=[True, False], ids=["inline", "awaited"])
def image(request: pytest.FixtureRequest) -> MemoryImage:
    return MemoryImage(1 << 20, inline=request.param)


async def test_written_bytes_are_read_back(image: MemoryImage) -> None:
    """What write gets is what read gives, inline or not."""
    operations = serve(image)
    assert await operations.write(FILE, 1000, b"hello") == 5
    assert bytes(await operations.read(FILE, 998, 9)) == b"\0\0hello\0\0"


async def test_reads_end_at_the_end(image: MemoryImage) -> None:
    """A read across the end is short, one past it is empty."""
    operations = serve(image)
    assert len(await operations.read(FILE, image.size - 10, 4096)) == 10
    assert await operations.read(FILE, image.size, 4096) == b""
    assert await operations.read(FILE, image.size + 5000, 1) == b""


async def test_write_across_the_end_is_short(image: MemoryImage) -> None:
    """Without the write-back cache a write across the end is short, and one past it has no space."""
    operations = serve(image)
    assert await operations.write(FILE, image.size - 3, b"abcdef") == 3
    assert bytes(image.data[-3:]) == b"abc"
    assert await errno_from(operations.write(FILE, image.size, b"x")) == errno.ENOSPC


async def test_written_back_page_across_the_end_fails_and_is_reported(image: MemoryImage) -> None:
    """With the write-back cache it is ENOSPC, what fits is written, and the size gets repaired."""
    operations = serve(image)
    operations.enable_writeback_cache = True
    assert await errno_from(operations.write(FILE, image.size - 3, b"abcdef")) == errno.ENOSPC
    assert bytes(image.data[-3:]) == b"abc"
    assert await mended(operations) == (image.size, True, False, False)


async def mended(operations: Operations) -> tuple[int, bool, bool, bool]:
    """What is asked of the process outside of the mount: size, lowers, syncs, forgets."""
    asked: list[tuple[int, bool, bool, bool]] = []
    with trio.move_on_after(10) as scope:

        async def mend(n_bytes: int, *, lowers: bool, syncs: bool, forgets: bool) -> None:
            asked.append((n_bytes, lowers, syncs, forgets))
            scope.cancel()

        await operations.sizes.watch(mend)
    return asked[0]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EFBIG, errno.ENOSPC])
async def test_a_write_across_the_end_that_cannot_grow_keeps_what_fits(image: MemoryImage, number: int) -> None:
    """A growable disk that does not grow: what fits is written, the kernel is told, the rest fails."""
    operations = serve(image, growable=True)
    operations.enable_writeback_cache = True

    async def refuse(size: int) -> None:
        raise OSError(number, "no")

    image.grow = refuse  # type: ignore[method-assign]
    expected = errno.ENOSPC if number == errno.EOPNOTSUPP else number
    assert await errno_from(operations.write(FILE, image.size - 3, b"abcdef")) == expected
    assert bytes(image.data[-3:]) == b"abc"
    assert await mended(operations) == (image.size, True, True, False)
    operations.enable_writeback_cache = False
    assert await operations.write(FILE, image.size - 3, b"defghi") == 3
    assert bytes(image.data[-3:]) == b"def"


async def test_close_flushes_only_after_writes(image: MemoryImage) -> None:
    """flush makes writes durable once; with nothing new it does nothing. fsync always flushes."""
    operations = serve(image)
    file = (await operations.open(FILE, os.O_RDWR, CTX)).fh
    await operations.flush(file)
    assert image.n_flushes == 0
    await operations.write(FILE, 0, b"x")
    await operations.flush(file)
    await operations.flush(file)
    assert image.n_flushes == 1
    await operations.fsync(FILE, True)
    assert image.n_flushes == 2


async def test_close_flushes_again_after_a_failed_flush(image: MemoryImage) -> None:
    """A flush that failed does not count as done."""
    operations = serve(image)
    file = (await operations.open(FILE, os.O_RDWR, CTX)).fh
    await operations.write(FILE, 0, b"x")
    image.failure = OSError(errno.EIO, "disk")
    assert await errno_from(operations.flush(file)) == errno.EIO
    assert await errno_from(operations.flush(file)) == errno.EIO
    image.failure = None
    await operations.flush(file)
    assert image.n_flushes == 1


async def test_a_reader_does_not_flush_at_close(image: MemoryImage) -> None:
    """Nor does it hear that somebody's flush has failed: what it read was right."""
    operations = serve(image)
    reader, writer = [(await operations.open(FILE, how, CTX)).fh for how in (os.O_RDONLY, os.O_WRONLY)]
    await operations.write(writer, 0, b"x")
    await operations.flush(reader)
    assert image.n_flushes == 0
    image.failure = OSError(errno.EIO, "disk")
    assert await errno_from(operations.flush(writer)) == errno.EIO
    await operations.flush(reader)


async def test_write_during_a_flush_is_flushed_by_the_next_close(image: MemoryImage) -> None:
    """A write that arrives while a flush is under way is not taken for flushed."""
    operations = serve(image)
    file = (await operations.open(FILE, os.O_RDWR, CTX)).fh
    await operations.write(FILE, 0, b"x")
    is_flushing, go_on = trio.Event(), trio.Event()

    async def flush_until_told() -> None:
        is_flushing.set()
        await go_on.wait()

    image.flush = flush_until_told  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(operations.flush, file)
        await is_flushing.wait()
        await operations.write(FILE, 1, b"y")
        go_on.set()
    del image.flush
    await operations.flush(file)
    assert image.n_flushes == 1


@pytest.mark.parametrize(
    ("failure", "number"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (CorruptImageError("L2 entry", 0, "bad"), errno.EIO),
        (ZeroDivisionError("a bug"), errno.EIO),
    ],
)
async def test_only_fuse_errors_leave_a_handler(
    image: MemoryImage, failure: Exception, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the image raises, handlers raise FUSEError; a bug leaves a traceback in the log."""
    operations = serve(image)
    image.failure = failure
    with caplog.at_level(logging.ERROR):
        for call in (operations.read(FILE, 0, 1), operations.write(FILE, 0, b"x"), operations.fsync(FILE, False)):
            assert await errno_from(call) == number
    is_bug = isinstance(failure, ZeroDivisionError)
    assert any(record.exc_info for record in caplog.records) == is_bug


async def test_cancellation_passes(image: MemoryImage) -> None:
    """A cancelled handler is cancelled, not answered with an error."""
    operations = serve(image)
    with trio.CancelScope() as scope:
        scope.cancel()
        await operations.fsync(FILE, False)
    assert scope.cancelled_caught
    assert operations.gate.n_slow == 0


async def test_folder_holds_one_name() -> None:
    """The folder knows its one file, and nothing else."""
    operations = serve(MemoryImage())
    assert (await operations.lookup(ROOT, b"disk.raw", CTX)).st_ino == FILE
    assert await errno_from(operations.lookup(ROOT, b"other", CTX)) == errno.ENOENT
    assert await errno_from(operations.lookup(FILE, b"disk.raw", CTX)) == errno.ENOENT
    assert await errno_from(operations.open(ROOT, os.O_RDONLY, CTX)) == errno.EISDIR
    assert await errno_from(operations.opendir(FILE, CTX)) == errno.ENOTDIR


async def test_root_can_be_the_file() -> None:
    """Without a name the root inode is the disk itself."""
    operations = serve(MemoryImage(12345), name=None)
    attributes = await operations.getattr(ROOT, CTX)
    assert stat.S_ISREG(attributes.st_mode)
    assert attributes.st_size == 12345
    assert await errno_from(operations.lookup(ROOT, b"x", CTX)) == errno.ENOTDIR


async def test_attributes_of_file_and_folder() -> None:
    """Size, blocks, block size, owner, mode and times are those of the disk."""
    image = MemoryImage(1 << 20, cluster_size=512)
    image.allocated = 3 * 65536
    operations = serve(image)
    file = await operations.getattr(FILE, CTX)
    assert (file.st_size, file.st_blocks, file.st_blksize, file.st_nlink) == (1 << 20, 384, 4096, 1)
    assert (file.st_mode, file.st_uid, file.st_gid) == (stat.S_IFREG | 0o600, 5, 6)
    assert file.st_mtime_ns == file.st_ctime_ns == MTIME
    folder = await operations.getattr(ROOT, CTX)
    assert (folder.st_mode, folder.st_uid) == (stat.S_IFDIR | 0o700, 5)
    assert await errno_from(operations.getattr(99, CTX)) == errno.ESTALE


async def test_block_size_has_an_upper_limit() -> None:
    """A cluster of 2 MiB does not make tools use buffers of 2 MiB."""
    assert (await serve(MemoryImage(cluster_size=2 << 20)).getattr(FILE, CTX)).st_blksize == 1 << 20


async def test_owner_mode_and_times_can_be_changed() -> None:
    """chmod, chown and utimens last; set-id bits do not."""
    operations = serve(MemoryImage())
    changed = {"mode": stat.S_IFREG | 0o6755, "uid": 7, "gid": 8, "atime_ns": 10, "mtime_ns": 20}
    await operations.setattr(FILE, *change(**changed), None, CTX)
    now = await operations.getattr(FILE, CTX)
    assert (now.st_mode, now.st_uid, now.st_gid) == (stat.S_IFREG | 0o755, 7, 8)
    assert (now.st_atime_ns, now.st_mtime_ns) == (10, 20)
    assert now.st_ctime_ns > MTIME
    assert (await operations.getattr(ROOT, CTX)).st_uid == 5


async def test_writes_move_the_times(image: MemoryImage) -> None:
    """A write sets mtime and ctime."""
    operations = serve(image)
    await operations.write(FILE, 0, b"x")
    attributes = await operations.getattr(FILE, CTX)
    assert attributes.st_mtime_ns == attributes.st_ctime_ns > MTIME


@pytest.mark.parametrize("growable", [False, True])
async def test_truncation_zeroes(growable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncating to less zeroes the rest. The answer is the smaller size, for the kernel to drop its pages, and is
    out of date at once; who asks next gets the true one, after the kernel's has been raised."""
    stored: list[tuple[int, int, bytes]] = []
    monkeypatch.setattr(sizes, "store_in_kernel", lambda *what: stored.append(what))
    image = MemoryImage(1000)
    image.data[:] = b"x" * 1000
    operations = serve(image, growable=growable)
    operations.enable_writeback_cache = True
    assert (await operations.setattr(FILE, *change(size=1000), FILE, CTX)).st_size == 1000
    for size in (999, 500, 0):
        answer = await operations.setattr(FILE, *change(size=size), FILE, CTX)
        assert (answer.st_size, answer.attr_timeout) == (size, 0)
        assert image.data == b"x" * size + bytes(1000 - size)
        answer = await operations.getattr(FILE, CTX)
        assert (answer.st_size, answer.attr_timeout > 0) == (1000, True)
        await operations.getattr(FILE, CTX)
        assert stored == [(FILE, 999, b"\0")], "once only: the page may have been written since"
        stored.clear()
        assert await mended(operations) == (1000, False, growable, False)
    if not growable:
        assert await errno_from(operations.setattr(FILE, *change(size=1001), FILE, CTX)) == errno.EFBIG
    assert await errno_from(operations.setattr(ROOT, *change(size=0), None, CTX)) == errno.EISDIR


async def test_a_truncation_from_outside_says_the_size_and_changes_nothing() -> None:
    """While the process outside tells the kernel a size, that truncation is none, even when the disk has grown."""
    image = MemoryImage(1024)
    operations = serve(image, growable=True)
    operations.sizes.is_wrong()
    with trio.move_on_after(10) as scope:

        async def mend(n_bytes: int, *, lowers: bool, syncs: bool, forgets: bool) -> None:
            await operations.setattr(FILE, *change(size=2048), FILE, CTX)
            image.data[:] = b"x" * 2048
            assert (await operations.setattr(FILE, *change(size=n_bytes), FILE, CTX)).st_size == 2048
            scope.cancel()

        await operations.sizes.watch(mend)
    assert image.data == b"x" * 2048


async def test_what_waits_for_a_size_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A close after a truncation waits for the process outside of the mount, whose own truncation waits for the
    kernel: the gate knows of both, and lets trio have its turn at once."""
    operations = serve(MemoryImage(4096))
    operations.enable_writeback_cache = True
    file = (await operations.open(FILE, os.O_RDWR, CTX)).fh
    n_waiting: list[int] = []

    def store(*_: object) -> None:
        n_waiting.append(trio.from_thread.run_sync(lambda: operations.gate.n_slow))

    monkeypatch.setattr(sizes, "store_in_kernel", store)

    async def mend(n_bytes: int, *, lowers: bool, syncs: bool, forgets: bool) -> None:
        await wait_all_tasks_blocked()
        n_waiting.append(operations.gate.n_slow)
        await operations.setattr(FILE, *change(size=n_bytes), FILE, CTX)

    await operations.setattr(FILE, *change(size=100), FILE, CTX)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(operations.sizes.watch, mend)
        await operations.flush(file)
        nursery.cancel_scope.cancel()
    assert n_waiting == [1, 2]
    assert operations.gate.n_slow == 0


async def test_a_truncation_that_fails_is_an_error() -> None:
    """What the image raises is answered, and what the kernel has cached is dropped: a part may be zeroes."""
    image = MemoryImage(1000)
    operations = serve(image)
    image.failure = OSError(errno.EIO, "disk")
    assert await errno_from(operations.setattr(FILE, *change(size=5), FILE, CTX)) == errno.EIO
    assert await mended(operations) == (1000, False, False, True)


async def test_read_only_image() -> None:
    """A read-only image opens for reading only, and refuses what would change it with EROFS."""
    operations = serve(MemoryImage(read_only=True))
    assert (await operations.open(FILE, os.O_RDONLY, CTX)).keep_cache
    for flags in (os.O_WRONLY, os.O_RDWR):
        assert await errno_from(operations.open(FILE, flags, CTX)) == errno.EROFS
    assert await errno_from(operations.write(FILE, 0, b"x")) == errno.EROFS
    assert await errno_from(operations.setattr(FILE, *change(size=0), FILE, CTX)) == errno.EROFS
    assert await errno_from(operations.unlink(ROOT, b"disk.raw", CTX)) == errno.EROFS
    assert not await operations.access(FILE, os.W_OK, CTX)
    assert await operations.access(FILE, os.R_OK, CTX)


@pytest.mark.parametrize(
    "call",
    [
        lambda o: o.create(ROOT, b"n", 0o600, os.O_RDWR, CTX),
        lambda o: o.mknod(ROOT, b"n", 0o600, 0, CTX),
        lambda o: o.mkdir(ROOT, b"n", 0o700, CTX),
        lambda o: o.symlink(ROOT, b"n", b"t", CTX),
        lambda o: o.link(FILE, ROOT, b"n", CTX),
        lambda o: o.unlink(ROOT, b"disk.raw", CTX),
        lambda o: o.rmdir(ROOT, b"n", CTX),
        lambda o: o.rename(ROOT, b"disk.raw", ROOT, b"n", 0, CTX),
    ],
)
async def test_names_cannot_be_changed(call: Callable[[Operations], Awaitable[object]]) -> None:
    """Nothing can be made, removed or renamed."""
    assert await errno_from(call(serve(MemoryImage()))) == errno.EPERM


async def test_statfs_counts_in_clusters() -> None:
    """Block size is the cluster size; blocks are the disk, free ones what the host has left."""
    image = MemoryImage(1 << 20, cluster_size=4096)
    image.free = 40960
    stats = await serve(image).statfs(CTX)
    assert (stats.f_bsize, stats.f_frsize, stats.f_blocks, stats.f_bfree, stats.f_bavail) == (4096, 4096, 256, 10, 10)


async def test_statistics_are_extended_attributes() -> None:
    """Every counter is listed and can be read; the folder has none, and nothing can be set or removed."""
    operations = serve(MemoryImage())
    names = await operations.listxattr(FILE, CTX)
    assert names == [b"user.qcowfuse.backend.flushes", b"user.qcowfuse.l2_cache.hits"]
    assert await operations.getxattr(FILE, names[1], CTX) == b"7"
    assert await operations.listxattr(ROOT, CTX) == []
    for inode, name in ((FILE, b"user.qcowfuse.none"), (FILE, b"security.capability"), (ROOT, names[1])):
        assert await errno_from(operations.getxattr(inode, name, CTX)) == pyfuse3.ENOATTR
    assert await errno_from(operations.setxattr(FILE, names[0], b"0", CTX)) == errno.EROFS
    assert await errno_from(operations.setxattr(FILE, b"user.mine", b"0", CTX)) == errno.EOPNOTSUPP
    assert await errno_from(operations.removexattr(FILE, names[0], CTX)) == errno.EROFS
    assert await errno_from(operations.removexattr(FILE, b"user.mine", CTX)) == pyfuse3.ENOATTR


async def test_release_is_noticed() -> None:
    """Opens are counted, and a release is told to whoever waits for the file to be free."""
    calls: list[int] = []
    operations = serve(MemoryImage(), on_release=lambda: calls.append(1))
    await operations.open(FILE, os.O_RDWR, CTX)
    assert operations.n_open == 1
    await operations.release(FILE)
    assert (operations.n_open, calls) == (0, [1])


async def test_waiting_handlers_are_counted_as_slow() -> None:
    """While a read waits, the gate knows it; afterwards no longer."""
    image = MemoryImage(inline=False)
    operations = serve(image)
    seen: list[int] = []

    async def read_slowly(guest_offset: int, n_bytes: int) -> bytes:
        seen.append(operations.gate.n_slow)
        return bytes(n_bytes)

    image.read_later = read_slowly  # type: ignore[method-assign]
    await operations.read(FILE, 0, 10)
    assert (seen, operations.gate.n_slow) == ([1], 0)
