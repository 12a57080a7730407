"""Host clusters in a row, as an allocation gives them out."""

from __future__ import annotations

from typing import NamedTuple


class HostRun(NamedTuple):
    """``n_clusters`` contiguous clusters of the image file from byte ``host_offset`` on.

    ``is_fresh``: just taken, and nothing was ever written at or behind it, so it reads as zeroes.
    """

    host_offset: int
    n_clusters: int
    is_fresh: bool = False
