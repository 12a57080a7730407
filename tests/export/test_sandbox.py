"""What a process can no longer do in the sandbox: in every thread, old and new."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qcowfuse.system import landlock
from qcowfuse.system.syscall_numbers import MACHINES
from tests.support.container import need_landlock
from tests.support.scripts import run_python

REPOSITORY = Path(__file__).parents[2]
ATTACKS = """
import ctypes, json, mmap, os, signal, socket, subprocess, sys, threading, time
import trio
from qcowfuse.daemon.sandbox import enter_sandbox
from qcowfuse.storage.workers import retain_worker_pool

kept = open(sys.argv[1], "r+b", buffering=0)
folder = os.path.dirname(sys.argv[1])

def attempt(function):
    try:
        function()
    except OSError as exc:
        return exc.errno
    return 0

ATTACKS = {
    "read a file": lambda: open(sys.argv[1]),
    "write a file": lambda: open(sys.argv[1], "r+"),
    "list a folder": lambda: os.listdir(folder),
    "make a file": lambda: open(folder + "/new", "w"),
    "remove a file": lambda: os.unlink(sys.argv[1]),
    "write own memory": lambda: open("/proc/self/mem", "r+b"),
    "connect": lambda: socket.socket(),
    "execute": lambda: os.execv(sys.executable, [sys.executable, "-c", "0"]),
    "fork": os.fork,
    "kill": lambda: os.kill(os.getppid(), 0),
    "executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "gain privileges": lambda: os.setuid(0),
}
WORK = {
    "read below proc": lambda: open("/proc/self/status").read(),
    "write an open file": lambda: os.pwrite(kept.fileno(), b"x", 0),
    "lengthen an open file": lambda: os.ftruncate(kept.fileno(), 1 << 16),
    "flush an open file": lambda: os.fdatasync(kept.fileno()),
}

def all_of_them():
    return {name: attempt(function) for name, function in {**ATTACKS, **WORK}.items()}

async def main():
    pool = retain_worker_pool()
    await pool.run_all(time.sleep, [(0.02,)] * 3)
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(trio.to_thread.run_sync, time.sleep, 0.02)
    n_threads = threading.active_count()
    sandbox = await enter_sandbox()
    results = [all_of_them()]
    results += await pool.run_all(all_of_them, [()] * 4)
    results.append(await trio.to_thread.run_sync(all_of_them))
    print(json.dumps([n_threads, str(sandbox), sandbox.statistics(), results]))
    pool.release()

trio.run(main)
"""

needs_filter = pytest.mark.skipif(os.uname().machine not in MACHINES, reason="no table of system calls here")


@needs_filter
def test_no_thread_reaches_anything(tmp_path: Path) -> None:
    """Every attack fails in the main thread, in older threads and in later ones; the work of a daemon goes on."""
    need_landlock()
    file = tmp_path / "image"
    file.write_bytes(b"image")
    printed = run_python("-c", textwrap.dedent(ATTACKS), str(file))
    n_threads, text, statistics, results = json.loads(printed)
    assert n_threads == 6
    assert text == f"Landlock {landlock.abi_version()}, seccomp, no capabilities"
    assert statistics == {
        "sandbox.landlock_abi": landlock.abi_version(),
        "sandbox.seccomp": 1,
        "sandbox.no_capabilities": 1,
    }
    assert len(results) == 6
    for result in results:
        allowed = {name for name, number in result.items() if not number}
        assert allowed == {
            "read below proc",
            "write an open file",
            "lengthen an open file",
            "flush an open file",
        }
        assert set(result.values()) <= {0, errno.EPERM, errno.EACCES}
    assert file.stat().st_size == 1 << 16
    assert not (tmp_path / "new").exists()


TRACEBACK = """
import linecache, sys, traceback
from qcowfuse.cli.trimmed_trio import import_trio
import_trio()
import trio
from qcowfuse.daemon.sandbox import enter_sandbox

update = linecache.updatecache

def update_late(*arguments):
    import tokenize  # as Python 3.13 does
    return update(*arguments)

linecache.updatecache = update_late
sys.modules.pop("tokenize", None)

def show():
    try:
        {}["bug"]
    except KeyError as exc:
        return "".join(traceback.format_exception(exc))

async def main():
    await enter_sandbox()
    print(show())

show()
sys.modules.pop("ast", None)
trio.run(main)
"""


@needs_filter
def test_a_traceback_can_be_shown(tmp_path: Path) -> None:
    """Nothing that it takes is imported only then, also where one was shown before."""
    need_landlock()
    script = tmp_path / "script.py"
    script.write_text(TRACEBACK)
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "KeyError: 'bug'" in done.stdout, done.stderr
