"""Rule R3 where other threads write: clusters that are given back while a thread still writes to them are nobody
else's until it has ended, whatever is written, discarded and fsynced meanwhile, and power cuts find nothing wrong.

Crash points: counts-not-lowered, holes-partly-punched.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from qcowfuse.driver.image import LARGE_WRITE
from qcowfuse.driver.layers.range_claims import InFlightEpochs
from qcowfuse.driver.pending import PendingPlace
from tests.support.images import ImageSpec, StorageKind
from tests.support.mutation import break_line
from tests.support.old_bytes import build_over_old_bytes
from tests.support.powercut import Guest, Recorded, check_cuts, record_workload
from tests.support.recording import SECTOR
from tests.support.slow_threads import SlowThreads, Transfer

KIB = 1 << 10
N_REGIONS = 4
SIZE = N_REGIONS * LARGE_WRITE
SPECS: dict[str, tuple[ImageSpec, StorageKind]] = {
    "4k": (ImageSpec(cluster_size=4096, size=SIZE), "file"),
    "v2": (ImageSpec(version=2, cluster_size=16 * KIB, size=SIZE), "used"),
    "64k": (ImageSpec(cluster_size=64 * KIB, size=SIZE), "device"),
    "extended": (ImageSpec(cluster_size=32 * KIB, size=SIZE, extended_l2=True), "used"),
}


class WritingGuest:
    """Writes a region of the disk by a thread while it is discarded, and others are written; ``wrong``: rounds after
    which the disk held what it must not."""

    def __init__(self, *, fails: bool = False) -> None:
        self.under_way: list[Transfer] = []
        self.n_written = 0
        self.wrong: list[int] = []
        self._fails = fails

    async def __call__(self, guest: Guest) -> None:
        """The workload: the last region is empty at first, and then the one that was written last is."""
        regions = [number * LARGE_WRITE for number in range(N_REGIONS)]
        for region in regions[:-1]:
            await guest.write(region, guest.chooser.randbytes(LARGE_WRITE))
        await guest.flush()
        empty = regions[-1]
        for number in range(7):
            region = guest.chooser.choice([other for other in regions if other != empty])
            await self._write_and_discard(guest, region, empty)
            for place in regions:
                if await guest.read(place, LARGE_WRITE) != guest.record.contents[place : place + LARGE_WRITE]:
                    self.wrong.append(number)
            await guest.zero(region, LARGE_WRITE, unmap=True)
            await guest.flush()
            await guest.flush()
            empty = region

    async def _write_and_discard(self, guest: Guest, region: int, empty: int) -> None:
        ended: list[Exception | None] = []
        answers: list[int] = []
        data = guest.chooser.randbytes(LARGE_WRITE)
        # What is discarded behind the beginning of a write stays so: the write goes to clusters that are nobody's.
        begun = guest.record.begin_write(region, data)
        pending = guest.image.start_write(region, data)
        if isinstance(pending, PendingPlace):  # not in several pieces
            assert pending.start_in_thread(partial(answers.append, 1), ended.append)
            self.n_written += 1
        else:
            assert pending is None
        steps: list[Callable[[], Awaitable[None]]] = [
            partial(guest.zero, region, LARGE_WRITE, unmap=True),
            guest.flush,
            guest.flush,
            partial(guest.write, empty, guest.chooser.randbytes(LARGE_WRITE)),
            partial(
                guest.write, region + guest.chooser.randrange(LARGE_WRITE // SECTOR) * SECTOR, bytes(range(256)) * 2
            ),
            guest.flush,
        ]
        for step in steps:
            if self.under_way and guest.chooser.random() < 0.4:
                self.under_way[0].move(guest.chooser.randrange(1, 64) * KIB)
            await step()
        if self.under_way:
            if self._fails:
                self.under_way[0].move(LARGE_WRITE // 4)
                self.under_way[0].fail(OSError(errno.EIO, "odd"))
            else:
                self.under_way[0].move(LARGE_WRITE)
            self.under_way.clear()
            assert len(ended) == 1
            assert len(answers) == (not self._fails)
        guest.record.end_write(begun)


async def writing(kind: str, *, fails: bool = False) -> tuple[WritingGuest, Recorded]:
    """Run it on an image."""
    spec, storage = SPECS[kind]
    guest = WritingGuest(fails=fails)
    recorded = await record_workload(
        build_over_old_bytes(spec, storage), guest, around=lambda inner: SlowThreads(inner, guest.under_way)
    )
    return guest, recorded


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize("kind", SPECS)
async def test_a_thread_never_writes_to_what_belongs_to_others(kind: str, fails: bool) -> None:
    """A cluster that a thread writes to is not taken by another write; afterwards it is, and the file does not grow
    for want of it."""
    guest, recorded = await writing(kind, fails=fails)
    assert guest.n_written >= 4, "hardly any write was left to a thread"
    assert not guest.wrong
    if recorded.built.storage == "file":
        assert len(recorded.final) < (N_REGIONS + 2) * LARGE_WRITE
    summary = await check_cuts(recorded, n_states=16, n_qemu=1)
    assert not summary.problems, "\n".join(summary.problems[:5])


_END = """    def end(error: Exception | None) -> None:
        self.abandon()
        on_end(error)
"""


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("breakage", ["epoch given up early", "epochs passed over"])
async def test_the_harness_catches_an_epoch_that_ends_early(
    kind: str, breakage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that is no operation in flight while a thread makes it, or that nobody waits for, is seen."""
    if breakage == "epoch given up early":
        break_line(monkeypatch, PendingPlace, "start_in_thread", _END, "    self.abandon()\n    end = on_end\n")
    else:
        monkeypatch.setattr(InFlightEpochs, "all_ended", lambda _, epoch: True)
    seen: list[int] = []
    try:
        guest, _ = await writing(kind)
        seen = guest.wrong
    except AssertionError:
        seen = [0]
    assert seen, "nobody would have noticed"
