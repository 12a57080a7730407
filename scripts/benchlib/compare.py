"""Runs every contender on every row, in turn, and collects the figures.

1. In each round each contender is measured once, one after the other, in an order that moves on by one each time.
2. A ratio is the median of the ratios of the rounds: what disturbs the machine for longer than a round disturbs
   all of them.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from . import images
from .contenders import OURS, Contender, Served
from .row import NotDoneError, Row, Settings
from .rows import DEVICE, MAKERS, image_mib, is_start_up

_SETTLING_SECONDS = 0.1
"""What each daemon has between its start and what is measured, but for the row of the start itself."""
_SHORT_SECONDS, _SHORT_ROUNDS = 0.05, 3
"""A command that takes less is measured in so many times the rounds: a tick of the machine is a tenth of it."""


@dataclass
class Result:
    """The figures of one row: for each contender one for each round."""

    row: Row
    figures: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """The median figure of a contender."""
        return statistics.median(self.figures[name])

    def ratio(self, peer: str) -> float | None:
        """How many times better we are than ``peer``; None where it was not measured."""
        if peer not in self.figures or OURS not in self.figures:
            return None
        pairs = zip(self.figures[OURS], self.figures[peer], strict=True)
        return statistics.median(b / a if self.row.less_is_better else a / b for a, b in pairs)

    def ratio_to_best(self) -> float | None:
        """The smallest of the ratios."""
        ratios = [ratio for peer in self.figures if peer != OURS and (ratio := self.ratio(peer)) is not None]
        return min(ratios, default=None)


def _is_left_out(row: Row) -> bool:
    missing = [program for program in row.needs if shutil.which(program) is None]
    if missing:
        print(f"left out: {row.name}: needs {', '.join(missing)}")
        return True
    if row.needs_root and os.geteuid():
        print(f"left out: {row.name}: needs root")
        return True
    return False


def compare(rows: list[Row], contenders: list[Contender], settings: Settings, *, rounds: int) -> list[Result]:
    """Measure all rows; says on standard error how far it is."""
    results = []
    for scene in dict.fromkeys(row.scene for row in rows):
        of_scene = [row for row in rows if row.scene == scene and not _is_left_out(row)]
        if not of_scene:
            continue
        with tempfile.TemporaryDirectory(dir=settings.folder, prefix=f"{scene}-") as name:
            folder = Path(name)
            template = folder / "template"
            template.mkdir()
            MAKERS[scene](template, image_mib(scene, settings))
            results += _run_scene(of_scene, contenders, settings, folder, rounds)
    return results


def _run_scene(
    rows: list[Row], contenders: list[Contender], settings: Settings, folder: Path, rounds: int
) -> list[Result]:
    results = []
    contenders = [c for c in contenders if rows[0].scene not in c.unable]
    with ExitStack() as stack:
        served: dict[str, Served] = {}
        is_fresh = all(row.is_fresh for row in rows)
        for number, contender in enumerate(list(contenders)):
            image = images.copy(folder / "template", folder / f"served{number}")
            if rows[0].scene == DEVICE:
                image = stack.enter_context(images.on_device(image))
            try:
                if is_fresh:
                    with contender.serve(image, folder):
                        shutil.rmtree(image.parent)
                else:
                    served[contender.name] = stack.enter_context(contender.serve(image, folder))
            except RuntimeError as error:
                print(f"{contender.name} is left out for {rows[0].scene}: {error}", file=sys.stderr)
                contenders.remove(contender)
        for row in rows:
            able = [c for c in contenders if c.writes or not row.writes]
            results.append(_run_row(row, able, served, settings, folder, rounds))
    return results


def _run_row(
    row: Row, able: list[Contender], served: dict[str, Served], settings: Settings, folder: Path, rounds: int
) -> Result:
    result = Result(row, {contender.name: [] for contender in able})
    start = time.monotonic()
    for number in range(_SHORT_ROUNDS * rounds):
        if number == rounds and not (row.unit == "s" and result.median(OURS) < _SHORT_SECONDS):
            break
        shift = number % len(able)
        for contender in able[shift:] + able[:shift]:
            if contender.name not in result.figures:
                continue
            try:
                if row.is_fresh:
                    figure = _measure_fresh(row, contender, settings, folder)
                else:
                    figure = row.measure(served[contender.name], settings)
            except NotDoneError as problem:
                if contender.name == OURS:
                    raise SystemExit(f"bench: {row.name}: {problem}") from None
                print(f"{contender.name} is left out: {row.name}: {problem}", file=sys.stderr)
                del result.figures[contender.name]
            else:
                result.figures[contender.name].append(figure)
    ratio = result.ratio_to_best()
    print(
        f"{row.name}: {result.median(OURS):,.4g} {row.unit}"
        + (f", {ratio:.2f} times the best other" if ratio else "")
        + f" ({time.monotonic() - start:.0f} s)",
        file=sys.stderr,
    )
    return result


def _measure_fresh(row: Row, contender: Contender, settings: Settings, folder: Path) -> float:
    copy = folder / "fresh"
    image = images.copy(folder / "template", copy)
    try:
        with contender.serve(image, folder) as served:
            if is_start_up(row):
                with served.file.open("rb") as file:
                    file.read(4096)
                return time.monotonic() - served.started
            # As users do: they go on when the command that mounts has returned, which is later than the file is seen.
            time.sleep(_SETTLING_SECONDS)
            return row.measure(served, settings)
    finally:
        shutil.rmtree(copy)
