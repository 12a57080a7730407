"""qcowfuse run: the disk for the time of a command, and nothing left behind however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounting import check_image_file, command, create_image, environment, wait_until
from tests.support.users import as_user

pytestmark = pytest.mark.mount


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return create_image(tmp_path / "disk.qcow2", "4M")


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """Where the folder of the mount is made; it must be empty at the end, and no mount be in it."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    yield folder
    wait_until(lambda: not list(folder.iterdir()), "the folder to be removed")
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()


def start(scratch: Path, *words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("run", *words),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(TMPDIR=str(scratch)),
    )


def run(scratch: Path, *words: str | Path, given: str = "") -> tuple[int, str, str]:
    """Exit code, output and errors."""
    process = start(scratch, *words)
    said, complained = process.communicate(given, timeout=60)
    return process.returncode, said, complained


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_command_has_the_disk(image: Path, scratch: Path) -> None:
    """Its path in the environment and in place of {}, in a private folder; streams and exit code are its own."""
    script = 'echo "$QCOWFUSE_DISK $1"; stat -c %a "${1%/*}"; echo more >&2; cat >"$1"; exit 7'
    code, said, complained = run(scratch, image, "--", "sh", "-c", script, "sh", "{}", given="by the command")
    path, same, mode = said.split()
    assert (code, mode) == (7, "700")
    assert complained.endswith("more\n")
    assert path == same
    assert Path(path).parent.parent == scratch
    check_image_file(image)
    assert b"by the command" in image.read_bytes()


def test_mount_options_come_before_the_image(image: Path, scratch: Path) -> None:
    """All of them; behind -- everything is the command's."""
    script = 'echo "$@"; stat -c %a "$QCOWFUSE_DISK"'
    before = ("-r", "--name", "a b", image, "--")
    code, said, _ = run(scratch, *before, "sh", "-c", script, "sh", "<{}>", "-r")
    assert (code, said.partition("/a b")[2]) == (0, "> -r\n400\n")


def test_exit_codes(image: Path, scratch: Path, tmp_path: Path) -> None:
    """A command that is missing, can't be run or was killed; an image that can't be mounted; wrong use."""
    code, _, said = run(scratch, "-r", image, "--", "no-such-command")
    assert code == 127
    assert said.endswith("qcowfuse run: no-such-command: No such file or directory\n")
    assert run(scratch, "-r", image, "--", "/etc/passwd")[0] == 126
    assert run(scratch, "-r", image, "--", "sh", "-c", "kill -KILL $$")[0] == 137
    code, _, said = run(scratch, tmp_path / "none", "--", "true")
    assert (code, said.count("\n")) == (6, 1)
    wrong: tuple[tuple[str | Path, ...], ...] = ((image,), (image, "--"), ("--", "true"), (image, "m", "--", "true"))
    for words in wrong:
        code, _, said = run(scratch, *words)
        assert (code, said.count("\n")) == (2, 1)


def test_signals_are_passed_on(image: Path, scratch: Path) -> None:
    """The command decides what they do; the disk is unmounted when it has ended."""
    script = "trap 'echo got; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    process = start(scratch, image, "--", "sh", "-c", script)
    assert line_of(process) == "ready"
    process.send_signal(signal.SIGTERM)
    said, complained = process.communicate(timeout=60)
    assert (process.returncode, said) == (3, "got\n")
    assert "Traceback" not in complained
    check_image_file(image)


def test_it_is_killed_itself(image: Path, scratch: Path) -> None:
    """The daemon lets the command go on with the disk, then ends and removes the folder."""
    script = 'exec 3<>"$1"; echo ready; read -r line; echo "$line" >&3'
    reader, writer = os.pipe()
    process = subprocess.Popen(
        command("run", image, "--", "sh", "-c", script, "sh", "{}"),
        stdin=reader,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(TMPDIR=str(scratch)),
    )
    os.close(reader)
    assert line_of(process) == "ready"
    process.kill()
    process.wait()
    assert list(scratch.iterdir())
    os.write(writer, b"still there\n")
    os.close(writer)
    wait_until(lambda: not list(scratch.iterdir()), "the folder to be removed")
    assert process.stdout is not None
    process.stdout.close()
    check_image_file(image)
    assert b"still there" in image.read_bytes()


def test_the_daemon_is_killed(image: Path, scratch: Path) -> None:
    """The command sees errors; the dead mount is removed, and the exit code tells."""
    script = 'kill -9 $(getfattr --absolute-names --only-values -n user.qcowfuse.pid "$1"); exit 0'
    code, _, said = run(scratch, image, "--", "sh", "-c", script, "sh", "{}")
    assert code == 137
    assert "the daemon was ended by SIGKILL" in said


def test_what_a_command_leaves_is_waited_for_and_can_be_cut_off(image: Path, scratch: Path) -> None:
    """Standard error says who uses the disk; a signal ends that after a flush, and the exit code stays."""
    script = 'printf kept >"$1"; exec 3<"$1"; sleep 1000 >&- 2>&- & echo $!; exit 4'
    process = start(scratch, image, "--", "sh", "-c", script, "sh", "{}")
    user = int(line_of(process))
    assert process.stderr is not None
    while "SIGINT or SIGTERM cuts its users off" not in (line := process.stderr.readline()):
        assert f"still in use by sleep (pid {user})" in line
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 4
    os.kill(user, signal.SIGTERM)
    check_image_file(image)
    assert b"kept" in image.read_bytes()


@pytest.mark.root
def test_a_plain_user(users_folder: Path) -> None:
    """Nothing of it needs root."""
    script = """
        qemu-img create -q -f qcow2 disk.qcow2 4M
        mkdir t
        TMPDIR=$PWD/t $qcowfuse run disk.qcow2 -- stat -c "%s %u" {}
        rmdir t
        qemu-img check -q disk.qcow2
        """
    done = as_user(script, users_folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{4 << 20} 65534\n", "")
