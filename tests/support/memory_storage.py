"""MemoryStorage: a Storage that is a bytearray, for tests of what lies above."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import trio

from qcowfuse.buffer import Buffer
from qcowfuse.storage.base import Deliver, OnEnd, OnWritten, StorageCounters


class MemoryStorage:
    """A bytearray as a Storage: all inline, or with ``suspend`` nothing inline and a checkpoint in each call.

    ``data`` is the contents, live. With ``suspend`` an awaited call acts after its checkpoint, so that others
    may come in between. Closing leaves ``data`` in place; any use after it raises ``OSError(EBADF)``.
    """

    def __init__(
        self, data: Buffer = b"", *, writable: bool = True, suspend: bool = False, name: str = "memory"
    ) -> None:
        self.data = bytearray(data)
        self.name = name
        self.writable = writable
        self.suspend = suspend
        self.is_fixed = False
        self.counters = StorageCounters()
        self.closed = False

    def size(self) -> int:
        """The length in bytes."""
        return len(self.data)

    def refresh_size(self) -> None:
        """It is known."""

    def allocated_bytes(self) -> int:
        """The length, in whole blocks of 512 bytes."""
        return -(-len(self.data) // 512) * 512

    def free_bytes(self) -> int:
        """1 GiB, whatever happens."""
        return 1 << 30

    def try_pread(self, host_offset: int, n_bytes: int) -> Buffer | None:
        """The bytes; None with ``suspend``."""
        self._must_be_open()
        return None if self.suspend else self._read(host_offset, n_bytes)

    def try_pread_into(self, host_offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer``; False with ``suspend``."""
        self._must_be_open()
        if self.suspend:
            # Rule of the protocol: the buffer is undefined now. Make sure that nobody relies on it.
            buffer[:] = b"\xa5" * len(buffer)
            return False
        buffer[:] = self._read(host_offset, len(buffer))
        return True

    async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
        """The bytes."""
        await self._checkpoint()
        return self._read(host_offset, n_bytes)

    def start_delivery(self, host_offset: int, n_bytes: int, deliver: Deliver, on_end: OnEnd) -> bool:
        """False: there are no threads."""
        return False

    async def pread_into(self, host_offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``."""
        await self._checkpoint()
        buffer[:] = self._read(host_offset, len(buffer))

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """Write; False with ``suspend`` and on a read-only storage."""
        self._must_be_open()
        if self.suspend or not self.writable:
            return False
        self._write(host_offset, b"".join(buffers))
        return True

    async def pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """Write."""
        self._must_be_writable()
        await self._checkpoint()
        self._write(host_offset, b"".join(buffers))

    def start_pwrite(self, host_offset: int, data: Buffer, on_written: OnWritten, on_end: OnEnd) -> bool:
        """False: there are no threads."""
        return False

    async def write_zeroes(self, host_offset: int, n_bytes: int, *, unmap: bool = False) -> None:
        """Write zeroes; within the length with ``unmap``."""
        self._must_be_writable()
        await self._checkpoint()
        self._write(host_offset, bytes(min(n_bytes, max(0, len(self.data) - host_offset)) if unmap else n_bytes))

    async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
        """Zero what lies within the length."""
        self._must_be_writable()
        await self._checkpoint()
        self.counters.writes += 1
        n_bytes = min(n_bytes, len(self.data) - host_offset)
        if n_bytes > 0:
            self.data[host_offset : host_offset + n_bytes] = bytes(n_bytes)

    async def allocate(self, host_offset: int, n_bytes: int) -> bool:
        """Grow; there is always room."""
        self._must_be_writable()
        await self._checkpoint()
        self.data.extend(bytes(max(0, host_offset + n_bytes - len(self.data))))
        return True

    async def keep_free(self, n_bytes: int) -> bool:
        """No need."""
        return False

    async def truncate(self, n_bytes: int) -> None:
        """Set the length."""
        self._must_be_writable()
        await self._checkpoint()
        del self.data[n_bytes:]
        self.data.extend(bytes(n_bytes - len(self.data)))

    def try_flush(self) -> bool:
        """Count; False with ``suspend``."""
        self._must_be_open()
        if self.suspend:
            return False
        self.counters.flushes += 1
        return True

    async def flush(self) -> None:
        """Count."""
        await self._checkpoint()
        self.counters.flushes += 1

    async def aclose(self) -> None:
        """From here on every use is an error."""
        self.closed = True

    def _read(self, host_offset: int, n_bytes: int) -> bytes:
        self.counters.reads += 1
        self.counters.read_bytes += n_bytes
        return bytes(self.data[host_offset : host_offset + n_bytes]).ljust(n_bytes, b"\0")

    def _write(self, host_offset: int, data: bytes) -> None:
        self.counters.writes += 1
        self.counters.written_bytes += len(data)
        if data:
            self.data.extend(bytes(max(0, host_offset - len(self.data))))
            self.data[host_offset : host_offset + len(data)] = data

    async def _checkpoint(self) -> None:
        self._must_be_open()
        if self.suspend:
            await trio.lowlevel.checkpoint()

    def _must_be_open(self) -> None:
        if self.closed:
            raise OSError(errno.EBADF, "storage is closed", self.name)

    def _must_be_writable(self) -> None:
        if not self.writable:
            raise OSError(errno.EBADF, "storage was opened read-only", self.name)
