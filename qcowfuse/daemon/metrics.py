"""The daemon's part of a scrape by Prometheus: a dictionary and one datagram; see :mod:`.metrics_process`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress

import trio

from .metrics_process import MetricsProcess

_log = logging.getLogger(__name__)


async def answer_metrics(
    process: MetricsProcess, labels: dict[str, str], statistics: Callable[[], dict[str, int]]
) -> None:
    """Say where the metrics are, then give the process the counters whenever it asks, until it is gone."""
    channel = process.socket
    _log.info("metrics: %s", process.url)
    with suppress(ConnectionError):
        while True:
            await trio.lowlevel.wait_readable(channel)
            if not channel.recv(1):
                return
            try:
                counters = statistics()
            except Exception:  # the requests that fail for the same reason report it
                counters = {}
            with suppress(BlockingIOError):
                channel.send(json.dumps([labels, counters]).encode())
