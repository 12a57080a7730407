"""qcowfuse-img create that does not come to its end: by a signal, by a full disk, while it makes any of its files."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qcowfuse.cli.img.main import main
from qcowfuse.tools import new_file
from tests.support import qemu
from tests.support.mounting import environment

WAYS = {
    "sparse": "preallocation=off",
    "metadata": "preallocation=metadata",
    "allocated": "preallocation=falloc",
    "written": "preallocation=full",
    "data file": "preallocation=full,data_file=data.raw",
    "raw data file": "data_file=data.raw,data_file_raw=on",
}
STEPS = ("reserve", "write", "publish")
"""Methods of NewFile that something may end."""
ENDED = """
import os, sys
from qcowfuse.system.alone import checkpoint
from qcowfuse.tools import new_file
from qcowfuse.cli.img.main import main
name, number, nameless = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "nameless"
original = getattr(new_file.NewFile, name)
async def ended(*args, **keywords):
    if name == "publish":
        os.kill(os.getpid(), number)
        await checkpoint()
    await original(*args, **keywords)
    os.kill(os.getpid(), number)
    await checkpoint()
setattr(new_file.NewFile, name, ended)
if not nameless:
    new_file.open_nameless = lambda path: None
sys.exit(main(sys.argv[4:]))
"""


def create_and_end(
    folder: Path, step: str, number: int, *words: str, nameless: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run create in ``folder``, with a signal to itself in one of its steps."""
    return subprocess.run(
        [sys.executable, "-c", ENDED, step, str(number), "nameless" if nameless else "named", "create", *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("way", "step", "nameless"),
    [
        *((way, "write", True) for way in WAYS),
        *(("data file", step, nameless) for step in STEPS for nameless in (True, False)),
    ],
)
def test_a_signal_leaves_nothing(way: str, step: str, nameless: bool, tmp_path: Path) -> None:
    """SIGTERM in any step: no file is left, one line says so, and the exit code tells of the signal."""
    done = create_and_end(tmp_path, step, signal.SIGTERM, "-q", "-o", WAYS[way], "i.qcow2", "4M", nameless=nameless)
    assert (done.returncode, done.stderr) == (128 + 15, "qcowfuse-img: i.qcow2: stopped by SIGTERM\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_other_signals_leave_nothing(number: int, tmp_path: Path) -> None:
    """Ctrl-C, the end of the terminal; and kill -9, where the file system has files without names."""
    try:
        os.close(os.open(tmp_path, os.O_RDWR | os.O_TMPFILE))
    except OSError:
        pytest.skip("no files without names here")
    done = create_and_end(tmp_path, "write", number, "-q", "-o", "preallocation=full", "i.qcow2", "4M")
    assert done.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["reserve", "write"])
def test_what_is_overwritten_is_left_empty(step: str, tmp_path: Path) -> None:
    """An image that --force had begun to overwrite is an empty file then; killed at once, it is at least no image."""
    image = tmp_path / "i.qcow2"
    words = ("-q", "--force", "-o", "preallocation=full", "i.qcow2", "4M")
    qemu.create(image, "qcow2", "1G")
    assert create_and_end(tmp_path, step, signal.SIGTERM, *words).returncode == 128 + 15
    assert image.read_bytes() == b""
    assert create_and_end(tmp_path, "reserve", signal.SIGKILL, *words).returncode == -9
    assert not any(image.read_bytes())
    assert main(["create", "-q", "--force", str(image), "4M"]) == 0
    assert qemu.check(image).clean


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nameless", [True, False], ids=["nameless", "named"])
def test_a_full_disk_leaves_nothing(
    way: str,
    nameless: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """ENOSPC in any of the steps that take space: no file is left, and one line names the file that did not fit."""
    n_steps, fails_at = 0, 0

    def failing(function: str) -> None:
        owner = os if function == "posix_fallocate" else new_file
        original = getattr(owner, function)

        def call(*args: object) -> None:
            nonlocal n_steps
            n_steps += 1
            if n_steps == fails_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            original(*args)

        monkeypatch.setattr(owner, function, call)

    for function in ("posix_fallocate", "_write_zeroes", "_write_parts"):
        failing(function)
    if not nameless:
        monkeypatch.setattr(new_file, "open_nameless", lambda path: None)
    image = tmp_path / "i.qcow2"
    data = tmp_path / "data.raw"
    words = ["create", "-q", "-o", WAYS[way].replace("data.raw", str(data)), str(image), "40M"]
    for fails_at in range(1, 100):
        n_steps = 0
        if main(words) == 0:
            break
        said = capsys.readouterr().err
        assert said in [f"qcowfuse-img: {path}: No space left on device\n" for path in (image, data)]
        assert (str(data) in said) == (way == "data file" and fails_at <= 3)  # 40 MiB in steps of 16
        assert os.listdir(tmp_path) == []
    assert n_steps >= 2
    assert qemu.check(image).clean


def test_two_that_make_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who comes second is refused, however late, and what the first one made stays."""
    image = tmp_path / "i.qcow2"
    original = new_file.NewFile.publish

    async def late(file: new_file.NewFile) -> None:
        if not image.exists():
            image.write_bytes(b"precious")
        await original(file)

    monkeypatch.setattr(new_file.NewFile, "publish", late)
    assert main(["create", "-q", str(image), "1M"]) == 1
    assert "exists" in capsys.readouterr().err
    assert image.read_bytes() == b"precious"
