"""What ``scripts/fuzz`` does, for a number of cases that is the same each time; and what it found, again."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest
import trio

from qcowfuse import printable
from qcowfuse.cli.mount import parser
from qcowfuse.daemon import outside_process
from qcowfuse.driver.layers.encryption import EncryptedData
from qcowfuse.driver.writing.append_allocation import AppendAllocator
from qcowfuse.format import luks
from qcowfuse.partitions.table import find_table
from qcowfuse.storage import beneath
from tests.support.checker import check_image_bytes
from tests.support.fuzzing import differential, judging, parsers, whole
from tests.support.fuzzing.cases import Case, changed, parse_case, random_changes, random_steps
from tests.support.fuzzing.disks import DISKS
from tests.support.fuzzing.encrypted import PASSPHRASE
from tests.support.fuzzing.judging import QEMU, TARGETS, WHOLE, judge, judge_apart, shrink_case
from tests.support.fuzzing.subjects import ENCRYPTED, IMAGES, SIZE, subject
from tests.support.fuzzing.workers import Fuzzing
from tests.support.mutation import break_line
from tests.support.partition_tables import answer

from .reproducers import DECIDED, REPRODUCERS

SEED = 1


@pytest.mark.parametrize("name", IMAGES)
def test_subjects_are_sound(name: str) -> None:
    """As they are built: clean, and the same bytes for QEMU and for us."""
    report = check_image_bytes(subject(name).data)
    assert (report.errors, report.leaks) == ([], 0)
    assert judge(Case(QEMU, name)) is None
    assert judge(Case(WHOLE, name, (), (("check",), ("info",), ("map",), ("rw",), ("write", 700, 9000, 7)))) is None


@pytest.mark.parametrize("name", DISKS)
def test_disks_are_sound(name: str) -> None:
    """As they are built: nothing is wrong with any of three partitions, or five and an extended one."""
    data = subject(name).data
    table = answer(find_table(len(data)), data)
    assert table.problems == ()
    assert [part.problem for part in table.partitions] == [""] * (6 if name == "mbr" else 3)


@pytest.mark.parametrize("name", ENCRYPTED)
def test_encrypted_subjects_are_sound(name: str, tmp_path: Path) -> None:
    """As above; what QEMU reads with the passphrase is what we read."""
    report = check_image_bytes(subject(name).data)
    assert (report.errors, report.leaks) == ([], 0)
    (tmp_path / "image").write_bytes(subject(name).data)
    kind = "aes" if "aes" in name else "luks"
    options = f"driver=qcow2,file.filename={tmp_path}/image,encrypt.key-secret=k,encrypt.format={kind}"
    secret = f"secret,id=k,data={PASSPHRASE.decode()}"
    convert = ["qemu-img", "convert", "--object", secret, "--image-opts", options, "-O", "raw", f"{tmp_path}/raw"]
    subprocess.run(convert, check=True, timeout=60)
    data = (tmp_path / "raw").read_bytes()
    assert len(data.strip(b"\0")) > SIZE // 2
    assert bytes(trio.run(whole._Session(Case(WHOLE, name)).disk) or b"") == data
    assert judge(Case(WHOLE, name, (), (("check",), ("info",), ("map",), ("rw",), ("write", 700, 9000, 7)))) is None


@pytest.mark.parametrize("case", REPRODUCERS, ids=lambda case: f"{case.subject}: {case.changes[0][0]}")
def test_found_before(case: Case) -> None:
    """Nothing is wrong with it any more."""
    assert judge_apart(case) is None


@pytest.mark.parametrize("name", DECIDED)
def test_decisions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU and we disagree as it was decided; without the decision that is a finding."""
    assert name in {decision.name for decision in differential.DECISIONS}
    for case in DECIDED[name]:
        assert judge(case) is None, case
        others = tuple(decision for decision in differential.DECISIONS if decision.name != name)
        with monkeypatch.context() as patch:
            patch.setattr(differential, "DECISIONS", others)
            assert "nobody decided" in (judge(case) or ""), case


def test_every_decision_has_a_case() -> None:
    """None is left over, and each says why."""
    assert {decision.name for decision in differential.DECISIONS} == set(DECIDED)
    assert all(decision.reason for decision in differential.DECISIONS)


@pytest.mark.parametrize("target", [target for target in TARGETS if target != QEMU])
def test_a_number_of_cases(target: str) -> None:
    """With a fixed seed: nothing wrong, and every case was run."""
    n_cases = 400 if target == WHOLE else 60
    fuzzing = Fuzzing(SEED, [target], n_cases=n_cases)
    assert [f"{finding.text}: {finding.case!r}" for finding in fuzzing.run()] == []
    assert fuzzing.counts == {target: n_cases}


