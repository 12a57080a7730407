"""Requests answered at once: which ones are, which are handed on unchanged, and when all is left to libfuse."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import select
import socket
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest
from pyfuse3 import FUSEError, RequestContext

from qcowfuse.fuse.attributes import Ownership
from qcowfuse.fuse.libfuse import direct_requests
from qcowfuse.fuse.libfuse.direct_requests import DirectRequests
from qcowfuse.fuse.libfuse.request_memory import FuseBuf, RequestBuffer, RequestMemory
from qcowfuse.fuse.operations import FILE_INODE_IN_DIRECTORY, Operations
from qcowfuse.fuse.request_gate import RequestGate
from qcowfuse.system.import_slot import SlotError
from tests.support.memory_image import MemoryImage

FILE = FILE_INODE_IN_DIRECTORY
GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH = 3, 4, 14, 15, 16, 17, 18, 20, 25
FALLOCATE, LSEEK = 43, 46
MTIME, HANDLE, CTIME, SIZE, MTIME_NOW, UID = 1 << 5, 1 << 6, 1 << 10, 1 << 3, 1 << 8, 1 << 1
N_BUFFER = (1 << 20) + 4096


def header(opcode: int, n_bytes: int, *, unique: int = 7, inode: int = FILE, n_extra: int = 0) -> bytes:
    return struct.pack("<IIQQIIIHH", n_bytes, opcode, unique, inode, 0, 0, 0, n_extra, 0)


def read_request(off: int, size: int, **extra: int) -> bytes:
    return header(READ, 80, **extra) + struct.pack("<QQIIQII", 1, off, size, 0, 0, 0, 0)


def write_request(off: int, data: bytes, *, n_stated: int | None = None, **extra: int) -> bytes:
    size = len(data) if n_stated is None else n_stated
    return header(WRITE, 80 + len(data), **extra) + struct.pack("<QQIIQII", 1, off, size, 0, 0, 0, 0) + data


def lseek_request(off: int, whence: int, **extra: int) -> bytes:
    return header(LSEEK, 64, **extra) + struct.pack("<QQII", 1, off, whence, 0)


def fallocate_request(off: int, length: int, mode: int, **extra: int) -> bytes:
    return header(FALLOCATE, 72, **extra) + struct.pack("<QQQII", 1, off, length, mode, 0)


def fsync_request(**extra: int) -> bytes:
    return header(FSYNC, 56, **extra) + struct.pack("<QII", 1, 1, 0)


def flush_request(handle: int, **extra: int) -> bytes:
    return header(FLUSH, 64, **extra) + struct.pack("<QIIQ", handle, 0, 0, 4711)


def open_request(flags: int, **extra: int) -> bytes:
    return header(OPEN, 48, **extra) + struct.pack("<II", flags, 0)


def release_request(handle: int, **extra: int) -> bytes:
    return header(RELEASE, 64, **extra) + struct.pack("<QIIQ", handle, os.O_RDWR, 0, 4711)


def getattr_request(**extra: int) -> bytes:
    return header(GETATTR, 56, **extra) + struct.pack("<IIQ", 1, 0, 1)


def setattr_request(valid: int, mtime: tuple[int, int], ctime: tuple[int, int], **extra: int) -> bytes:
    """``struct fuse_setattr_in``: valid, handle, size, lock owner, times, their nanoseconds, mode, owner."""
    times = struct.pack("<QQQIII", 1, mtime[0], ctime[0], 2, mtime[1], ctime[1])
    return header(SETATTR, 128, **extra) + struct.pack("<IIQQQ", valid, 0, 9, 4711, 0) + times + bytes(20)


_LIBC = ctypes.CDLL(None)
_LIBC.malloc.restype, _LIBC.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
_LIBC.free.restype, _LIBC.free.argtypes = None, (ctypes.c_void_p,)


def allocated(n_bytes: int) -> int:
    """The address of memory such as libfuse has."""
    address = _LIBC.malloc(n_bytes)
    assert isinstance(address, int)
    return address


def freed(fuse_buf: FuseBuf) -> None:
    """What libfuse does in the end."""
    _LIBC.free(fuse_buf.mem)
    fuse_buf.mem = None


class Kernel:
    """The kernel's side of the connection, and an :class:`DirectRequests` on the other."""

    def __init__(self, image: MemoryImage, *, burst: int = 32) -> None:
        self.socket, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self.gate = RequestGate(burst=burst, spin=0)
        operations = Operations(
            image, file_name=b"disk.raw", ownership=Ownership(5, 6, 0o600), mtime_ns=0, gate=self.gate
        )
        self.operations = operations
        self.at_once = DirectRequests(operations, self.gate)
        self.at_once.answers_lseek = self.at_once.answers_fallocate = True
        self.at_once._fd = self._ours.fileno()
        self.at_once.memory = RequestMemory()
        self.fuse_buf = FuseBuf(flags=5)
        self._buffer = RequestBuffer(self.fuse_buf, allocated(N_BUFFER), N_BUFFER)

    def receive(self, *requests: bytes) -> int:
        for request in requests:
            self.socket.send(request)
        return self.at_once._receive_into(self._buffer)

    def handed_on(self, n_bytes: int) -> bytes:
        assert self.fuse_buf.size == n_bytes
        assert self.fuse_buf.flags == 0
        assert self.fuse_buf.mem is not None
        return ctypes.string_at(self.fuse_buf.mem, n_bytes)

    def reply(self) -> tuple[int, int, bytes]:
        """Unique number, error, the rest."""
        data = self.socket.recv(N_BUFFER, socket.MSG_DONTWAIT)
        n_bytes, error, unique = struct.unpack_from("<IiQ", data)
        assert n_bytes == len(data)
        return unique, error, data[16:]

    async def close_writer(self) -> None:
        """What the kernel sends when a descriptor that could write is closed."""
        opened = await self.operations.open(FILE, os.O_RDWR, cast(RequestContext, None))
        await self.operations.flush(opened.fh)

    def has_reply(self) -> bool:
        return bool(select.select([self.socket], [], [], 0)[0])

    def close(self) -> None:
        self.socket.close()
        self._ours.close()
        freed(self.fuse_buf)


