"""Power cuts while space is set aside: what is read is what was there or was written; leaks at most.

Crash points: round-not-begun, counts-partly-written, blocks-without-pointers, tables-without-entries,
links-partly-written, counts-not-lowered.
"""

from __future__ import annotations

import pytest

from tests.crash.test_power_cuts import SPECS
from tests.support.old_bytes import build_in_turn
from tests.support.powercut import Guest, check_cuts, record_workload

KIB = 1 << 10
CUT_SPECS = (
    *("v3", "v2", "v1", "refcount-64", "backing-qcow2", "snapshot", "zeroes-snapshot", "extended-backing", "zlib"),
    *("data-file", "data-file-raw", "extended-data-file", "aes"),
)


async def reserving(guest: Guest) -> None:
    """Space for parts and for all of the disk, among writes and discards, with fsyncs now and then."""
    size = guest.image.size
    for number in range(12):
        start = guest.chooser.randrange(size - 1)
        n_bytes = guest.chooser.randrange(1, min(60 * KIB, size - start) + 1)
        if number % 4 == 3:
            await guest.zero(start, n_bytes, unmap=number % 8 == 3)
        await guest.image.allocate(start, n_bytes)
        for _ in range(3):
            await guest.write_random(0, size, 5 * KIB)
        if number % 3 == 1:
            await guest.flush()
    await guest.image.allocate(0, size)
    await guest.flush()
    await guest.write_random(0, size, 5 * KIB)


@pytest.mark.parametrize("spec", CUT_SPECS)
async def test_a_power_cut_while_space_is_set_aside(spec: str) -> None:
    """Whatever a power cut leaves: consistent, and what fsync promised is there."""
    recorded = await record_workload(build_in_turn(SPECS, spec), reserving, seed=len(spec))
    summary = await check_cuts(recorded, n_states=100, n_qemu=4)
    assert not summary.problems, "\n".join(summary.problems[:5])
