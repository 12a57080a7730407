"""What is said of operations that failed: a line in the log, and the number that the kernel gets."""

from __future__ import annotations

import errno
import logging

from .errnos import errno_of

_log = logging.getLogger(__name__)


class Failures:
    """Of one file. What is repeated is logged once: a failing disk says the same a thousand times."""

    def __init__(self) -> None:
        self._last = ""

    def note(self, operation: str, exc: Exception) -> int:
        """Log that ``operation`` failed with ``exc``; the error number to answer with. What is not in the table of
        :mod:`.errnos` is a bug, logged with its traceback, and EIO."""
        number = errno_of(exc)
        message = f"{operation} failed: {exc}"
        if message != self._last:
            self._last = message
            if number is None:
                _log.error("bug in qcowfuse: %s failed unexpectedly", operation, exc_info=exc)
            else:
                _log.error("%s", message)
        return errno.EIO if number is None else number