@pytest.fixture
def image() -> MemoryImage:
    image = MemoryImage(1 << 20)
    image.data[:] = os.urandom(1 << 20)
    return image


@pytest.fixture
def kernel(image: MemoryImage) -> Iterator[Kernel]:
    kernel = Kernel(image)
    yield kernel
    kernel.close()


def test_a_read_is_answered(kernel: Kernel, image: MemoryImage) -> None:
    """Header and data, and then there is nothing more to do."""
    assert kernel.receive(read_request(4096, 8192, unique=99)) == -errno.EINTR
    assert kernel.reply() == (99, 0, bytes(image.data[4096:12288]))
    assert not kernel.has_reply()
    assert kernel.at_once.n_answered == 1


def test_a_write_is_answered(kernel: Kernel, image: MemoryImage) -> None:
    """The data is in the image, and the next close will flush."""
    data = os.urandom(5000)
    assert kernel.receive(write_request(123, data, unique=5)) == -errno.EINTR
    unique, error, rest = kernel.reply()
    assert (unique, error, struct.unpack("<II", rest)) == (5, 0, (5000, 0))
    assert bytes(image.data[123:5123]) == data
    assert kernel.operations.writes.n_changes == 1


class HoleyImage(MemoryImage):
    """Knows at once where its data is, and zeroes at once."""

    def try_find_extent(self, guest_offset: int, n_bytes: int) -> tuple[bool, int, bool] | None:
        """Up to the end of the cluster."""
        assert 0 < n_bytes <= self.size - guest_offset
        end = min(guest_offset // self.cluster_size * self.cluster_size + self.cluster_size, guest_offset + n_bytes)
        return any(self.data[guest_offset:end]), end - guest_offset, False

    def try_write_zeroes(self, guest_offset: int, n_bytes: int, *, unmap: bool) -> bool:
        """Whole clusters."""
        if (guest_offset | n_bytes) % self.cluster_size:
            return False
        self.data[guest_offset : guest_offset + n_bytes] = bytes(n_bytes)
        self.was_unmapped = unmap
        return True


@pytest.fixture
def holey() -> Iterator[tuple[Kernel, HoleyImage]]:
    image = HoleyImage(1 << 20, cluster_size=4096)
    image.data[8192:16384] = b"x" * 8192
    kernel = Kernel(image)
    yield kernel, image
    kernel.close()


@pytest.mark.parametrize(
    ("off", "whence", "found"),
    [
        (0, os.SEEK_DATA, 8192),
        (9000, os.SEEK_DATA, 9000),
        (9000, os.SEEK_HOLE, 16384),
        (3, os.SEEK_HOLE, 3),
        ((1 << 20) - 100, os.SEEK_HOLE, (1 << 20) - 100),
    ],
)
def test_a_seek_is_answered(holey: tuple[Kernel, HoleyImage], off: int, whence: int, found: int) -> None:
    """The place."""
    kernel, _ = holey
    assert kernel.receive(lseek_request(off, whence, unique=3)) == -errno.EINTR
    unique, error, rest = kernel.reply()
    assert (unique, error, struct.unpack("<Q", rest)) == (3, 0, (found,))
    assert kernel.at_once.n_answered == 1


def test_a_seek_that_finds_no_data_is_answered(holey: tuple[Kernel, HoleyImage]) -> None:
    """ENXIO, where a few looks show that; a longer search is handed on."""
    kernel, image = holey
    assert kernel.receive(lseek_request(image.size - 8 * 4096, os.SEEK_DATA, unique=4)) == -errno.EINTR
    assert kernel.reply() == (4, -errno.ENXIO, b"")
    assert kernel.at_once.n_answered == 1
    request = lseek_request(image.size - 9 * 4096, os.SEEK_DATA)
    assert kernel.handed_on(kernel.receive(request)) == request
    assert not kernel.has_reply()


class DurableImage(MemoryImage):
    """Knows at once that all is durable, while ``is_durable``."""

    is_durable = True

    def try_flush(self) -> bool:
        """One more flush."""
        if self.is_durable:
            self.n_flushes += 1
        return self.is_durable


@pytest.fixture
def durable() -> Iterator[tuple[Kernel, DurableImage]]:
    image = DurableImage(1 << 20, cluster_size=4096)
    kernel = Kernel(image)
    yield kernel, image
    kernel.close()


async def test_an_fsync_is_answered(durable: tuple[Kernel, DurableImage]) -> None:
    """One flush, and the next close finds nothing to do; after another write it does."""
    kernel, image = durable
    requests = write_request(0, b"x" * 512, unique=3), fsync_request(unique=4)
    assert kernel.receive(*requests) == -errno.EINTR
    assert kernel.reply()[:2] == (3, 0)
    assert kernel.reply() == (4, 0, b"")
    assert (image.n_flushes, kernel.at_once.n_answered) == (1, 2)
    await kernel.close_writer()
    assert image.n_flushes == 1
    assert kernel.receive(write_request(0, b"y" * 512)) == -errno.EINTR
    await kernel.close_writer()
    assert image.n_flushes == 2


def test_an_fsync_that_must_wait_is_handed_on(durable: tuple[Kernel, DurableImage]) -> None:
    """And so is one of the folder, one of another length, and one that fails."""
    kernel, image = durable
    for request in (fsync_request(inode=1), header(FSYNC, 60) + bytes(20)):
        assert kernel.handed_on(kernel.receive(request)) == request
    image.is_durable = False
    request = fsync_request()
    assert kernel.handed_on(kernel.receive(request)) == request
    image.try_flush = None  # type: ignore[method-assign, assignment]
    assert kernel.handed_on(kernel.receive(request)) == request
    assert not kernel.has_reply()
    assert kernel.at_once.n_answered == 0


async def test_opens_and_releases_are_answered(kernel: Kernel) -> None:
    """With the handle that the handler would give, and the page cache kept; both are counted."""
    operations, context = kernel.operations, cast(RequestContext, None)
    for flags, n_writers in ((os.O_RDONLY, 0), (os.O_RDWR, 1), (os.O_WRONLY | os.O_APPEND, 1)):
        assert kernel.receive(open_request(flags, unique=8)) == -errno.EINTR
        unique, error, body = kernel.reply()
        handle, opened, backing = struct.unpack("<QII", body)
        assert (unique, error, opened, backing) == (8, 0, 2, 0)
        assert (operations.n_open, operations.unsent.n_writers) == (1, n_writers)
        assert handle == (await operations.open(FILE, flags, context)).fh
        assert kernel.receive(release_request(handle, unique=9), release_request(handle)) == -errno.EINTR
        assert kernel.reply() == (9, 0, b"")
        kernel.reply()
        assert (operations.n_open, operations.unsent.n_writers) == (0, 0)


def test_opening_for_writing_is_refused_at_once(kernel: Kernel, image: MemoryImage) -> None:
    """Of a disk that is read-only; nothing is counted then, and others are handed on."""
    image.read_only = True
    assert kernel.receive(open_request(os.O_RDWR)) == -errno.EINTR
    assert kernel.reply()[1] == -errno.EROFS
    assert kernel.receive(open_request(os.O_RDONLY)) == -errno.EINTR
    assert kernel.reply()[1] == 0
    for request in (open_request(0, inode=1), header(OPEN, 44) + bytes(4), header(RELEASE, 48) + bytes(8)):
        assert kernel.handed_on(kernel.receive(request)) == request
    assert kernel.operations.n_open == 1


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EINVAL])
def test_an_open_that_the_kernel_does_not_take_is_no_open(
    kernel: Kernel, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There will be no release."""

    def refuse(fd: int, parts: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "writev", refuse)
    assert kernel.receive(open_request(os.O_RDWR)) == -errno.EINTR
    assert (kernel.operations.n_open, kernel.operations.unsent.n_writers) == (0, 0)


async def test_a_close_is_answered(durable: tuple[Kernel, DurableImage]) -> None:
    """Of a writer: with one flush where something was written since the last. Of a reader: with none."""
    kernel, image = durable
    context = cast(RequestContext, None)
    reader = (await kernel.operations.open(FILE, os.O_RDONLY, context)).fh
    writer = (await kernel.operations.open(FILE, os.O_RDWR, context)).fh
    assert kernel.receive(write_request(0, b"x" * 512, unique=3)) == -errno.EINTR
    kernel.reply()
    for handle, n_flushes in ((reader, 0), (writer, 1), (writer, 1)):
        assert kernel.receive(flush_request(handle, unique=4)) == -errno.EINTR
        assert kernel.reply() == (4, 0, b"")
        assert image.n_flushes == n_flushes
    assert kernel.at_once.n_answered == 4


async def test_a_close_that_must_wait_is_handed_on(durable: tuple[Kernel, DurableImage]) -> None:
    """For a flush, or until the size is right again; and so is one of another length."""
    kernel, image = durable
    context = cast(RequestContext, None)
    writer = (await kernel.operations.open(FILE, os.O_RDWR, context)).fh
    assert kernel.receive(write_request(0, b"x" * 512)) == -errno.EINTR
    kernel.reply()
    image.is_durable = False
    for request in (flush_request(writer), header(FLUSH, 48) + bytes(8)):
        assert kernel.handed_on(kernel.receive(request)) == request
    image.is_durable = True
    await kernel.operations.sizes.truncate(4096, 1)
    request = flush_request(writer)
    assert kernel.handed_on(kernel.receive(request)) == request
    assert not kernel.has_reply()


async def test_attributes_are_answered(kernel: Kernel, image: MemoryImage) -> None:
    """What libfuse makes of what the handler says; not while the size has to be put right."""
    context = cast(RequestContext, None)
    assert kernel.receive(getattr_request(unique=12)) == -errno.EINTR
    unique, error, body = kernel.reply()
    shown = await kernel.operations.getattr(FILE, context)
    assert (unique, error, len(body)) == (12, 0, 104)
    assert struct.unpack_from("<3Q", body, 16) == (FILE, image.size, shown.st_blocks)
    assert struct.unpack_from("<4I", body, 76) == (shown.st_mode, 1, 5, 6)
    await kernel.operations.sizes.truncate(4096, 1)
    for request in (getattr_request(), getattr_request(inode=1), header(GETATTR, 48) + bytes(8)):
        assert kernel.handed_on(kernel.receive(request)) == request
    assert not kernel.has_reply()


@pytest.mark.parametrize("valid", [MTIME | CTIME, MTIME | CTIME | HANDLE])
async def test_the_times_before_an_fsync_are_set(kernel: Kernel, valid: int) -> None:
    """The reply is what libfuse makes of the same attributes."""
    request = setattr_request(valid, (1_700_000_000, 5), (1_700_000_001, 999_999_999), unique=11)
    assert kernel.receive(request) == -errno.EINTR
    unique, error, body = kernel.reply()
    assert (unique, error, len(body)) == (11, 0, 104)
    shown = await kernel.operations.getattr(FILE, cast(RequestContext, None))
    assert shown.st_mtime_ns == 1_700_000_000_000_000_005
    assert shown.st_ctime_ns == 1_700_000_001_999_999_999
    assert struct.unpack_from("<QII", body) == (1, 0, 0)
    inode, size, blocks, atime, mtime, ctime = struct.unpack_from("<6Q", body, 16)
    assert (inode, size, blocks) == (FILE, 1 << 20, shown.st_blocks)
    assert (atime, mtime, ctime) == (0, 1_700_000_000, 1_700_000_001)
    nanoseconds = struct.unpack_from("<3I", body, 64)
    assert nanoseconds == (0, 5, 999_999_999)
    assert struct.unpack_from("<7I", body, 76) == (0o100600, 1, 5, 6, 0, shown.st_blksize, 0)


@pytest.mark.parametrize(
    "valid", [MTIME, CTIME, MTIME | CTIME | SIZE, MTIME | CTIME | MTIME_NOW, MTIME | CTIME | UID]
)
def test_other_attributes_are_not_set_here(kernel: Kernel, valid: int) -> None:
    """Sizes and owners, and times that somebody set by hand, go the long way."""
    request = setattr_request(valid, (1, 2), (3, 4))
    assert kernel.handed_on(kernel.receive(request)) == request


def test_times_before_1970_are_not_set_here(kernel: Kernel) -> None:
    """The kernel sends them as huge numbers."""
    for times in (((1 << 64) - 5, 0), (5, 0)), ((5, 0), ((1 << 64) - 5, 0)):
        request = setattr_request(MTIME | CTIME, *times)
        assert kernel.handed_on(kernel.receive(request)) == request


@pytest.mark.parametrize(("mode", "unmaps"), [(3, True), (16, False), (17, False)])
async def test_a_punch_is_answered(holey: tuple[Kernel, HoleyImage], mode: int, unmaps: bool) -> None:
    """Zeroes, and the next close will flush."""
    kernel, image = holey
    before = image.n_flushes
    assert kernel.receive(fallocate_request(8192, 4096, mode, unique=4)) == -errno.EINTR
    assert kernel.reply() == (4, 0, b"")
    assert not any(image.data[8192:12288])
    assert any(image.data[12288:16384])
    assert image.was_unmapped is unmaps
    await kernel.close_writer()
    assert image.n_flushes == before + 1


async def test_a_punch_that_failed_is_not_tried_again(
    holey: tuple[Kernel, HoleyImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its handler answers with the error; the next punch at the same place is a new one."""
    kernel, image = holey
    request = fallocate_request(8192, 4096, 3)
    working = image.try_write_zeroes

    def failing(guest_offset: int, n_bytes: int, *, unmap: bool) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    for is_refused in (False, True):  # libfuse may have no memory for a request
        monkeypatch.setattr(image, "try_write_zeroes", failing)
        assert kernel.receive(request) == len(request)
        assert not kernel.has_reply()
        if is_refused:
            monkeypatch.setattr(image, "try_write_zeroes", lambda *args, **more: False)
            assert kernel.receive(request) == len(request)
        else:
            with pytest.raises(FUSEError) as caught:
                await kernel.operations.fallocate(3, 8192, 4096)
            assert caught.value.errno == errno.ENOSPC
            assert any(image.data[8192:12288])
        await kernel.operations.fallocate(3, 8192, 4096)
        assert not any(image.data[8192:12288])
        image.data[8192:12288] = b"x" * 4096
    monkeypatch.setattr(image, "try_write_zeroes", working)
    assert kernel.receive(request) == -errno.EINTR


HANDED_ON = {
    "no data behind": lseek_request(20000, os.SEEK_DATA),
    "behind the end": lseek_request(1 << 20, os.SEEK_HOLE),
    "a place below 0": lseek_request((1 << 64) - 1, os.SEEK_HOLE),
    "another whence": lseek_request(0, os.SEEK_END),
    "a long search": lseek_request(20000, os.SEEK_DATA),
    "another file": lseek_request(0, os.SEEK_DATA, inode=1),
    "too short": header(LSEEK, 56) + bytes(16),
    "space set aside": fallocate_request(8192, 4096, 0),
    "past the end": fallocate_request((1 << 20) - 4096, 8192, 3),
    "wrapped": fallocate_request(8192, (1 << 64) - 4096, 3),
    "part of a cluster": fallocate_request(8192, 512, 3),
    "collapse": fallocate_request(8192, 4096, 8),
    "short": header(FALLOCATE, 64) + bytes(24),
}


@pytest.mark.parametrize("name", HANDED_ON)
def test_other_requests_about_holes_are_handed_on(holey: tuple[Kernel, HoleyImage], name: str) -> None:
    """As they came, with nothing done."""
    kernel, image = holey
    before = bytes(image.data)
    request = HANDED_ON[name]
    assert kernel.receive(request) == len(request)
    assert kernel.handed_on(len(request)) == request
    assert not kernel.has_reply()
    assert bytes(image.data) == before


def test_what_the_session_does_not_answer_is_handed_on(holey: tuple[Kernel, HoleyImage]) -> None:
    """libfuse answers then that there is no such operation."""
    kernel, _ = holey
    kernel.at_once.answers_lseek = kernel.at_once.answers_fallocate = False
    for request in (lseek_request(0, os.SEEK_DATA), fallocate_request(8192, 4096, 3)):
        assert kernel.receive(request) == len(request)
        assert not kernel.has_reply()


async def test_nothing_is_said_about_holes_while_the_kernel_may_hold_data(holey: tuple[Kernel, HoleyImage]) -> None:
    """With the write-back cache, as long as the file is open for writing."""
    kernel, _ = holey
    kernel.operations.enable_writeback_cache = True
    request = lseek_request(0, os.SEEK_DATA)
    info = await kernel.operations.open(FILE, os.O_RDWR, cast(RequestContext, None))
    assert kernel.receive(request) == len(request)
    await kernel.operations.release(info.fh)
    assert kernel.receive(request) == -errno.EINTR


def test_several_requests_are_answered_in_their_order(kernel: Kernel, image: MemoryImage) -> None:
    """A read after a write of the same bytes sees them, with one call of libfuse's."""
    requests = [
        write_request(0, b"first", unique=1),
        read_request(0, 5, unique=2),
        write_request(0, b"later", unique=3),
    ]
    assert kernel.receive(*requests, read_request(0, 5, unique=4)) == -errno.EINTR
    assert [kernel.reply()[0] for _ in range(4)] == [1, 2, 3, 4]
    assert kernel.at_once.n_answered == 4
    assert bytes(image.data[:5]) == b"later"


@pytest.mark.parametrize(
    "request_",
    [
        header(STATFS, 40),
        read_request(0, 512, inode=1),
        write_request(0, b"x" * 512, inode=1),
        read_request((1 << 20) - 512, 1024),
        read_request(1 << 63, 512),
        write_request((1 << 20) - 512, b"x" * 1024),
        write_request(0, b"x" * 512, n_stated=1024),
        write_request(0, b"x" * 512, n_stated=511),
        write_request(0, b""),
        read_request(0, 512, n_extra=1),
        read_request(0, 512)[:-8],
    ],
    ids=[
        *("another opcode", "read of another inode", "write of another inode", "read past the end", "read far out"),
        *("write past the end", "too short", "too long", "of nothing", "with extensions", "cut short"),
    ],
)
def test_what_is_not_plain_is_handed_on(kernel: Kernel, image: MemoryImage, request_: bytes) -> None:
    """Unanswered, unchanged, and without any effect."""
    before = bytes(image.data)
    assert kernel.receive(request_) == len(request_)
    assert kernel.handed_on(len(request_)) == request_
    assert not kernel.has_reply()
    assert image.data == before
    assert kernel.at_once.n_answered == 0


@pytest.mark.parametrize("request_", [read_request(0, 512), write_request(0, b"x" * 512)])
def test_what_would_have_to_wait_is_handed_on(image: MemoryImage, request_: bytes) -> None:
    """What was started goes on in pyfuse3's handlers."""
    image.inline = False
    kernel = Kernel(image)
    assert kernel.receive(request_) == len(request_)
    assert kernel.handed_on(len(request_)) == request_
    assert not kernel.has_reply()
    kernel.close()


async def test_what_was_started_is_finished_by_its_handler(image: MemoryImage) -> None:
    """The handler that a request is handed on to goes on with what was started, and with its own copy of the data;
    the request after that is started anew."""
    image.inline = False
    kernel = Kernel(image)
    n_starts = 0
    start_read, start_write = image.start_read, image.start_write

    def counted_read(guest_offset: int, n_bytes: int, is_alone: object = None, /) -> object:
        nonlocal n_starts
        n_starts += 1
        return start_read(guest_offset, n_bytes)

    def counted_write(guest_offset: int, data: bytes, is_alone: object = None, /) -> object:
        nonlocal n_starts
        n_starts += 1
        return start_write(guest_offset, data)

    image.start_read, image.start_write = counted_read, counted_write  # type: ignore[assignment,method-assign]
    kernel = Kernel(image)
    kernel.receive(write_request(0, b"x" * 512))
    assert await kernel.operations.write(FILE, 0, b"y" * 512) == 512
    kernel.receive(read_request(0, 512))
    assert bytes(await kernel.operations.read(FILE, 0, 512)) == b"y" * 512
    assert n_starts == 2
    await kernel.operations.read(FILE, 0, 512)
    assert n_starts == 3
    assert not image.guard.epochs.n_in_flight
    kernel.close()


@pytest.mark.parametrize("request_", [read_request(0, 512), write_request(0, b"x" * 512)])
async def test_what_libfuse_never_hands_on_is_abandoned(image: MemoryImage, request_: bytes) -> None:
    """A request that its handler never gets is no longer in flight when the next one comes, or at the end."""
    image.inline = False
    kernel = Kernel(image)
    libfuse = Libfuse(kernel, header(26, 104) + bytes(64))
    libfuse.ask()
    kernel.socket.send(request_)
    libfuse.ask()
    assert kernel.operations.started.is_kept
    assert image.guard.epochs.n_in_flight == 1
    libfuse.ask()
    assert not kernel.operations.started.is_kept
    assert image.guard.epochs.n_in_flight == 0
    with kernel.at_once.active():
        kernel.receive(request_)
    assert image.guard.epochs.n_in_flight == 0
    kernel.close()


@pytest.mark.parametrize("place", [(0, 511), (1, 512)])
async def test_another_request_than_the_started_one(image: MemoryImage, place: tuple[int, int]) -> None:
    """A handler that is asked for something else starts that, and the started one is given up."""
    image.inline = False
    kernel = Kernel(image)
    kernel.receive(read_request(0, 512))
    off, size = place
    assert bytes(await kernel.operations.read(FILE, off, size)) == bytes(image.data[off : off + size])
    assert image.guard.epochs.n_in_flight == 0
    kernel.receive(read_request(0, 512))
    assert await kernel.operations.write(FILE, 0, b"z" * 512) == 512
    assert image.guard.epochs.n_in_flight == 0
    assert image.data[:512] == b"z" * 512
    kernel.close()


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "disk"), RuntimeError("bug")])
@pytest.mark.parametrize("request_", [read_request(0, 512), write_request(0, b"x" * 512)])
def test_errors_are_decided_elsewhere(
    kernel: Kernel, image: MemoryImage, request_: bytes, failure: Exception
) -> None:
    """Whatever the image raises, the request is handed on, and answered there."""
    image.failure = failure
    assert kernel.receive(request_) == len(request_)
    assert kernel.handed_on(len(request_)) == request_
    assert not kernel.has_reply()


