"""kill -9 of the daemon under load on a loop device with ext4: leaks at most, and every fsynced file is whole."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.support.container import need_loop_devices
from tests.support.killing import IMAGE_OPTIONS, KillTest

pytestmark = [pytest.mark.mount, pytest.mark.root]


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_killed_daemon_loses_nothing_that_was_fsynced(number: int) -> None:
    """Killed twice in a row, each time at some moment of the load; the page cache keeps what was written.

    Crash points: round-not-begun, counts-partly-written, blocks-without-pointers, tables-without-entries,
    links-partly-written, counts-not-lowered, autoclear-without-data.
    """
    need_loop_devices()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        test = KillTest(Path(name), number, *IMAGE_OPTIONS[number])
        for _ in range(2):
            test.kill_once()
        assert test.n_promises > 0
