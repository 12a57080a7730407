"""The process that has another one ask for the passphrase."""

from __future__ import annotations

import os
import signal

import pytest

from qcowfuse.cli import passphrase
from qcowfuse.cli.passphrase import KeySource
from qcowfuse.driver import chain
from qcowfuse.driver.options import OpenOptions


async def _layer(image: str, options: OpenOptions) -> str:
    return image


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_behind_the_answer_counts(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The child has ended, with a passphrase, and cannot be told any more."""
    wait = os.waitpid

    def wait_and_interrupt(pid: int, options: int) -> tuple[int, int]:
        ended = wait(pid, 0)
        os.kill(os.getpid(), number)
        return ended

    monkeypatch.setattr(passphrase, "forbid_core_dumps", lambda: None)  # it would be for all tests
    monkeypatch.setattr(passphrase, "may_need_passphrase", lambda image: True)
    monkeypatch.setattr(chain, "first_encrypted_layer", _layer)
    monkeypatch.setattr(passphrase, "ask", lambda image, twice: bytearray(b"typed"))
    key = KeySource(None, {})
    key.prepare("image", OpenOptions())
    assert key("image") == b"typed"
    monkeypatch.setattr(os, "waitpid", wait_and_interrupt)
    key = KeySource(None, {})
    with pytest.raises(KeyboardInterrupt):
        key.prepare("image", OpenOptions())
    assert not key.descriptors
