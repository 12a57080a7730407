"""Which of many ranges lie over others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Extent(NamedTuple):
    """Bytes from ``start`` up to ``end``. ``name``: for a person; ``key``: for the caller."""

    start: int
    end: int
    name: str
    key: int


def find_overlaps(extents: Iterable[Extent]) -> dict[int, str]:
    """By key, each range that lies over another one, and the name of one that it lies over. Empty ranges lie
    nowhere."""
    in_order = sorted(extent for extent in extents if extent.start < extent.end)
    found: dict[int, str] = {}
    longest: Extent | None = None
    """Of all before, the one that ends last: if any of them reaches into the next, this one does."""
    for position, extent in enumerate(in_order):
        if longest is not None and extent.start < longest.end:
            found[extent.key] = longest.name
        elif position + 1 < len(in_order) and in_order[position + 1].start < extent.end:
            found[extent.key] = in_order[position + 1].name
        if longest is None or extent.end > longest.end:
            longest = extent
    return found
