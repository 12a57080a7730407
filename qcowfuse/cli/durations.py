"""Options that are a number of seconds, alike for mounts and verbs."""

from __future__ import annotations

MAX_SECONDS = 7 * 86400.0


def seconds(text: str) -> float:
    """0 to 604,800, with a fraction if need be. Raises ValueError."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= MAX_SECONDS:
        raise ValueError(f"bad time {text!r}: expected seconds, such as 0 or 2.5")
    return number
