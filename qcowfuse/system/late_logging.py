"""Loggers that import the logging of the standard library with their first message.

1. A short command that has nothing to say does without it: its import takes a quarter of the time of such a command.
2. What a program wants to set up before any message is done then, once.
"""

from __future__ import annotations

from collections.abc import Callable

_set_up: list[Callable[[], None]] = []


class LateLogger:
    """Stands for ``logging.getLogger(name)``."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def warning(self, text: str, *args: object) -> None:
        """See logging.Logger."""
        import logging

        expect_messages()
        logging.getLogger(self._name).warning(text, *args, stacklevel=2)

    def debug(self, text: str, *args: object) -> None:
        """See logging.Logger."""
        import logging

        expect_messages()
        logging.getLogger(self._name).debug(text, *args, stacklevel=2)


def before_messages(function: Callable[[], None]) -> None:
    """Call it before the first message, in place of what was to be called so far."""
    _set_up[:] = [function]


def expect_messages() -> None:
    """From now on there may be messages of other loggers, too."""
    while _set_up:
        _set_up.pop()()
