"""Opening a file that a file server has lent to a client: a lease, which the kernel takes back for who opens it."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import OpenOptions
from qcowfuse.storage import opened
from qcowfuse.storage.opened import open_descriptor
from qcowfuse.tools.peek import may_need_passphrase
from tests.support.images import BASE, TOP, ImageSpec, build_image


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


@pytest.mark.parametrize("lent", ["top.img", "base.img"])
async def test_a_stop_ends_the_wait(lent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the image as for its backing file, however long a file stays lent."""
    spec = ImageSpec(size=64 << 10, cluster_size=4096, backing="qcow2", backing_size=64 << 10)
    for path, data in build_image(spec).files.items():
        (tmp_path / os.path.basename(path)).write_bytes(data)
    assert {os.path.basename(TOP), os.path.basename(BASE)} == {"top.img", "base.img"}
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    holder = os.open(tmp_path / lent, os.O_RDWR)
    fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    waits: list[float] = []
    sleep = time.sleep
    try:
        with trio.CancelScope() as scope:

            def stop(seconds: float) -> None:
                waits.append(seconds)
                if len(waits) == 3:
                    trio.from_thread.run_sync(scope.cancel)
                sleep(0)

            monkeypatch.setattr(time, "sleep", stop)
            await open_image(str(tmp_path / "top.img"), OpenOptions())
        assert scope.cancelled_caught
        assert len(waits) == 3
    finally:
        os.close(holder)
        signal.signal(signal.SIGIO, before)


def test_a_look_for_encryption_waits_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the passphrase would not be asked for, and the image opened without it a moment later."""
    path = tmp_path / "f"
    path.write_bytes(build_image(ImageSpec(encryption="aes")).top)
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    holder = os.open(path, os.O_RDWR)
    fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    monkeypatch.setattr(time, "sleep", lambda _: fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_UNLCK))
    try:
        assert may_need_passphrase(str(path))
    finally:
        os.close(holder)
        signal.signal(signal.SIGIO, before)
