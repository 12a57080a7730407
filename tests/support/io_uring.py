"""Whether this kernel lets us use io_uring, and a binding that needs none."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from qcowfuse.storage.ring import load_binding

from .container import is_contained, lacks


def need_io_uring() -> None:
    """Skip where the kernel refuses. A missing binding is no reason: it is installed with everything else."""
    try:
        load_binding().Context(1)
    except (OSError, SystemError) as error:
        if is_contained():
            lacks(f"io_uring: {error}")
        pytest.skip(f"this kernel refuses io_uring: {error}")


class FakeContext:
    """An io_uring that answers when told to. ``is_held``: it has not answered yet what it was handed."""

    def __init__(self) -> None:
        self.fileno = os.eventfd(0, os.EFD_NONBLOCK)
        self.submitted: deque[SimpleNamespace] = deque()
        self.n_failures = 0
        self.is_held = False

    def submit(self, operation: SimpleNamespace) -> int:
        self.submitted.append(operation)
        return 1

    def flush(self) -> int:
        if self.n_failures:
            self.n_failures -= 1
            raise SystemError(11, "Resource temporarily unavailable")
        for operation in self.submitted:
            if not self.is_held:
                os.eventfd_write(self.fileno, 1)
            operation.is_handed_over = True
        return 0

    def let_go(self) -> None:
        """Answer what was held."""
        self.is_held = False
        os.eventfd_write(self.fileno, 1)

    def poll(self) -> int:
        return os.eventfd_read(self.fileno)

    def process_events(self) -> int:
        n_done = 0
        while not self.is_held and self.submitted and self.submitted[0].is_handed_over:
            operation = self.submitted.popleft()
            operation.done(operation.result(operation))
            n_done += 1
        return n_done


class FakeBinding:
    """A binding whose reads and flushes end with ``results``, one after the other, and then as they should."""

    def __init__(self) -> None:
        self.results: deque[int] = deque()
        self.contexts: list[FakeContext] = []
        self.flushed: list[int] = []
        self.Operation = SimpleNamespace(read=self._read, fdsync=self._flush)
        self.Context = self._context

    def _context(self, n_operations: int) -> FakeContext:
        self.contexts.append(FakeContext())
        return self.contexts[-1]

    def _read(self, n_bytes: int, fd: int, host_offset: int) -> SimpleNamespace:
        operation = self._operation(n_bytes)
        operation.get_value = lambda: os.pread(fd, n_bytes, host_offset)
        return operation

    def _flush(self, fd: int) -> SimpleNamespace:
        self.flushed.append(fd)
        return self._operation(0)

    def _operation(self, usual: int) -> SimpleNamespace:
        def set_callback(done: Callable[[int], None]) -> None:
            operation.done = done

        def result(_: object) -> int:
            return self.results.popleft() if self.results else usual

        operation = SimpleNamespace(is_handed_over=False, set_callback=set_callback, result=result)
        return operation
