"""Where the log goes: standard error in the foreground and until the daemon serves, then a file or syslog."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys

_SYSLOG = "/dev/log"
_ROOT = logging.getLogger()


class _SyslogHandler(logging.handlers.SysLogHandler):
    append_nul = False


def log_to_stderr(*, debug: bool) -> None:
    """Begin to log."""
    logging.raiseExceptions = False  # a log that cannot be written must not end the service
    logging.captureWarnings(True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("qcowfuse: %(levelname)s: %(message)s"))
    _ROOT.handlers[:] = [handler]
    _ROOT.setLevel(logging.DEBUG if debug else logging.INFO)
    for noisy in ("pyfuse3", "trio"):
        logging.getLogger(noisy).setLevel(logging.DEBUG if debug else logging.WARNING)


def quieten() -> None:
    """Only warnings and errors: while the shell waits, it wants to see no more."""
    _ROOT.setLevel(max(_ROOT.level, logging.WARNING))


def log_to_file(path: str) -> None:
    """Append to a file. Raises OSError."""
    handler = logging.FileHandler(os.path.abspath(path), encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s qcowfuse[%(process)d] %(levelname)s: %(message)s"))
    _ROOT.handlers[:] = [handler]


def log_to_syslog() -> None:
    """To the local syslog (journald listens there too), or nowhere when there is none."""
    try:
        handler: logging.Handler = _SyslogHandler(_SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON)
    except OSError:
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter(f"qcowfuse[{os.getpid()}]: %(levelname)s: %(message)s"))
    _ROOT.handlers[:] = [handler]
    _ROOT.setLevel(logging.INFO)
