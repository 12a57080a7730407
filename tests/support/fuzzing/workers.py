"""Many cases in several processes: each says which case it is at, so that one that dies or hangs is known.

1. Which cases there are depends on the seed alone, not on the number of processes or on their speed.
2. A process that dies, or is ended after :data:`~.judging.WALL_SECONDS`, is a finding; another one goes on behind
   that case.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from .cases import Case
from .judging import QEMU, WALL_SECONDS, WHOLE, case_of, judge_limited, kind_of

_SLOT = struct.Struct("=Qd")
_PER_ROUND = {WHOLE: 20, QEMU: 2}
_OF_A_PARSER = 4


@dataclass
class Finding:
    """What is wrong with which case."""

    case: Case
    text: str

    @property
    def kind(self) -> str:
        """What findings that are one have in common."""
        return f"{self.case.target} {kind_of(self.text)}"


@dataclass
class _Worker:
    pid: int
    pipe: int
    slot: int
    rest: bytes = b""


@dataclass
class Fuzzing:
    """``n_cases`` or ``seconds`` bound it; ``counts``: cases by target, when it is over."""

    seed: int
    targets: Sequence[str]
    n_jobs: int = 1
    seconds: float | None = None
    n_cases: int | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._round = [t for t in self.targets for _ in range(_PER_ROUND.get(t, _OF_A_PARSER))]
        self._slots = mmap.mmap(-1, _SLOT.size * self.n_jobs)
        self._end = time.monotonic() + self.seconds if self.seconds is not None else float("inf")

    def case(self, index: int) -> Case:
        """The case of a place in the order of all."""
        n_round, place = divmod(index, len(self._round))
        return case_of(self.seed, self._round[place], n_round * 64 + place)

    def run(self) -> Iterator[Finding]:
        """Run them all; the first finding of each kind as it comes."""
        workers = [self._start(slot, slot) for slot in range(self.n_jobs)]
        seen: set[str] = set()
        try:
            while workers:
                ready = select.select([worker.pipe for worker in workers], [], [], 1.0)[0]
                for worker in list(workers):
                    found = self._hear(worker, worker.pipe in ready)
                    for finding in found or ():
                        if finding.kind not in seen:
                            seen.add(finding.kind)
                            yield finding
                    if found is None:
                        workers.remove(worker)
                        yield from self._gone(worker, workers)
        finally:
            for worker in workers:
                with suppress(OSError):
                    os.kill(worker.pid, signal.SIGKILL)
                os.close(worker.pipe)
                os.waitpid(worker.pid, 0)

    def _hear(self, worker: _Worker, is_ready: bool) -> list[Finding] | None:
        """What a process says; None when it has nothing more to say."""
        if not is_ready:
            _, since = _SLOT.unpack_from(self._slots, worker.slot * _SLOT.size)
            if since and time.monotonic() - since > WALL_SECONDS:
                os.kill(worker.pid, signal.SIGKILL)
            return []
        got = os.read(worker.pipe, 1 << 16)
        if not got:
            return None
        *lines, worker.rest = (worker.rest + got).split(b"\n")
        found = []
        for line in lines:
            said = json.loads(line)
            if isinstance(said, dict):
                for target, count in said.items():
                    self.counts[target] = self.counts.get(target, 0) + count
            else:
                found.append(Finding(self.case(said[0]), said[1]))
        return found

    def _gone(self, worker: _Worker, workers: list[_Worker]) -> Iterator[Finding]:
        os.close(worker.pipe)
        _, status = os.waitpid(worker.pid, 0)
        if status:
            index, _ = _SLOT.unpack_from(self._slots, worker.slot * _SLOT.size)
            yield Finding(self.case(index), f"Died: status {status}" if status != 9 else "Hang: had to be killed")
            workers.append(self._start(worker.slot, index + self.n_jobs))

    def _start(self, slot: int, index: int) -> _Worker:
        readable, writable = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(readable)
                self._work(slot, index, writable)
                code = 0
            finally:
                os._exit(code)
        os.close(writable)
        return _Worker(pid, readable, slot)

    def _work(self, slot: int, index: int, pipe: int) -> None:
        counts: dict[str, int] = {}
        while time.monotonic() < self._end and (self.n_cases is None or index < self.n_cases):
            _SLOT.pack_into(self._slots, slot * _SLOT.size, index, time.monotonic())
            case = self.case(index)
            text = judge_limited(case)
            counts[case.target] = counts.get(case.target, 0) + 1
            if text is not None:
                os.write(pipe, json.dumps([index, text[:2000]]).encode() + b"\n")
            index += self.n_jobs
        os.write(pipe, json.dumps(counts).encode() + b"\n")
