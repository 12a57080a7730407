"""ResidentStorage: an image file that is mapped and locked in RAM, so that no read waits for a disk.

1. Reads are copies out of a locked mapping. Writes go through the page cache, which the mapping shows at
   once; so a full disk is ENOSPC as ever (a store into a mapping would be SIGBUS) and the length stays exact.
2. What a growing file adds is served from the page cache until there are 64 MiB of it; then the mapping is
   made anew. Where that much RAM can't be locked any more it stays so, with one warning.
3. For measuring: the flush still goes to the disk below; put the file on a tmpfs to be rid of that too.
"""

from __future__ import annotations

import errno
import logging
import resource
from collections.abc import Sequence

from ...buffer import Buffer
from ..base import Deliver, OnEnd, OnWritten, StorageCounters
from ..blocking import read_all, read_all_into
from ..file import FileStorage
from ..syscalls import LockedMapping

_log = logging.getLogger(__name__)

GROWTH_STEP = 64 << 20
"""Bytes past the mapping before it is made anew."""

_CAP_IPC_LOCK = 14


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 20):.1f} MiB"


def available_bytes() -> int:
    """RAM that can be had without swapping (MemAvailable), in bytes. Raises OSError."""
    with open("/proc/meminfo") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise OSError(errno.ENOSYS, "no MemAvailable in /proc/meminfo")


def lockable_bytes() -> int | None:
    """What RLIMIT_MEMLOCK lets this process lock, in bytes; None without limit (CAP_IPC_LOCK). Raises OSError."""
    with open("/proc/self/status", newline="\n") as status:
        for line in status:
            if line.startswith("CapEff:") and int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1:
                return None
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if limit == resource.RLIM_INFINITY else limit


def _check_fits(n_bytes: int, path: str) -> None:
    available = available_bytes()
    if n_bytes > available:
        text = f"cannot hold the image in memory: it has {_mib(n_bytes)}, and {_mib(available)} of RAM are available"
        raise OSError(errno.ENOMEM, text, path)
    lockable = lockable_bytes()
    if lockable is not None and n_bytes > lockable:
        text = (
            f"cannot lock the image in memory: it has {_mib(n_bytes)}, and RLIMIT_MEMLOCK (ulimit -l) "
            f"allows {_mib(lockable)}"
        )
        raise OSError(errno.ENOMEM, text, path)


