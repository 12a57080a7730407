"""SEEK_DATA and SEEK_HOLE on an image of any size, answered within a bounded time.

While the kernel waits for the answer, the process that asked cannot be killed, and a process that wants the same file
locked (another seek, a write that does not go to the page cache) waits with it. lseek(2) allows an answer that takes
zeroes for data, never one that takes data for a hole. So:

1. A search that has taken its time, or whose caller got a signal, ends with what is safe. SEEK_DATA names the place
   that the search has come to: it goes on from there when it is asked again. SEEK_HOLE names the end of the file.
2. What SEEK_DATA has named like that is data for a cluster: SEEK_HOLE there gives a place behind it. So a program
   that asks for one and the other in turns gets on with every call.
3. A search in an image of ordinary size is never cut short, however slow the machine: some hundred looks are free.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable

from ..driver.image import Image

NO_DATA = -1
"""What :meth:`Seeker.try_seek` gives where no data follows."""
DATA_SECONDS = 0.5
HOLE_SECONDS = 2.0
"""The end of the file is a poor answer where much follows, and tables that are read from a slow disk take time."""
FREE_LOOKS = 256
_LOOKS_PER_QUESTION = 8
_QUESTION_SECONDS = 0.02
_MAX_NAMED = 256


def never() -> bool:
    """For ``is_interrupted``."""
    return False


class Seeker:
    """Searches in ``image``; ``clock`` in seconds."""

    def __init__(self, image: Image, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._image = image
        self._clock = clock
        self._named: OrderedDict[int, None] = OrderedDict()

    async def seek(
        self, off: int, end: int, whence: int, is_interrupted: Callable[[], bool] = never, *, least_hole: int = 1
    ) -> int | None:
        """The first place from ``off`` on (before ``end``, the end of the file) with data, or in a hole of
        ``least_hole`` bytes or more, or up to the end: ``end`` where no hole follows, None where no data does. Raises
        what the image raises."""
        is_wanted_data = whence == os.SEEK_DATA
        image, clock = self._image, self._clock
        if not is_wanted_data and off in self._named:
            off = min(off + image.cluster_size, end)
        now = clock()
        give_up_at = now + (DATA_SECONDS if is_wanted_data else HOLE_SECONDS)
        asked_at = now
        n_looks = n_in_hole = 0
        while off < end:
            is_data, n_bytes = await image.find_extent(off, end - off, keep=not n_looks)
            n_in_hole = 0 if is_data else n_in_hole + n_bytes
            if is_data and is_wanted_data:
                return off
            off += n_bytes
            if not is_wanted_data and n_in_hole and (n_in_hole >= least_hole or off == end):
                return off - n_in_hole
            n_looks += 1
            now = clock()
            is_late = now >= give_up_at and n_looks >= FREE_LOOKS
            if n_looks % _LOOKS_PER_QUESTION == 0 or now >= asked_at + _QUESTION_SECONDS:
                asked_at = now
                is_late = is_late or is_interrupted()
            if is_late and off < end:
                return self._named_early(off) if is_wanted_data else end
        return None if is_wanted_data else end

    def try_seek(self, off: int, end: int, whence: int) -> int | None:
        """:meth:`seek`, where a few looks in memory tell; None where they don't, or are slow.
        :data:`NO_DATA` means that no data follows. Raises CorruptImageError."""
        is_wanted_data = whence == os.SEEK_DATA
        if not is_wanted_data and off in self._named:
            return None
        give_up_at = self._clock() + _QUESTION_SECONDS
        for n_looks in range(_LOOKS_PER_QUESTION):
            if off >= end:
                return NO_DATA if is_wanted_data else end
            if n_looks and self._clock() >= give_up_at:  # a look goes through all layers of a chain
                return None
            found = self._image.try_find_extent(off, end - off)
            if found is None:
                return None
            is_data, n_bytes, is_followed = found
            if is_data is is_wanted_data:
                return off
            off += n_bytes
            if is_followed:
                return off
        if off >= end:
            return NO_DATA if is_wanted_data else end
        return None

    def _named_early(self, off: int) -> int:
        self._named[off] = None
        if len(self._named) > _MAX_NAMED:
            self._named.popitem(last=False)
        return off
