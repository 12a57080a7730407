"""The programs that serve a QCOW image as one file, each as a context manager around a running daemon.

1. A contender that is missing is left out, with one line that says so.
2. Every one serves with its defaults, but for what makes them alike: writes allowed, discards passed on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .images import PASSPHRASE
from .tools import REPOSITORY, python, run, until, wait_ended

OURS = "qcowfuse"
QSD = "qemu-storage-daemon"
_ENCRYPTED = ("luks", "luks-empty")


@dataclass(frozen=True)
class Served:
    """``file`` is the virtual disk; ``pids`` are the processes that serve it, ``started`` (monotonic) is when."""

    file: Path
    pids: tuple[int, ...]
    started: float

    def counters(self) -> dict[str, int]:
        """The extended attributes that a qcowfuse mount shows."""
        prefix = "user.qcowfuse."
        names = [name for name in os.listxattr(self.file) if name.startswith(prefix)]
        return {name.removeprefix(prefix): int(os.getxattr(self.file, name)) for name in names}

    def resident_mib(self) -> float:
        """Resident memory of all processes."""
        total = 0
        for pid in self.pids:
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1])
        return total / 1024


Serve = Callable[..., AbstractContextManager[Served]]


@dataclass(frozen=True)
class Contender:
    """``serve(image, folder)`` runs it; ``version`` for the report; ``unable``: kinds of images it can't serve."""

    name: str
    serve: Serve
    writes: bool
    version: str
    unable: tuple[str, ...] = ()


def _passphrase(image: Path) -> Path | None:
    """The file with the passphrase of an encrypted image."""
    file = image.with_name(PASSPHRASE)
    return file if file.exists() else None


def _size_of(image: Path) -> int:
    return int(json.loads(run("qemu-img", "info", "-U", "--output=json", str(image)))["virtual-size"])


def _has_size(file: Path, size: int) -> bool:
    try:
        return file.stat().st_size == size
    except OSError:
        return False


@contextmanager
def serve_qcowfuse(image: Path, folder: Path, *options: str) -> Iterator[Served]:
    """A foreground qcowfuse on a fresh mount point."""
    mount_point = Path(tempfile.mkdtemp(dir=folder, prefix="mnt"))
    key = _passphrase(image)
    if key:
        options = (*options, f"--key-file={key}")
    command = [python(), "-m", "qcowfuse", "-f", *options, str(image), str(mount_point)]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    file = mount_point / "disk.raw"
    try:
        until(file.exists, process)
        yield Served(file, (process.pid,), started)
    finally:
        run("fusermount3", "-u", str(mount_point), check=False)
        wait_ended(process)
        mount_point.rmdir()


@contextmanager
def serve_qsd(program: str, n_iothreads: int, image: Path, folder: Path) -> Iterator[Served]:
    """QEMU's FUSE export; without a thread for it, or with ``n_iothreads`` that answer in turn (from QEMU 11)."""
    descriptor, name = tempfile.mkstemp(dir=folder, prefix="qsd")
    os.close(descriptor)
    file = Path(name)
    size = _size_of(image)
    key = _passphrase(image)
    format_: dict[str, object] = {"driver": "qcow2", "node-name": "q", "file": "f", "discard": "unmap"}
    export: dict[str, object] = {"type": "fuse", "id": "e", "node-name": "q", "mountpoint": str(file)}
    export["writable"] = True
    driver = "host_device" if image.is_block_device() else "file"
    command = [program, "--blockdev", f"driver={driver},node-name=f,filename={image},discard=unmap"]
    if key:
        command += ["--object", f"secret,id=key,file={key}"]
        format_["encrypt"] = {"format": "luks", "key-secret": "key"}
    threads = [f"t{number}" for number in range(n_iothreads)]
    for thread in threads:
        command += ["--object", f"iothread,id={thread}"]
    if threads:
        export["iothread"] = threads[0] if len(threads) == 1 else threads
    command += ["--blockdev", json.dumps(format_), "--export", json.dumps(export)]
    started = time.monotonic()
    process = subprocess.Popen(command)
    try:
        until(lambda: _has_size(file, size), process)
        yield Served(file, (process.pid,), started)
    finally:
        process.send_signal(signal.SIGTERM)
        wait_ended(process)
        # Ended right behind its start, it may leave the mount.
        run("fusermount3", "-u", "-q", "-z", str(file), check=False)
        file.unlink()