def test_a_number_of_cases_with_qemu() -> None:
    """As above, for what takes processes."""
    fuzzing = Fuzzing(SEED, [QEMU], n_cases=60)
    assert [f"{finding.text}: {finding.case!r}" for finding in fuzzing.run()] == []


def test_cases_print_as_what_they_are() -> None:
    """A printed case is read back, and does the same."""
    chooser = random.Random(SEED)
    for name in ("v3-512", "v1", "luks", "options"):
        case = Case("whole", name, random_changes(chooser, name, raw=0.5), random_steps(chooser, SIZE), True)
        assert parse_case(f"    {case!r},") == case
    cut = Case("mount-options", "options", (("cut", 3), ("insert@1", 0x4142), ("@0", 0x43)))
    assert changed(cut).data == b"CABo,"


def test_a_broken_parser_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bound gone, there is a finding; what is left of its case is the one change that matters."""
    break_line(monkeypatch, luks, "parse_luks_header", "len(data) >= HEADER_LENGTH", "len(data) >= 8")
    monkeypatch.setattr(parsers, "parse_luks_header", luks.parse_luks_header)
    found = next(Fuzzing(SEED, ["luks"], n_cases=2000).run())
    assert found.case.target == "luks"
    shortest = shrink_case(found.case, found.text)
    assert len(shortest.changes) == 1
    assert judge(shortest) is not None


def test_a_way_out_of_the_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links that the kernel follows by itself lead anywhere."""
    monkeypatch.setattr(beneath, "_PATH_FLAGS", os.O_PATH | os.O_CLOEXEC)
    texts = [finding.text for finding in Fuzzing(SEED, ["names"], n_cases=40).run()]
    assert any(" led to " in text for text in texts), texts


def test_a_request_with_more_than_numbers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that gets to a call on the mount."""
    break_line(
        monkeypatch,
        outside_process,
        "parse_request",
        "all(isinstance(value, int) for value in args)",
        "isinstance(args, list)",
    )
    assert next(Fuzzing(SEED, ["requests"], n_cases=40).run()).text.startswith("AssertionError")


def test_a_message_of_several_lines_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with a command line is said on one line, whatever is in it."""
    monkeypatch.setattr(printable, "printable", str)
    monkeypatch.setattr(parser, "printable", str)
    texts = [finding.text for finding in Fuzzing(SEED, ["arguments"], n_cases=200).run()]
    assert any("not fit to be shown" in text for text in texts), texts


def test_a_cipher_that_numbers_sectors_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written in one session is read as something else in the next."""
    numbers = iter(range(1 << 30))
    monkeypatch.setattr(EncryptedData, "_sector", lambda *_, **__: next(numbers))
    case = Case(WHOLE, "v3-luks", (), (("rw",), ("write", 700, 9000, 7), ("read", 0, 20_000)))
    assert "reading 20000 bytes at 0x0 differs" in (judge_apart(case) or "")


def test_a_broken_allocator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1 clusters put on top of others: a clean image that is not clean any more."""
    break_line(monkeypatch, AppendAllocator, "_allocate", "round_up(start,", "round_up(4096,")
    case = Case(WHOLE, "v1", (), (("rw",), ("read", 0, 512), ("write", 600, 10, 7), ("write", 9000, 5000, 9)))
    shortest = shrink_case(case, judge_apart(case) or "")
    assert "clean image 2" in (judge_apart(shortest) or "")
    assert len(shortest.steps) < len(case.steps)


@pytest.mark.parametrize(("what", "said"), [("exit", "Died"), ("memory", "MemoryError"), ("spin", "Hang")])
def test_processes_that_end_are_findings(what: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that ends its process, takes too much memory or too long is found, and the next ones are run."""
    numbers = iter(range(1 << 30))

    def run(_case: Case) -> None:
        if next(numbers) % 3 != 1:
            return
        if what == "exit":
            os._exit(5)
        elif what == "memory":
            bytearray(2 * judging.MEMORY)
        while what == "spin":
            pass

    monkeypatch.setattr(judging, "run_case", run)
    monkeypatch.setattr(judging, "CPU_SECONDS", 0.05 if what == "spin" else 60.0)
    found = list(Fuzzing(SEED, ["luks"], n_cases=4).run())
    assert found
    assert found[0].text.startswith(said)


def test_replay(tmp_path: Path) -> None:
    """Lines of a file, as the program does it: here those that were found before."""
    file = tmp_path / "cases"
    file.write_text("# a word\n" + "".join(f"    {case!r},\n" for case in REPRODUCERS[:2]), encoding="utf-8")
    cases = [parse_case(line) for line in file.read_text(encoding="utf-8").splitlines() if "Case(" in line]
    assert cases == list(REPRODUCERS[:2])
