"""Standard streams that are closed, full, or read by nobody: neither the exit code nor an image suffers from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qcowfuse.cli.exit_codes import ExitCode
from qcowfuse.cli.img.exit_codes import ImgExit
from tests.support.mounting import environment

QCOWFUSE = "from qcowfuse.cli.entry import qcowfuse as main"
IMG = "from qcowfuse.cli.entry import qcowfuse_img as main"
ALL_CLOSED = "<&- >&- 2>&-"


def run(program: str, words: str, streams: str, folder: Path) -> tuple[int, str, str]:
    """A program with ``streams``, redirections of the shell; its exit code and what it printed."""
    script = f'exec "$0" -c "{program}; import sys; sys.exit(main())" {words} {streams}'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment(),
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert run(IMG, "create -q disk.qcow2 1M", ALL_CLOSED, tmp_path) == (ImgExit.OK, "", "")
    return tmp_path


@pytest.mark.parametrize("streams", [">&-", ALL_CLOSED, "2>/dev/full"])
def test_closed_streams(folder: Path, streams: str) -> None:
    """Commands do what they do elsewhere, say it where they can, and end with their exit codes."""
    code, out, err = run(QCOWFUSE, "disk.qcow2 missing", streams, folder)
    assert (code, out) == (ExitCode.MOUNT, "")
    assert err.count("\n") == ("2>" not in streams)
    assert run(QCOWFUSE, "umount missing", streams, folder)[0] == ExitCode.MOUNT
    assert run(IMG, "info missing", streams, folder)[:2] == (ImgExit.FAILED, "")
    code, out, err = run(IMG, "check disk.qcow2", streams, folder)
    assert (code, err) == (ImgExit.OK, "")
    assert bool(out) == (streams == "2>/dev/full")


def test_an_image_is_never_a_standard_stream(folder: Path) -> None:
    """What a library prints to standard error goes nowhere, and not into the image that is opened next."""
    before = (folder / "disk.qcow2").read_bytes()
    opening = f"import os; {QCOWFUSE.replace('qcowfuse as main', 'open_standard_streams as main')}; main()"
    writing = "os.open('disk.qcow2', os.O_RDWR); os.write(2, b'cough'); os.write(1, b'cough')"
    hiding = "os.devnull = '/missing/null'"
    for null in ("pass", hiding):
        assert run(f"import os; {null}; {opening}; {writing}; main = int", "", ALL_CLOSED, folder) == (0, "", "")
    assert (folder / "disk.qcow2").read_bytes() == before


def test_output_that_cannot_be_written_is_a_failure(folder: Path) -> None:
    """It names the stream, not the image."""
    code, _, err = run(IMG, "info disk.qcow2", ">/dev/full", folder)
    assert (code, err) == (ImgExit.FAILED, "qcowfuse-img: standard output: No space left on device\n")
    code, _, err = run(QCOWFUSE, "list --output=json", ">/dev/full", folder)
    assert (code, err) == (ExitCode.SYSTEM, "qcowfuse list: standard output: No space left on device\n")


def test_limits_of_the_system_are_named(folder: Path) -> None:
    """Too few files: the place is the image, and not the file that was one too many."""
    (folder / "mnt").mkdir()
    code, out, err = run(
        f"import resource; resource.setrlimit(7, (6, 6)); {QCOWFUSE}", "-r disk.qcow2 mnt", "", folder
    )
    assert out == ""
    assert err.count("\n") == 1
    if code != ExitCode.MOUNT:  # where there is no /dev/fuse
        assert code == ExitCode.SYSTEM
        assert err.startswith("qcowfuse: disk.qcow2: Too many open files: no more than 6 ")
