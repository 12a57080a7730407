"""A plain command line of qcowfuse-img means without argparse what it means with it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from qcowfuse.cli.img import arguments
from qcowfuse.cli.img.parser import build_parser
from qcowfuse.cli.near_misses import IMG_COMMANDS

SWITCHES = ("-U", "-q", "-l", "--force", "--output=json", "--output=human", "--", "-r", "-x", "--ignore-locks")
NAMES = ((), ("image",), ("image", "1G"), ("a", "b", "c"), ("",), ("-",))


def with_argparse(words: list[str]) -> dict[str, object] | None:
    """What argparse makes of it; None for a mistake."""
    try:
        return vars(build_parser().parse_args(words))
    except SystemExit:
        return None


def plain(words: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, object] | None:
    """What is made of it without argparse; None where that is left to argparse."""

    def refuse() -> None:
        raise LookupError

    monkeypatch.setattr("qcowfuse.cli.img.parser.build_parser", refuse)
    try:
        return vars(arguments.parse(words))
    except LookupError:
        return None
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize("command", IMG_COMMANDS)
def test_plain_command_lines_are_read_as_argparse_does(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With no, one and two switches, before and behind the names; a mistake is never taken for a plain line."""
    n_plain = 0
    for names in NAMES:
        for n_switches in range(3):
            for switches in itertools.permutations(SWITCHES, n_switches):
                words = [command, *switches[:1], *names, *switches[1:]]
                if (found := plain(words, monkeypatch)) is None:
                    continue
                n_plain += 1
                assert found == with_argparse(words), words
    assert bool(n_plain) == (command not in ("resize", "partitions"))
    capsys.readouterr()


def test_what_is_repeated_is_a_list_of_its_own() -> None:
    """Not one that all command lines of a process have in common."""
    first, second = arguments.parse(["map", "image"]), arguments.parse(["map", "image"])
    assert first.allow_dir == []
    assert first.allow_dir is not second.allow_dir


@pytest.mark.parametrize(
    "words", [["info"], ["--output=json", "info", "image"], ["infos", "image"], ["info", "-x", "i"]]
)
def test_mistakes_are_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, with exit code 1."""
    with pytest.raises(SystemExit) as found:
        arguments.parse(words)
    assert found.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_plain_command_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    """No parser of command lines, no event loop, and nothing of other commands."""
    image = tmp_path / "image.qcow2"
    needless = {
        "trio",
        "qcowfuse.cli.trimmed_trio",
        "qcowfuse.storage.file",
        "argparse",
        "gettext",
        "dataclasses",
        "inspect",
        "hashlib",
        "shutil",
        "uuid",
    }
    needless |= {f"qcowfuse.tools.{name}" for name in ("snapshot_edit", "shadow_refcounts", "create_encryption")}
    needless |= {f"qcowfuse.{name}" for name in ("consistency.repair", "cli.img.parser", "cli.passphrase")}
    own = {"create": "qcowfuse.tools.create", "check": "qcowfuse.tools.check", "map": "qcowfuse.tools.extent_map"}
    script = """
import sys
sys.path[1:] = {path!r}
from qcowfuse.cli.entry import qcowfuse_img
code = qcowfuse_img()
print(*sys.modules)
sys.exit(code)
"""
    for command in ("create -q {} 1M", "info {}", "check -q {}", "snapshot -l {}", "map {}"):
        words = command.format(image).split()
        program = [sys.executable, "-S", "-c", script.format(path=sys.path), *words]
        modules = set(subprocess.run(program, capture_output=True, text=True, check=True).stdout.split())
        others = {module for name, module in own.items() if name != words[0]}
        assert not modules & (needless | others), words
