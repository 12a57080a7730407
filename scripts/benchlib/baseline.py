"""A stored comparison, and which rows have fallen since.

1. Stored are ratios to the others, not times: of each the median of the rounds, and the lowest and highest.
2. A row has fallen where its median is below the lowest ratio that was stored, and the stored median is above the
   highest ratio of now: both runs would have to be wrong by their whole spread.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import NamedTuple

from .compare import Result
from .contenders import OURS


class Ratios(NamedTuple):
    """To one other contender, over the rounds."""

    lowest: float
    median: float
    highest: float


class Fall(NamedTuple):
    """One row that has fallen beside ``peer``."""

    row: str
    peer: str
    before: Ratios
    now: Ratios


def ratios_of(result: Result) -> dict[str, Ratios]:
    """By contender."""
    found = {}
    ours = result.figures.get(OURS, [])
    for peer, figures in result.figures.items():
        if peer != OURS and figures:
            pairs = zip(ours, figures, strict=True)
            ratios = [b / a if result.row.less_is_better else a / b for a, b in pairs]
            found[peer] = Ratios(min(ratios), median(ratios), max(ratios))
    return found


def write_baseline(path: Path, results: list[Result]) -> None:
    """Store what was measured."""
    rows = {
        result.row.name: {
            peer: [float(f"{value:.4g}") for value in ratios] for peer, ratios in ratios_of(result).items()
        }
        for result in results
    }
    path.write_text(json.dumps(rows, indent=1) + "\n")


def find_falls(path: Path, results: list[Result]) -> tuple[list[Fall], int]:
    """What has fallen since ``path`` was written, and how many ratios were held against it."""
    stored = json.loads(path.read_text())
    falls = []
    n_compared = 0
    for result in results:
        for peer, now in ratios_of(result).items():
            if peer not in stored.get(result.row.name, {}):
                continue
            n_compared += 1
            before = Ratios(*stored[result.row.name][peer])
            if now.median < before.lowest and now.highest < before.median:
                falls.append(Fall(result.row.name, peer, before, now))
    return falls, n_compared


def _shown(ratios: Ratios) -> str:
    return f"{ratios.median:.2f} ({ratios.lowest:.2f} to {ratios.highest:.2f})"


def print_falls(falls: list[Fall], n_compared: int) -> None:
    """One line each."""
    for fall in falls:
        print(f"fallen: {fall.row}: {_shown(fall.before)} times {fall.peer} before, {_shown(fall.now)} now")
    print(f"{len(falls)} of {n_compared} ratios have fallen by more than noise")
