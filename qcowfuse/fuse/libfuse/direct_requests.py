"""Requests that need not wait, answered as soon as they have been read from /dev/fuse.

pyfuse3 reads a request with libfuse's ``fuse_session_receive_buf``, and then has libfuse take it apart and start a
coroutine. For a read of 4 KiB from memory that costs several times what the read does. While
:meth:`DirectRequests.active` lasts, that call is diverted: requests are read here, READ and WRITE of the one file are
answered by plain calls, and then comes the next; whatever else is read is handed to libfuse, as if libfuse had read
it. So are FSYNC with the SETATTR before it, OPEN, FLUSH, RELEASE, GETATTR, and LSEEK and FALLOCATE where the session
answers them at all.

1. A request is answered here, or handed on unanswered, never both. When in doubt (another opcode or inode, a length
   that does not fit) it is handed on as it came. A read or write that has to wait, or that failed, was started here
   all the same: it is kept for its handler, which goes on with it (:mod:`..started`), and answers.
2. A buffer of libfuse's is used once libfuse itself has received a request with it, and only if that looked as it
   must: so memory and layout are known. Until then, and for good on any surprise, requests are libfuse's to receive.
3. Nothing raised here gets to libfuse: ctypes would swallow it.
4. No data is kept: the memory that a write is handed in is overwritten by the next request. A pending write gets the
   copy that its handler is given, or, where a thread makes it, that memory itself (:mod:`.request_memory`).
5. The gate counts what is answered here (rule 3 of :mod:`..request_gate`), and spins here when there is no request.
   An answer about holes may take longer than any other: it counts for as many as could be given meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import pyfuse3
from pyfuse3 import FUSEError

from ...driver.image import LARGE_WRITE, StartRead, always
from ...driver.pending import PendingPlace, PendingRead, PendingWrite
from ...errors import OutOfRangeError
from ...system.import_slot import LoadedObject, SlotError, diverted
from ...system.short_wait import allow_short_waits
from ..failures import Failures
from ..fsync_at_once import FsyncAtOnce
from ..holes_at_once import HolesAtOnce
from ..open_files import OpenFiles
from ..request_gate import RequestGate
from ..seeking import NO_DATA
from ..started import StartedRequest
from ..writes_at_once import WritesAtOnce
from .attribute_messages import SETATTR_BYTES, pack_attributes, parse_set_times
from .replies import AnsweringThreads, send_data, send_error, send_written
from .request_memory import Loan, RequestBuffer, RequestMemory

# linux/fuse.h: fuse_in_header, and the head that fuse_read_in and fuse_write_in have in common.
_REQUEST = struct.Struct("<IIQQ12xHxxQQI")
_HEADER = struct.Struct("<IIQ")
_HEADER_BYTES = 40
_WRITE_BYTES = _HEADER_BYTES + 40
_WRITE_FLAGS, _FUSE_WRITE_CACHE = struct.Struct("<60xI"), 1
"""Where the flags of a write are, and the one of what the page cache sends: no client waits for that."""
_FUSE_GETATTR, _FUSE_SETATTR, _FUSE_OPEN, _FUSE_READ, _FUSE_WRITE, _FUSE_RELEASE = 3, 4, 14, 15, 16, 18
_FUSE_FSYNC, _FUSE_FLUSH, _FUSE_FALLOCATE, _FUSE_LSEEK = 20, 25, 43, 46
# What stands behind the header, and the length of both: fuse_{fsync,getattr,setattr,flush,...}_in.
_FSYNC_BYTES, _GETATTR_BYTES, _SETATTR_BYTES = _HEADER_BYTES + 16, _HEADER_BYTES + 16, _HEADER_BYTES + SETATTR_BYTES
_OPEN, _OPEN_BYTES = struct.Struct("<I"), _HEADER_BYTES + 8
_HANDLE, _HANDLE_BYTES = struct.Struct("<Q"), _HEADER_BYTES + 24
"""Of FLUSH and RELEASE."""
_OPENED, _FOPEN_DIRECT_IO, _FOPEN_KEEP_CACHE = struct.Struct("<QII"), 1, 2
_LSEEK, _LSEEK_BYTES = struct.Struct("<8xQI"), _HEADER_BYTES + 24
_FALLOCATE, _FALLOCATE_BYTES = struct.Struct("<8xQQI"), _HEADER_BYTES + 32
_SOUGHT = struct.Struct("<Q")
COPIED_BYTES = 64 << 10
"""What a thread is to write is copied up to here: longer data is lent, with all of the memory around it."""
_USUAL_SECONDS = 100e-6
"""What the answer to a request takes at most, as the bounds of the gate suppose."""

_Answer = Callable[[memoryview, int], bytes | int | None]
"""Takes a request and its length; gives what stands behind the header of the reply, the number of an error, or None
for what is handed on."""

_log = logging.getLogger(__name__)


class RequestHandlers(Protocol):
    """What of :class:`~qcowfuse.fuse.operations.Operations` is used here."""

    started: StartedRequest
    failures: Failures

    @property
    def file_inode(self) -> int:
        """The inode of the one file."""

    @property
    def start_read(self) -> StartRead:
        """Starts reads."""

    @property
    def writes(self) -> WritesAtOnce:
        """What answers WRITE."""

    @property
    def opens(self) -> OpenFiles:
        """What answers OPEN and RELEASE."""

    @property
    def fsyncs(self) -> FsyncAtOnce:
        """What answers FSYNC, SETATTR of the times that come before it, FLUSH and GETATTR."""

    @property
    def holes(self) -> HolesAtOnce:
        """What answers LSEEK and FALLOCATE."""


def _nothing() -> None:
    """There is no memory to give back."""


_RECEIVE = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class DirectRequests:
    """``with hook.active():`` around ``pyfuse3.main``. ``refusal`` is None, or says why libfuse receives all."""

    def __init__(self, handlers: RequestHandlers, gate: RequestGate) -> None:
        self.refusal: str | None = None
        self.answers_lseek = self.answers_fallocate = False
        self.n_answered = 0
        self.threads = AnsweringThreads(gate, handlers.failures.note)
        self._handlers = handlers
        self._gate = gate
        self._fd = -1
        self._buffers: dict[int, RequestBuffer] = {}
        self.memory: RequestMemory | None = None
        self._undo: Callable[[], None] | None = None
        self._answers: dict[int, _Answer] = {
            _FUSE_FSYNC: self._fsync,
            _FUSE_SETATTR: self._set_times,
            _FUSE_OPEN: self._open,
            _FUSE_FLUSH: self._flush,
            _FUSE_RELEASE: self._release,
            _FUSE_GETATTR: self._getattr,
            _FUSE_LSEEK: self._lseek,
            _FUSE_FALLOCATE: self._fallocate,
        }

    @contextmanager
    def active(self) -> Iterator[None]:
        """Divert inside of the block. Raises nothing of its own."""
        try:
            library = ctypes.CDLL(pyfuse3.__file__)
            name, slot = LoadedObject(library).slot_of(["fuse_session_receive_buf"])
            # pyfuse3 holds the interpreter's lock while it receives, and so must all that stands in between.
            self._receive_by_libfuse: Callable[[int, int], int] = _RECEIVE((name, library))
            self._fd_of: Callable[[int], int] = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(
                ("fuse_session_fd", library)
            )
            self.memory = RequestMemory()
            callback = _RECEIVE(self._receive)
            target = ctypes.cast(callback, ctypes.c_void_p).value
            assert target is not None
            diversion = diverted(slot, target)
            diversion.__enter__()
        except (SlotError, OSError, AttributeError, ValueError, LookupError) as exc:
            self._refuse(str(exc))
            yield
            return
        try:
            yield
        finally:
            diversion.__exit__(None, None, None)
            self._handlers.started.drop()
            _log.debug("%d requests were answered at once", self.n_answered)

    async def wait_until_ended(self) -> None:
        """Return when no thread answers a request any more; no request may be received any more. A cancellation
        waits."""
        await self.threads.wait_until_ended()
        if self.memory is not None:
            self.memory.release()

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        _log.info("requests go the long way, small ones are slower: %s", reason)

    def _receive(self, session: int, fuse_buf: int) -> int:
        """Stands in for ``fuse_session_receive_buf``: bytes of a request, 0 at the end, or minus an error number."""
        if self._handlers.started.is_kept:
            self._handlers.started.drop()
        buffer = self._buffers.get(fuse_buf)
        if buffer is not None and buffer.fuse_buf.mem == buffer.address:
            try:
                return self._receive_into(buffer)
            except OSError as exc:
                # Such as ENODEV, the end of the connection. libfuse will get the same, and knows what to do.
                if exc.errno not in (errno.ENODEV, errno.EINTR, errno.ENOENT):
                    _log.info("reading a request failed: %s", exc)
            except Exception:
                _log.exception("bug in qcowfuse: receiving a request failed unexpectedly")
        n_bytes = self._receive_by_libfuse(session, fuse_buf)
        if n_bytes == -errno.EAGAIN:
            return -errno.EINTR
        if n_bytes > 0 and self.refusal is None:
            try:
                self._learn(session, fuse_buf, n_bytes)
            except (SlotError, OSError, ValueError) as exc:
                self._buffers.clear()
                self._refuse(str(exc))
        return n_bytes

    def _learn(self, session: int, address: int, n_bytes: int) -> None:
        """Make the buffer that libfuse has just received with one of ours (rule 2). Raises SlotError, OSError."""
        assert self.memory is not None
        buffer = self.memory.buffer_of(address, n_bytes)
        if n_bytes < _HEADER_BYTES or _HEADER.unpack_from(buffer.view)[0] != n_bytes:
            raise SlotError("libfuse's buffer holds no request")
        if self._fd < 0:
            fd = self._fd_of(session)
            os.set_blocking(fd, False)  # libfuse copes: see EAGAIN above
            self._fd = fd
            allow_short_waits(fd, lambda: self._gate.n_slow)
        self._buffers[address] = buffer

    def _receive_into(self, buffer: RequestBuffer) -> int:
        fd, view, gate = self._fd, buffer.view, self._gate
        handlers, threads = self._handlers, self.threads
        start_read, start_write, file_inode = handlers.start_read, handlers.writes.start, handlers.file_inode
        is_idle, answers = gate.is_idle, self._answers
        n_answered, n_others, n_allowed = 0, 0, gate.n_left_in_burst()
        try:
            while n_answered + n_others < n_allowed:
                try:
                    n_bytes = os.readv(fd, buffer.views)
                except BlockingIOError:
                    if gate.spin(fd):
                        continue
                    return -errno.EINTR
                n_stated, opcode, unique, inode, n_extra, _, off, size = _REQUEST.unpack_from(view)
                if inode == file_inode and n_stated == n_bytes and not n_extra:
                    if opcode == _FUSE_READ:
                        try:
                            data = start_read(off, size, is_idle)
                        except Exception as exc:
                            self._keep(PendingRead, off, size, exc)
                        else:
                            if not isinstance(data, PendingRead):
                                send_data(fd, unique, data)
                                # Free before the next is made: the same memory, in the processor's cache still.
                                del data
                                n_answered += 1
                                continue
                            if threads.start_read(fd, unique, data):
                                n_answered += 1
                                del data
                                continue
                            handlers.started.keep(PendingRead, off, size, data)
                            del data
                    elif opcode == _FUSE_WRITE and n_bytes == _WRITE_BYTES + size and size:
                        may_wait = size < LARGE_WRITE or not _WRITE_FLAGS.unpack_from(view)[0] & _FUSE_WRITE_CACHE
                        try:
                            pending = start_write(off, view[_WRITE_BYTES:n_bytes], is_idle if may_wait else always)
                        except Exception as exc:
                            self._keep(PendingWrite, off, size, exc)
                        else:
                            if pending is None:
                                send_written(fd, unique, size)
                                n_answered += 1
                                continue
                            if isinstance(pending, PendingPlace) and self._hand_over(buffer, unique, size, pending):
                                n_answered += 1
                                view = buffer.view
                                del pending
                                continue
                            handlers.started.keep(PendingWrite, off, size, pending)
                    elif opcode in answers:
                        n_worth = self._answer(answers[opcode], unique, view, n_bytes)
                        if n_worth:
                            n_answered += 1
                            n_others += n_worth - 1
                            continue
                buffer.fuse_buf.size = n_bytes
                buffer.fuse_buf.flags = 0
                return n_bytes
            return -errno.EINTR
        finally:
            gate.count(n_answered + n_others)
            self.n_answered += n_answered

    def _hand_over(self, buffer: RequestBuffer, unique: int, size: int, pending: PendingPlace) -> bool:
        """Have a thread make the write that was read into ``buffer``, and answer it; False where that can't be: then
        it is as before, in ``buffer``."""
        loan: Loan | None = None
        if size <= COPIED_BYTES:
            pending.use(bytes(buffer.view[_WRITE_BYTES : _WRITE_BYTES + size]))
        elif self.memory is None or (loan := self.memory.lend(buffer)) is None:
            return False
        writes = self._handlers.writes
        give_back = loan.give_back if loan is not None else _nothing
        if not self.threads.start_write(self._fd, unique, size, pending, give_back, writes.end_elsewhere):
            if loan is not None:
                loan.undo()
            return False
        writes.begin_elsewhere()
        return True

    def _answer(self, answer: _Answer, unique: int, view: memoryview, n_bytes: int) -> int:
        """Answer a request by ``answer``; as how many it counts, 0 where it has to be handed on."""
        start = time.perf_counter()
        self._undo = None
        try:
            body = answer(view, n_bytes)
        except Exception as exc:
            _log.debug("not answered at once: %r", exc)
            return 0
        if body is None:
            return 0
        seconds = time.perf_counter() - start
        if isinstance(body, int):
            send_error(self._fd, unique, body)
        else:
            is_taken = send_data(self._fd, unique, body)
            if not is_taken and self._undo is not None:
                self._undo()
        return 1 + int(seconds / _USUAL_SECONDS)

    def _fsync(self, view: memoryview, n_bytes: int) -> bytes | None:
        return b"" if n_bytes == _FSYNC_BYTES and self._handlers.fsyncs.start_fsync() else None

    def _set_times(self, view: memoryview, n_bytes: int) -> bytes | None:
        times = parse_set_times(view, _HEADER_BYTES) if n_bytes == _SETATTR_BYTES else None
        return None if times is None else pack_attributes(self._handlers.fsyncs.start_set_times(*times))

    def _open(self, view: memoryview, n_bytes: int) -> bytes | int | None:
        if n_bytes != _OPEN_BYTES:
            return None
        (flags,) = _OPEN.unpack_from(view, _HEADER_BYTES)
        opens = self._handlers.opens
        try:
            handle = opens.open(flags)
        except FUSEError as exc:
            return exc.errno
        self._undo = partial(opens.release, handle)
        return _OPENED.pack(handle, _FOPEN_KEEP_CACHE if opens.is_cached else _FOPEN_DIRECT_IO, 0)

    def _flush(self, view: memoryview, n_bytes: int) -> bytes | None:
        if n_bytes != _HANDLE_BYTES:
            return None
        (handle,) = _HANDLE.unpack_from(view, _HEADER_BYTES)
        return b"" if self._handlers.fsyncs.start_flush(handle) else None

    def _release(self, view: memoryview, n_bytes: int) -> bytes | None:
        if n_bytes != _HANDLE_BYTES:
            return None
        (handle,) = _HANDLE.unpack_from(view, _HEADER_BYTES)
        self._handlers.opens.release(handle)
        return b""

    def _getattr(self, view: memoryview, n_bytes: int) -> bytes | None:
        entry = self._handlers.fsyncs.start_getattr() if n_bytes == _GETATTR_BYTES else None
        return None if entry is None else pack_attributes(entry)

    def _lseek(self, view: memoryview, n_bytes: int) -> bytes | int | None:
        if not self.answers_lseek or n_bytes != _LSEEK_BYTES:
            return None
        off, whence = _LSEEK.unpack_from(view, _HEADER_BYTES)
        found = self._handlers.holes.start_lseek(off, whence)
        if found == NO_DATA:
            return errno.ENXIO
        return None if found is None else _SOUGHT.pack(found)

    def _fallocate(self, view: memoryview, n_bytes: int) -> bytes | None:
        if not self.answers_fallocate or n_bytes != _FALLOCATE_BYTES:
            return None
        off, length, mode = _FALLOCATE.unpack_from(view, _HEADER_BYTES)
        return b"" if self._handlers.holes.start_fallocate(mode, off, length) else None

    def _keep(self, kind: type[PendingRead] | type[PendingWrite], off: int, size: int, failure: Exception) -> None:
        """Leave the failure of a start to the handler. What does not lie in the disk was not even started."""
        _log.debug("not answered at once: %r", failure)
        if not isinstance(failure, OutOfRangeError):
            self._handlers.started.keep(kind, off, size, failure)
