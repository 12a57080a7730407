"""``qcowfuse status``: what one mount says of itself, once or again and again with rates.

1. Counters are those of the extended attributes ``user.qcowfuse.*``; rates are the differences between two looks,
   divided by the time between them.
2. What waits: requests that the kernel has sent and not got an answer to (to be read by root and by the user of the
   mount), else those that the daemon knows to wait.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ...printable import printable
from ..exit_codes import ExitCode
from ..size_text import size_text
from .layout import duration_text, print_json, time_text
from .look import Look, look_at, summary
from .mounts import Mount

_RATES = {
    "reads": "backend.reads",
    "read-bytes": "backend.read_bytes",
    "writes": "backend.writes",
    "written-bytes": "backend.written_bytes",
    "flushes": "backend.flushes",
    "l2-cache-hits": "l2_cache.hits",
    "l2-cache-misses": "l2_cache.misses",
}
_LINES_PER_HEADING = 20
_HEADING = "time        reads/s     read/s   writes/s  written/s  flush/s  L2 hits  wait"


def print_status(mount: Mount, *, as_json: bool) -> ExitCode:
    """Print it once."""
    look = look_at([mount])[0]
    if as_json:
        print_json(_as_json(mount, look))
    else:
        for line in _lines(mount, look):
            print(printable(line))
    return ExitCode.MOUNT if look.problem else ExitCode.OK


def watch_status(mount: Mount, interval: float, *, as_json: bool) -> ExitCode:
    """Print rates each ``interval`` seconds, until the mount is gone."""
    before, seen = look_at([mount])[0], time.monotonic()
    n_lines = 0
    while not before.problem:
        time.sleep(max(seen + interval - time.monotonic(), 0))
        look, now = look_at([mount])[0], time.monotonic()
        if look.problem:
            break
        rates = _rates(before, look, now - seen)
        if as_json:
            print_json(_as_json(mount, look) | {"rates": rates}, indent=None)
        else:
            if n_lines % _LINES_PER_HEADING == 0:
                print(_HEADING)
            print(_rate_line(rates, _n_waiting(mount, look)), flush=True)
        before, seen, n_lines = look, now, n_lines + 1
    return ExitCode.OK if n_lines else ExitCode.MOUNT


def _as_json(mount: Mount, look: Look) -> dict[str, Any]:
    return summary(mount, look) | {
        "waiting-requests": None if look.problem else _n_waiting(mount, look),
        "l2-cache-hit-rate": _share(look.counters, "l2_cache"),
        "decoded-clusters-hit-rate": _share(look.counters, "decoded_clusters"),
        "counters": look.counters,
    }


def _share(counters: dict[str, int], cache: str) -> float | None:
    """Hits as a part of all, from 0 to 1; None where nothing was asked for."""
    hits, misses = counters.get(f"{cache}.hits", 0), counters.get(f"{cache}.misses", 0)
    return hits / (hits + misses) if hits + misses > 0 else None


def _n_waiting(mount: Mount, look: Look) -> int:
    with suppress(OSError, ValueError):
        with open(f"/sys/fs/fuse/connections/{os.minor(mount.device)}/waiting") as waiting:
            return int(waiting.read())
    return look.counters.get("waiting_requests", 0)


def _rates(before: Look, after: Look, seconds: float) -> dict[str, float]:
    return {
        name: round((after.counters.get(key, 0) - before.counters.get(key, 0)) / seconds, 2)
        for name, key in _RATES.items()
    }


def _rate_line(rates: dict[str, float], n_waiting: int) -> str:
    asked = rates["l2-cache-hits"] + rates["l2-cache-misses"]
    share = f"{rates['l2-cache-hits'] / asked:.1%}" if asked > 0 else "-"
    cells = (
        f"{rates['reads']:9.0f}",
        f"{size_text(int(rates['read-bytes'])):>9}",
        f"{rates['writes']:9.0f}",
        f"{size_text(int(rates['written-bytes'])):>9}",
        f"{rates['flushes']:7.1f}",
        f"{share:>7}",
        f"{n_waiting:4}",
    )
    return "  ".join((time.strftime("%H:%M:%S"), *cells))


def _lines(mount: Mount, look: Look) -> Iterator[str]:
    said = summary(mount, look)
    yield f"mount point:    {said['mount-point']}"
    if said["file"]:
        yield f"file:           {said['file']}"
    yield f"image:          {said['image']}"
    yield f"state:          {said['state']}"
    if said["pid"] is not None:
        yield f"daemon:         pid {said['pid']}, mounted by {said['user']}"
    if said["since"] is not None:
        yield f"since:          {time_text(said['since'])} ({duration_text(time.time() - said['since'])})"
    if look.problem or not mount.is_here:
        return
    count = look.counters
    access = "read-only" if mount.read_only else "read-write"
    yield f"disk:           {size_text(look.size)} ({look.size} bytes), {size_text(look.allocated)} in use, {access}"
    yield f"open files:     {count.get('open_files', 0)}"
    yield f"waiting:        {_n_waiting(mount, look)} requests"
    used, budget = count.get("l2_cache.used_bytes", 0), count.get("l2_cache.budget_bytes", 0)
    yield f"L2 cache:       {_cache_text(count, 'l2_cache')}, {size_text(used)} of {size_text(budget)} used"
    if _share(count, "decoded_clusters") is not None:
        yield f"compressed:     {_cache_text(count, 'decoded_clusters')} in the cache of decoded clusters"
    for name, n_bytes, label in (
        ("reads", "read_bytes", "image reads:"),
        ("writes", "written_bytes", "image writes:"),
    ):
        number, volume = count.get(f"backend.{name}", 0), count.get(f"backend.{n_bytes}", 0)
        yield f"{label:15} {number}, {size_text(volume)}"
    yield f"image flushes:  {count.get('backend.flushes', 0)}"


def _cache_text(count: dict[str, int], cache: str) -> str:
    share = _share(count, cache)
    if share is None:
        return "not asked yet"
    hits, misses = count[f"{cache}.hits"], count[f"{cache}.misses"]
    return f"{share:.1%} hits ({hits} of {hits + misses})"
