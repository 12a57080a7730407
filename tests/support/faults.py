"""Storages that fail, or wait, at an operation of the test's choice.

1. Operations are numbered from 0 in the order in which they are begun; a ``try_`` call that declines is none.
2. A failing write has written a part, whole sectors, before it fails.
3. A failed flush is final, as the Storage protocol has it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, NamedTuple

import trio

from qcowfuse.buffer import Buffer
from qcowfuse.storage.base import Deliver, OnEnd, OnWritten, Storage

from .forwarding import ForwardingStorage
from .recording import SECTOR

Kind = Literal["read", "write", "punch", "allocate", "flush"]


class Operation(NamedTuple):
    """One operation that reaches the storage."""

    number: int
    kind: Kind
    host_offset: int
    n_bytes: int


Check = Callable[[Operation], int]
"""errno to fail with, or 0."""
Gate = Callable[[Operation], Awaitable[None]]
"""Awaited before the operation is done."""


class FaultyStorage(ForwardingStorage):
    """Asks ``check`` and ``gate`` about each operation. Inline calls are declined unless ``inline``."""

    def __init__(
        self, inner: Storage, *, check: Check | None = None, gate: Gate | None = None, inline: bool = False
    ) -> None:
        super().__init__(inner)
        self.check = check
        self.gate = gate
        self.inline = inline
        self.operations: list[Operation] = []
        self.flush_failure: int = 0

    @property
    def n_failed_flushes(self) -> int:
        """1 after a flush has failed."""
        return int(bool(self.flush_failure))

    def try_pread(self, host_offset: int, n_bytes: int) -> Buffer | None:
        """Inline only."""
        if not self.inline:
            return None
        self._raise_if_wanted(self._note("read", host_offset, n_bytes))
        return self.inner.try_pread(host_offset, n_bytes)

    def try_pread_into(self, host_offset: int, buffer: memoryview) -> bool:
        """Inline only."""
        if not self.inline:
            return False
        self._raise_if_wanted(self._note("read", host_offset, len(buffer)))
        return self.inner.try_pread_into(host_offset, buffer)

    async def pread(self, host_offset: int, n_bytes: int) -> Buffer:
        """Ask first."""
        await self._pass(self._note("read", host_offset, n_bytes))
        return await self.inner.pread(host_offset, n_bytes)

    def start_delivery(self, host_offset: int, n_bytes: int, deliver: Deliver, on_end: OnEnd) -> bool:
        """False: a fault is for a task to meet."""
        return False

    async def pread_into(self, host_offset: int, buffer: memoryview) -> None:
        """Ask first."""
        await self._pass(self._note("read", host_offset, len(buffer)))
        await self.inner.pread_into(host_offset, buffer)

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """Inline only."""
        if not self.inline:
            return False
        data = b"".join(buffers)
        operation = self._note("write", host_offset, len(data))
        code = self.check(operation) if self.check else 0
        if code:
            if part := data[: len(data) // 2 // SECTOR * SECTOR]:
                self.inner.try_pwritev(host_offset, (part,))
            raise OSError(code, os.strerror(code))
        return self.inner.try_pwritev(host_offset, buffers)

    async def pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """Ask first."""
        data = b"".join(buffers)
        operation = self._note("write", host_offset, len(data))
        if self.gate:
            await self.gate(operation)
        code = self.check(operation) if self.check else 0
        if code:
            if part := data[: len(data) // 2 // SECTOR * SECTOR]:
                await self.inner.pwritev(host_offset, (part,))
            raise OSError(code, os.strerror(code))
        await self.inner.pwritev(host_offset, buffers)

    def start_pwrite(self, host_offset: int, data: Buffer, on_written: OnWritten, on_end: OnEnd) -> bool:
        """False: a fault is for a task to meet."""
        return False

    async def write_zeroes(self, host_offset: int, n_bytes: int, *, unmap: bool = False) -> None:
        """A write like any other; with ``unmap`` like a hole."""
        if unmap:
            await self._pass(self._note("punch", host_offset, n_bytes))
            await self.inner.write_zeroes(host_offset, n_bytes, unmap=True)
            return
        await self.pwritev(host_offset, [bytes(n_bytes)])

    async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
        """Ask first."""
        await self._pass(self._note("punch", host_offset, n_bytes))
        await self.inner.punch_hole(host_offset, n_bytes, in_use=in_use)

    async def allocate(self, host_offset: int, n_bytes: int) -> bool:
        """Ask first."""
        await self._pass(self._note("allocate", host_offset, n_bytes))
        return await self.inner.allocate(host_offset, n_bytes)

    def try_flush(self) -> bool:
        """Inline only, and only where nothing can be held."""
        if not self.inline or self.gate or self.flush_failure:
            return False
        operation = self._note("flush", 0, 0)
        if self.check:
            self.flush_failure = self.check(operation)
        return not self.flush_failure and self.inner.try_flush()

    async def flush(self) -> None:
        """Ask first."""
        operation = self._note("flush", 0, 0)
        if self.gate:
            await self.gate(operation)
        if not self.flush_failure and self.check:
            self.flush_failure = self.check(operation)
        if self.flush_failure:
            raise OSError(self.flush_failure, os.strerror(self.flush_failure))
        await self.inner.flush()

    def _note(self, kind: Kind, host_offset: int, n_bytes: int) -> Operation:
        operation = Operation(len(self.operations), kind, host_offset, n_bytes)
        self.operations.append(operation)
        return operation

    def _raise_if_wanted(self, operation: Operation) -> None:
        code = self.check(operation) if self.check else 0
        if code:
            raise OSError(code, os.strerror(code))

    async def _pass(self, operation: Operation) -> None:
        if self.gate:
            await self.gate(operation)
        self._raise_if_wanted(operation)


def fail_at(number: int, *, code: int = errno.EIO, for_ever: bool = False) -> Check:
    """Fail operation ``number``, and with ``for_ever`` all that follow."""

    def check(operation: Operation) -> int:
        return code if operation.number == number or (for_ever and operation.number > number) else 0

    return check


class Hold:
    """A gate that stops operations which ``wanted`` chooses until :meth:`release`; others pass."""

    def __init__(self, wanted: Callable[[Operation], bool]) -> None:
        self.wanted = wanted
        self.held: list[Operation] = []
        self.reached = trio.Event()
        self._released = trio.Event()

    async def __call__(self, operation: Operation) -> None:
        """The gate."""
        if self._released.is_set() or not self.wanted(operation):
            return
        self.held.append(operation)
        self.reached.set()
        await self._released.wait()

    def release(self) -> None:
        """Let go of everything, now and from here on."""
        self._released.set()
