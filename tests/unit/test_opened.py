"""Opening a file that a file server has lent to a client: a lease, which the kernel takes back for who opens it."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfuse.storage import opened
from qcowfuse.storage.opened import open_descriptor


@pytest.fixture
def lease(tmp_path: Path) -> Iterator[int]:
    """The descriptor of the file f, which is lent to its holder for reading until someone opens it for writing."""
    (tmp_path / "f").write_bytes(b"x")
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # what tells the holder
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        yield fd
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, before)


def test_a_lease_that_is_given_back(lease: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The open waits for it. Who opens for reading does not have to."""
    n_waits = 0

    def give_back(_: float) -> None:
        nonlocal n_waits
        n_waits += 1
        fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    monkeypatch.setattr(time, "sleep", give_back)
    os.close(open_descriptor(str(tmp_path / "f"), writable=False))
    assert n_waits == 0
    fd = open_descriptor(str(tmp_path / "f"), writable=True)
    assert n_waits == 1
    assert os.get_blocking(fd)
    os.close(fd)


def test_a_lease_that_is_kept(lease: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told what keeps the file, and no other error is taken for that."""
    del lease
    monkeypatch.setattr(opened, "LEASE_SECONDS", 0)
    with pytest.raises(BlockingIOError, match="lent to a client of a file server") as caught:
        open_descriptor(str(tmp_path / "f"), writable=True)
    assert caught.value.filename == str(tmp_path / "f")
    with pytest.raises(FileNotFoundError):
        open_descriptor(str(tmp_path / "g"), writable=True)
