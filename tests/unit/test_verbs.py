"""The verbs of qcowfuse without a mount: when a word is a verb, what a target names, what text looks like."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qcowfuse.cli.verb_names import VERBS
from qcowfuse.cli.verbs.layout import duration_text
from qcowfuse.cli.verbs.main import main
from qcowfuse.cli.verbs.mounts import Mount, matching
from qcowfuse.cli.verbs.options import VERB_OPTIONS
from qcowfuse.daemon.record import FoundRecord, Record, RecordWriter, State, find_records, read_record
from tests.support.mounting import command, environment


def qcowfuse(folder: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        command(*words), capture_output=True, text=True, check=False, cwd=folder, env=environment(), timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def all_at_once(folder: Path, *lines: list[str]) -> Iterator[tuple[int, str, str]]:
    """Run qcowfuse with each of several command lines, next to each other."""
    with ThreadPoolExecutor(len(lines)) as pool:
        yield from pool.map(lambda words: qcowfuse(folder, *words), lines)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With its options and an example, and the main help names the verb."""
    assert verb in VERB_OPTIONS
    assert main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"usage: qcowfuse {verb}" in said
    assert all(f"--{option.name}" in said for option in VERB_OPTIONS[verb].options)


def test_the_main_help_names_the_verbs(tmp_path: Path) -> None:
    """Each with what it does."""
    code, said, _ = qcowfuse(tmp_path, "--help")
    assert code == 0
    assert all(f"{verb:8}{text}" in said for verb, text in VERBS.items())


def test_a_verb_or_an_image_of_that_name(tmp_path: Path) -> None:
    """The verb goes first; what makes no sense for it is a mount where there is such a file, and so is what begins
    with an option or with ``--``."""
    mounting, missing = ": is an empty file", "not mounted by qcowfuse (qcowfuse list shows what is)"
    (tmp_path / "m").mkdir()
    assert qcowfuse(tmp_path, "list", "m")[::2] == (
        2,
        "qcowfuse list: too many arguments: m (qcowfuse list --help says more)\n",
    )
    for name in ("list", "status"):
        (tmp_path / name).write_bytes(b"")
    as_mounts = (
        ["list", "m"],
        ["./list", "m"],
        ["-r", "list", "m"],
        ["--", "list", "m"],
        ["list", "m", "-o", "ro"],
        ["status", "m", "-o", "rw,dev,suid"],  # as mount(8) calls it
    )
    for code, _, said in all_at_once(tmp_path, *as_mounts):
        assert code == 3, said
        assert mounting in said
    assert main(["list", "--wrong"]) == 2
    code, _, said = qcowfuse(tmp_path, "status", "m")
    assert code == 5
    assert said == f"qcowfuse status: m: {missing}; to mount the image: qcowfuse ./status m\n"


def test_wrong_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """With what was expected, and exit code 2."""
    for words, expected in (
        (["umount"], "the following arguments are required: MOUNTPOINT|IMAGE"),
        (["umount", "--timeout", "soon", "m"], "timeout: bad time 'soon'"),
        (["status", "--output=yaml", "m"], "output: 'yaml' is neither human nor json"),
        (["status", "--watch", "--interval", "0", "m"], "interval: bad interval '0'"),
        (["umount", "--forc", "m"], "unknown option --forc (did you mean --force?)"),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"qcowfuse {words[0]}: {expected}" in said


def test_what_a_target_names(tmp_path: Path) -> None:
    """A mount point or its file names the newest mount there, an image every mount of it, through links as well."""
    image, point = tmp_path / "disk.qcow2", tmp_path / "m"
    image.write_bytes(b"")
    point.mkdir()
    (tmp_path / "link").symlink_to(image)
    (tmp_path / "to-m").symlink_to(point)
    record = Record(str(image), str(point), f"{point}/disk.raw", 3, 0)

    def mount(place: Path | str, device: int, found: FoundRecord | None = None) -> Mount:
        return Mount(str(place), str(image), device, 0, 0, False, True, found)

    mounts = [mount("/elsewhere", 1), mount(point, 2), mount(point, 3, FoundRecord(record, 1, 0, ""))]
    for target in (point, f"{point}/", tmp_path / "to-m", f"{point}/disk.raw", f"{point}/../m"):
        assert [found.device for found in matching(str(target), mounts)] == [3]
    for target in (image, tmp_path / "link", os.path.relpath(image)):
        assert [found.device for found in matching(str(target), mounts)] == [1, 2, 3]
    assert matching(str(tmp_path), mounts) == []


def test_durations() -> None:
    """The two largest units."""
    assert [duration_text(seconds) for seconds in (-1, 0, 59.9, 61, 3600, 90000, 200000)] == [
        *("0 s", "0 s", "59 s", "1 min 1 s", "1 h", "1 d 1 h", "2 d 7 h")
    ]


def test_a_record_is_read_after_the_end_of_its_process() -> None:
    """The last state stays readable for whoever has it open; a failure is not overwritten."""
    script = """
import sys
from qcowfuse.daemon.record import *
writer = RecordWriter(Record("image \\udcff", "/m", "/m/disk.raw", 7, 5))
print("ready", flush=True)
sys.stdin.readline()
writer.note(State.FAILED, "x" * 1000)
writer.note(State.CLOSED)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        links = {entry: os.readlink(entry) for entry in Path(f"/proc/{process.pid}/fd").iterdir()}
        (path,) = [entry for entry, link in links.items() if "qcowfuse-record" in link]
        descriptor = os.open(path, os.O_RDONLY)
        assert read_record(descriptor) == Record("image \udcff", "/m", "/m/disk.raw", 7, 5)
        # It has no /dev/fuse, so it serves nothing.
        assert process.pid not in {found.pid for found in find_records()}
        process.stdin.write("\n")
    record = read_record(descriptor)
    os.close(descriptor)
    assert record is not None
    assert (record.state, record.detail) == (State.FAILED, "x" * 1000)


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"[1]", b'["a","b","c",1,2,"lost",""]', b"[" * 5000, b"\xff"])
def test_a_record_is_distrusted(text: bytes) -> None:
    """Whatever is in it is a record or nothing."""
    descriptor = os.memfd_create("record")
    os.write(descriptor, text)
    assert read_record(descriptor) is None
    os.close(descriptor)


def test_a_record_that_cannot_be_made_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon goes on without."""

    def refuse(*_: object) -> int:
        raise OSError

    monkeypatch.setattr(os, "memfd_create", refuse)
    RecordWriter(Record("i", "m", "f", 1, 1)).note(State.CLOSED)
