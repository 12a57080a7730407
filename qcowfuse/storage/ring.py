"""Reads and flushes that wait for the disk, by io_uring: no thread for each, and no hand-overs between threads.

1. It only reads and flushes, and reads only into buffers of its own: the kernel can never write into memory that a
   caller has freed.
2. A read that fails, comes back short or finds the ring full is for the caller to do again in a thread, which says
   what is wrong. So whatever io_uring can't do on some kernel or file system costs time, not correctness.
3. A flush that fails is never done again: the kernel tells of a lost write once. So that no kernel without flushes is
   taken for a broken disk, the ring has flushed a file in memory before, and ECANCELED alone says that there was no
   thread in the kernel to begin with it. A file system that may have that error from elsewhere (one on a network) is
   not for :meth:`Ring.begin_flush`.
4. What has begun is waited for, cancelled or not, as in :mod:`.workers`.
5. One ring for each trio run, in the thread that made it. Without it (old kernel, seccomp, a sysctl, no binding)
   everything works by threads.
6. While a read is the only one, its answer is waited for by spinning: on a fast disk it is there before a process
   has gone to sleep and been woken. On a slow one that is soon given up, for a while. A flush takes longer: it is
   waited for as :mod:`~qcowfuse.system.short_wait` says.

Measured on a cold file on ext4 with reads of 4 KiB at depth 16: 2.6 times as many as by :mod:`.workers`, for a
quarter of the processor time; through a mount 1.4 times as many, and 1.9 times at depth 1.

Measured on ext4, 4 KiB and fdatasync each: 125 us in this thread, 210 us by :mod:`.workers`, 175 us by a ring whose
answer comes through trio, 140 us with a short wait for it.
"""

from __future__ import annotations

import errno
import importlib.machinery
import importlib.util
import logging
import os
import select
import time
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import trio

from ..system.short_wait import wait_shortly
from .restricted_ring import restricted_context

MAX_READS = 128
"""Reads and flushes in flight at most."""

MAX_READ_BYTES = 128 << 10
"""Longer reads are better off in a thread, which copies them beside the trio thread."""

_RETRY_SECONDS = 0.005
_SPIN = 60e-6
_MAX_FUTILE = 4
_WITHOUT_SPIN = 64
_PROBE_MS = 200


_log = logging.getLogger(__name__)


class RingRequest:
    """A read or flush on its way through ``ring``; ``result`` is a count of bytes or a negative errno."""

    __slots__ = ("result", "ring", "task")

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.result: int | None = None
        self.task: trio.lowlevel.Task | None = None

    def done(self, result: int) -> None:
        """The kernel has answered; called in the trio thread, perhaps before the task sleeps."""
        self.result = result
        self.ring.n_in_flight -= 1
        if self.task is not None:
            trio.lowlevel.reschedule(self.task)

    async def end(self) -> int:
        """The result. Cancellation waits; one task at most may wait for a request."""
        if self.result is None:
            self.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(_refuse_abort)
        assert self.result is not None
        return self.result


