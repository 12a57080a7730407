"""The process outside of the mount: calls, failures, calls that hang, and its end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from qcowfuse.export.outside import Outside
from tests.support.mounting import is_alive, wait_until


@pytest.fixture
def outside() -> Iterator[Outside]:
    """One that is closed after the test."""
    with Outside() as made:
        yield made


def parent_pid() -> int:
    """The process whose children answer."""
    return os.getppid()


def open_files() -> set[str]:
    """What the descriptors of the answering process stand for."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that listdir had open
            found.add(os.readlink(f"/proc/self/fd/{fd}").partition(":")[0])
    return found


async def test_calls_are_made_elsewhere(outside: Outside) -> None:
    """A call runs in another process with the arguments given, and its result comes back."""
    assert await outside.run(os.getpid) != os.getpid()
    assert await outside.run(divmod, 17, 5) == (3, 2)


async def test_failures_come_back(outside: Outside, tmp_path: Path) -> None:
    """What a call raises is raised here, with errno and file name."""
    missing = str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError) as caught:
        await outside.run(os.stat, missing)
    assert caught.value.filename == missing


async def test_it_holds_nothing_of_ours(outside: Outside, tmp_path: Path) -> None:
    """Neither the daemon's files nor its standard streams: only its socket."""
    with (tmp_path / "ours").open("w"):
        assert await outside.run(open_files) == {"socket", "/dev/null"}


async def test_a_call_that_hangs_is_in_nobodys_way(outside: Outside) -> None:
    """After a call was given up, others are answered, and its late answer is not taken for theirs."""
    with trio.move_on_after(0.05) as scope:
        await outside.run(time.sleep, 0.3)
    assert scope.cancelled_caught
    assert await outside.run(divmod, 9, 2) == (4, 1)
    await trio.sleep(0.4)
    assert await outside.run(divmod, 9, 4) == (2, 1)


async def test_stop_signals_are_not_for_it(outside: Outside) -> None:
    """What ends the daemon in order does not end the process before it."""
    pid = await outside.run(parent_pid)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(pid, number)
    assert await outside.run(parent_pid) == pid


async def test_it_ends_with_us() -> None:
    """When the other end is closed, the process is gone."""
    with Outside() as outside:
        pid = await outside.run(parent_pid)
        assert is_alive(pid)
    wait_until(lambda: not is_alive(pid), "the end of the process")


async def test_calls_are_made_here_when_it_is_gone(outside: Outside) -> None:
    """Without the process a call is made all the same."""
    pid = await outside.run(parent_pid)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), "the end of the process")
    assert await outside.run(os.getpid) == os.getpid()


async def test_it_leaves_the_session(outside: Outside) -> None:
    """When told to, it has a session of its own."""
    assert await outside.run(os.getsid, 0) == os.getsid(0)
    outside.leave_session()
    assert await outside.run(os.getsid, 0) == await outside.run(parent_pid)
