"""What a session can have beyond pyfuse3's public interface, and for each part whether it does.

1. A part is lacking until it is seen to work, or to have been set; why it is lacking is kept in words.
2. Losing one part says nothing of the others, but for those that stand on it (:data:`STANDS_ON`).
"""

from __future__ import annotations

from enum import StrEnum


class Feature(StrEnum):
    """One part; the value is its name in the statistics."""

    TUNED_INIT = "tuned_init"
    """The parameters of the connection are those that a disk image wants."""
    WRITEBACK_CACHE = "writeback_cache"
    """The kernel gathers small writes in its page cache."""
    FALLOCATE = "fallocate"
    """Discard, write zeroes and preallocation reach the image."""
    LSEEK = "lseek"
    """The image says where data and holes are."""
    COPY_FILE_RANGE = "copy_file_range"
    """Copies within the mount keep holes, and need no request for each piece."""
    KILLPRIV = "killpriv"
    """The kernel does not ask for privileges to take away before each write."""
    REQUEST_WAIT = "request_wait"
    """The next request is waited for without a lock, and mostly without trio."""
    DIRECT_REQUESTS = "direct_requests"
    """Reads and writes that need not wait are answered without libfuse."""


STANDS_ON = {
    # O_TRUNC would set the kernel's idea of the size to zero, and the cache would believe it.
    Feature.WRITEBACK_CACHE: Feature.TUNED_INIT,
    # It hands the turn back by a count that only this wait resets.
    Feature.DIRECT_REQUESTS: Feature.REQUEST_WAIT,
}
"""Parts that are not safe, or do not work, without another one."""


NOT_EXECUTABLE = "memory can't be made executable here"


def reason_of(exc: Exception) -> str:
    """What went wrong, for a line in the log."""
    if isinstance(exc, MemoryError):  # ctypes says no more than that
        return NOT_EXECUTABLE
    return str(exc) or repr(exc)


class Features:
    """The state of one session."""

    def __init__(self) -> None:
        self._lacking: dict[Feature, str] = dict.fromkeys(Feature, "there is no session yet")

    def __contains__(self, feature: Feature) -> bool:
        return feature not in self._lacking

    def why_not(self, feature: Feature) -> str | None:
        """Why it is lacking, None when it is not."""
        return self._lacking.get(feature)

    def gain(self, feature: Feature) -> None:
        """It works now; if what it stands on is lacking, it is lacking for the same reason."""
        below = STANDS_ON.get(feature)
        if below is not None and below in self._lacking:
            self.lose(feature, self._lacking[below])
        else:
            self._lacking.pop(feature, None)

    def lose(self, feature: Feature, reason: str) -> None:
        """It does not work, nor does what stands on it. ``reason`` is part of a line in the log."""
        self._lacking[feature] = reason
        for upper, below in STANDS_ON.items():
            if below is feature and upper not in self._lacking:
                self._lacking[upper] = reason

    def statistics(self) -> dict[str, int]:
        """1 or 0 for each part, as counters that users see."""
        return {f"libfuse.{feature}": int(feature in self) for feature in Feature}

    def __str__(self) -> str:
        """One line for the log."""
        there = ", ".join(feature for feature in Feature if feature in self) or "nothing"
        return "; ".join([there, *(f"no {feature}: {reason}" for feature, reason in self._lacking.items())])
