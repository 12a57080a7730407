"""kill -9 of a daemon that serves a loop device under load, again and again, and what must be left of it each time.

1. Writers make files on ext4 and fsync them; a ledger outside of the image notes name and checksum when fsync has
   returned. A rename over an old file is noted after the fsync of the folder. Only what has returned before the kill
   counts: ext4's fsync of a folder succeeds when there is nothing to commit, and so it does once the commit of
   another writer has failed for want of the disk.
2. After the kill: the image has leaks at most, each file in the ledger is whole, and e2fsck finds nothing once the
   kernel has replayed the journal.
3. Nothing is mended in between: the next round goes on with the image as it was left, leaks and all.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from . import qemu
from .loops import backing_file
from .mounting import Mounted, wait_until

IMAGE_OPTIONS = (
    (),
    ("-o", "cluster_size=4096,refcount_bits=64"),
    ("-o", "cluster_size=512"),
    ("-o", "compat=0.10"),
    ("-o", "extended_l2=on"),
    ("-o", "cluster_size=2M"),
)
DISK_SIZE = 96 << 20
N_WRITERS = 3


class Ledger:
    """What must be there after a crash: SHA-256 by name. Names whose present state is not known are left out.
    ``late``: what was promised when the daemon had been killed."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}
        self.late: dict[str, str] = {}
        self.is_over = False
        self.lock = threading.Lock()

    def forget(self, name: str) -> None:
        """It is being changed: from now on nothing is promised."""
        with self.lock:
            self.sums.pop(name, None)

    def promise(self, name: str, sha256: str) -> None:
        """fsync has returned."""
        with self.lock:
            (self.late if self.is_over else self.sums)[name] = sha256


class _Writer(threading.Thread):
    """Makes, overwrites, renames and deletes files until the disk fails under it."""

    def __init__(self, folder: Path, number: int, seed: int, ledger: Ledger) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.number = number
        self.chooser = random.Random(seed)
        self.ledger = ledger
        self.n_promises = 0
        self.stop = False

    def run(self) -> None:
        with suppress(OSError):  # the end of the daemon
            while not self.stop:
                self._one_file()

    def _one_file(self) -> None:
        chooser = self.chooser
        name = f"{self.number}-{chooser.randrange(12)}"
        data = chooser.randbytes(chooser.choice((1, 700, 4096, 50_000, 400_000, 1_500_000)))
        self.ledger.forget(name)
        path = self.folder / name
        kind = chooser.choice(("write", "write", "rename", "delete"))
        if kind == "delete":
            with suppress(FileNotFoundError):
                path.unlink()
            return
        target = path if kind == "write" else path.with_name(f"new-{self.number}")
        with open(target, "wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
        if kind == "rename":
            os.rename(target, path)
        self._sync_folder()
        self.ledger.promise(name, hashlib.sha256(data).hexdigest())
        self.n_promises += 1

    def _sync_folder(self) -> None:
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class KillTest:
    """One image in ``folder`` that lives through any number of kills."""

    def __init__(self, folder: Path, seed: int, *options: str) -> None:
        self.folder = folder
        self.chooser = random.Random(seed)
        self.image = folder / "disk.qcow2"
        self.point = folder / "mnt"
        self.tree = folder / "tree"
        self.point.mkdir()
        self.tree.mkdir()
        self.ledger = Ledger()
        self.n_promises = self.n_late = self.n_late_lost = 0
        qemu.must_run("qemu-img", "create", "-q", "-f", "qcow2", *options, self.image, str(DISK_SIZE))
        with Mounted(self.image, self.point) as mount:
            qemu.must_run("mkfs.ext4", "-q", "-F", mount.file)

    def kill_once(self) -> None:
        """Load, kill, check. Raises AssertionError when anything is lost."""
        mount = Mounted(self.image, self.point)
        self.ledger.is_over = False
        self.ledger.late.clear()
        device = ""
        writers: list[_Writer] = []
        try:
            direct_io = self.chooser.choice(("on", "off"))
            device = qemu.must_run("losetup", "-f", "--show", f"--direct-io={direct_io}", mount.file).strip()
            qemu.must_run("mount", "-o", "discard", device, self.tree)
            writers = [
                _Writer(self.tree, number, self.chooser.randrange(1 << 30), self.ledger)
                for number in range(N_WRITERS)
            ]
            for writer in writers:
                writer.start()
            time.sleep(self.chooser.uniform(0.1, 0.7))
            with self.ledger.lock:
                self.ledger.is_over = True
            mount.send_signal(signal.SIGKILL)
            mount.wait_for_end(-signal.SIGKILL)
        finally:
            self._clean_up(mount, device, writers)
        self.n_promises += sum(writer.n_promises for writer in writers)
        self.check()

    def _clean_up(self, mount: Mounted, device: str, writers: list[_Writer]) -> None:
        for writer in writers:
            writer.stop = True
        if mount.is_alive:
            mount.send_signal(signal.SIGKILL)
        mount.wait_for_end(-signal.SIGKILL)
        for writer in writers:
            writer.join(30)
        qemu.run("umount", "-l", self.tree)
        if device:
            qemu.run("losetup", "-d", device)
            wait_until(lambda: backing_file(Path(device)) != str(mount.file), f"{device} to be detached")
        qemu.must_run("fusermount3", "-u", "-z", self.point)
        mount._clean_up()

    def check(self) -> None:
        """The image as it was left, then its file system, through a new daemon that closes cleanly."""
        found = qemu.run("qemu-img", "check", self.image)
        assert found.code in (0, 3), found.stdout + found.stderr
        raw = self.folder / "left.raw"
        qemu.must_run("qemu-img", "convert", "-O", "raw", self.image, raw)
        self._check_file_system(raw)
        raw.unlink()

    def _check_file_system(self, raw: Path) -> None:
        qemu.must_run("mount", "-o", "loop", raw, self.tree)  # the kernel replays the journal
        try:
            for name, wanted in self.ledger.sums.items():
                data = (self.tree / name).read_bytes()
                assert hashlib.sha256(data).hexdigest() == wanted, f"{name} is not what was fsynced"
            for name, wanted in self.ledger.late.items():
                path = self.tree / name
                if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
                    self.n_late_lost += 1
                self.n_late += 1
        finally:
            qemu.must_run("umount", self.tree)
        clean = qemu.run("e2fsck", "-fn", raw)
        assert clean.code == 0, clean.stdout


def kill_repeatedly(n_times: int, seed: int, say: Callable[[str], None]) -> int:
    """Kill ``n_times``, with a new image now and then; 1 when something was lost, and then the image is kept."""
    chooser = random.Random(seed)
    n_killed = n_promises = 0
    while n_killed < n_times:
        options = chooser.choice(IMAGE_OPTIONS)
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            test = KillTest(Path(name), chooser.randrange(1 << 30), *options)
            try:
                for _ in range(min(10, n_times - n_killed)):
                    test.kill_once()
                    n_killed += 1
            except AssertionError as error:
                kept = shutil.copy(test.image, tempfile.gettempdir())
                say(f"FAILED after {n_killed} kills: {error}\nthe image is {kept}; ledger: {test.ledger.sums}")
                return 1
            n_promises += test.n_promises
            late = f"{test.n_late_lost} of {test.n_late} late ones lost by ext4"
            say(f"{n_killed} kills, {n_promises} fsynced files, {late}, {options}")
    return 0