def test_answered_requests_before_one_that_is_handed_on(kernel: Kernel) -> None:
    """The replies are out before libfuse gets its request; what comes after stays where it is."""
    last = header(STATFS, 40)
    assert kernel.receive(read_request(0, 512, unique=1), last, read_request(0, 512, unique=3)) == len(last)
    assert kernel.handed_on(len(last)) == last
    assert kernel.reply()[0] == 1
    assert not kernel.has_reply()
    assert kernel.receive() == -errno.EINTR
    assert kernel.reply()[0] == 3


def test_others_get_their_turn(image: MemoryImage) -> None:
    """After a burst the call returns, though there is more; fewer make a burst while a handler waits."""
    kernel = Kernel(image, burst=4)
    requests = [read_request(0, 512, unique=number) for number in range(7)]
    assert kernel.receive(*requests) == -errno.EINTR
    assert kernel.at_once.n_answered in (4, 5)
    assert kernel.gate.n_left_in_burst() <= 1
    kernel.close()


@pytest.mark.parametrize(("seconds", "n_answered"), [(0.002, 1), (0.00001, 3)])
@pytest.mark.parametrize("asked", [lseek_request(9000, os.SEEK_DATA), fallocate_request(8192, 4096, 3)])
def test_an_answer_that_took_long_counts_for_several(
    asked: bytes, seconds: float, n_answered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was asked about holes: a few such answers, and others get their turn."""
    now = itertools.count(0, seconds)
    monkeypatch.setattr(direct_requests, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    holey = HoleyImage(1 << 20, cluster_size=4096)
    holey.data[8192:16384] = b"x" * 8192
    kernel = Kernel(holey, burst=20)
    assert kernel.receive(asked, asked, asked) == -errno.EINTR
    assert kernel.at_once.n_answered == n_answered
    assert (kernel.gate.n_left_in_burst() <= 1) is (n_answered == 1)
    kernel.close()


def test_an_interrupted_request_needs_no_reply(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses a reply to a request that it gave up: the next one is served all the same."""
    real, refusals = os.writev, [OSError(errno.ENOENT, "gone")]

    def writev(fd: int, parts: tuple[bytes, ...]) -> int:
        if refusals:
            raise refusals.pop()
        return real(fd, parts)

    monkeypatch.setattr(os, "writev", writev)
    assert kernel.receive(read_request(0, 512, unique=1), read_request(0, 512, unique=2)) == -errno.EINTR
    assert kernel.reply()[0] == 2
    assert not kernel.has_reply()


def test_a_refused_reply_becomes_an_error(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever for a reply that could not be sent."""

    def writev(fd: int, parts: tuple[bytes, ...]) -> int:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(os, "writev", writev)
    assert kernel.receive(read_request(0, 512, unique=1)) == -errno.EINTR
    assert kernel.reply() == (1, -errno.EIO, b"")


class Libfuse:
    """Stands in for libfuse: receives with a buffer of its own."""

    def __init__(self, kernel: Kernel, request_: bytes) -> None:
        self.kernel, self.request = kernel, request_
        self.memory = allocated(N_BUFFER)
        self.fuse_buf = FuseBuf()
        at_once = kernel.at_once
        at_once._receive_by_libfuse = self.receive
        at_once._fd_of = lambda session: at_once._fd
        self.n_received = 0

    @property
    def address(self) -> int:
        return ctypes.addressof(self.fuse_buf)

    def ask(self) -> int:
        """What pyfuse3 gets when it asks for a request."""
        return self.kernel.at_once._receive(0, self.address)

    def receive(self, session: int, address: int) -> int:
        self.n_received += 1
        ctypes.memmove(self.memory, self.request, len(self.request))
        self.fuse_buf.mem, self.fuse_buf.size = self.memory, len(self.request)
        return len(self.request)


def test_a_buffer_is_libfuses_until_it_is_known(kernel: Kernel) -> None:
    """The first request of each buffer goes libfuse's way; then requests are received here, until it has another."""
    init = header(26, 104) + bytes(64)
    libfuse = Libfuse(kernel, init)
    assert libfuse.ask() == len(init)
    kernel.socket.send(read_request(0, 512))
    assert libfuse.ask() == -errno.EINTR
    assert kernel.reply()[0] == 7
    assert libfuse.n_received == 1
    libfuse.fuse_buf.mem = None
    assert libfuse.ask() == len(init)
    assert libfuse.n_received == 2
    assert kernel.at_once.refusal is None


@pytest.mark.parametrize("surprise", ["size", "flags", "mem", "content"])
def test_an_unknown_kind_of_buffer_ends_it(kernel: Kernel, surprise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where libfuse's buffer is not what it must be, all requests are libfuse's from then on."""
    init = header(26, 104) + bytes(64)
    libfuse = Libfuse(kernel, init)
    original = libfuse.receive

    def receive(session: int, address: int) -> int:
        n_bytes = original(session, address)
        if surprise == "content":
            ctypes.memset(libfuse.memory, 0, 4)
        else:
            setattr(libfuse.fuse_buf, surprise, {"size": 1, "flags": 2, "mem": None}[surprise])
        return n_bytes

    kernel.at_once._receive_by_libfuse = receive
    for _ in range(3):
        assert libfuse.ask() == len(init)
    assert libfuse.n_received == 3
    assert kernel.at_once.refusal is not None


def test_the_end_of_the_connection_is_for_libfuse(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENODEV is met again by libfuse, which ends the session; EAGAIN from it means: ask again."""
    init = header(26, 104) + bytes(64)
    libfuse = Libfuse(kernel, init)
    libfuse.ask()

    def readv(fd: int, buffers: object) -> int:
        raise OSError(errno.ENODEV, "unmounted")

    monkeypatch.setattr(os, "readv", readv)
    kernel.at_once._receive_by_libfuse = lambda session, address: 0
    assert libfuse.ask() == 0
    kernel.at_once._receive_by_libfuse = lambda session, address: -errno.EAGAIN
    assert libfuse.ask() == -errno.EINTR


def test_without_a_slot_nothing_is_diverted(monkeypatch: pytest.MonkeyPatch, image: MemoryImage) -> None:
    """On a surprise the block runs all the same, and the reason is kept."""

    def no_object(library: object) -> object:
        raise SlotError("not today")

    monkeypatch.setattr(direct_requests, "LoadedObject", no_object)
    hook = DirectRequests(Kernel(image).operations, RequestGate())
    with hook.active():
        pass
    assert hook.refusal == "not today"


def test_the_slot_is_found_and_given_back(image: MemoryImage) -> None:
    """pyfuse3 as installed can be diverted."""
    hook = DirectRequests(Kernel(image).operations, RequestGate())
    with hook.active():
        assert hook.refusal is None