class ResidentStorage:
    """``inner``, which it owns from now on, with its whole contents locked in RAM."""

    def __init__(self, inner: FileStorage) -> None:
        """Reads the whole file, at once. Raises OSError(ENOMEM) with the sizes where it does not fit."""
        self._inner = inner
        self._mapping: LockedMapping | None = None
        self._view = memoryview(b"")
        self._mapped = 0
        self._may_grow = True
        _check_fits(inner.size(), inner.name)
        try:
            self._map()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOMEM, errno.EPERM):
                raise
            text = f"cannot lock the image's {_mib(inner.size())} in memory ({error.strerror})"
            raise OSError(errno.ENOMEM, text, inner.name) from error

    @property
    def name(self) -> str:
        """The path."""
        return self._inner.name

    @property
    def is_fixed(self) -> bool:
        """The inner one's."""
        return self._inner.is_fixed

    @property
    def writable(self) -> bool:
        """Whether the file was opened for writing."""
        return self._inner.writable

    @property
    def counters(self) -> StorageCounters:
        """The inner one's, with what was answered from memory."""
        return self._inner.counters

    @property
    def resident_bytes(self) -> int:
        """Bytes from the start of the file that are locked in RAM."""
        return self._mapped

    def fileno(self) -> int:
        """The descriptor, for locks."""
        return self._inner.fileno()

    def size(self) -> int:
        """The length in bytes."""
        return self._inner.size()

    def refresh_size(self) -> None:
        """It stays: what is in memory does not grow by what others do."""

    def allocated_bytes(self) -> int:
        """Bytes of disk space in use."""
        return self._inner.allocated_bytes()

    def free_bytes(self) -> int:
        """Free bytes in the file system below."""
        return self._inner.free_bytes()

    def try_pread(self, host_offset: int, n_bytes: int) -> Buffer | None:
        """Never declines. Raises OSError."""
        counters = self._inner.counters
        counters.reads += 1
        counters.read_bytes += n_bytes
        if host_offset + n_bytes <= self._mapped:
            return bytes(self._view[host_offset : host_offset + n_bytes])
        return read_all(self._inner.fileno(), host_offset, n_bytes)

    def try_pread_into(self, host_offset: int, buffer: memoryview) -> bool:
        """Never declines. Raises OSError."""
        n_bytes = len(buffer)
        counters = self._inner.counters
        counters.reads += 1
        counters.read_bytes += n_bytes
        if host_offset + n_bytes <= self._mapped:
            buffer[:] = self._view[host_offset : host_offset + n_bytes]
        else:
            read_all_into(self._inner.fileno(), host_offset, buffer)
        return True

    async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
        """As :meth:`try_pread`."""
        data = self.try_pread(host_offset, n_bytes)
        assert data is not None
        return data

    def start_delivery(self, host_offset: int, n_bytes: int, deliver: Deliver, on_end: OnEnd) -> bool:
        """False: no read waits."""
        return False

    async def pread_into(self, host_offset: int, buffer: memoryview) -> None:
        """As :meth:`try_pread_into`."""
        self.try_pread_into(host_offset, buffer)

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """Declines only on a read-only storage. Raises OSError."""
        inner = self._inner
        if not inner.writable:
            return False
        done = inner.write_inline(host_offset, buffers)
        self._follow_growth()
        return done

    async def pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """As :meth:`try_pwritev`. Raises OSError."""
        if not self.try_pwritev(host_offset, buffers):
            await self._inner.pwritev(host_offset, buffers)

    def start_pwrite(self, host_offset: int, data: Buffer, on_written: OnWritten, on_end: OnEnd) -> bool:
        """False: no write waits."""
        return False

    async def write_zeroes(self, host_offset: int, n_bytes: int, *, unmap: bool = False) -> None:
        """Zero the range; may grow. Raises OSError."""
        await self._inner.write_zeroes(host_offset, n_bytes, unmap=unmap)
        self._follow_growth()

    async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
        """Give the range's space back; it may be zeroes then. Raises OSError."""
        await self._inner.punch_hole(host_offset, n_bytes, in_use=in_use)

    async def allocate(self, host_offset: int, n_bytes: int) -> bool:
        """Set space aside; may grow. Raises OSError."""
        allocated = await self._inner.allocate(host_offset, n_bytes)
        self._follow_growth()
        return allocated

    async def keep_free(self, n_bytes: int) -> bool:
        """As the inner one. Raises OSError."""
        return await self._inner.keep_free(n_bytes)

    async def truncate(self, n_bytes: int) -> None:
        """Set the length. Raises OSError."""
        # Before the file shrinks: a mapping that reaches past the end would be SIGBUS for a read under way.
        if n_bytes < self._mapped:
            self._mapped = n_bytes
        await self._inner.truncate(n_bytes)
        self._follow_growth()

    def try_flush(self) -> bool:
        """See Storage."""
        return self._inner.try_flush()

    async def flush(self) -> None:
        """Make every completed write durable. Raises OSError."""
        await self._inner.flush()

    async def aclose(self) -> None:
        """Unmap and close. Idempotent."""
        self._unmap()
        await self._inner.aclose()

    def _map(self) -> None:
        n_bytes = self._inner.size()
        if n_bytes == 0:
            return
        mapping = LockedMapping(self._inner.fileno(), n_bytes)
        self._unmap()
        self._mapping = mapping
        self._view = mapping.view
        self._mapped = n_bytes

    def _unmap(self) -> None:
        self._mapped = 0
        if self._mapping is not None:
            self._mapping.unmap()
            self._mapping = None

    def _follow_growth(self) -> None:
        if self._inner.size() - self._mapped < GROWTH_STEP or not self._may_grow:
            return
        try:
            _check_fits(self._inner.size() - self._mapped, self._inner.name)
            self._map()
        except OSError as error:
            self._may_grow = False
            _log.warning(
                "%s: %s are locked in RAM, what it grew by is not (%s)",
                self._inner.name,
                _mib(self._mapped),
                error.strerror,
            )