def load_binding() -> ModuleType:
    """caio's module for io_uring. Raises ImportError, with the reason, where there is no io_uring to be had.

    Not by ``import``: the package would load its other parts and asyncio, and probe the kernel, for 0.1 s.
    """
    package = importlib.util.find_spec("caio")
    places = package and package.submodule_search_locations
    spec = places and importlib.machinery.PathFinder.find_spec("caio.linux_uring", places)
    if not spec or spec.loader is None:
        raise ImportError("the Python package caio, or its part for io_uring, is not installed")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Ring:
    """Submission and completion of reads and flushes for the storages of one trio run."""

    def __init__(self) -> None:
        """Raises ImportError or OSError where io_uring can't be used."""
        binding = load_binding()
        try:
            self._context: Any = restricted_context(binding, MAX_READS)
            self._new_read: Callable[[int, int, int], Any] = binding.Operation.read
            self._new_flush: Callable[[int], Any] | None = getattr(binding.Operation, "fdsync", None)
            self._fd: int = self._context.fileno
        except (AttributeError, TypeError, SystemError) as error:
            raise ImportError(f"caio: {error}") from error
        self.n_in_flight = 0
        """Requests that the kernel has not answered."""
        self._n_users = 0
        self._is_stuck = False
        self._n_without_spin = 0
        self._n_futile = 0
        self._scope = trio.CancelScope()
        if not self._can_flush():
            self._new_flush = None

    async def read(self, fd: int, host_offset: int, n_bytes: int) -> bytes | None:
        """All ``n_bytes``, or None: then the caller reads in another way (rule 2). Cancellation waits (rule 4)."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._is_full:
            return None
        operation = self._new_read(n_bytes, fd, host_offset)
        read = self._begin(operation)
        if read.result is None and self.n_in_flight == 1:
            self._spin(read)
        if await read.end() != n_bytes:
            return None
        data: bytes = operation.get_value()
        return data

    def begin_flush(self, fd: int, *, n_own: int) -> RingRequest | None:
        """Begin fdatasync, and wait shortly for its end; None: nothing was done, the caller flushes in another way.

        ``fd`` is of a local file system, or a block device, and stays open until the request has ended; ``n_own`` is
        as in :func:`~qcowfuse.system.short_wait.wait_shortly`. The caller looks at the result with
        :func:`flush_result`.
        """
        if self._new_flush is None or self._is_full:
            return None
        flush = self._begin(self._new_flush(fd))
        if flush.result is None and self.n_in_flight == 1 and wait_shortly(self._fd, n_own=n_own):
            self._take_answers()
        return flush

    @property
    def _is_full(self) -> bool:
        return self.n_in_flight >= MAX_READS or self._is_stuck

    def _begin(self, operation: Any) -> RingRequest:
        request = RingRequest(self)
        operation.set_callback(request.done)
        self._context.submit(operation)
        self.n_in_flight += 1
        self._flush()
        return request

    def _can_flush(self) -> bool:
        """Whether a flush of a file in memory succeeds (rule 3)."""
        if self._new_flush is None:
            return False
        try:
            fd = os.memfd_create("qcowfuse")
        except (OSError, AttributeError):  # a C library may lack it
            return False
        try:
            probe = self._begin(self._new_flush(fd))
            poller = select.poll()
            poller.register(self._fd, select.POLLIN)
            if probe.result is None and poller.poll(_PROBE_MS):
                self._take_answers()
        finally:
            os.close(fd)
        return probe.result == 0

    def retain(self) -> Ring:
        """One more user."""
        if not self._n_users:
            trio.lowlevel.spawn_system_task(self._watch, self._scope, name="qcowfuse io_uring")
        self._n_users += 1
        return self

    def release(self) -> None:
        """One user less; the last one, whose reads have all ended, gives up the ring."""
        self._n_users -= 1
        if not self._n_users:
            self._scope.cancel()
            _current_ring.set(None)

    def _flush(self) -> None:
        """Hand what was submitted to the kernel, and take what it has answered."""
        try:
            self._context.flush()
            self._is_stuck = False
        except SystemError:
            # Out of memory, most likely. What was submitted stays in the ring: the watcher tries again.
            self._is_stuck = True
            os.eventfd_write(self._fd, 1)

    def _spin(self, read: RingRequest) -> None:
        """Wait a little for the only read there is (rule 6)."""
        if self._n_without_spin:
            self._n_without_spin -= 1
            return
        take, now, give_way = self._context.process_events, time.perf_counter, os.sched_yield
        end = now() + _SPIN
        while now() < end:
            give_way()
            if take() and read.result is not None:
                self._n_futile = 0
                return
        self._n_futile += 1
        if self._n_futile == _MAX_FUTILE:
            self._n_futile = 0
            self._n_without_spin = _WITHOUT_SPIN

    def _take_answers(self) -> None:
        with suppress(BlockingIOError):
            self._context.poll()
        while self._context.process_events():
            pass

    async def _watch(self, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                await trio.lowlevel.wait_readable(self._fd)
                self._take_answers()
                if self._is_stuck:
                    await trio.sleep(_RETRY_SECONDS)
                    self._flush()
        del self._context  # with it goes the ring, and its descriptors


def flush_result(result: int) -> bool:
    """Whether a flush with that ``result`` was made; False: nothing was done. Raises OSError, final (rule 3)."""
    if result == -errno.ECANCELED:
        return False
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return True


def _refuse_abort(_raise_cancel: object) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED


_current_ring: trio.lowlevel.RunVar[Ring | None] = trio.lowlevel.RunVar("qcowfuse io_uring", None)
_is_refused: trio.lowlevel.RunVar[bool] = trio.lowlevel.RunVar("qcowfuse without io_uring", False)


def retain_ring() -> Ring | None:
    """The ring of this trio run with one more user; give it back with :meth:`Ring.release`.

    None where io_uring can't be used; then the log says why, once.
    """
    ring = _current_ring.get()
    if ring is None:
        if _is_refused.get():
            return None
        try:
            ring = Ring()
        except (OSError, ImportError) as error:
            _is_refused.set(True)
            # caio goes on with advice for container platforms, several lines of it.
            reason = " ".join(str(error).split()).partition(". ")[0]
            _log.info("reads and flushes that wait for the disk go by threads: no io_uring: %s", reason)
            return None
        _current_ring.set(ring)
    return ring.retain()
