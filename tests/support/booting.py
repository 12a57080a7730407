"""A container that boots this machine's systemd, on a throw-away overlay of this machine's root directory.

1. Whether a container boots here at all is settled once, with a script that does nothing: what a container lacks for
   that, it lacks for every test. From then on a boot that does not come to its script is a failure.
2. A script that fails, and a boot that does not end, show the processes with their control groups and where in the
   kernel each one waits, the mounts, and the journal: afterwards nothing is left of them.
3. Control groups are of version 2, as Debian and Ubuntu boot by themselves, whatever this machine has. With version
   1, a systemd in a container does not hear when a group is empty. Version 257 kills what is left of a service right
   behind the SIGTERM, and version 252 waits for it until the time-out.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.container import free_loop_devices, lacks

REPOSITORY = Path(__file__).parents[2]
SECONDS = 60
LAUNCHER = f"""#!/bin/sh
export PYTHONPATH={REPOSITORY}
exec {sys.executable} -c 'import sys; from qcowfuse.cli.entry import qcowfuse; sys.exit(qcowfuse())' "$@"
"""
LOOK = r"""#!/bin/bash
for folder in /proc/[0-9]*; do
    arguments=$(tr '\0' ' ' <$folder/cmdline)
    [ -n "$arguments" ] || continue
    echo "process ${folder#/proc/}: $arguments"
    grep -s -E '^(State|PPid|NoNewPrivs|Seccomp|Sig...):' $folder/status
    grep -s -E ':/.*\.|^0:' $folder/cgroup
    cat $folder/stack
done
cat /proc/self/mountinfo
timeout 5 systemd-cgls --no-pager -l
timeout 5 systemctl --no-pager list-jobs
timeout 5 journalctl --no-pager -n 300
"""
"""Prints rule 2. What asks systemd comes last, in case that hangs."""
PRELUDE = """#!/bin/bash
exec >/srv/out.log 2>&1
set -x
fail() { set +x; echo "FAILED: $*"; /srv/look; exit 1; }
expect() { [ "$1" = "$2" ] || fail "$1 is not $2"; }
# wait_for COMMAND: 10 s at most
wait_for() { for i in $(seq 100); do "$@" && return; sleep 0.1; done; fail "waited for $*"; }
state() { systemctl show -P ActiveState "$1"; }
mounted() { grep -q " $1 fuse" /proc/self/mounts; }
gone() { ! mounted "$1"; }
no_daemon() { ! pgrep -f "from qcowfuse[.]cli" >/dev/null; }
checked() { qemu-img check -q "$1" || fail "qemu-img check $1"; }
"""
NEEDS_A_BOOT = [
    pytest.mark.mount,
    pytest.mark.root,
    pytest.mark.skipif(not shutil.which("systemd-nspawn"), reason="needs systemd-nspawn (package systemd-container)"),
]
"""Marks of a module whose tests boot a container."""


class Outcome(NamedTuple):
    """How a boot ended. ``code`` is None for one that had to be killed; ``log`` is None without a begun script."""

    code: int | None
    log: str | None
    console: str


@contextmanager
def throw_away_root() -> Iterator[Path]:
    """A root directory that is this machine's, with the program installed; what is written to it vanishes."""
    top = Path(tempfile.mkdtemp(prefix="qcowfuse-systemd-", dir="/dev/shm"))
    upper, work, root = top / "upper", top / "work", top / "root"
    for directory in (upper, work, root):
        directory.mkdir()
    options = f"lowerdir=/,upperdir={upper},workdir={work}"
    command: list[str | Path] = ["mount", "-t", "overlay", "overlay", "-o", options, root]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(top)
        lacks(f"overlay mounts: {done.stderr.strip()}")
    try:
        launcher = root / "usr/local/bin/qcowfuse"
        launcher.write_text(LAUNCHER)
        launcher.chmod(0o755)
        (root / "etc/fstab").write_text("")
        yield root
    finally:
        subprocess.run(["umount", root], check=True)
        shutil.rmtree(top)


def run_booted(root: Path, script: str) -> None:
    """Boot the container and run ``script`` in it; fail with its log where it fails. Skips where nothing boots."""
    if reason := _why_nothing_boots():
        lacks(f"a systemd within it: {reason}")
    outcome = _boot(root, script)
    said = outcome.console if outcome.log is None else outcome.log
    assert outcome.code is not None, f"not at an end after {SECONDS} s: {said}\n{outcome.console}"
    assert outcome.code == 0, said


@functools.cache
def _why_nothing_boots() -> str:
    """What the console said of a boot that ended before its script began, empty where it came to the script."""
    with throw_away_root() as root:
        outcome = _boot(root, 'expect "$(stat -f -c %T /sys/fs/cgroup)" cgroup2fs\nexit 0\n')
    if outcome.code is None:
        pytest.fail(f"a container that does nothing is not at an end after {SECONDS} s: {outcome.console}")
    assert outcome.log is None or outcome.code == 0, outcome.log
    return "" if outcome.log is not None else outcome.console.strip() or f"exit code {outcome.code}"


def _loop_nodes() -> list[Path]:
    """The loop devices that there are, enough free ones among them, and what makes more."""
    free_loop_devices()
    return [node for node in Path("/dev").glob("loop*") if not node.is_dir()]


def _boot(root: Path, script: str) -> Outcome:
    for name, text in (("scenario", PRELUDE + script), ("look", LOOK)):
        (root / "srv" / name).write_text(text)
        (root / "srv" / name).chmod(0o755)
    # The overlay holds the root file system alone, and /tmp in the container is its own.
    needed = {str(REPOSITORY), sys.prefix, sys.base_prefix} - {"/usr"}
    command = [
        *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network", "-D", str(root)),
        *("--bind=/dev/fuse", *(f"--bind-ro={path}" for path in sorted(needed))),
        *(f"--bind={node}" for node in _loop_nodes()),
        *("--console=pipe", "-b", "systemd.run=/srv/scenario"),
        *("systemd.run_success_action=exit", "systemd.run_failure_action=exit"),
    ]
    # systemd-tmpfiles in the container changes the mode of the device node that it shares with this machine.
    mode = os.stat("/dev/fuse").st_mode & 0o777
    environment = os.environ | {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}  # rule 3
    console_path = root.parent / "console"
    with console_path.open("w") as console:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, env=environment)
        code: int | None = None
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            _look_and_kill(process, console.fileno())
        finally:
            os.chmod("/dev/fuse", mode)
    log = root / "srv/out.log"
    return Outcome(code, log.read_text() if log.exists() else None, console_path.read_text(errors="replace"))


def _look_and_kill(process: subprocess.Popen[bytes], console: int) -> None:
    """Have rule 2 printed to ``console``, and end the container with all that is in it."""
    inits = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for init in inits:
        look = ["nsenter", "-t", init, "-m", "-p", "-C", "-i", "-u", "-n", "/srv/look"]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(look, stdin=subprocess.DEVNULL, stdout=console, stderr=console, timeout=30, check=False)
        with suppress(ProcessLookupError):
            os.kill(int(init), signal.SIGKILL)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