@contextmanager
def _serve_nbdfuse(nbdfuse: str, server: list[str], image: Path, folder: Path) -> Iterator[Served]:
    mount_point = Path(tempfile.mkdtemp(dir=folder, prefix="nbd"))
    file = mount_point / "disk.raw"
    size = _size_of(image)
    started = time.monotonic()
    process = subprocess.Popen([nbdfuse, str(file), "[", *server, "]"], stderr=subprocess.DEVNULL)
    try:
        until(lambda: _has_size(file, size), process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield Served(file, (process.pid, *map(int, children)), started)
    finally:
        run("fusermount3", "-u", str(mount_point), check=False)
        wait_ended(process)
        mount_point.rmdir()


def serve_qemu_nbd(nbdfuse: str, qemu_nbd: str, image: Path, folder: Path) -> AbstractContextManager[Served]:
    """qemu-nbd, mounted by nbdfuse."""
    command = [qemu_nbd, "--discard=unmap"]
    key = _passphrase(image)
    if key:
        opened = f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=key,file.filename={image}"
        command += ["--object", f"secret,id=key,file={key}", "--image-opts", opened]
    else:
        command += ["-f", "qcow2", str(image)]
    return _serve_nbdfuse(nbdfuse, command, image, folder)


def serve_nbdkit(nbdfuse: str, command: list[str], image: Path, folder: Path) -> AbstractContextManager[Served]:
    """nbdkit's qcow2dec filter (read-only, no backing files), mounted by nbdfuse."""
    return _serve_nbdfuse(nbdfuse, [*command, str(image)], image, folder)


def _processes_with(argument: str) -> Iterator[int]:
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if argument.encode() in command.read_bytes().split(b"\0"):
                yield int(command.parent.name)


@contextmanager
def serve_qcowmount(program: str, image: Path, folder: Path) -> Iterator[Served]:
    """libqcow's qcowmount (read-only)."""
    mount_point = Path(tempfile.mkdtemp(dir=folder, prefix="libqcow"))
    file = mount_point / "qcow1"
    size = _size_of(image)
    # It goes into the background by itself, and ends with the mount.
    started = time.monotonic()
    process = subprocess.Popen(
        [program, str(image), str(mount_point)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: _has_size(file, size), process)
        wait_ended(process)
        yield Served(file, tuple(_processes_with(str(mount_point))), started)
    finally:
        run("fusermount3", "-u", str(mount_point), check=False)
        wait_ended(process)
        mount_point.rmdir()


def _nbdkit_command(program: str) -> list[str] | None:
    """How to serve with qcow2dec, None where this nbdkit has no such filter."""
    # A copy that was unpacked somewhere looks for its plugins in /usr/lib: name their files.
    files = [
        *sorted(Path(program).parent.glob("root/usr/lib/*/nbdkit/filters/nbdkit-qcow2dec-filter.so")),
        *sorted(Path(program).parent.glob("root/usr/lib/*/nbdkit/plugins/nbdkit-file-plugin.so")),
    ]
    filter_, plugin = map(str, files) if len(files) == 2 else ("qcow2dec", "file")
    command = [program, "-r", f"--filter={filter_}", plugin]
    probe = subprocess.run([*command, "--dump-plugin"], check=False, capture_output=True)
    return command if probe.returncode == 0 else None


def find_contenders(peers: Path | None) -> list[Contender]:
    """What there is, ours first; says what is missing. ``peers``: a folder made by ``get-peers``."""

    def find(name: str) -> str | None:
        return shutil.which(str(peers / name)) if peers and (peers / name).exists() else shutil.which(name)

    # As pip does when it installs: else, under PYTHONDONTWRITEBYTECODE, each start would compile every module again.
    run(python(), "-m", "compileall", "-q", "qcowfuse", cwd=REPOSITORY)
    version = run(python(), "-m", "qcowfuse", "--version", cwd=REPOSITORY).strip()
    found = [Contender(OURS, serve_qcowfuse, True, version)]
    missing = []
    qsd, qemu_nbd, nbdfuse = find("qemu-storage-daemon"), find("qemu-nbd"), find("nbdfuse")
    nbdkit, qcowmount = find("nbdkit"), find("qcowmount")
    if qsd:
        version = run(qsd, "--version").splitlines()[0]
        found.append(Contender(QSD, partial(serve_qsd, qsd, 0), True, version))
        for number, unit in ((1, "iothread"), (2, "iothreads"), (4, "iothreads")):
            found.append(Contender(f"{QSD}, {number} {unit}", partial(serve_qsd, qsd, number), True, version))
    else:
        missing.append(QSD)
    if nbdfuse and qemu_nbd:
        version = f"{run(nbdfuse, '--version').splitlines()[0]}, {run(qemu_nbd, '--version').splitlines()[0]}"
        found.append(Contender("nbdfuse+qemu-nbd", partial(serve_qemu_nbd, nbdfuse, qemu_nbd), True, version))
    else:
        missing.append("nbdfuse+qemu-nbd")
    command = _nbdkit_command(nbdkit) if nbdkit else None
    if nbdfuse and nbdkit and command:
        version = run(nbdkit, "--version").strip()
        found.append(
            Contender(
                "nbdfuse+nbdkit",
                partial(serve_nbdkit, nbdfuse, command),
                False,
                version,
                ("chain", *_ENCRYPTED, "extended"),
            )
        )
    else:
        missing.append("nbdfuse+nbdkit qcow2dec")
    if qcowmount:
        version = run(qcowmount, "-V").strip().splitlines()[0]
        found.append(
            Contender(
                "qcowmount",
                partial(serve_qcowmount, qcowmount),
                False,
                version,
                ("chain", "zstd", *_ENCRYPTED, "extended"),
            )
        )
    else:
        missing.append("qcowmount")
    if missing:
        print(f"left out, because they are not installed: {', '.join(missing)} (see scripts/bench get-peers)")
    return found
