"""Image locks against QEMU's own tools, both ways round, and between two of ours."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from qcowfuse.cli.img.main import main as img
from qcowfuse.cli.mount.arguments import parse_arguments
from qcowfuse.driver.chain import open_image
from qcowfuse.errors import ImageLockedError
from qcowfuse.storage import locks as locks_module
from qcowfuse.storage.locks import acquire_image_lock, wait_image_lock
from qcowfuse.tools.overlay import EphemeralOverlay

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-io") is None or shutil.which("qemu-nbd") is None, reason="needs qemu-io and qemu-nbd"
)


@pytest.fixture
def image(tmp_path: Path) -> str:
    """A small qcow2 image."""
    path = str(tmp_path / "image.qcow2")
    if shutil.which("qemu-img") is None:
        Path(path).write_bytes(bytes(4096))
    else:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    return path


@contextmanager
def ours(path: str, *, writable: bool) -> Iterator[int]:
    """The image, opened and locked by us."""
    fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    try:
        acquire_image_lock(fd, path, writable=writable)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def qemu_io(path: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A qemu-io that has the image open."""
    with subprocess.Popen(
        ["qemu-io", *options, "-f", "qcow2", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert "1 MiB" in answer, answer
        try:
            yield process
        finally:
            process.stdin.close()
            process.wait(timeout=30)


def _wait_for_greeting(socket_path: Path) -> None:
    """Until the server's main loop runs: it forgets a SIGTERM that comes between its first listen and that."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(socket_path))
        assert client.recv(8) == b"NBDMAGIC"


@contextmanager
def qemu_nbd(path: str, *options: str) -> Iterator[int]:
    """A qemu-nbd that serves the image; gives its pid."""
    socket_path = Path(path).with_suffix(".sock")
    with subprocess.Popen(["qemu-nbd", *options, "-f", "qcow2", "-t", "-k", str(socket_path), path]) as process:
        try:
            deadline = time.monotonic() + 30
            while not socket_path.exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            _wait_for_greeting(socket_path)
            yield process.pid
        finally:
            process.terminate()
            process.wait(timeout=30)


def run_qemu(*command: str) -> subprocess.CompletedProcess[str]:
    """A QEMU tool, its output kept."""
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


def bytes_locked(path: str) -> set[int]:
    """The bytes of the file that anybody has locked, from /proc/locks."""
    inode = os.stat(path).st_ino
    found: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "OFDLCK" and fields[5].endswith(f":{inode}"):
            assert fields[3] == "READ"
            found.update(range(int(fields[6]), int(fields[7]) + 1))
    return found


def refusal(path: str, *, writable: bool) -> str:
    """What we say when the lock is refused."""
    with pytest.raises(ImageLockedError) as caught, ours(path, writable=writable):
        pass
    assert caught.value.path == path
    assert "\n" not in str(caught.value)
    return str(caught.value)


@needs_qemu
@pytest.mark.parametrize("writable", [True, False])
def test_our_bytes_are_qemus(image: str, writable: bool) -> None:
    """We lock the same bytes as QEMU does for a writer and for a reader."""
    with qemu_io(image, *([] if writable else ["-r"])):
        of_qemu = bytes_locked(image)
    with ours(image, writable=writable):
        assert bytes_locked(image) == of_qemu
    assert bytes_locked(image) == set()


@needs_qemu
@pytest.mark.parametrize(("backing_format", "shared"), [("qcow2", set()), ("raw", {201, 203})])
def test_a_backing_file_has_the_readers_bytes(image: str, backing_format: str, shared: set[int]) -> None:
    """We lock a backing file as QEMU does; a raw one more strictly: QEMU would let others write to it."""
    top = image + ".top"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", backing_format, top, "1M"]
    subprocess.run(command, check=True)
    with qemu_io(top):
        of_qemu = bytes_locked(image)
        with ours(image, writable=False):
            pass
    with ours(image, writable=False):
        assert bytes_locked(image) == of_qemu | shared
        with qemu_io(top):
            pass


@needs_qemu
def test_next_to_a_qemu_writer(image: str) -> None:
    """Neither a writer nor a reader of ours; the message names the process and what to do."""
    with qemu_io(image) as process:
        for writable in (True, False):
            message = refusal(image, writable=writable)
            assert f"open for writing by qemu-io (pid {process.pid}); stop it first" in message
        assert bytes_locked(image) == {100, 101, 103, 201, 203}
    with ours(image, writable=True):
        pass


@needs_qemu
def test_next_to_a_qemu_reader(image: str) -> None:
    """No writer of ours, and the message offers --read-only; a reader is welcome."""
    with qemu_io(image, "-r") as process:
        message = refusal(image, writable=True)
        assert f"in use by qemu-io (pid {process.pid}); stop it, or serve" in message
        with ours(image, writable=False):
            pass


@needs_qemu
@pytest.mark.parametrize("writable", [True, False])
def test_next_to_a_forced_qemu_reader(image: str, writable: bool) -> None:
    """qemu-io -U -r stands in nobody's way."""
    with qemu_io(image, "-U", "-r"), ours(image, writable=writable):
        pass


@needs_qemu
def test_next_to_qemu_nbd(image: str) -> None:
    """The same with a server in place of a command line."""
    with qemu_nbd(image) as pid:
        assert f"open for writing by qemu-nbd (pid {pid})" in refusal(image, writable=False)
    with qemu_nbd(image, "-r") as pid:
        assert f"in use by qemu-nbd (pid {pid})" in refusal(image, writable=True)
        with ours(image, writable=False):
            pass


@needs_qemu
def test_qemu_next_to_our_writer(image: str) -> None:
    """QEMU's writers, readers, info and check are refused; with -U reading goes."""
    with ours(image, writable=True):
        for command in (
            ["qemu-io", "-f", "qcow2", "-c", "length", image],
            ["qemu-io", "-r", "-f", "qcow2", "-c", "length", image],
            ["qemu-img", "info", image],
            ["qemu-img", "check", image],
            ["qemu-nbd", "-r", "-f", "qcow2", "-k", image + ".sock", image],
        ):
            result = run_qemu(*command)
            assert re.search('Failed to get (shared )?"write" lock', result.stderr + result.stdout), command
            assert "Is another process using the image" in result.stderr + result.stdout, command
        assert run_qemu("qemu-img", "info", "-U", image).returncode == 0
        assert run_qemu("qemu-img", "check", "-U", image).returncode == 0
        assert "1 MiB" in run_qemu("qemu-io", "-U", "-r", "-f", "qcow2", "-c", "length", image).stdout
    assert run_qemu("qemu-img", "check", image).returncode == 0


@needs_qemu
def test_qemu_next_to_our_reader(image: str) -> None:
    """QEMU may read, but not write."""
    with ours(image, writable=False):
        assert "1 MiB" in run_qemu("qemu-io", "-r", "-f", "qcow2", "-c", "length", image).stdout
        assert run_qemu("qemu-img", "info", image).returncode == 0
        assert run_qemu("qemu-img", "check", image).returncode == 0
        result = run_qemu("qemu-io", "-f", "qcow2", "-c", "length", image)
        assert 'Failed to get "write" lock' in result.stderr + result.stdout
        result = run_qemu("qemu-img", "resize", "-f", "qcow2", image, "2M")
        assert 'Failed to get "write" lock' in result.stderr


def test_two_of_ours(image: str) -> None:
    """Readers go together, a writer with nobody; what was refused leaves no lock behind."""
    with ours(image, writable=False), ours(image, writable=False):
        assert "in use by this process" in refusal(image, writable=True)
    with ours(image, writable=True):
        before = bytes_locked(image)
        assert "open for writing by this process" in refusal(image, writable=True)
        assert "open for writing by this process" in refusal(image, writable=False)
        assert bytes_locked(image) == before
    with ours(image, writable=True):
        pass


def test_a_lock_on_the_whole_file(image: str) -> None:
    """What other hypervisors do, one write lock over everything, is seen and named too."""
    fd = os.open(image, os.O_RDWR)
    try:
        whole = locks_module.FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, whole)
        assert "open for writing by this process" in refusal(image, writable=False)
        assert "open for writing by this process" in refusal(image, writable=True)
    finally:
        os.close(fd)


def test_a_fork_keeps_the_lock(image: str) -> None:
    """A daemon that forks and whose parent closes the image still holds it; its end gives it up."""
    read_end, write_end = os.pipe()
    fd = os.open(image, os.O_RDWR)
    acquire_image_lock(fd, image, writable=True)
    pid = os.fork()
    if pid == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    os.close(read_end)
    os.close(fd)
    try:
        assert f"(pid {pid})" in refusal(image, writable=True)
    finally:
        os.close(write_end)
        os.waitpid(pid, 0)
    with ours(image, writable=True):
        pass


async def test_waiting_gets_the_lock_when_it_is_free(image: str) -> None:
    """The wait ends soon after the other gives up, and in the error when it does not."""
    fd = os.open(image, os.O_RDWR)
    try:
        with ours(image, writable=False):
            start = trio.current_time()
            with pytest.raises(ImageLockedError, match="in use by"):
                await wait_image_lock(fd, image, writable=True, timeout=0.2)
            assert 0.2 <= trio.current_time() - start < 5
            with pytest.raises(ImageLockedError, match="in use by"):
                await wait_image_lock(fd, image, writable=True, timeout=0)
        async with trio.open_nursery() as nursery:
            with ours(image, writable=False):
                nursery.start_soon(lambda: wait_image_lock(fd, image, writable=True, timeout=30))
                await trio.sleep(0.2)
                assert bytes_locked(image) == {100, 201, 203}
        assert bytes_locked(image) == {100, 101, 103, 201, 203}
    finally:
        os.close(fd)


def test_without_locks_it_is_a_warning(
    image: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file system that answers ENOLCK is used all the same; another error of fcntl comes out."""

    def fail(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", fail)
    number = errno.ENOLCK
    with caplog.at_level(logging.WARNING), ours(image, writable=True):
        pass
    assert "has no locks" in caplog.text
    number = errno.EIO
    with pytest.raises(OSError, match="cannot lock") as caught, ours(image, writable=True):
        pass
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, image)


def test_reading_what_others_write(image: str, tmp_path: Path) -> None:
    """-U reads while QEMU writes, and keeps nobody out; without it the writer is named. It writes nothing."""
    raw = Path(image)
    with qemu_io(image) as process:
        for words in (["-r"], ["-x"]):
            refused = parse_and_open(image, *words)
            assert "open for writing by" in refused
            assert "qemu-io" in refused
            assert parse_and_open(image, *words, "-U") == "opened"
        assert process.poll() is None
    before = raw.read_bytes()
    assert parse_and_open(image, "-x", "--force-share") == "opened"
    assert raw.read_bytes() == before
    assert os.listdir(tmp_path) == [raw.name]


def test_locks_that_are_ignored(image: str, caplog: pytest.LogCaptureFixture) -> None:
    """--ignore-locks opens for writing what others hold, takes no lock, and warns each time."""
    with ours(image, writable=True):
        for words in ([], ["-r"], ["-x"]):
            caplog.clear()
            assert parse_and_open(image, *words, "-o", "ignore-locks") == "opened"
            warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
            assert len(warnings) == 1
            assert f"{image}: opened without a look at its locks" in warnings[0]
    assert parse_and_open(image, "--ignore-locks", during=lambda: acquired(image)) == "opened"


def test_changes_that_ignore_locks(
    image: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """So do check -r, resize and snapshot of qcowfuse-img."""
    with ours(image, writable=True):
        for words in (["check", "-r", "all"], ["resize"], ["snapshot", "-c", "s"], ["snapshot", "-l"]):
            more = ["2M"] if words == ["resize"] else []
            assert img([*words, image, *more]) == 1
            assert "open for writing by this process" in capsys.readouterr().err
            assert img([*words, "--ignore-locks", image, *more]) == 0
            assert ("without a look at its locks" in caplog.text) == (words[-1] != "-l")
            caplog.clear()


@pytest.mark.parametrize("words", [["-U"], ["-U", "--overlay", "o"], ["-r", "-U", "--overlay", "o"]])
def test_what_is_written_needs_its_lock(words: list[str], image: str, capsys: pytest.CaptureFixture[str]) -> None:
    """-U is refused where something is written that means something afterwards."""
    with pytest.raises(SystemExit):
        parse_arguments([*words, image, "mnt"])
    assert "--force-share" in capsys.readouterr().err


def acquired(path: str) -> None:
    """Nobody else has the image locked."""
    with ours(path, writable=True):
        pass


def parse_and_open(image: str, *words: str, during: Callable[[], None] = lambda: None) -> str:
    """Open as the command line says: "opened", or why not."""
    given = parse_arguments([*words, "--lock-wait=0", image, "mnt"])

    async def run() -> None:
        overlay = None if given.ephemeral is None else EphemeralOverlay()
        opened = await open_image(given.image, given.open_options, overlay=overlay)
        try:
            during()
            await opened.read(0, 512)
        finally:
            await opened.aclose()

    try:
        trio.run(run)
    except ImageLockedError as error:
        return str(error)
    return "opened"
