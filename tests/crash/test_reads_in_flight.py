"""Rule R3 where other threads read: clusters that are given back while a thread still copies from them keep their
bytes until it has ended, whatever is written, discarded and fsynced meanwhile, and power cuts find nothing wrong.

Crash points: counts-not-lowered, holes-partly-punched.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from qcowfuse.buffer import Buffer
from qcowfuse.driver.image import LARGE_READ
from qcowfuse.driver.layers.range_claims import InFlightEpochs
from qcowfuse.driver.pending import PendingRead, PendingSource
from tests.support.images import ImageSpec, StorageKind
from tests.support.mutation import break_line
from tests.support.old_bytes import build_over_old_bytes
from tests.support.powercut import Guest, Recorded, check_cuts, record_workload
from tests.support.recording import SECTOR
from tests.support.slow_threads import SlowThreads, Transfer

KIB = 1 << 10
N_REGIONS = 4
SPECS: dict[str, tuple[ImageSpec, StorageKind]] = {
    "4k": (ImageSpec(cluster_size=4096, size=N_REGIONS * LARGE_READ), "file"),
    "v2": (ImageSpec(version=2, cluster_size=16 * KIB, size=N_REGIONS * LARGE_READ), "used"),
    "64k": (ImageSpec(cluster_size=64 * KIB, size=N_REGIONS * LARGE_READ), "device"),
    "extended": (ImageSpec(cluster_size=32 * KIB, size=N_REGIONS * LARGE_READ, extended_l2=True), "used"),
}


class ReadingGuest:
    """Reads a region of the disk while it is discarded, and others are written; ``wrong``: sectors, by round, that
    were delivered and that hold neither what was there nor what was written there meanwhile."""

    def __init__(self) -> None:
        self.under_way: list[Transfer] = []
        self.n_delivered = 0
        self.wrong: list[tuple[int, int]] = []

    async def __call__(self, guest: Guest) -> None:
        """The workload: the last region is empty at first, and then the one that was read is."""
        regions = [number * LARGE_READ for number in range(N_REGIONS)]
        for region in regions[:-1]:
            await guest.write(region, guest.chooser.randbytes(LARGE_READ))
        await guest.flush()
        empty = regions[-1]
        for number in range(7):
            region = guest.chooser.choice([other for other in regions if other != empty])
            await self._read_and_discard(guest, number, region, empty)
            empty = region

    async def _read_and_discard(self, guest: Guest, number: int, region: int, empty: int) -> None:
        before = await guest.read(region, LARGE_READ)
        delivered: list[bytes] = []
        ended: list[Exception | None] = []

        def deliver(data: Buffer) -> None:
            delivered.append(bytes(data))

        pending = guest.image.start_read(region, LARGE_READ)
        if isinstance(pending, PendingRead):  # not in several pieces
            assert pending.start_delivery(deliver, ended.append)
        written = guest.chooser.randbytes(SECTOR)
        steps: list[Callable[[], Awaitable[None]]] = [
            partial(guest.zero, region, LARGE_READ, unmap=True),
            guest.flush,
            guest.flush,
            partial(guest.write, empty, guest.chooser.randbytes(LARGE_READ)),
            partial(guest.write, region + guest.chooser.randrange(LARGE_READ // SECTOR) * SECTOR, written),
            guest.flush,
        ]
        for step in steps:
            await step()
            if self.under_way and guest.chooser.random() < 0.4:
                self.under_way[0].move(guest.chooser.randrange(1, 64) * KIB)
        while self.under_way:
            self.under_way[0].move(LARGE_READ)
            if ended:
                self.under_way.clear()
        for data in delivered:
            self.n_delivered += 1
            for start in range(0, LARGE_READ, SECTOR):
                sector = data[start : start + SECTOR]
                if sector not in (before[start : start + SECTOR], bytes(SECTOR), written):
                    self.wrong.append((number, start // SECTOR))
        await guest.zero(region, LARGE_READ, unmap=True)
        await guest.flush()
        await guest.flush()


async def reading(kind: str) -> tuple[ReadingGuest, Recorded]:
    """Run it on an image."""
    spec, storage = SPECS[kind]
    guest = ReadingGuest()
    recorded = await record_workload(
        build_over_old_bytes(spec, storage), guest, around=lambda inner: SlowThreads(inner, guest.under_way)
    )
    return guest, recorded


@pytest.mark.parametrize("kind", SPECS)
async def test_a_thread_never_delivers_what_belongs_to_others(kind: str) -> None:
    """A cluster that a thread reads from is neither taken by a write nor punched; afterwards it is, and the file does
    not grow for want of it."""
    guest, recorded = await reading(kind)
    assert guest.n_delivered >= 4, "hardly any read was left to a thread"
    assert not guest.wrong
    if recorded.built.storage == "file":
        assert len(recorded.final) < (N_REGIONS + 2) * LARGE_READ
    if recorded.built.storage != "used":
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
    """A read that is no operation in flight while a thread copies for it, or that nobody waits for, is seen."""
    if breakage == "epoch given up early":
        break_line(monkeypatch, PendingSource, "start_delivery", _END, "    self.abandon()\n    end = on_end\n")
    else:
        monkeypatch.setattr(InFlightEpochs, "all_ended", lambda _, epoch: True)
    guest, _ = await reading(kind)
    assert guest.wrong, "nobody would have noticed"
