"""Loggers that import nothing until they have something to say, and say it then as any other logger does."""

from __future__ import annotations

import logging

import pytest

from qcowfuse.system import late_logging
from qcowfuse.system.late_logging import LateLogger, before_messages, expect_messages
from tests.support.scripts import run_python


def test_nothing_is_imported_before_the_first_message() -> None:
    """And what is to be set up is, before it."""
    words = run_python(
        "-S",
        "-c",
        """
import sys
from qcowfuse.system.late_logging import LateLogger, before_messages
log = LateLogger("some.name")
before_messages(lambda: print("replaced"))
before_messages(lambda: print("set up"))
print("logging" in sys.modules)
log.warning("%s", "first")
log.warning("%s", "second")
print("logging" in sys.modules)
""",
    ).split()
    assert words == ["False", "set", "up", "True"]


def test_messages_are_those_of_the_logger_of_that_name(caplog: pytest.LogCaptureFixture) -> None:
    """With their level, their words, and the place that they come from."""
    log = LateLogger("qcowfuse.some")
    with caplog.at_level(logging.DEBUG, "qcowfuse.some"):
        log.warning("%d of %s", 3, "them")
        log.debug("plain")
    assert caplog.record_tuples == [
        ("qcowfuse.some", logging.WARNING, "3 of them"),
        ("qcowfuse.some", logging.DEBUG, "plain"),
    ]
    assert {record.filename for record in caplog.records} == {"test_late_logging.py"}


def test_what_is_to_be_set_up_is_set_up_once() -> None:
    """Also where only other loggers are going to be used."""
    done: list[int] = []
    before_messages(lambda: done.append(1))
    for _ in range(3):
        expect_messages()
    late_logging.LateLogger("qcowfuse.some").debug("something")
    assert done == [1]
