"""Decoding ahead of sequential readers.

1. The reads so far tell what will be read next; the last few readers are told apart.
2. The work is done by a few system tasks of trio, which live only while something is queued: nobody has to open a
   nursery for them.
3. An error ahead is silent: a read that wants the cluster meets it again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable

import trio

from ...errors import QcowFuseError
from .decoded_cache import Key
from .decoding import ClusterRequest
from .decompression import INLINE_BYTES, RUN_BYTES, DecodedClusters

AHEAD_BYTES = 6 << 20
"""Guest bytes that are decoded ahead of one reader; a whole number of times in the cache, for several readers."""
_MAX_QUEUED = AHEAD_BYTES // INLINE_BYTES
_MAX_STREAMS = 4
_SLACK = 256 << 10
"""Bytes by which a sequential reader's requests may be off: the kernel's read-ahead sends several at a time."""
_MIN_STREAK = 2

log = logging.getLogger(__name__)


class _Stream:
    __slots__ = ("ahead_end", "end", "streak")

    def __init__(self, end: int) -> None:
        self.end = end
        self.ahead_end = 0
        self.streak = 0


class SequentialReads:
    """Tells from the reads so far what will be read next; the last few readers are told apart."""

    def __init__(self) -> None:
        self._streams: list[_Stream] = []

    def is_expected(self, guest_offset: int) -> bool:
        """Whether a read there would follow another one."""
        return any(-_SLACK <= guest_offset - stream.end <= _SLACK for stream in self._streams)

    def note(self, guest_offset: int, n_bytes: int) -> tuple[int, int]:
        """A read was asked for; start and end of the guest range to make ready now, empty most of the time."""
        end = guest_offset + n_bytes
        streams = self._streams
        stream = next((s for s in streams if -_SLACK <= guest_offset - s.end <= _SLACK), None)
        if stream is None:
            streams.insert(0, _Stream(end))
            del streams[_MAX_STREAMS:]
            return end, end
        if stream is not streams[0]:
            streams.remove(stream)
            streams.insert(0, stream)
        if end <= stream.end:
            return end, end
        stream.end = end
        stream.streak += 1
        start = max(end, stream.ahead_end)
        if stream.streak < _MIN_STREAK or start - end > AHEAD_BYTES - RUN_BYTES:
            return end, end
        stream.ahead_end = end + AHEAD_BYTES
        return start, stream.ahead_end


class ReadAhead:
    """Has clusters decoded in the background, into ``decoded``."""

    def __init__(self, decoded: DecodedClusters) -> None:
        self._decoded = decoded
        self._queue: deque[ClusterRequest] = deque()
        self._runners: dict[trio.CancelScope, trio.Event] = {}
        self._n_runners = 0
        self._spaces: list[bytearray] = []
        self._closed = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing is decoded ahead now."""
        return not self._runners

    async def wait_until_idle(self) -> None:
        """Until nothing is decoded ahead."""
        for ended in list(self._runners.values()):
            await ended.wait()

    def decode(self, clusters: Iterable[ClusterRequest]) -> None:
        """Have clusters decoded in the background, first come, first served.

        Those that are there already cost nothing. Small ones, which no thread would decode, and those for which
        there is no room in the queue are left to the read that wants them.
        """
        if self._closed:
            return
        decoded, queue = self._decoded, self._queue
        for wanted in clusters:
            if len(queue) >= _MAX_QUEUED or wanted.source.cluster_size <= INLINE_BYTES:
                break
            if not decoded.is_here(wanted):
                queue.append(wanted)
        if not queue:
            return
        # Twice as many as threads: when a job ends the next one is there, even if this thread has to wait its turn.
        n_jobs = -(-len(queue) * queue[0].source.cluster_size // RUN_BYTES)
        for _ in range(min(n_jobs, 2 * decoded.n_threads - self._n_runners)):
            self._n_runners += 1
            scope = trio.CancelScope()
            self._runners[scope] = trio.Event()
            trio.lowlevel.spawn_system_task(self._run, scope, name="qcowfuse decode ahead")

    async def aclose(self) -> None:
        """Cancel what is done, and wait until that has ended. Idempotent."""
        self._closed = True
        self._queue.clear()
        self._spaces.clear()
        with trio.CancelScope(shield=True):
            for scope, ended in list(self._runners.items()):
                scope.cancel()
                await ended.wait()

    async def _run(self, scope: trio.CancelScope) -> None:
        space = self._spaces.pop() if self._spaces else bytearray(RUN_BYTES)
        queue, decoded = self._queue, self._decoded
        try:
            with scope:
                while queue:
                    batch: dict[Key, ClusterRequest] = {}
                    n_bytes = 0
                    while queue and n_bytes < RUN_BYTES:
                        wanted = queue.popleft()
                        if not decoded.is_here(wanted):
                            batch[wanted[:2]] = wanted
                            n_bytes += wanted.source.cluster_size
                    if not batch:
                        continue
                    try:
                        await decoded.decode_all(batch, space=space)
                    except (OSError, QcowFuseError):
                        pass
                    except Exception:  # a bug; but nothing may leave a system task, that would end the program
                        log.exception("decoding ahead failed")
        finally:
            self._n_runners -= 1
            self._spaces.append(space)
            self._runners.pop(scope).set()
