"""What a daemon gives up once it serves, so that an image that takes it over gains as little as can be.

1. Given up are, in this order: new privileges; the file system but for reading below /proc, TCP, and other processes
   (:mod:`~qcowfuse.system.landlock`); all capabilities; every system call that serving does not need
   (:mod:`~qcowfuse.system.seccomp`).
2. It comes after the mount has been seen to answer: mounting needs privileges. The process outside of the mount
   (:mod:`.outside`) keeps what unmounting takes.
3. Landlock and capabilities belong to a thread. The main thread goes first, so that threads started from then on are
   born restricted; each thread that is there already does it for itself. Threads of the kernel's io_uring act with
   what the thread had that made the request.
   A thread that is busy is waited for, though not for ever: a read of the image may hang.
4. Where the kernel lacks a part the others are done all the same. Only a thread that was not reached is a failure.
5. Whatever needs a file, a library or a system call that is not in the filter must have got it before.

An io_uring that exists already is not under the filter of system calls, but under Landlock; and it is made so that
it only reads and flushes (:mod:`~qcowfuse.storage.restricted_ring`).
"""

from __future__ import annotations

import ctypes
import linecache
import os
from contextlib import suppress
from functools import partial
from typing import Final, NamedTuple

from ..system import landlock, privileges, seccomp
from ..system.every_thread import PATIENCE_SECONDS, run_in_every_thread

_READABLE: Final = "/proc"
_KERNEL_WORKERS: Final = (b"iou-wrk-", b"iou-sqp-")


class Sandbox(NamedTuple):
    """What was given up. ``landlock_abi`` is 0 where there is no Landlock, ``lacks`` says what is missing and why."""

    landlock_abi: int = 0
    has_filter: bool = False
    has_no_capabilities: bool = False
    lacks: tuple[str, ...] = ()

    @property
    def is_incomplete(self) -> bool:
        """Whether something failed that this kernel can do."""
        return not self.has_no_capabilities

    def statistics(self) -> dict[str, int]:
        """The state as counters."""
        return {
            "sandbox.landlock_abi": self.landlock_abi,
            "sandbox.seccomp": int(self.has_filter),
            "sandbox.no_capabilities": int(self.has_no_capabilities),
        }

    def __str__(self) -> str:
        """One line for the log."""
        parts = [f"Landlock {self.landlock_abi}"] if self.landlock_abi else []
        parts += ["seccomp"] * self.has_filter + ["no capabilities"] * self.has_no_capabilities
        return "; ".join([", ".join(parts) or "nothing given up", *self.lacks])


async def enter_sandbox() -> Sandbox:
    """Give up what serving does not need, in every thread of this process. Runs in the trio thread.

    Raises nothing that ends the service: what can't be had is in :attr:`Sandbox.lacks`.
    """
    load_what_comes_late()
    lacks: list[str] = []
    n_threads = len(_threads())
    ruleset, abi = -1, landlock.abi_version()
    try:
        ruleset = landlock.ruleset_for_reading_below(_READABLE)
    except OSError as exc:
        lacks.append(f"without Landlock: {exc.strerror}")
    try:
        missed = await run_in_every_thread(partial(_give_up, ruleset), _threads)
    except OSError as exc:
        return Sandbox(lacks=(*lacks, f"capabilities and Landlock are kept: {exc.strerror}"))
    finally:
        if ruleset >= 0:
            os.close(ruleset)
    if missed:
        lacks.append(
            f"{len(missed)} of {n_threads} threads were busy for {PATIENCE_SECONDS:g} seconds and kept what they had"
        )
    try:
        seccomp.install()
    except OSError as exc:
        lacks.append(f"without seccomp: {exc.strerror}")
        has_filter = False
    else:
        has_filter = True
    return Sandbox(
        landlock_abi=0 if ruleset < 0 or missed else abi,
        has_filter=has_filter,
        has_no_capabilities=not missed,
        lacks=tuple(lacks),
    )


def load_what_comes_late() -> None:
    """What is loaded when it is needed, by then too late (rule 5)."""
    # By the C library, when a thread ends.
    with suppress(OSError):
        ctypes.CDLL("libgcc_s.so.1")
    # By Python 3.13 and later, when it looks for a line of a traceback, here of no file. A line that it knows already
    # has it import more: the parser.
    linecache.getline("<sandbox>", 1)
    linecache.clearcache()


def _give_up(ruleset: int) -> None:
    privileges.forbid_new_privileges()
    if ruleset >= 0:
        landlock.restrict_this_thread(ruleset)
    privileges.keep_capabilities()


def _threads() -> set[int]:
    """The threads of this process, but for those of the kernel's."""
    found = set()
    for number in os.listdir("/proc/self/task"):
        with suppress(OSError):
            fd = os.open(f"/proc/self/task/{number}/comm", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if not os.read(fd, 64).startswith(_KERNEL_WORKERS):
                    found.add(int(number))
            finally:
                os.close(fd)
    return found
