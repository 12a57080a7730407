"""A stop signal ends a look at an image: one line, the exit code of the signal, no lock left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import qemu
from tests.support.mounting import environment

SCRIPT = """
import os, sys
from qcowfuse.cli.entry import qcowfuse_img
from qcowfuse.storage.blocking_file import BlockingFile
number, n_left = int(sys.argv.pop(1)), int(sys.argv.pop(1))
original = BlockingFile.try_pread
def try_pread(self, host_offset, n_bytes):
    global n_left
    n_left -= 1
    if n_left == 0:
        os.kill(os.getpid(), number)
    return original(self, host_offset, n_bytes)
BlockingFile.try_pread = try_pread
code = qcowfuse_img()
assert n_left <= 0, f"{n_left} reads are missing"
sys.exit(code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", ["map", "check", "map --output=json"])
def test_a_signal_ends_a_look(command: str, number: signal.Signals, image_folder: Path) -> None:
    """In the middle of it; the image can be written at once."""
    path = image_folder / "image"
    qemu.create(path, "qcow2", "1G", options="cluster_size=4k,preallocation=metadata")
    words = [sys.executable, "-c", SCRIPT, str(number.value), "60", *command.split(), str(path)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 128 + number
    assert done.stderr == f"qcowfuse-img: {path}: stopped by {number.name}\n"
    qemu.io(path, ["write 0 512"])


def test_a_signal_that_is_ignored_ends_nothing(image_folder: Path) -> None:
    """As nohup has it."""
    path = image_folder / "image"
    qemu.create(path, "qcow2", "1G", options="cluster_size=4k,preallocation=metadata")
    program = SCRIPT.replace("import os, sys", "import os, signal, sys\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)")
    words = [sys.executable, "-c", program, str(signal.SIGHUP.value), "60", "check", "-q", str(path)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
