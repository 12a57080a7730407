"""Each rule of the driver broken on purpose: the crash tests' checker must notice, or it would protect nothing.

What is broken is a line of the real source; what must notice is the same run and the same checks that
:mod:`test_power_cuts` and :mod:`test_error_sweep` make of sound code.

Each rule, how it is broken, and below as what it is noticed, with the crash point:

R1: counts are written after the links
    a reference with a count that is too low (counts-partly-written, links-partly-written)
R1: no flush between counts and links
    the same
R2: no flush between data and links
    bytes that are neither old nor new (round-not-begun)
R2: linked before the bytes are written
    the same, where an fsync runs meanwhile
R3: a count falls before the unlink is durable
    a reference with a count of 0 (counts-not-lowered)
R3: freed clusters are used while a read is in flight
    the reader's bytes (tests/driver/test_concurrency.py; where a thread reads, test_reads_in_flight)
R4: the L1 entry goes out with the counts
    an L2 table that is no table yet (tables-without-entries)
R4: a new L2 table is linked that was not written
    old bytes for entries (tables-without-entries)
R4: a refcount block and its pointer go out together
    a block that is no block yet (blocks-without-pointers)
R4: the moved refcount table and the header field go out together
    a refcount table that is none (refcount-table-moved)
R5: autoclear bits are cleared without a flush
    bits that vouch for what has changed (autoclear-without-data)
fsync: it ends without the last flush
    what fsync promised is lost (counts-not-lowered)
error: what could not be written is forgotten
    counts, links or promised bytes that never arrive (round-failed)
error: clusters of a failed write stay taken
    leaks after a clean close (closing)
"""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, replace
from types import ModuleType

import pytest

from qcowfuse.driver.writing.feature_bits import FeatureBits
from qcowfuse.driver.writing.new_tables import NewTables
from qcowfuse.driver.writing.write_back import WriteBack
from qcowfuse.driver.writing.writer import Writer
from tests.support.images import TOP, BuiltImage, ImageSpec, build_image
from tests.support.mutation import break_line
from tests.support.powercut import Guest, check_cuts, record_workload
from tests.support.random_scenarios import random_scenario
from tests.support.scenarios import KIB, Fault, Scenario, run_scenario

PLAIN = ImageSpec(size=64 * KIB, fill=0.5)
SHARED = ImageSpec(size=64 * KIB, fill=1.0, snapshot=True, cluster_size=4096)
EMPTY = ImageSpec(size=256 * KIB)
TABLES = ImageSpec(cluster_size=4096, size=5 << 20)
FULL_TABLE = ImageSpec(refcount_bits=64, size=2200 * KIB, fill=0.86)


@dataclass(frozen=True)
class Breakage:
    """One line that is broken, and the images on which it is sure to be noticed."""

    owner: type | ModuleType
    name: str
    old: str
    new: str
    specs: tuple[ImageSpec, ...] = (PLAIN, SHARED)
    suspend: bool = False


_FIRST_FLUSH = """        await self.flush_storage(data)
        data = None
        round_.links_written = True
"""
BREAKAGES = {
    "R1 counts after links": Breakage(
        WriteBack,
        "_write_round",
        "await self._write_refcounts(round_.refcounts)",
        "counts = round_.refcounts.blocks + round_.refcounts.moved_table + round_.refcounts.table\n"
        "    round_.late += [Part([write]) for write in counts]",
    ),
    "R1 R2 no flush before links": Breakage(
        WriteBack, "_write_round", _FIRST_FLUSH, "        round_.links_written = True\n"
    ),
    "R2 linked before written": Breakage(
        Writer,
        "_allocate_and_link",
        "        await self._write_data(parts,",
        "        self.link(slice_, plan, guest_offset=start, host_offset=host_offset)\n"
        "        await self._write_data(parts,",
        specs=(SHARED,),
        suspend=True,
    ),
    "R3 count falls with the unlink": Breakage(
        WriteBack,
        "_run",
        "    round_ = self._take(final=final)\n",
        "    for run in self._unlinked:\n        await self._release(run)\n    self._unlinked = []\n"
        "    round_ = self._take(final=final)\n",
    ),
    "R4 L1 entries with the counts": Breakage(
        WriteBack,
        "_take",
        "round_.late += [Part([link]) for link in links]",
        "round_.early += [Part([link]) for link in links]",
        specs=(EMPTY, SHARED),
    ),
    "R4 a new table is not written": Breakage(
        NewTables,
        "try_make",
        "self._storage.try_pwritev(run.host_offset, [ZEROES[:table_size]])",
        "True",
        specs=(TABLES,),
    ),
    "R4 blocks with their pointers": Breakage(
        WriteBack, "_write_refcounts", "        await self.flush_storage()\n", "", specs=(EMPTY, FULL_TABLE)
    ),
    "R4 table with its pointer": Breakage(
        WriteBack,
        "_write_refcounts",
        "await self._write_all(refcounts.moved_table)",
        "await self._write_all(refcounts.table)",
        specs=(FULL_TABLE,),
    ),
    "R5 no flush": Breakage(FeatureBits, "_write", "    await flush()\n", "", specs=(replace(PLAIN, seed=9),)),
    "fsync without the last flush": Breakage(
        WriteBack, "_write_round", "    if final:\n        await self.flush_storage(data)", "    pass"
    ),
}


