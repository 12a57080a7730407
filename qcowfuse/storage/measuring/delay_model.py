"""What one access to a storage is made to cost, where that is asked for; only values, so that cli may read it.

1. A constant, or the geometry of a disk with one spindle.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_SECONDS_PER_KIB = 1e-6
_MAX_DELAY = 60.0


class DelayModel(NamedTuple):
    """What one access costs: ``constant`` seconds, or with None the disk's geometry.

    The disk: 1 us per KiB moved and 1 us per KiB of distance from the end of the previous access.
    """

    constant: float | None

    @classmethod
    def parse(cls, text: str) -> DelayModel:
        """``"1ms"``, ``"250us"``, ``"0.5s"`` (60 s at most) or ``"disk"``. Raises ValueError."""
        word = text.strip().lower()
        if word == "disk":
            return cls(None)
        match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(s|ms|us)", word, re.ASCII)
        if match is None:
            raise ValueError(
                f"bad delay {text!r}: expected a time with its unit, such as 250us, 1ms or 0.5s, or disk"
            )
        seconds = float(match[1]) * _UNITS[match[2]]
        if seconds > _MAX_DELAY:
            raise ValueError(f"bad delay {text!r}: {_MAX_DELAY:g}s at most")
        return cls(seconds)

    @property
    def is_disk(self) -> bool:
        """Whether this is the disk's geometry, with its one spindle."""
        return self.constant is None

    def delay(self, previous_end: int, host_offset: int, n_bytes: int) -> float:
        """Seconds that an access costs after one that ended at byte ``previous_end``."""
        if self.constant is not None:
            return self.constant
        return (n_bytes + abs(host_offset - previous_end)) / 1024 * _SECONDS_PER_KIB
