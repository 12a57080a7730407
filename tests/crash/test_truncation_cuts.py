"""Power cuts and failing operations while all of a disk from some place on is zeroed: what a truncation does.

The driver gives back what it has let go of in between, with flushes of its own: here after a few clusters.
"""

from __future__ import annotations

import errno

import pytest
import trio

from qcowfuse.driver.writing import changes
from qcowfuse.errors import ReadOnlyImageError
from tests.crash.test_error_sweep import Run, check_left_behind, close, read_undisturbed, start
from tests.crash.test_power_cuts import SPECS
from tests.support.faults import fail_at
from tests.support.images import build_image
from tests.support.old_bytes import build_in_turn
from tests.support.powercut import Guest, check_cuts, record_workload

KIB = 1 << 10
CUT_SPECS = (
    *("v3", "v2", "v1", "v1-4k", "backing-qcow2", "snapshot", "zeroes-snapshot", "extended-backing", "zlib"),
    *("data-file", "data-file-raw", "data-file-backing", "extended-data-file", "aes"),
)
SWEEP_SPECS = ("v3", "v1-4k", "backing-qcow2", "snapshot-4k", "extended-snapshot", "data-file", "data-file-raw")


@pytest.fixture(autouse=True)
def few_clusters_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushes in the middle of a truncation."""
    monkeypatch.setattr(changes, "MAX_UNLINKED", 2)


async def truncating(guest: Guest) -> None:
    """Truncations to less, some in the middle of a sector, with writes before and after, and fsyncs now and then."""
    size = guest.image.size
    for number, end in enumerate((size - 700, size // 2 + 100, 0, size // 3, 0)):
        for _ in range(4):
            await guest.write_random(0, size, 9 * KIB)
        if number % 2:
            await guest.flush()
        await guest.zero(end, size - end, unmap=True)
        await guest.write_random(0, size, 2000)
        if number != 2:
            await guest.flush()


@pytest.mark.parametrize("spec", CUT_SPECS)
async def test_a_power_cut_while_a_disk_is_truncated(spec: str) -> None:
    """Each byte is the old one or zero, and zero once fsync has promised it; leaks at most.

    Crash points: zeroes-partly-linked, holes-partly-punched.
    """
    # Another kind of storage than in test_power_cuts.
    built = build_in_turn(SPECS, spec, ("device", "file", "used"))
    recorded = await record_workload(built, truncating, seed=len(spec))
    summary = await check_cuts(recorded, n_states=100, n_qemu=4)
    assert not summary.problems, "\n".join(summary.problems[:5])


async def _truncate(run: Run, n_bytes: int) -> None:
    begun = run.record.begin_write(n_bytes, bytes(run.image.size - n_bytes))
    try:
        await run.image.write_zeroes(n_bytes, run.image.size - n_bytes, unmap=True)
    except (OSError, ReadOnlyImageError) as error:
        run.errors.append(error)
    else:
        run.record.end_write(begun)


async def _workload(run: Run) -> None:
    for end in (run.image.size // 2, 0):
        await run.write(0, b"a" * 5 * KIB)
        await run.write(run.image.size - 9 * KIB, b"b" * 8 * KIB)
        await _truncate(run, end)
        await run.write(run.image.size - 3 * KIB, b"c" * 2 * KIB)
    await run.flush()


@pytest.mark.parametrize("spec", SWEEP_SPECS)
async def test_a_truncation_fails_at_any_operation(spec: str) -> None:
    """The Nth operation fails, for every N: whoever truncates hears of what can't be hidden, the disk holds old bytes
    or zeroes, and a second try succeeds."""
    built = build_image(SPECS[spec])
    number = 0
    while True:
        run = await start(built, fail_at(number, code=errno.ENOSPC), inline=False)
        with trio.fail_after(30):
            await _workload(run)
            if len(run.faulty.operations) <= number:
                assert number > 10
                assert not run.errors
                await close(run)
                return
            failed = run.faulty.operations[number]
            run.set_check(None)
            if not run.flush_failure:
                assert not run.record.expected_now().mismatches(await read_undisturbed(run)), f"operation {number}"
                heard = len(run.errors)
                await _truncate(run, 0)
                assert await read_undisturbed(run) == bytes(run.image.size)
                await close(run)
                assert len(run.errors) == heard, run.errors[heard:]
            else:
                await close(run)
        if failed.kind in ("write", "flush"):
            assert run.errors, f"nobody heard that operation {number} failed: {failed}"
        await check_left_behind(run)
        number += 1
