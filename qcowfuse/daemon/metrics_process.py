"""Counters for Prometheus over HTTP, by a process of their own.

1. Formatting and HTTP are done by the process, which has neither the image nor the mount: the daemon's part of a
   scrape is a dictionary and one datagram. A thread of the daemon would keep requests waiting for the interpreter.
2. The listening socket is made before there is a sandbox or another network, and only the process keeps it.
3. The process trusts nobody who connects: a request has a time limit as a whole, one is served at a time, and
   counters that are just out are given again. It gives up what it can, and ends with the daemon.
4. What is imported from ``prometheus_client`` is imported here alone, and only when metrics are wanted.
5. The process can import nothing once it has given up the file system, and its standard error leads nowhere. So no
   traceback is made, which may need a module: an error is answered in a sentence.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

from ..system import landlock, privileges
from .process import become_user, collect_own_garbage
from .settings import User

_REQUEST_SECONDS = 5
_ANSWER_SECONDS = 2.0
_FRESH_SECONDS = 0.2
_MAX_ANSWER = 1 << 17
_NO_COUNTERS = b"qcowfuse: the process that serves the disk does not answer\n"
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_GAUGES = frozenset(
    str.split(
        "l2_cache.budget_bytes l2_cache.used_bytes l2_cache.slices open_files waiting_requests stopping "
        "image.read_only image.flush_failed image.corrupt since"
    )
)
_LEFT_OUT = ("pid", "libfuse.", "sandbox.")


class MetricsProcess:
    """Made before there are threads; it ends when :attr:`socket` is closed, by which it asks for the counters.
    ``listener`` is given up to it."""

    def __init__(self, listener: socket.socket, user: User | None) -> None:
        self.address = listener.getsockname()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            self.socket.close()
            _serve(theirs, listener, user)
        theirs.close()
        listener.close()
        self.socket.setblocking(False)

    @property
    def url(self) -> str:
        """Where Prometheus finds it."""
        host, port = self.address[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"


def _serve(channel: socket.socket, listener: socket.socket, user: User | None) -> NoReturn:
    """The process: one request after the other, until the daemon's end of ``channel`` is closed."""
    code = 1
    try:
        collect_own_garbage()
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        _keep_only(channel.fileno(), listener.fileno())
        server = _Server(channel, listener)
        with suppress(PermissionError):
            os.setsid()
        os.chdir("/")
        _give_up(user)
        poll = select.poll()
        for one in (channel, listener):
            poll.register(one, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            # What comes unasked is an answer that came too late.
            if channel.fileno() in ready and not channel.recv(_MAX_ANSWER):
                break
            if listener.fileno() in ready:
                server.serve_one()
        code = 0
    finally:
        os._exit(code)


def _keep_only(*descriptors: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    before = 2
    for descriptor in sorted(descriptors):
        os.closerange(before + 1, descriptor)
        before = descriptor
    os.closerange(before + 1, os.sysconf("SC_OPEN_MAX"))


def _give_up(user: User | None) -> None:
    """Rule 3: the file system, capabilities, and new privileges."""
    if user is not None:
        become_user(user)
    privileges.forbid_new_privileges()
    with suppress(OSError):
        ruleset = landlock.ruleset_for_reading_below("/proc")
        landlock.restrict_this_thread(ruleset)
        os.close(ruleset)
    privileges.keep_capabilities()


class _Server:
    """HTTP on ``listener``, with counters from ``channel``."""

    def __init__(self, channel: socket.socket, listener: socket.socket) -> None:
        import importlib
        from wsgiref import simple_server

        self._channel = channel
        self._seen: tuple[float, Any] = (-_FRESH_SECONDS, None)
        # Without its types, which mypy lacks where the package is not installed.
        self._client: Any = importlib.import_module("prometheus_client")
        core: Any = importlib.import_module("prometheus_client.core")
        self._counter, self._gauge = core.CounterMetricFamily, core.GaugeMetricFamily
        registry = self._client.CollectorRegistry(auto_describe=False)
        registry.register(self)
        serve_metrics = self._client.make_wsgi_app(registry)

        def serve(environ: Any, start_response: Any) -> Any:
            try:
                return serve_metrics(environ, start_response)
            except _TimeIsUp:
                raise
            except Exception:
                start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
                return [_NO_COUNTERS]

        class Handler(simple_server.WSGIRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

        class Server(simple_server.WSGIServer):
            # Its own socket is thrown away at once, and qcowfuse@.service has none of the network's.
            address_family = socket.AF_UNIX

            def handle_error(self, *_: object) -> None:
                pass

        simple_server.ServerHandler.log_exception = lambda *_: None  # type: ignore[method-assign]
        self._http = Server(("", 0), Handler, bind_and_activate=False)
        self._http.socket.close()
        self._http.socket = listener
        self._http.server_name, self._http.server_port = "localhost", 0
        self._http.setup_environ()
        self._http.set_app(serve)
        # What it imports late, it imports now.
        self._client.generate_latest(self._client.CollectorRegistry())
        signal.signal(signal.SIGALRM, _time_is_up)

    def serve_one(self) -> None:
        """One request. A client that takes too long is dropped."""
        signal.alarm(_REQUEST_SECONDS)
        try:
            self._http.handle_request()
        except _TimeIsUp:
            pass
        finally:
            signal.alarm(0)

    def collect(self) -> Iterator[Any]:
        """For the registry."""
        labels, counters = self._ask()
        names, values = list(labels), list(labels.values())
        for name, value in counters.items():
            if name.startswith(_LEFT_OUT):
                continue
            full = f"qcowfuse_{name.replace('.', '_')}"
            if name == "since":
                full = "qcowfuse_mounted_time_seconds"
            kind = self._gauge if name in _GAUGES else self._counter
            family = kind(full, f"{name}: see qcowfuse status", labels=names)
            family.add_metric(values, value)
            yield family

    def _ask(self) -> Any:
        """The labels and counters of the daemon. Raises OSError where it is gone or stands still."""
        when, said = self._seen
        if time.monotonic() - when >= _FRESH_SECONDS:
            self._channel.settimeout(_ANSWER_SECONDS)
            try:
                self._channel.send(b"?")
                said = json.loads(self._channel.recv(_MAX_ANSWER))
            finally:
                self._channel.settimeout(None)
            self._seen = (time.monotonic(), said)
        return said


class _TimeIsUp(Exception):  # noqa: N818 - not an error of ours
    """The client took too long."""


def _time_is_up(_number: int, _frame: FrameType | None) -> None:
    raise _TimeIsUp
