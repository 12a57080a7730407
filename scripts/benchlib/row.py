"""One row of a comparison: a figure of one served disk, on one kind of image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .contenders import Served


@dataclass(frozen=True)
class Settings:
    """How much is measured. ``folder`` is for helper files."""

    folder: Path
    size_mib: int
    compressed_mib: int
    seconds: float
    quick: bool


class NotDoneError(Exception):
    """What was measured was not done, so that its figure means nothing; the text says what is lacking."""


Measure = Callable[[Served, Settings], float]


@dataclass(frozen=True)
class Row:
    """``is_fresh``: each measurement has its own copy of the image and its own daemon. ``unit`` names the figure;
    of seconds and MiB of memory less is better."""

    name: str
    scene: str
    unit: str
    measure: Measure
    writes: bool = False
    is_fresh: bool = False
    needs: tuple[str, ...] = ()
    needs_root: bool = False

    @property
    def less_is_better(self) -> bool:
        """Whether the smaller figure is the better one."""
        return self.unit in ("s", "MiB")
