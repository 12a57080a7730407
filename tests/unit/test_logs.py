"""The log that goes to syslog."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest

from qcowfuse.cli import logs


def listen(address: Path) -> socket.socket:
    """A syslog."""
    address.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.settimeout(5)
    listener.bind(str(address))
    return listener


def record(level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord("qcowfuse", level, __file__, 1, text, None, None)


def test_messages_reach_a_syslog_that_was_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Priority, name and text arrive, before and after a restart, and what comes in between ends nothing."""
    monkeypatch.setattr(logs, "SYSLOG", str(tmp_path / "log"))
    monkeypatch.setattr(logging, "raiseExceptions", False)
    listener = listen(tmp_path / "log")
    handler = logs.open_syslog()
    handler.emit(record(logging.WARNING, "a name \udcff"))
    assert listener.recv(1000).partition(b"]: ")[2] == b"WARNING: a name ?"
    listener.close()
    handler.emit(record(logging.ERROR, "nobody hears this"))
    listener = listen(tmp_path / "log")
    handler.emit(record(logging.ERROR, "back"))
    assert listener.recv(1000).startswith(b"<27>qcowfuse[")
    listener.close()


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a syslog there is a log that goes nowhere."""
    monkeypatch.setattr(logs, "SYSLOG", str(tmp_path / "log"))
    logs.open_syslog().emit(record(logging.INFO, "unheard"))


def test_a_traceback_that_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is shown all the same."""

    def refuse(*arguments: object, **named: object) -> None:
        raise ImportError("in a sandbox")

    monkeypatch.setattr("traceback.print_exception", refuse)
    error = KeyError("a name \x1b")
    failed = logging.LogRecord("qcowfuse", logging.ERROR, __file__, 1, "bug", None, (KeyError, error, None))
    assert logs.OneLine("%(message)s").format(failed) == "bug\n  KeyError: 'a name \\x1b'"
