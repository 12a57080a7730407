"""What a check or a repair finds and does, as plain values."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntFlag

Report = Callable[[str], None]
"""Called with one line for each finding."""
Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all, now and then."""


class Fix(IntFlag):
    """What a repair may mend: counts that are too high, and everything else."""

    NOTHING = 0
    LEAKS = 1
    ERRORS = 2
    ALL = 3


class CheckResult:
    """The counts of ``qemu-img check``: clusters, but for ``image_end_offset`` in bytes."""

    def __init__(
        self,
        *,
        leaks: int = 0,
        corruptions: int = 0,
        check_errors: int = 0,
        total_clusters: int = 0,
        allocated_clusters: int = 0,
        fragmented_clusters: int = 0,
        compressed_clusters: int = 0,
        image_end_offset: int = 0,
        leaks_fixed: int = 0,
        corruptions_fixed: int = 0,
    ) -> None:
        self.leaks = leaks
        self.corruptions = corruptions
        self.check_errors = check_errors
        self.total_clusters = total_clusters
        self.allocated_clusters = allocated_clusters
        self.fragmented_clusters = fragmented_clusters
        self.compressed_clusters = compressed_clusters
        self.image_end_offset = image_end_offset
        self.leaks_fixed = leaks_fixed
        self.corruptions_fixed = corruptions_fixed

    @property
    def is_clean(self) -> bool:
        """Neither leaks nor corruptions, and all of it could be looked at."""
        return not (self.leaks or self.corruptions or self.check_errors)
