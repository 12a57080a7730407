"""What verbs print: tables, times and JSON. Whatever comes from a mount or an image is made printable here."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from ...printable import printable
from ..json_text import as_unicode


def print_json(value: Any, *, indent: int | None = 4) -> None:
    """``value`` as JSON; without ``indent`` as one line."""
    print(json.dumps(as_unicode(value), indent=indent), flush=True)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], to_the_right: frozenset[int]) -> None:
    """Columns below their headings; those with the numbers ``to_the_right`` end in line."""
    lines = [headings, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        cells = (
            cell.rjust(width) if column in to_the_right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def time_text(seconds: int) -> str:
    """Seconds since the epoch as the local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def duration_text(seconds: float) -> str:
    """``3 d 2 h``, ``2 h 5 min``, ``5 min 3 s``: the two largest units."""
    left = max(int(seconds), 0)
    parts: list[str] = []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        number, left = divmod(left, size)
        if number or (name == "s" and not parts):
            parts.append(f"{number} {name}")
    return " ".join(parts[:2])
