"""Man pages and completions: as the parsers are now, free of warnings, and shells understand them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qcowfuse.cli.img.create_options import known_options
from qcowfuse.cli.mount.mount_options import list_words, sort_options
from qcowfuse.cli.mount.options import OPTIONS
from tests.support.mounting import REPOSITORY
from tests.unit.test_named_options import commands

DATA = REPOSITORY / "qcowfuse" / "data"
PAGES = sorted((DATA / "man").iterdir())
FISH = {name: (DATA / f"completions/fish/{name}.fish").read_text() for name in ("qcowfuse", "qcowfuse-img")}


def test_they_are_those_of_the_parsers() -> None:
    """Nothing that scripts/manual writes differs from what is there."""
    done = subprocess.run([REPOSITORY / "scripts/manual", "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("command", commands())
def test_every_option_is_in_each(command: str) -> None:
    """Each option of each command is in its man page and in the completions of the three shells."""
    program, _, verb = command.partition(" ")
    page = (DATA / f"man/{program}.1").read_text().replace("\\-", "-")
    zsh = (DATA / "completions/zsh/_qcowfuse").read_text()
    answer = completed(program, *([verb] if verb else []), "-")
    for name in commands()[command]:
        assert f"\\fB{name}\\fR" in page or name in ("--help", "-h")
        assert name in answer
        assert f"'*{name}[" in zsh or f"'*{name}=[" in zsh
        assert f" -{'l' if name.startswith('--') else 's'} {name.lstrip('-')} " in FISH[program]


def test_the_list_behind_o_is_in_the_man_page_and_understood() -> None:
    """Options that stand in the list alone are in the page, and what is offered for it is taken."""
    page = (DATA / "man/qcowfuse.1").read_text()
    for option in OPTIONS:
        assert option.on_command_line or f"\\fB{option.name}\\fR" in page
    sort_options([",".join(f"{word}1" if word.endswith("=") else word for word in list_words())])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_man_has_nothing_to_say_against_a_page(page: Path) -> None:
    """man(1) formats it without a warning, and each section that a reader looks for is there."""
    if shutil.which("man") is not None:  # a small system has none; the text is checked all the same
        done = subprocess.run(
            ["man", "--warnings", "-E", "UTF-8", "-l", page],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANWIDTH": "80"},
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "{{" not in done.stdout
    text = page.read_text()
    assert {"NAME", "SYNOPSIS", "DESCRIPTION", "EXAMPLES", "SEE ALSO"} <= {
        line[4:] for line in text.splitlines() if line.startswith(".SH ")
    }


def completed(program: str, *words: str, set_up: str = "") -> list[str]:
    """What bash offers for the last of the words."""
    script = f"""
        {set_up}
        . {DATA}/completions/bash/{program}
        compopt() {{ :; }}  # there is no completion under way
        COMP_WORDS=("$@")
        COMP_CWORD=$(($# - 1))
        "$(complete -p "$1" | sed 's/.*-F \\([^ ]*\\) .*/\\1/')"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-euc", script, "bash", program, *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_bash_completes_values(tmp_path: Path) -> None:
    """Words of a choice, also behind =, files, folders, and names within the list behind -o."""
    (tmp_path / "disk.qcow2").touch()
    (tmp_path / "disks").mkdir()
    here = f"cd {tmp_path}"
    assert completed("qcowfuse", "--discard", "") == ["unmap", "ignore"]
    assert completed("qcowfuse", "--discard", "=", "u") == ["unmap"]
    assert completed("qcowfuse", "--discard", "=") == ["unmap", "ignore"]
    assert sorted(completed("qcowfuse", "-r", "di", set_up=here)) == ["disk.qcow2", "disks"]
    assert completed("qcowfuse", "--allow-dir", "di", set_up=here) == ["disks"]
    assert "root" in completed("qcowfuse", "--user", "ro")
    assert completed("qcowfuse", "-o", "ro,partition") == ["ro,partition=", "ro,partitions"]
    assert completed("qcowfuse", "--name", "", set_up=here) == []
    assert completed("qcowfuse-img", "par") == ["partitions"]
    assert completed("qcowfuse-img", "--v") == ["--version"]
    assert completed("qcowfuse-img", "check", "--repair", "") == ["leaks", "all"]
    assert set(completed("qcowfuse-img", "create", "-o", "")) == set(known_options("qcow2"))
    assert sorted(completed("qcowfuse-img", "info", "--", "di", set_up=here)) == ["disk.qcow2", "disks"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_can_parse_it(shell: str) -> None:
    """No syntax error; where zsh or fish is not installed, what an own file of each begins with."""
    files = [path for path in (DATA / "completions" / shell).iterdir() if not path.name.endswith(".zwc")]
    assert files
    for path in files:
        if shutil.which(shell) is not None:
            done = subprocess.run([shell, "-n", path], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, "")
        assert path.read_text().startswith("#compdef qcowfuse qcowfuse-img\n" if shell == "zsh" else f"# {shell} ")
