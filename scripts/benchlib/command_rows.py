"""Rows of whole commands that people run on the served file, and of calls that a command makes very often.

Each measurement has a daemon of its own: nothing of the file is in the kernel's page cache when it begins, and each
command goes through the whole of it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

from .contenders import Served
from .row import NotDoneError, Row, Settings
from .tools import run

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_PUNCH_BYTES = 64 << 10


def _timed(served: Served, settings: Settings, *, command: tuple[str, ...]) -> float:
    """Seconds of a command, in which {} is the served file and {out} a new one in memory."""
    folder = Path(tempfile.mkdtemp(dir=settings.folder, prefix="out"))
    names = {"{}": str(served.file), "{out}": str(folder / "out")}
    try:
        start = time.monotonic()
        run(*(word.replace("{out}", names["{out}"]).replace("{}", names["{}"]) for word in command))
        return time.monotonic() - start
    finally:
        shutil.rmtree(folder)


def _copy_in(served: Served, settings: Settings) -> float:
    """Seconds of dd into the served file, of as much as it has, until it is durable."""
    start = time.monotonic()
    run("dd", "if=/dev/zero", f"of={served.file}", "bs=4M", f"count={settings.size_mib // 4}", "conv=notrunc,fsync")
    return time.monotonic() - start


def _punches(served: Served, settings: Settings) -> float:
    """Punches a second, of 64 KiB each, one after the other, as many as the disk has room for: some tenths of a
    second, since less is decided by where client and daemon happen to run."""
    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = libc.fallocate64
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    n_punches = min(8192, (settings.size_mib << 20) // _PUNCH_BYTES)
    descriptor = os.open(served.file, os.O_RDWR)
    try:
        start = time.monotonic()
        for number in range(n_punches):
            mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
            if fallocate(descriptor, mode, number * _PUNCH_BYTES, _PUNCH_BYTES):
                raise OSError(ctypes.get_errno(), "fallocate")
        return n_punches / (time.monotonic() - start)
    finally:
        os.close(descriptor)


def _seeks(served: Served, settings: Settings) -> float:
    """Extents a second that walks with SEEK_DATA and SEEK_HOLE find, one after the other for a while: the first one
    takes some 50 ms, in which it is chance on which processors the kernel has client and daemon run."""
    descriptor = os.open(served.file, os.O_RDONLY)
    try:
        n_found = position = 0
        start = now = time.monotonic()
        while now < start + settings.seconds:
            try:
                position = os.lseek(descriptor, position, os.SEEK_DATA)
            except OSError:
                position, now = 0, time.monotonic()
                continue
            position = os.lseek(descriptor, position, os.SEEK_HOLE)
            n_found += 1
            if n_found == 1 and position == os.fstat(descriptor).st_size:
                raise NotDoneError("shows no holes")
        return n_found / (now - start)
    finally:
        os.close(descriptor)


def _copy_within(served: Served, settings: Settings) -> float:
    """Seconds of a copy of the first half over the second, by copy_file_range(2), until it is durable."""
    half = settings.size_mib << 19
    descriptor = os.open(served.file, os.O_RDWR)
    try:
        start = time.monotonic()
        n_done = 0
        while n_done < half:
            n_done += os.copy_file_range(descriptor, descriptor, half - n_done, n_done, half + n_done)
        os.fsync(descriptor)
        return time.monotonic() - start
    finally:
        os.close(descriptor)


def _command(name: str, scene: str, *command: str) -> Row:
    return Row(name, scene, "s", partial(_timed, command=command), is_fresh=True, needs=(command[0],))


_CONVERT = ("qemu-img", "convert", "-f", "raw", "-O")

COMMAND_ROWS = (
    _command("cp of the whole file, buffered", "copy", "cp", "{}", "{out}"),
    _command("cp --sparse=always, half is holes, buffered", "copy-half", "cp", "--sparse=always", "{}", "{out}"),
    _command("dd bs=4M of the whole file, buffered", "copy", "dd", "if={}", "of=/dev/null", "bs=4M"),
    _command("qemu-img convert to raw, full, buffered", "copy", *_CONVERT, "raw", "{}", "{out}"),
    _command("qemu-img convert to raw, half is holes, buffered", "copy-half", *_CONVERT, "raw", "{}", "{out}"),
    _command("qemu-img convert to qcow2, full, buffered", "copy", *_CONVERT, "qcow2", "{}", "{out}"),
    _command("qemu-img convert to raw, empty, buffered", "copy-empty", *_CONVERT, "raw", "{}", "{out}"),
    Row("dd bs=4M into the whole file, buffered", "copy-empty", "s", _copy_in, writes=True, is_fresh=True),
    Row("copy within the disk", "copy", "s", _copy_within, writes=True, is_fresh=True),
    Row("copy within the disk, half is holes", "copy-half", "s", _copy_within, writes=True, is_fresh=True),
    Row("punches of 64 KiB, one by one", "copy", "per s", _punches, writes=True, is_fresh=True),
    Row("SEEK_DATA and SEEK_HOLE, half is holes", "copy-half", "per s", _seeks, is_fresh=True),
)
