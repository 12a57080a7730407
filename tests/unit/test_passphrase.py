"""The process that has another one ask for the passphrase."""

from __future__ import annotations

import os
import pty
import signal
import sys
import termios
from pathlib import Path

import pytest

from qcowfuse.cli import passphrase
from qcowfuse.cli.passphrase import KeySource
from qcowfuse.driver import chain
from qcowfuse.driver.options import OpenOptions
from tests.support.mounting import environment


async def _layer(image: str, options: OpenOptions) -> str:
    return image


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT])
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


@pytest.mark.parametrize("typed", [b"\x03", b"\x1c"], ids=["interrupt", "quit"])
def test_the_terminal_shows_what_is_typed_again(tmp_path: Path, typed: bytes) -> None:
    """After Ctrl-C and Ctrl-\\ at the prompt."""
    entry = "import sys; from qcowfuse.cli.entry import qcowfuse_img as main; sys.exit(main())"
    words = [sys.executable, "-c", entry, "create", "-o", "encrypt.format=luks", str(tmp_path / "new"), "1M"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(words[0], words, environment())
    said = b""
    while not said.endswith(b": "):
        said += os.read(terminal, 100)
    assert not termios.tcgetattr(terminal)[3] & termios.ECHO
    os.write(terminal, typed)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGINT
    assert termios.tcgetattr(terminal)[3] & termios.ECHO
    os.close(terminal)
    assert not (tmp_path / "new").exists()