def steps_for(spec: ImageSpec, seed: int, *, suspend: bool) -> Scenario:
    """Random operations without faults."""
    chooser = random.Random(seed)
    while True:
        scenario = random_scenario(chooser, spec, n_steps=40, may_fail=False, aligned=True)
        if scenario.suspend == suspend and len(scenario.steps) > 15:
            return replace(scenario, tiny_caches=False)


async def fill(guest: Guest) -> None:
    """Allocate until the refcount table is too small."""
    for number, start in enumerate(range(0, guest.image.size, 16 * KIB)):
        await guest.write(start, guest.chooser.randbytes(min(5 * KIB, guest.image.size - start)))
        if number % 40 == 20:
            await guest.flush()


def with_autoclear(built: BuiltImage) -> BuiltImage:
    """The image with an autoclear bit that nobody knows."""
    top = bytearray(built.top)
    top[88:96] = (1 << 40).to_bytes(8, "big")
    return BuiltImage(built.spec, {**built.files, TOP: bytes(top)}, built.contents, built.snapshot_contents)


async def noticed(specs: tuple[ImageSpec, ...], *, suspend: bool) -> list[str]:
    """What the checks say to the first images on which they say anything."""
    for spec in specs:
        if spec == FULL_TABLE:
            recorded = await record_workload(build_image(spec), fill)
            problems = (await check_cuts(recorded, n_states=60, n_qemu=0)).problems
        elif spec.seed == 9:
            recorded = await record_workload(
                with_autoclear(build_image(spec)), lambda guest: guest.write(0, b"x" * 512)
            )
            problems = (await check_cuts(recorded, n_states=50, n_qemu=0)).problems
        else:
            problems = []
            for seed in range(12 if suspend else 6):
                scenario = steps_for(spec, seed, suspend=suspend)
                problems = (await run_scenario(scenario, n_states=100, n_qemu=0)).problems or []
                if problems:
                    break
        if problems:
            return problems
    return []


@pytest.mark.parametrize("name", BREAKAGES)
async def test_a_broken_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of the ordering rules is changed, and the checks of the crash tests report damage."""
    broken = BREAKAGES[name]
    break_line(monkeypatch, broken.owner, broken.name, broken.old, broken.new)
    assert await noticed(broken.specs, suspend=broken.suspend), "nobody would have noticed"


async def test_nothing_is_noticed_where_nothing_is_broken() -> None:
    """The same runs on sound code report nothing: what is noticed above is the breakage."""
    assert not await noticed((PLAIN, SHARED, TABLES, FULL_TABLE, replace(PLAIN, seed=9)), suspend=False)
    assert not await noticed((SHARED,), suspend=True)


ERROR_BREAKAGES = {
    "counts are forgotten": Breakage(WriteBack, "_restore", "    self._allocator.put_back()\n", ""),
    "links are forgotten": Breakage(
        WriteBack,
        "_restore",
        "            self._cache.mark_dirty(part.slice_, part.start, part.end)\n",
        "            pass\n",
    ),
    "tables are forgotten": Breakage(
        WriteBack, "_restore", "    self._dirty_l1 |= round_.dirty_l1\n", "", specs=(EMPTY,)
    ),
    "unlinked clusters are forgotten": Breakage(WriteBack, "_restore", "    self._unlinked += round_.unlinked\n", ""),
    "clusters stay taken": Breakage(Writer, "give_back", "await self._allocator.release([run], punch=True)", "pass"),
}


async def noticed_after_errors(specs: tuple[ImageSpec, ...]) -> list[str]:
    """The same for runs in which one storage operation fails, and leaks.

    A count that can not be lowered for want of its block is a leak that is allowed: nobody hears of it.
    """
    for spec in specs:
        for seed in range(3):
            scenario = steps_for(spec, seed, suspend=False)
            for number in range(90):
                outcome = await run_scenario(replace(scenario, fault=Fault(number, errno.ENOSPC)), n_states=0)
                if outcome.problems or (outcome.n_errors and outcome.n_leaks > 2):
                    return outcome.problems or [f"{outcome.n_leaks} leaks"]
    return []


@pytest.mark.parametrize("name", ERROR_BREAKAGES)
async def test_a_careless_error_path_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write fails once and the image goes on: forgetting anything of what was under way is noticed."""
    broken = ERROR_BREAKAGES[name]
    break_line(monkeypatch, broken.owner, broken.name, broken.old, broken.new)
    assert await noticed_after_errors(broken.specs), "nobody would have noticed"


async def test_nothing_is_noticed_after_errors_that_are_handled() -> None:
    """The same runs on sound code report nothing."""
    assert not await noticed_after_errors((PLAIN, SHARED, EMPTY))
