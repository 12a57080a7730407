"""Starting and ending real qcowfuse mounts in tests.

1. A :class:`Mounted` is a daemon that serves; ``close()`` (or the end of a ``with``) unmounts it, waits for the
   daemon's end and checks that this end was a good one.
2. Whatever a test leaves behind (a dead mount, a stopped daemon) is removed when the ``with`` block ends.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from .container import need_loop_devices

REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 30.0
"""Seconds that a start or an end may take on a slow machine."""

Argument = str | Path


def command(*arguments: Argument) -> list[str]:
    """The command line of qcowfuse from this source tree."""
    return [sys.executable, "-m", "qcowfuse", *map(str, arguments)]


def patched(arguments: list[str], patch: str) -> list[str]:
    """A command line as of :func:`command`, with statements that the process runs first."""
    if not patch:
        return arguments
    python, _, module, *rest = arguments
    return [python, "-c", f"{patch}\nimport runpy\nrunpy.run_module({module!r}, run_name='__main__')", *rest]


def environment(**extra: str) -> dict[str, str]:
    """The environment for :func:`command`, whatever the working directory."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **extra}


def run_qcowfuse(*arguments: Argument, cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run qcowfuse until it returns: a start as daemon, or a failure."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment(**extra),
        timeout=TIMEOUT + 30,
    )


def wait_until(condition: Callable[[], bool], what: str, timeout: float = TIMEOUT) -> None:
    """Poll until ``condition()``; AssertionError that names ``what`` after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout:g} s for {what}"
        time.sleep(0.01)


def is_mounted(path: Path) -> bool:
    """Whether the table of mounts has ``path``."""
    lines = Path("/proc/self/mountinfo").read_bytes().decode(errors="surrogateescape").split("\n")
    places = [line.split(" ")[4] for line in lines if line]
    return str(path) in {re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place) for place in places}


def is_alive(pid: int) -> bool:
    """Whether the process exists and is more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter when it goes between the open and the read
        return False


def daemon_pid(mount_point: Path) -> int | None:
    """The process that was started for ``mount_point`` and serves it."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (directory / "cmdline").read_bytes().split(b"\0")
            is_ours = any(word.endswith(b"qcowfuse") for word in words)
            if is_ours and os.fsencode(mount_point) in words and _holds_fuse(directory):
                found.append(int(directory.name))
    return max(found, default=None)


def _holds_fuse(process: Path) -> bool:
    return any(os.readlink(fd) == "/dev/fuse" for fd in (process / "fd").iterdir())


class Mounted:
    """An image that a qcowfuse process serves."""

    def __init__(
        self,
        image: Path,
        mount_point: Path,
        *options: Argument,
        foreground: bool = True,
        name: str = "disk.raw",
        patch: str = "",
    ) -> None:
        """Start and wait until it serves. Raises AssertionError with what it printed, when it doesn't.

        ``patch``: statements that the process runs before it starts, to change what a test wants changed.
        """
        self.image = image
        self.mount_point = mount_point
        self.file = mount_point / name if mount_point.is_dir() else mount_point
        self.process: subprocess.Popen[str] | None = None
        if foreground:
            self.process = subprocess.Popen(
                patched(command("-f", *options, image, mount_point), patch),
                stderr=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
                text=True,
                env=environment(),
            )
            self.pid = self.process.pid
            self.log = ""
            # Read all the time: a daemon whose log nobody reads stands still once the pipe is full.
            self._reader = threading.Thread(target=self._read_log, daemon=True)
            self._reader.start()
            self._wait_until_it_serves()
        else:
            done = run_qcowfuse(*options, image, mount_point)
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""
            pid = daemon_pid(mount_point)
            assert pid is not None
            self.pid = pid

    def _wait_until_it_serves(self) -> None:
        end = time.monotonic() + TIMEOUT
        while self._reader.is_alive() and time.monotonic() < end:
            if any("INFO" in line and f"at {self.file}" in line for line in self.log.splitlines()):
                return
            time.sleep(0.005)
        assert self.process is not None
        raise AssertionError(f"qcowfuse does not serve, exit code {self.process.poll()}: {self.log}")

    def _read_log(self) -> None:
        assert self.process is not None
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    @property
    def is_alive(self) -> bool:
        """Whether the daemon runs."""
        return is_alive(self.pid)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the daemon."""
        os.kill(self.pid, number)

    def wait_for_end(self, exit_code: int = 0) -> str:
        """Wait until the daemon is gone; with -f, check its exit code. Returns what it logged."""
        if self.process is None:
            wait_until(lambda: not self.is_alive, "the end of the daemon")
            return ""
        self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        assert self.process.returncode == exit_code, self.log
        return self.log

    def close(self) -> None:
        """Unmount as a user does, and wait for the good end. Nothing when it has ended already."""
        if not self.is_alive and not is_mounted(self.mount_point):
            return
        subprocess.run(["fusermount3", "-u", self.mount_point], check=True)
        self.wait_for_end()

    def __enter__(self) -> Mounted:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._clean_up()

    def _clean_up(self) -> None:
        if is_mounted(self.mount_point):
            subprocess.run(["fusermount3", "-u", "-z", self.mount_point], check=False)
        end = time.monotonic() + 5
        while self.is_alive and time.monotonic() < end:
            time.sleep(0.02)
        if self.is_alive:
            os.kill(self.pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
            self._reader.join(TIMEOUT)
            if self.process.stderr is not None:
                self.process.stderr.close()


@contextmanager
def loop_device(file: Path, *options: str) -> Iterator[str]:
    """A loop device on ``file`` for the time of the block."""
    need_loop_devices()
    done = subprocess.run(["losetup", "-f", "--show", *options, file], check=True, capture_output=True, text=True)
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def create_image(path: Path, size: str = "64M", *options: str) -> Path:
    """A new QCOW2 image, by qemu-img."""
    done: Sequence[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2", *options, path, size]
    subprocess.run(done, check=True)
    return path


def check_image_file(path: Path) -> None:
    """qemu-img check finds neither corruption nor leaks."""
    done = subprocess.run(["qemu-img", "check", "-q", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
