"""Random operations on random images with faults and power cuts: what ``scripts/crashtest`` does, for a while."""

from __future__ import annotations

import errno
import random
import subprocess
import sys
from pathlib import Path

import pytest

from qcowfuse.driver.writing import unguarded
from qcowfuse.driver.writing.write_back import WriteBack
from tests.support.images import ImageSpec
from tests.support.mounting import REPOSITORY, environment
from tests.support.mutation import break_line
from tests.support.random_scenarios import random_scenario, random_spec
from tests.support.scenarios import (
    KIB,
    Fault,
    Scenario,
    check_scenario,
    shrink_scenario,
)
from tests.support.shrink import shrink


@pytest.mark.parametrize("seed", range(8))
def test_random_operations_faults_and_power_cuts(seed: int) -> None:
    """Nothing is lost in any of some thousand states.

    Crash points: round-not-begun, counts-partly-written, blocks-without-pointers, tables-without-entries,
    links-partly-written, counts-not-lowered, refcount-table-moved,
    data-file-flushed-first, zeroes-partly-linked, holes-partly-punched, links-for-eviction, round-failed, closing,
    version-1-unlinked.
    """
    chooser = random.Random(seed)
    for _ in range(2):
        spec = random_spec(chooser)
        for _ in range(5):
            scenario = random_scenario(chooser, spec)
            outcome = check_scenario(scenario, n_states=40)
            assert not outcome.problems, f"{outcome.problems[:3]}\n{scenario.to_json()}"


@pytest.mark.parametrize("seed", range(2))
def test_operations_before_free_clusters_are_known(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same while, and after, the look at free clusters goes on in the background.

    Crash points: round-not-begun, counts-partly-written, blocks-without-pointers, tables-without-entries,
    links-partly-written, counts-not-lowered.
    """
    monkeypatch.setattr(unguarded, "INLINE_BYTES", 0)
    chooser = random.Random(100 + seed)
    for _ in range(2):
        spec = random_spec(chooser)
        for _ in range(2):
            scenario = random_scenario(chooser, spec)
            outcome = check_scenario(scenario, n_states=15)
            assert not outcome.problems, f"{outcome.problems[:3]}\n{scenario.to_json()}"


def test_scenarios_can_be_written_down() -> None:
    """A scenario from its JSON is the same scenario."""
    chooser = random.Random(3)
    for _ in range(20):
        scenario = random_scenario(chooser, random_spec(chooser))
        assert Scenario.from_json(scenario.to_json()) == scenario


def test_shrinking_finds_what_matters() -> None:
    """Of many items the three that make it fail are left, in their order."""
    n_runs = 0

    def fails(items: list[int]) -> bool:
        nonlocal n_runs
        n_runs += 1
        return {3, 40, 77} <= set(items)

    assert shrink(range(100), fails) == [3, 40, 77]
    assert n_runs < 200


def test_a_failure_is_shrunk_and_replayed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What fails with many operations is brought down to few, which still fail, and succeed on sound code."""
    chooser = random.Random(1)
    spec = ImageSpec(size=64 * KIB, fill=0.5)
    scenario = random_scenario(chooser, spec, n_steps=40, may_fail=False, aligned=True)
    while len(scenario.steps) < 20:
        scenario = random_scenario(chooser, spec, n_steps=40, may_fail=False, aligned=True)
    with monkeypatch.context() as patch:
        break_line(patch, WriteBack, "_write_round", "await self._write_refcounts(round_.refcounts)", "pass")
        shortest = shrink_scenario(scenario, n_states=60)
        assert check_scenario(shortest, n_states=60).failed
    assert len(shortest.steps) <= 2
    file = tmp_path / "scenario.json"
    file.write_text(shortest.to_json())
    done = subprocess.run(
        [sys.executable, REPOSITORY / "scripts/crashtest", "--replay", file],
        capture_output=True,
        text=True,
        check=False,
        env=environment(QCOWFUSE_CRASHTEST="1"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing found" in done.stdout


def test_an_error_that_nobody_hears_of_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenarios notice an error that is swallowed."""
    break_line(monkeypatch, WriteBack, "flush_storage", "        self.fail(error)\n        raise\n", "        pass\n")
    steps = (("write", 0, 4096, 1), ("flush",))
    problems = [
        check_scenario(Scenario(ImageSpec(size=64 * KIB), steps, fault=Fault(number, errno.EIO)), n_states=0).problems
        for number in range(12)
    ]
    assert any("nobody heard" in str(found) for found in problems)
