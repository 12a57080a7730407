"""Guest ranges with an allocation in flight, and operations in flight that may still look at old host clusters.

1. A claim is taken without waiting, after a look at the mapping in the same step, and given up after the link or the
   failure. A request that meets a claim waits for it and looks at the mapping again: there is no queue to order.
2. Claims are ranges of guest clusters ``start`` to ``end`` (exclusive) and never overlap.
3. A host cluster that was unlinked while epoch E was current is not handed out again before every operation of epoch
   E or older has ended (:class:`InFlightEpochs`).
"""

from __future__ import annotations

import trio


class Claim:
    """One claimed range; ``released`` is set when it is over."""

    __slots__ = ("end", "released", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.released = trio.Event()


class Claims:
    """The set of claims of one image; few at a time, so a list is the fastest search. ``taken`` is not to be changed
    by others: a hot path may ask whether there is any."""

    def __init__(self) -> None:
        self.taken: list[Claim] = []

    def first_conflict(self, start: int, end: int) -> Claim | None:
        """The claim with the lowest start that overlaps the range."""
        found: Claim | None = None
        for claim in self.taken:
            if claim.start < end and start < claim.end and (found is None or claim.start < found.start):
                found = claim
        return found

    def take(self, start: int, end: int) -> Claim:
        """Claim a range that has no conflict."""
        claim = Claim(start, end)
        self.taken.append(claim)
        return claim

    def release(self, claim: Claim) -> None:
        """Give the claim up and wake the requests that wait for it."""
        self.taken.remove(claim)
        claim.released.set()


class InFlightEpochs:
    """Counts operations in flight by the epoch they began in."""

    def __init__(self) -> None:
        self.current = 0
        self._in_flight: dict[int, int] = {}

    def enter(self) -> int:
        """An operation begins; returns what :meth:`leave` wants."""
        epoch = self.current
        self._in_flight[epoch] = self._in_flight.get(epoch, 0) + 1
        return epoch

    def leave(self, epoch: int) -> None:
        """The operation has ended."""
        left = self._in_flight[epoch] - 1
        if left:
            self._in_flight[epoch] = left
        else:
            del self._in_flight[epoch]

    @property
    def n_in_flight(self) -> int:
        """Operations that have begun and not ended."""
        return sum(self._in_flight.values())

    def advance(self) -> int:
        """Start a new epoch; returns the one that ended."""
        ended = self.current
        self.current += 1
        return ended

    def all_ended(self, epoch: int) -> bool:
        """Whether no operation of ``epoch`` or an older one is in flight."""
        return all(other > epoch for other in self._in_flight)
