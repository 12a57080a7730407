"""Where the log goes: standard error in the foreground and until the daemon serves, then a file or syslog."""

from __future__ import annotations

import logging
import os
import sys

_SYSLOG = "/dev/log"
_ROOT = logging.getLogger()


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


def log_to_file(path: str) -> None:
    """Append to a file. Raises OSError."""
    handler = logging.FileHandler(os.path.abspath(path), encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s qcowfuse[%(process)d] %(levelname)s: %(message)s"))
    _ROOT.handlers[:] = [handler]


def open_syslog() -> logging.Handler:
    """The local syslog (journald listens there too), or nowhere when there is none."""
    from logging.handlers import SysLogHandler

    try:
        syslog = SysLogHandler(_SYSLOG, SysLogHandler.LOG_DAEMON)
    except OSError:
        return logging.NullHandler()
    syslog.append_nul = False
    syslog.setFormatter(logging.Formatter(f"qcowfuse[{os.getpid()}]: %(levelname)s: %(message)s"))
    return syslog


def log_to(handler: logging.Handler) -> None:
    """Log there and nowhere else from now on."""
    _ROOT.handlers[:] = [handler]
    _ROOT.setLevel(logging.INFO)
