"""SlowThreads: a storage whose threads read and write a piece at a time, when the test tells them to."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

from qcowfuse.buffer import Buffer
from qcowfuse.storage.base import Deliver, OnEnd, OnWritten, Storage

from .forwarding import ForwardingStorage


class Transfer(ABC):
    """``n_bytes`` that a thread moves: some of them with each :meth:`move`, and with the last of them it ends."""

    def __init__(self, n_bytes: int, on_end: OnEnd) -> None:
        self.n_left = n_bytes
        self._on_end = on_end

    def move(self, n_bytes: int) -> None:
        """Up to ``n_bytes`` more."""
        thread = threading.Thread(target=self._move, args=(min(n_bytes, self.n_left),))
        thread.start()
        thread.join()
        if not self.n_left:
            self._on_end(None)

    def fail(self, error: OSError) -> None:
        """It ends here, and badly."""
        self.n_left = 0
        self._on_end(error)

    def _move(self, n_bytes: int) -> None:
        self._move_some(n_bytes)
        self.n_left -= n_bytes
        if not self.n_left:
            self._finish()

    @abstractmethod
    def _move_some(self, n_bytes: int) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


class Reading(Transfer):
    """A delivery that is under way."""

    def __init__(self, storage: Storage, host_offset: int, n_bytes: int, deliver: Deliver, on_end: OnEnd) -> None:
        super().__init__(n_bytes, on_end)
        self._storage = storage
        self._host_offset = host_offset
        self._deliver = deliver
        self._copied = bytearray()

    def _move_some(self, n_bytes: int) -> None:
        part = self._storage.try_pread(self._host_offset + len(self._copied), n_bytes)
        assert part is not None
        self._copied += part

    def _finish(self) -> None:
        self._deliver(self._copied)


class Writing(Transfer):
    """A write that is under way."""

    def __init__(
        self, storage: Storage, host_offset: int, data: Buffer, on_written: OnWritten, on_end: OnEnd
    ) -> None:
        super().__init__(len(data), on_end)
        self._storage = storage
        self._host_offset = host_offset
        self._data = data
        self._on_written = on_written

    def _move_some(self, n_bytes: int) -> None:
        n_done = len(self._data) - self.n_left
        part = memoryview(self._data)[n_done : n_done + n_bytes]
        assert self._storage.try_pwritev(self._host_offset + n_done, (part,))

    def _finish(self) -> None:
        self._on_written()


class SlowThreads(ForwardingStorage):
    """What its threads have begun is in ``under_way``."""

    def __init__(self, inner: Storage, under_way: list[Transfer]) -> None:
        super().__init__(inner)
        self._under_way = under_way

    def start_delivery(self, host_offset: int, n_bytes: int, deliver: Deliver, on_end: OnEnd) -> bool:
        """See Storage."""
        self._under_way.append(Reading(self.inner, host_offset, n_bytes, deliver, on_end))
        return True

    def start_pwrite(self, host_offset: int, data: Buffer, on_written: OnWritten, on_end: OnEnd) -> bool:
        """See Storage."""
        self._under_way.append(Writing(self.inner, host_offset, data, on_written, on_end))
        return True
