"""Where the log goes: standard error in the foreground and until the daemon serves, then a file or syslog."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from ..printable import printable

SYSLOG = "/dev/log"
_LOG_DAEMON = 3 << 3
_SEVERITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.NOTSET, 7),
)
_ROOT = logging.getLogger()


class OneLine(logging.Formatter):
    """A record is one line, whatever names are in it; a traceback follows in indented lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """See Formatter."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """See Formatter."""
        try:
            text = super().formatException(ei)
        except Exception:  # the record is worth more than its traceback, and would be lost with it
            text = f"{ei[0].__name__}: {ei[1]}"
        return "\n".join("  " + printable(line) for line in text.splitlines())


def warn_to_stderr(program: str) -> None:
    """What is logged without any handler: warnings and worse, one line each."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(OneLine(f"{program}: %(levelname)s: %(message)s"))


def log_to_stderr(*, debug: bool) -> None:
    """Begin to log."""
    logging.raiseExceptions = False  # a log that cannot be written must not end the service
    logging.captureWarnings(True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("qcowfuse: %(levelname)s: %(message)s"))
    _ROOT.handlers[:] = [handler]
    _ROOT.setLevel(logging.DEBUG if debug else logging.INFO)
    for noisy in ("pyfuse3", "trio"):
        logging.getLogger(noisy).setLevel(logging.DEBUG if debug else logging.WARNING)


def log_to_file(path: str) -> None:
    """Append to a file; a new one is the user's alone. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY, 0o600)
    handler = logging.StreamHandler(os.fdopen(fd, "a", encoding="utf-8", errors="backslashreplace"))
    handler.setFormatter(OneLine("%(asctime)s qcowfuse[%(process)d] %(levelname)s: %(message)s"))
    _ROOT.handlers[:] = [handler]


def open_syslog() -> logging.Handler:
    """The local syslog (journald listens there too), or nowhere when there is none."""
    try:
        syslog = _Syslog(SYSLOG)
    except OSError:
        return logging.NullHandler()
    syslog.setFormatter(OneLine(f"qcowfuse[{os.getpid()}]: %(levelname)s: %(message)s"))
    return syslog


class _Syslog(logging.Handler):
    """Datagrams to the socket at ``address``, each by its name: the standard library's handler connects, and would
    have to open another socket after the syslog was restarted, which a daemon in its sandbox can't.

    A message that can't be sent at once is lost: the syslog may be waiting for this very disk.
    """

    def __init__(self, address: str) -> None:
        """Raises OSError where nobody listens there."""
        super().__init__()
        import socket

        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as trial:
            trial.connect(address)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record, as the facility "daemon" (RFC 3164)."""
        severity = next(number for level, number in _SEVERITIES if record.levelno >= level)
        try:
            text = f"<{_LOG_DAEMON | severity}>{self.format(record)}"
            self._socket.sendto(text.encode("utf-8", "backslashreplace"), self._address)
        except Exception:
            self.handleError(record)


def log_to(handler: logging.Handler) -> None:
    """Log there and nowhere else from now on."""
    _ROOT.handlers[:] = [handler]
    _ROOT.setLevel(logging.INFO)
