"""Shortest list of operations that still fails: delta debugging (Zeller and Hildebrandt's ddmin)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def shrink(items: Sequence[T], fails: Callable[[list[T]], bool]) -> list[T]:
    """A part of ``items``, in their order, for which ``fails`` holds and from which no single item can be left out.

    ``fails(items)`` must hold, and should always give the same answer for the same list.
    """
    current = list(items)
    n_parts = 2
    while len(current) >= 2:
        size = -(-len(current) // n_parts)
        for start in range(0, len(current), size):
            rest = current[:start] + current[start + size :]
            if rest and fails(rest):
                current = rest
                n_parts = max(n_parts - 1, 2)
                break
        else:
            if size == 1:
                break
            n_parts = min(2 * n_parts, len(current))
    return current
