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

from qcowfuse.daemon.mount_client import MountClient
from qcowfuse.daemon.mountpoint import MountBusyError
from qcowfuse.daemon.outside import Outside
from qcowfuse.daemon.outside_process import OutsideProcess
from qcowfuse.errors import MountError
from tests.support.mounting import is_alive, wait_until


class Client(MountClient):
    """Calls for tests."""

    VERBS = frozenset(
        (
            "parent_pid",
            "open_files",
            "pid",
            "divide",
            "missing",
            "sleep",
            "session",
            "busy",
            "bug",
            "adopt",
            "odd_name",
        )
    )

    def __init__(self) -> None:
        """No mount."""

    def adopt(self) -> int:
        """Called in the process itself."""
        return os.getpid()

    def pid(self) -> int:
        return os.getpid()

    def parent_pid(self) -> int:
        """The process whose children answer."""
        return os.getppid()

    def session(self) -> int:
        return os.getsid(0)

    def divide(self, number: int, divisor: int) -> int:
        return number // divisor

    def missing(self) -> None:
        os.stat("/missing \udcff")

    def sleep(self, n_milliseconds: int) -> None:
        time.sleep(n_milliseconds / 1000)

    def busy(self) -> None:
        raise MountBusyError("in use")

    def bug(self) -> None:
        raise ZeroDivisionError("oops")

    def odd_name(self) -> str:
        return "name \udcff"

    def open_files(self) -> str:
        """What the descriptors of the answering process stand for."""
        found = set()
        for fd in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # the one that listdir had open
                found.add(os.readlink(f"/proc/self/fd/{fd}").partition(":")[0])
        return " ".join(sorted(found))

    def hidden(self) -> int:
        """No verb."""
        return 1


@pytest.fixture
def outside() -> Iterator[Outside[Client]]:
    """One that is closed after the test."""
    with Outside(OutsideProcess(Client())) as made:
        yield made


async def test_calls_are_made_elsewhere(outside: Outside[Client]) -> None:
    """A call runs in another process with the arguments given, and its result comes back."""
    assert await outside.run(Client.pid) != os.getpid()
    assert await outside.run(Client.divide, 17, 5) == 3
    assert await outside.run(Client.odd_name) == "name \udcff"
    assert await outside.run(Client.adopt) == await outside.run(Client.parent_pid)


async def test_failures_come_back(outside: Outside[Client]) -> None:
    """What a call raises is raised here, with errno and file name; a bug is named."""
    with pytest.raises(FileNotFoundError) as caught:
        await outside.run(Client.missing)
    assert caught.value.filename == "/missing \udcff"
    with pytest.raises(MountBusyError, match="in use"):
        await outside.run(Client.busy)
    with pytest.raises(MountError, match="ZeroDivisionError: oops"):
        await outside.run(Client.bug)


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"\x80\x04\x95 pickle",
        b'[1, "hidden", []]',
        b'[1, "__init__", []]',
        b'[1, "divide", ["4", 2]]',
        b'[1, ["pid"], []]',
        b"{}",
        b"[" * 100_000,
        b'[1, "pid"]',
    ],
)
async def test_what_is_no_request_is_passed_over(outside: Outside[Client], request_: bytes) -> None:
    """Nothing but a known verb with numbers is done, and the process lives on."""
    if request_:
        outside._socket.send(request_)
    assert await outside.run(Client.divide, 9, 2) == 4


async def test_it_holds_nothing_of_ours(outside: Outside[Client], tmp_path: Path) -> None:
    """Neither the daemon's files nor its standard streams: only its socket."""
    with (tmp_path / "ours").open("w"):
        assert await outside.run(Client.open_files) == "/dev/null socket"


@pytest.mark.skipif(os.geteuid() != 0, reason="other users have no capabilities to give up")
async def test_it_keeps_the_capabilities_that_unmounting_takes(outside: Outside[Client]) -> None:
    """As root: four of them, and no new privileges."""
    status = Path(f"/proc/{await outside.run(Client.parent_pid)}/status").read_text().splitlines()
    values = dict(line.split(":\t", 1) for line in status if ":\t" in line)
    assert int(values["CapEff"], 16) & ~(1 << 21 | 1 << 19 | 1 << 1 | 1 << 2) == 0
    assert values["NoNewPrivs"] == "1"


async def test_a_call_that_hangs_is_in_nobodys_way(outside: Outside[Client]) -> None:
    """After a call was given up, others are answered, and its late answer is not taken for theirs."""
    with trio.move_on_after(0.05) as scope:
        await outside.run(Client.sleep, 300)
    assert scope.cancelled_caught
    assert await outside.run(Client.divide, 9, 2) == 4
    await trio.sleep(0.4)
    assert await outside.run(Client.divide, 9, 4) == 2


async def test_stop_signals_are_not_for_it(outside: Outside[Client]) -> None:
    """What ends the daemon in order does not end the process before it."""
    pid = await outside.run(Client.parent_pid)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(pid, number)
    assert await outside.run(Client.parent_pid) == pid


async def test_it_ends_with_us() -> None:
    """When the other end is closed, the process is gone."""
    with Outside(OutsideProcess(Client())) as outside:
        pid = await outside.run(Client.parent_pid)
        assert is_alive(pid)
    wait_until(lambda: not is_alive(pid), "the end of the process")


async def test_calls_are_made_here_when_it_is_gone(outside: Outside[Client]) -> None:
    """Without the process a call is made all the same."""
    pid = await outside.run(Client.parent_pid)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), "the end of the process")
    assert await outside.run(Client.pid) == os.getpid()
    with pytest.raises(MountError, match="is gone"):
        await outside.run(Client.write_back_served)


async def test_it_leaves_the_session(outside: Outside[Client]) -> None:
    """When told to, it has a session of its own."""
    assert await outside.run(Client.session) == os.getsid(0)
    outside.leave_session()
    assert await outside.run(Client.session) == await outside.run(Client.parent_pid)
