"""What comes out of a comparison: a table, a JSON file and a picture."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

from .compare import Result
from .contenders import OURS, QSD, Contender
from .row import Settings
from .tools import table


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean; 1 of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


def print_table(results: list[Result], peers: list[str]) -> None:
    """Medians of ours and of ``peers``, and our ratios to the best of them and to qemu-storage-daemon."""
    names = [OURS, *peers]
    rows = []
    for result in results:
        figures = [_figure(result.median(name)) if result.figures.get(name) else "" for name in names]
        ratios = [_ratio(result.ratio_to_best()), _ratio(result.ratio(QSD))]
        rows.append([result.row.name, result.row.unit, *figures, *ratios])
    table(["", "unit", *names, "to best", "to qsd"], rows)
    print()
    for peer in names[1:]:
        measured = [ratio for result in results if (ratio := result.ratio(peer)) is not None]
        if measured:
            print(f"geometric mean to {peer}: {geometric_mean(measured):.2f} ({len(measured)} rows)")


def write_json(
    path: Path, results: list[Result], contenders: list[Contender], settings: Settings, *, rounds: int
) -> None:
    """Everything that was measured."""
    document = {
        "machine": {
            "kernel": platform.release(),
            "processor": platform.machine(),
            "python": platform.python_version(),
        },
        "contenders": {contender.name: contender.version for contender in contenders},
        "settings": {"size_mib": settings.size_mib, "seconds": settings.seconds, "rounds": rounds},
        "rows": [
            {
                "name": result.row.name,
                "unit": result.row.unit,
                "figures": result.figures,
                "ratio": {peer: result.ratio(peer) for peer in result.figures if peer != OURS},
                "ratio_to_best": result.ratio_to_best(),
            }
            for result in results
        ],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


_COLOURS = ("#1f6feb", "#d29922", "#8957e5", "#6e7681")
_LINE, _LABEL, _PLOT, _TOP = 12, 330, 420, 46


def write_svg(path: Path, results: list[Result], contenders: list[Contender]) -> None:
    """How many times faster than each other contender, a bar for each, on a logarithmic scale."""
    peers = [contender.name for contender in contenders[1:]]
    ratios = [ratio for result in results for peer in peers if (ratio := result.ratio(peer))]
    low = min(0.5, *ratios, 1.0) if ratios else 0.5
    high = max(4.0, *ratios) if ratios else 4.0
    scale = _PLOT / math.log(high / low)

    def x(ratio: float) -> float:
        return _LABEL + math.log(ratio / low) * scale

    parts = []
    y = _TOP
    for result in results:
        measured = [(peer, ratio) for peer in peers if (ratio := result.ratio(peer))]
        if not measured:
            continue
        middle = y + _LINE * len(measured) / 2 + 4
        parts.append(f'<text x="{_LABEL - 8}" y="{middle:.0f}" text-anchor="end">{escape(result.row.name)}</text>')
        for peer, ratio in measured:
            left, right = sorted((x(1.0), x(ratio)))
            colour = _COLOURS[peers.index(peer) % len(_COLOURS)]
            parts.append(
                f'<rect x="{left:.1f}" y="{y}" width="{right - left:.1f}" height="{_LINE - 2}" fill="{colour}"/>'
                f'<text x="{x(ratio) + 4:.1f}" y="{y + _LINE - 3}" class="v">{ratio:.1f}</text>'
            )
            y += _LINE
        y += 6
    grid = [
        f'<line x1="{x(tick):.1f}" y1="{_TOP - 8}" x2="{x(tick):.1f}" y2="{y}" stroke="#8888" '
        f'stroke-width="{2 if tick == 1 else 0.5}"/><text x="{x(tick):.1f}" y="{_TOP - 12}" class="v" '
        f'text-anchor="middle">{tick:g}</text>'
        for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
        if low <= tick <= high
    ]
    legend = "".join(
        f'<rect x="{10 + 180 * number}" y="8" width="10" height="10" fill="{_COLOURS[number % len(_COLOURS)]}"/>'
        f'<text x="{24 + 180 * number}" y="17">{escape(peer)}</text>'
        for number, peer in enumerate(peers)
    )
    width = _LABEL + _PLOT + 50
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 10}" font-family="sans-serif" '
        f'font-size="11"><style>.v{{font-size:9px}}</style><rect width="100%" height="100%" fill="#fff"/>'
        f"<title>qcowfuse: times as fast as the others</title>{legend}{''.join(grid)}{''.join(parts)}</svg>\n"
    )
