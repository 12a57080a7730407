"""A line that says how far something long has come, where standard error is a terminal; nothing elsewhere."""

from __future__ import annotations

import time
from contextlib import suppress
from types import TracebackType
from typing import TextIO

_INTERVAL = 0.2
_FIRST_AFTER = 0.5


class ProgressLine:
    """``[#####     ]  50 %`` on one line of ``stream``; a context manager that wipes it at the end."""

    def __init__(self, stream: TextIO, *, is_wanted: bool = True) -> None:
        self._stream = stream
        self._is_shown = is_wanted and stream.isatty()
        self._next = time.monotonic() + _FIRST_AFTER
        self._line = ""

    def show(self, n_done: int, n_all: int) -> None:
        """``n_done`` steps of ``n_all`` are done."""
        if not self._is_shown or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _INTERVAL
        percent = 100 * n_done // max(n_all, 1)
        self._line = f"[{'#' * (percent // 5):<20}] {percent:3} %"
        self._stream.write(f"\r{self._line}")
        self._stream.flush()

    def print_above(self, text: str) -> None:
        """A line of text for the same stream, the progress below it."""
        self._wipe()
        with suppress(OSError):  # the exit code has to do
            print(text, file=self._stream)

    def _wipe(self) -> None:
        if self._line:
            self._stream.write("\r" + " " * len(self._line) + "\r")
            self._stream.flush()
            self._line = ""

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._wipe()
