"""The socket that metrics are served at: made here, or by systemd, which passes it on (sd_listen_fds(3))."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from ...errors import MountError

_FIRST_PASSED = 3
_BACKLOG = 16


def listen_at(host: str, port: int) -> socket.socket:
    """A listening socket at a numeric address. Raises OSError that names it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, f"--metrics {host}:{port}") from exc
    return listener


def passed_socket() -> socket.socket:
    """The one socket that systemd has passed to this process. Raises MountError where there is none, or another."""
    is_for_us = os.environ.get("LISTEN_PID") == str(os.getpid())
    with suppress(OSError):
        if is_for_us and os.environ.get("LISTEN_FDS") == "1":
            listener = socket.socket(fileno=_FIRST_PASSED)
            is_tcp = listener.family in (socket.AF_INET, socket.AF_INET6) and listener.type == socket.SOCK_STREAM
            if is_tcp and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                listener.set_inheritable(False)
                return listener
    raise MountError("--metrics systemd: needs -f, and one TCP socket of a unit qcowfuse@NAME.socket")
