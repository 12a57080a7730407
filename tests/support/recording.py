"""RecordingStorage logs what a driver does to its image file; PowerCuts makes from the log every state that a
power cut may leave.

1. A write is volatile from the moment it begins until a flush that began after its end has ended.
2. At a cut every 512-byte sector of a volatile write is there or not, each on its own; what is not volatile is there.
   A sector is never a mixture: where several writes met in it, it holds what it held after one of them.
3. Cuts are taken just before the end of each flush and at the end of the log: the states of any earlier moment
   are among those, with the later writes not applied.
4. Behind the old end of a file that has grown, a sector that is not there reads as zeroes, or as what lay on the
   disk: some file systems have their tables durable before the data. (But for the rest of the cluster in which the
   file ended: a guest that writes there on such a file system may see old bytes, as it does in a raw file.)
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qcowfuse.buffer import Buffer
from qcowfuse.storage.base import Storage

from .forwarding import ForwardingStorage
from .memory_storage import MemoryStorage

SECTOR = 512
_COMPARED_BYTES = 16 * SECTOR
"""At once: most of what is compared is equal."""
NEVER = 1 << 62
_NOISE_BYTES = 64 << 10
_NOISE = random.Random(0).randbytes(_NOISE_BYTES)


class Clock:
    """Numbers the events of one recording."""

    def __init__(self) -> None:
        self.now = 0

    def tick(self) -> int:
        """The next moment."""
        self.now += 1
        return self.now


@dataclass(slots=True)
class RecordedWrite:
    """``data`` at ``host_offset``; ``ended`` is NEVER for one that was cancelled or failed. ``shows_old_bytes``: see
    rule 4 of the module; space that is only set aside reads as zeroes everywhere."""

    host_offset: int
    data: bytes
    begun: int
    ended: int = NEVER
    shows_old_bytes: bool = True


@dataclass(slots=True)
class RecordedFlush:
    """One flush that succeeded."""

    begun: int
    ended: int


class RecordingStorage(ForwardingStorage):
    """Logs writes and flushes, with moments of ``clock``."""

    def __init__(self, inner: Storage, clock: Clock | None = None) -> None:
        super().__init__(inner)
        self.clock = clock or Clock()
        self.writes: list[RecordedWrite] = []
        self.flushes: list[RecordedFlush] = []

    def try_pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> bool:
        """Log it if it was done."""
        begun = self.clock.tick()
        data = b"".join(buffers)
        try:
            if not self.inner.try_pwritev(host_offset, buffers):
                return False
        except OSError:
            self._failed(self._begin(host_offset, data))
            raise
        self.writes.append(RecordedWrite(host_offset, data, begun, self.clock.tick()))
        return True

    async def pwritev(self, host_offset: int, buffers: Sequence[Buffer]) -> None:
        """Log it, whether it ends well or not."""
        write = self._begin(host_offset, b"".join(buffers))
        try:
            await self.inner.pwritev(host_offset, buffers)
        except OSError:
            self._failed(write)
            raise
        write.ended = self.clock.tick()

    async def write_zeroes(self, host_offset: int, n_bytes: int, *, unmap: bool = False) -> None:
        """Logged as a write of zeroes, within the length with ``unmap``."""
        if unmap:
            n_bytes = max(0, min(n_bytes, self.inner.size() - host_offset))
        write = self._begin(host_offset, bytes(n_bytes), shows_old_bytes=False)
        try:
            await self.inner.write_zeroes(host_offset, n_bytes, unmap=unmap)
        except OSError:
            self._failed(write)
            raise
        write.ended = self.clock.tick()

    async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
        """Logged as a write of what is there afterwards; of nothing where that is what was there."""
        n_bytes = max(0, min(n_bytes, self.inner.size() - host_offset))
        before = self._contents(host_offset, n_bytes)
        write = self._begin(host_offset, bytes(n_bytes))
        await self.inner.punch_hole(host_offset, n_bytes, in_use=in_use)
        after = self._contents(host_offset, n_bytes)
        write.data = b"" if after == before else after
        write.ended = self.clock.tick()

    def _contents(self, host_offset: int, n_bytes: int) -> bytes:
        assert isinstance(self.inner, MemoryStorage)
        return bytes(self.inner.data[host_offset : host_offset + n_bytes])

    async def allocate(self, host_offset: int, n_bytes: int) -> bool:
        """Logged as a write of the last zero, where the file grows."""
        end = host_offset + n_bytes
        write = self._begin(end - 1, b"\0", shows_old_bytes=False) if end > self.inner.size() else None
        try:
            return await self.inner.allocate(host_offset, n_bytes)
        finally:
            if write is not None:
                write.ended = self.clock.tick()

    async def truncate(self, n_bytes: int) -> None:
        """Logged as a write of the last zero, for a file that grows. Nothing that runs shortens a file."""
        assert n_bytes > self.inner.size(), "a running image shortens its file"
        write = self._begin(n_bytes - 1, b"\0", shows_old_bytes=False)
        await self.inner.truncate(n_bytes)
        write.ended = self.clock.tick()

    def try_flush(self) -> bool:
        """Logged if it succeeds."""
        begun = self.clock.tick()
        if not self.inner.try_flush():
            return False
        self.flushes.append(RecordedFlush(begun, self.clock.tick()))
        return True

    async def flush(self) -> None:
        """Logged if it succeeds."""
        begun = self.clock.tick()
        await self.inner.flush()
        self.flushes.append(RecordedFlush(begun, self.clock.tick()))

    def _begin(self, host_offset: int, data: bytes, *, shows_old_bytes: bool = True) -> RecordedWrite:
        write = RecordedWrite(host_offset, data, self.clock.tick(), shows_old_bytes=shows_old_bytes)
        self.writes.append(write)
        return write

    def _failed(self, write: RecordedWrite) -> None:
        """A write that the file system refused is over: what is there now is what was written of it."""
        if isinstance(self.inner, MemoryStorage):
            write.data = self._contents(write.host_offset, len(write.data))
            write.ended = self.clock.tick()


class _Piece:
    __slots__ = ("data", "host_offset", "shows_old_bytes")

    def __init__(self, host_offset: int, data: bytes, shows_old_bytes: bool) -> None:
        self.host_offset = host_offset
        self.data = data
        self.shows_old_bytes = shows_old_bytes


def _pieces(write: RecordedWrite, now: bytes | bytearray) -> list[_Piece]:
    """The sectors of a write, whole, as they were after it: earlier writes to the rest of a sector are with it."""
    start = write.host_offset // SECTOR * SECTOR
    end = min(-(-(write.host_offset + len(write.data)) // SECTOR) * SECTOR, len(now))
    shown = write.shows_old_bytes
    return [_Piece(place, bytes(now[place : place + SECTOR]), shown) for place in range(start, end, SECTOR)]


def _apply(image: bytearray, host_offset: int, data: bytes) -> None:
    if not data:
        return
    if host_offset > len(image):
        image.extend(bytes(host_offset - len(image)))
    image[host_offset : host_offset + len(data)] = data


class Cut:
    """A moment of the power cut: what is durable for sure, and the writes that are volatile then."""

    def __init__(self, moment: int, durable: bytes, volatile: list[list[_Piece]], cluster_size: int) -> None:
        self.moment = moment
        self._cluster_size = cluster_size
        self.durable = durable
        self._writes = volatile
        self.n_pieces = sum(len(pieces) for pieces in self._writes)

    def extremes(self) -> tuple[bytearray, bytearray]:
        """Nothing that is volatile is there, and all of it is."""
        return self._state([]), self._state([piece for pieces in self._writes for piece in pieces])

    def states(self, n_random: int, chooser: random.Random) -> Iterator[bytearray]:
        """Images after the cut: all of them where there are no more than ``n_random`` or so; else those in which
        one write is there, one is missing or one is torn, and random ones of several densities."""
        flat = [piece for pieces in self._writes for piece in pieces]
        if 1 << len(flat) <= max(n_random, 16):
            for bits in range(1 << len(flat)):
                yield self._state([piece for number, piece in enumerate(flat) if bits >> number & 1])
            return
        yield self._state([])
        yield self._state(flat)
        n_writes = len(self._writes)
        singles = list(range(n_writes))
        if 2 * n_writes > n_random:
            singles = chooser.sample(singles, n_random // 2)
        for chosen in singles:
            yield self._state(self._writes[chosen])
            yield self._state(
                [piece for number, part in enumerate(self._writes) if number != chosen for piece in part]
            )
        for number in range(n_random):
            density = (0.1, 0.5, 0.9)[number % 3]
            taken: list[_Piece] = []
            for pieces in self._writes:
                if len(pieces) > 1 and chooser.random() < 0.4:
                    taken += [piece for piece in pieces if chooser.random() < 0.5]
                elif chooser.random() < density:
                    taken += pieces
            if number % 4 == 2:  # so it is when the file system has its tables on disk, but not the data
                yield self._state(taken, under=self._old_bytes(flat))
                continue
            state = self._state(taken)
            if number % 4 == 0:  # the new length became durable, the bytes did not
                longest = max(piece.host_offset + len(piece.data) for piece in flat)
                state.extend(bytes(max(0, longest - len(state))))
            yield state

    def _old_bytes(self, pieces: Sequence[_Piece]) -> list[_Piece]:
        """What lies below new sectors of a file that has grown: see rule 4 of the module."""
        end = -(-len(self.durable) // self._cluster_size) * self._cluster_size
        return [
            _Piece(piece.host_offset, _NOISE[piece.host_offset % _NOISE_BYTES :][: len(piece.data)], True)
            for piece in pieces
            if piece.shows_old_bytes and piece.host_offset >= end
        ]

    def _state(self, taken: Sequence[_Piece], *, under: Sequence[_Piece] = ()) -> bytearray:
        image = bytearray(self.durable)
        for piece in (*under, *taken) if under else taken:
            _apply(image, piece.host_offset, piece.data)
        return image


def moments_of(*recordings: RecordingStorage) -> list[int]:
    """The moments at which the power may go, see rule 3 of the module; of several files that share a clock."""
    ended = {flush.ended for recording in recordings for flush in recording.flushes}
    return sorted(ended | {recordings[0].clock.now + 1})


def cuts(
    initial: bytes,
    recording: RecordingStorage,
    moments: Sequence[int] | None = None,
    *,
    cluster_size: int = 64 << 10,
) -> Iterator[Cut]:
    """The cuts at ``moments``, by default all that there are for the one file. ``cluster_size``: its own, or more."""
    for moment in moments_of(recording) if moments is None else moments:
        safe_from = max((flush.begun for flush in recording.flushes if flush.ended < moment), default=0)
        durable, now = bytearray(initial), bytearray(initial)
        volatile = []
        for write in recording.writes:
            if write.begun > moment:
                continue
            _apply(now, write.host_offset, write.data)
            if write.ended <= safe_from:
                _apply(durable, write.host_offset, write.data)
            else:
                volatile.append(_pieces(write, now))
        yield Cut(moment, bytes(durable), volatile, cluster_size)


@dataclass(slots=True)
class _Version:
    issued: int
    ended: int
    value: bytes


@dataclass(slots=True)
class _Size:
    issued: int
    ended: int
    size: int


class GuestRecord:
    """What the guest wrote and which fsyncs ended, sector by sector: what may be read after a cut.

    Writers that overlap in time must not touch the same sectors.
    """

    def __init__(self, contents: bytes, clock: Clock, *, behind: bytes = b"") -> None:
        """``behind``: what the disk goes on with when it grows, from its beginning on; then zeroes."""
        self.contents = bytearray(contents)
        self.clock = clock
        self._behind = behind
        self._versions: dict[int, list[_Version]] = {}
        self._promises: list[tuple[int, int]] = []
        self._sizes = [_Size(0, 0, len(contents))]

    def begin_grow(self, size: int) -> _Size:
        """The guest makes the disk larger."""
        begun = _Size(self.clock.tick(), NEVER, size)
        self._sizes.append(begun)
        n_before = len(self.contents)
        self.contents.extend(self._behind[n_before:size].ljust(size - n_before, b"\0"))
        return begun

    def end_grow(self, begun: _Size) -> None:
        """That has been answered with success, which is a promise."""
        begun.ended = self.clock.tick()

    def begin_write(self, guest_offset: int, data: bytes) -> list[_Version]:
        """The guest issues a write."""
        issued = self.clock.tick()
        first, last = guest_offset // SECTOR, (guest_offset + len(data) - 1) // SECTOR
        for sector in range(first, last + 1):
            if sector not in self._versions:
                self._versions[sector] = [_Version(0, 0, self._sector(sector))]
        self.contents[guest_offset : guest_offset + len(data)] = data
        begun = []
        for sector in range(first, last + 1):
            version = _Version(issued, NEVER, self._sector(sector))
            self._versions[sector].append(version)
            begun.append(version)
        return begun

    def end_write(self, begun: list[_Version]) -> None:
        """The write has been answered with success."""
        ended = self.clock.tick()
        for version in begun:
            version.ended = ended

    def begin_flush(self) -> int:
        """The guest issues an fsync."""
        return self.clock.tick()

    def end_flush(self, begun: int) -> None:
        """The fsync has been answered with success."""
        self._promises.append((begun, self.clock.tick()))

    def expected_now(self) -> Expectation:
        """What may be read from the running image: every write that was answered with success is there."""
        return self.expected_at(self.clock.now, promised=self.clock.now)

    def expected_at(self, moment: int, *, promised: int | None = None) -> Expectation:
        """What may be read after a cut at ``moment``; writes that ended by ``promised`` must be there."""
        if promised is None:
            promised = max((begun for begun, ended in self._promises if ended <= moment), default=0)
        contents = bytearray(self.contents)
        allowed: dict[int, list[bytes]] = {}
        for sector, versions in self._versions.items():
            base = next(number for number in reversed(range(len(versions))) if versions[number].ended <= promised)
            values = [version.value for version in versions[base:] if version.issued <= moment]
            allowed[sector] = values
            contents[sector * SECTOR : sector * SECTOR + len(values[0])] = values[0]
        least = max(size.size for size in self._sizes if size.ended <= moment)
        sizes = {size.size for size in self._sizes if size.issued <= moment and size.size >= least}
        return Expectation(bytes(contents), allowed, sizes)

    def _sector(self, sector: int) -> bytes:
        return bytes(self.contents[sector * SECTOR : (sector + 1) * SECTOR])


class Expectation:
    """The contents that a cut must leave, with the sectors that may be one of several."""

    def __init__(self, contents: bytes, allowed: dict[int, list[bytes]], sizes: set[int]) -> None:
        self._contents = contents
        self._allowed = allowed
        self._sizes = sizes

    def mismatches(self, found: bytes) -> list[int]:
        """Guest sectors that hold what they must not."""
        assert len(found) in self._sizes
        if found == self._contents[: len(found)]:
            return []
        wrong = []
        for start in range(0, len(found), _COMPARED_BYTES):
            block = found[start : start + _COMPARED_BYTES]
            if block == self._contents[start : start + len(block)]:
                continue
            for sector in range(start // SECTOR, -(-(start + len(block)) // SECTOR)):
                part = found[sector * SECTOR : (sector + 1) * SECTOR]
                if part == self._contents[sector * SECTOR : sector * SECTOR + len(part)]:
                    continue
                if part not in self._allowed.get(sector, ()):
                    wrong.append(sector)
        return wrong
