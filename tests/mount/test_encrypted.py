"""Encrypted images through a real mount, and every way to give the passphrase, or not to."""

from __future__ import annotations

import os
import pty
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from qcowfuse.cli.img.create_options import parse_create_options
from qcowfuse.tools.create import create_image
from tests.support.images import PASSPHRASE, image_arguments
from tests.support.mounting import TIMEOUT, Mounted, command, daemon_pid, environment, is_mounted

pytestmark = pytest.mark.mount

SECRET = PASSPHRASE.decode()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A LUKS image that costs its owner little time to open."""
    path = tmp_path / "disk.qcow2"
    options = parse_create_options("qcow2", ["encrypt.format=luks,encrypt.iter-time=1"], size="8M")
    trio.run(lambda: create_image(str(path), options, passphrase=PASSPHRASE))
    return path


@pytest.fixture
def mount_point(tmp_path: Path) -> Path:
    path = tmp_path / "m"
    path.mkdir()
    return path


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(PASSPHRASE)
    return path


def start(*arguments: str | Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """A start as daemon without a terminal to ask on."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env=environment(**extra),
        timeout=TIMEOUT,
    )


def unmount(mount_point: Path) -> None:
    subprocess.run(["fusermount3", "-u", mount_point], check=True)


@pytest.mark.parametrize("cipher", ["aes-256", "serpent-256"])
def test_what_is_written_is_what_qemu_reads(cipher: str, mount_point: Path, key_file: Path, tmp_path: Path) -> None:
    """Writes of odd lengths through the mount, with and without the write-back cache; the secret is in no log."""
    image = tmp_path / "disk.qcow2"
    chosen = parse_create_options(
        "qcow2", [f"encrypt.format=luks,encrypt.iter-time=1,encrypt.cipher-alg={cipher}"], size="8M"
    )
    trio.run(lambda: create_image(str(image), chosen, passphrase=PASSPHRASE))
    data = bytearray(8 << 20)
    for number, options in enumerate(([], ["--no-writeback-cache"])):
        with Mounted(image, mount_point, "-d", "--key-file", key_file, *options) as mounted:
            with mounted.file.open("r+b", buffering=0) as file:
                for step in range(40):
                    at, part = step * 150_001 + number * 777, os.urandom(1 + step * 97)
                    os.pwrite(file.fileno(), part, at)
                    data[at : at + len(part)] = part
                assert os.pread(file.fileno(), len(data), 0) == data[: 1 << 31]
                os.fsync(file.fileno())
        assert SECRET not in mounted.log
    raw = tmp_path / "raw"
    source = image_arguments("qcow2", str(image), encrypted=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", *source, raw], check=True)
    assert raw.read_bytes() == data
    subprocess.run(["qemu-img", "check", "-q", *source], check=True)


def test_key_as_mount_option_or_credential(image: Path, mount_point: Path, key_file: Path, tmp_path: Path) -> None:
    """-o key-file=PATH, and systemd's credential qcowfuse.key; what is given on the command line goes first."""
    (tmp_path / "credentials").mkdir()
    credential = tmp_path / "credentials" / "qcowfuse.key"
    for content, options in ((b"wrong", ["-o", f"ro,key-file={key_file}"]), (PASSPHRASE, [])):
        credential.write_bytes(content)
        done = start(*options, image, mount_point, CREDENTIALS_DIRECTORY=str(credential.parent))
        assert (done.returncode, done.stderr) == (0, "")
        assert (mount_point / "disk.raw").stat().st_size == 8 << 20
        unmount(mount_point)
    credential.unlink()
    assert start(image, mount_point, CREDENTIALS_DIRECTORY=str(credential.parent)).returncode == 3


@pytest.mark.parametrize("how", [[], ["-f"]], ids=["daemon", "foreground"])
def test_wrong_and_missing_keys_are_one_line(image: Path, mount_point: Path, key_file: Path, how: list[str]) -> None:
    """A wrong key, no key and no terminal, no such file, a directory: one clear line, the right code, no mount."""
    key_file.write_bytes(PASSPHRASE + b"\n")
    cases: list[tuple[list[str | Path], int, str]] = [
        (["--key-file", key_file], 3, f"{image}: this is not the key of this image"),
        ([], 3, "no terminal to ask for the passphrase: give --key-file PATH"),
        (["--key-file", key_file.parent / "none"], 3, "none: No such file"),
        (["--key-file", key_file.parent], 3, "Is a directory"),
    ]
    before = image.read_bytes()
    for options, code, text in cases:
        done = start(*how, *options, image, mount_point)
        assert done.returncode == code, done.stderr
        assert text in done.stderr
        assert done.stderr.count("\n") == 1
        assert SECRET not in done.stderr
    assert not is_mounted(mount_point)
    assert image.read_bytes() == before


# With names, or the passphrase would be in the environment, by PYTEST_CURRENT_TEST.
@pytest.mark.parametrize(("typed", "code"), [(SECRET, 0), ("wrong", 3)], ids=["right", "wrong"])
def test_the_passphrase_is_asked_for_on_a_terminal(image: Path, mount_point: Path, typed: str, code: int) -> None:
    """The prompt names the image, does not show what is typed, and comes before the daemon goes its way."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(command()[0], command(image, mount_point), environment())
    said = b""
    while not said.endswith(b": "):
        said += os.read(terminal, 100)
    assert said == f"Passphrase of {image}: ".encode()
    os.write(terminal, f"{typed}\n".encode())
    said = b""
    try:
        while part := os.read(terminal, 1000):
            said += part
    except OSError:
        pass  # how the other end of a terminal says that all have left
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == code, said
    assert typed.encode() not in said
    assert is_mounted(mount_point) is (code == 0)
    if code == 0:
        try:
            processes = processes_of(mount_point)
            assert len(processes) == 2  # the daemon, and the process outside of the mount
            assert {process: n_copies(process, PASSPHRASE) for process in processes} == dict.fromkeys(processes, 0)
            assert "0" in limit_of_core_dumps(daemon_pid(mount_point))
        finally:
            unmount(mount_point)


def processes_of(mount_point: Path) -> list[int]:
    """All that were started for ``mount_point``."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.fsencode(mount_point) in (directory / "cmdline").read_bytes().split(b"\0"):
                found.append(int(directory.name))
    return found


def n_copies(process: int, secret: bytes) -> int:
    """How often the memory of a process holds ``secret``."""
    n_found = 0
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory, open(f"/proc/{process}/maps") as maps:
        for line in maps:
            addresses, access, *_ = line.split()
            start, end = (int(address, 16) for address in addresses.split("-"))
            with suppress(OSError, OverflowError):
                if "r" in access and end - start < 1 << 30:
                    n_found += os.pread(memory.fileno(), end - start, start).count(secret)
    return n_found


def limit_of_core_dumps(process: int | None) -> list[str]:
    """The soft and the hard limit."""
    lines = Path(f"/proc/{process}/limits").read_text().splitlines()
    return next(line for line in lines if line.startswith("Max core file size")).split()[4:6]


def test_a_stop_need_not_wait_for_the_derivation_of_a_key(image: Path, mount_point: Path, key_file: Path) -> None:
    """An image that wants 2^27 rounds for each of its slots is told of, and given up at once by SIGTERM."""
    contents = image.read_bytes()
    area = contents.index(b"LUKS\xba\xbe")
    with image.open("r+b") as file:
        file.seek(area + 208 + 4)  # the iterations of the first key slot
        file.write((1 << 27).to_bytes(4, "big"))
    arguments = command("-f", "--key-file", key_file, image, mount_point)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stderr is not None
        assert "wants 134217728 rounds of PBKDF2" in process.stderr.readline()
        process.terminate()
        assert "stopped by SIGTERM before the image was open" in process.stderr.read()
        assert process.wait(TIMEOUT) == 5


def test_a_plain_image_needs_no_question(tmp_path: Path, mount_point: Path) -> None:
    """Without encryption nobody asks, and a key file that is given is not even read."""
    plain = tmp_path / "plain.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", plain, "1M"], check=True)
    done = start("--key-file", tmp_path / "none", plain, mount_point)
    assert (done.returncode, done.stderr) == (0, "")
    unmount(mount_point)
