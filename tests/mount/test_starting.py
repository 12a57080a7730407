"""The start of a daemon: signals in the middle of it, what it keeps open, and whom its log is for."""

from __future__ import annotations

import os
import pty
import select
import signal
import stat
import subprocess
import sys
import termios
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.support import qemu
from tests.support.mounting import (
    TIMEOUT,
    Mounted,
    command,
    create_image,
    daemon_pid,
    environment,
    is_alive,
    is_mounted,
    patched,
    run_qcowfuse,
    wait_until,
)

pytestmark = pytest.mark.mount


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "mnt").mkdir()
    return create_image(tmp_path / "image.qcow2", "4M")


def held(image: Path, where: str, gate: Path) -> list[str]:
    """The command line of a start that waits at a place in it until the file ``gate`` is gone."""
    wait = f"import os, time\nwhile os.path.exists({str(gate)!r}): time.sleep(0.01)\n"
    indented = "".join(f"    {line}\n" for line in wait.splitlines())
    patches = {
        "imports": f"""
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "pyfuse3":
            open({str(gate)!r} + ".seen", "w").close()
        {"".join(f"    {line}" + chr(10) + "        " for line in wait.splitlines())}
sys.meta_path.insert(0, Finder())
""",
        "mounted": f"""
import qcowfuse.daemon.served_file as served_file
usual = served_file.check_served
def check_served(*arguments):
    open({str(gate)!r} + ".seen", "w").close()
{indented}
    return usual(*arguments)
served_file.check_served = check_served
check_served.__module__, check_served.__qualname__ = "qcowfuse.daemon.served_file", "check_served"
""",
    }
    python, _, module, *rest = command(image, image.parent / "mnt")
    start = f"import runpy\nrunpy.run_module({module!r}, run_name='__main__')"
    return [python, "-c", patches[where] + start, *rest]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("goes_to", ["starter", "all"])
@pytest.mark.parametrize("where", ["imports", "mounted"])
def test_a_stop_signal_during_the_start(
    image: Path, tmp_path: Path, where: str, goes_to: str, number: signal.Signals
) -> None:
    """One line that says so, the exit code of a failed start, and no mount. (Where the signal is passed on when it
    serves already, it ends all the same.)"""
    gate = tmp_path / "gate"
    gate.touch()
    process = subprocess.Popen(
        held(image, where, gate), stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    wait_until((tmp_path / "gate.seen").exists, "the place in the start")
    (os.killpg if goes_to == "all" else os.kill)(process.pid, number)
    time.sleep(0.5)  # for the starter to pass it on
    gate.unlink()
    _, said = process.communicate(timeout=60)
    if process.returncode == 0 and goes_to == "starter":
        wait_until(lambda: not is_mounted(tmp_path / "mnt"), "the end of the mount")
        return
    assert process.returncode == 5
    assert said.startswith(f"qcowfuse: {image}: stopped by {number.name} before "), said
    assert said.count("\n") == 1
    assert not is_mounted(tmp_path / "mnt")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_while_it_waits_for_the_lock(image: Path, tmp_path: Path, number: signal.Signals) -> None:
    """The wait ends at once."""
    with Mounted(image, tmp_path / "mnt"):
        (tmp_path / "other").mkdir()
        words = command("--lock-wait", "1000", image, tmp_path / "other")
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment())
        assert process.stderr is not None
        assert "waiting" in process.stderr.readline()
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert (process.returncode, said.count("\n")) == (5, 1)
        assert f"stopped by {number.name} before the image was open" in said


@pytest.mark.parametrize("program", ["qcowfuse", "qcowfuse_img"])
def test_ctrl_c_before_anything_is_imported(program: str) -> None:
    """Nothing is printed, and whoever waits sees that SIGINT ended it."""
    script = f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("qcowfuse.cli.mount.main", "qcowfuse.cli.img.main"):
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from qcowfuse.cli.entry import {program}
sys.exit({program}())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


SLOW_FORK = """
import os, time, warnings
warnings.simplefilter("ignore")  # Python 3.12 and later warn of a fork in __main__, where the product's is not
usual = os.fork
def fork():
    pid = usual()
    if pid:
        time.sleep(1)
    return pid
os.fork = fork
"""
"""The child runs long before its parent does."""


@pytest.fixture(scope="module")
def encrypted_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """QEMU measures for two seconds how long its derivation of a key takes."""
    folder = tmp_path_factory.mktemp("encrypted")
    (folder / "key").write_text("open sesame")
    secret = f"secret,id=s,file={folder / 'key'}"
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1"
    qemu.must_run(
        "qemu-img", "create", "-q", "-f", "qcow2", "--object", secret, "-o", options, folder / "image", "1M"
    )
    return folder / "image"


END = b"(ended)"
"""What a :class:`Terminal` shows behind all that its command has printed."""


class Terminal:
    """A terminal with a command in it.

    The leader of its session is another process, as a shell is for the user: the kernel would hang the terminal up at
    the leader's end, drop what was not read yet and set the echo by itself.
    """

    def __init__(self, arguments: list[str]) -> None:
        reports, report = os.pipe()
        leader, self._fd = pty.fork()
        if leader == 0:
            pid = os.spawnve(os.P_NOWAIT, arguments[0], arguments, environment())
            os.write(report, f"{pid}\n".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(1, END)
            os.write(report, f"{code}\n".encode())
            signal.pause()
        os.close(report)
        self._leader = leader
        self._reports = os.fdopen(reports)
        self.pid = int(self._reports.readline())

    @property
    def echoes(self) -> bool:
        """Whether what is typed is seen."""
        return bool(termios.tcgetattr(self._fd)[3] & termios.ECHO)

    def type(self, keys: bytes) -> None:
        """As the user does."""
        os.write(self._fd, keys)

    def read_until(self, end: bytes) -> bytes:
        """What the command prints, up to ``end``."""
        said = b""
        while not said.endswith(end):
            assert select.select([self._fd], [], [], TIMEOUT)[0], said
            said += os.read(self._fd, 1000)
        return said

    def exit_code(self) -> int:
        """Of the command, once it has ended."""
        return int(self._reports.readline())

    def close(self) -> None:
        """End the leader; the command has ended, or is hung up."""
        os.kill(self._leader, signal.SIGKILL)
        os.waitpid(self._leader, 0)
        os.close(self._fd)
        self._reports.close()


def interrupt_prompt(terminal: Terminal, number: signal.Signals) -> None:
    """The program ends as by Ctrl-C; the terminal echoes again, nothing is printed but the end of the line."""
    os.kill(terminal.pid, number)
    assert terminal.exit_code() == 130
    assert terminal.echoes
    assert terminal.read_until(END) == b"\r\n" + END


@pytest.mark.parametrize("patch", ["", SLOW_FORK], ids=["at once", "child first"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_at_the_prompt(
    encrypted_image: Path, tmp_path: Path, number: signal.Signals, patch: str
) -> None:
    """The terminal echoes again, nothing is printed but the end of the line."""
    (tmp_path / "mnt").mkdir()
    with closing(Terminal(patched(command(encrypted_image, tmp_path / "mnt"), patch))) as terminal:
        assert terminal.echoes
        assert b"Passphrase" in terminal.read_until(b": ")
        wait_until(lambda: not terminal.echoes, "the prompt")
        interrupt_prompt(terminal, number)


LOST_SIGNAL = """
import qcowfuse.cli.passphrase as passphrase
usual, lost = passphrase._interrupt, []
def interrupt(number):
    if lost:
        usual(number)
    lost.append(number)
passphrase._interrupt = interrupt
"""
"""Python runs no handler of a signal that comes right before a system call that blocks."""


@pytest.mark.parametrize("patch", ["", LOST_SIGNAL], ids=["at once", "lost"])
@pytest.mark.parametrize(("n_typed", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_stop_signal_at_the_prompt_for_a_new_passphrase(
    tmp_path: Path, n_typed: int, number: signal.Signals, patch: str
) -> None:
    """At either question: the terminal echoes again, nothing is printed but the end of the line, nothing is made."""
    path = tmp_path / "new.qcow2"
    program = f"{patch}\nimport sys\nfrom qcowfuse.cli.img.main import main\nsys.exit(main())"
    words = [sys.executable, "-c", program, "create", "-q", "-o", "encrypt.format=luks", str(path), "1M"]
    with closing(Terminal(words)) as terminal:
        assert b"Passphrase" in terminal.read_until(b": ")
        wait_until(lambda: not terminal.echoes, "the prompt")
        for _ in range(n_typed):
            terminal.type(b"sesame\n")
            assert b"Once more" in terminal.read_until(b": ")
            wait_until(lambda: not terminal.echoes, "the prompt")
        interrupt_prompt(terminal, number)
    assert not path.exists()


def test_a_new_passphrase_is_typed_twice(tmp_path: Path) -> None:
    """The same, and it opens the image; or another one, and nothing is made."""
    program = "import sys; from qcowfuse.cli.img.main import main; sys.exit(main())"
    for second, code in ((b"sesame", 0), (b"Sesame", 1)):
        path = tmp_path / f"{code}.qcow2"
        words = ["create", "-q", "-o", "encrypt.format=luks,encrypt.iter-time=1", str(path), "1M"]
        with closing(Terminal([sys.executable, "-c", program, *words])) as new:
            for typed in (b"sesame", second):
                new.read_until(b": ")
                wait_until(lambda: not new.echoes, "the prompt")
                new.type(typed + b"\n")
            assert new.exit_code() == code
            said = new.read_until(END)
        assert (b"the passphrases differ" in said) == bool(code)
        assert path.exists() != bool(code)
    (tmp_path / "key").write_bytes(b"sesame")
    assert qemu.must_run(
        *("qemu-io", "--object", f"secret,id=s,file={tmp_path / 'key'}", "-c", "read -P 0 0 1M"),
        *("--image-opts", f"driver=qcow2,encrypt.key-secret=s,file.filename={tmp_path / '0.qcow2'}"),
    )


def test_a_daemon_keeps_no_descriptor_of_its_starter(image: Path, tmp_path: Path) -> None:
    """Whoever reads a pipe that the shell had open sees its end when the command returns."""
    read_end, write_end = os.pipe()
    words = command(image, tmp_path / "mnt")
    subprocess.run(words, check=True, pass_fds=[write_end], env=environment(), timeout=60)
    os.close(write_end)
    assert select.select([read_end], [], [], 10)[0], "somebody still has the pipe"
    os.close(read_end)
    subprocess.run(["fusermount3", "-u", tmp_path / "mnt"], check=True)


def test_a_key_by_process_substitution(tmp_path: Path) -> None:
    """A descriptor that is named as a file is kept until it has been read."""
    (tmp_path / "mnt").mkdir()
    script = f"""
python={sys.executable}
img() {{ "$python" -c 'import sys; from qcowfuse.cli.img.main import main; sys.exit(main())' "$@"; }}
img create -q -o encrypt.format=luks,encrypt.iter-time=1 --key-file <(printf sesame) image.qcow2 1M || exit 1
"$python" -m qcowfuse --key-file <(printf sesame) image.qcow2 mnt || exit 2
head -c 4 mnt/disk.raw | cmp -n 4 - /dev/zero || exit 3
fusermount3 -u mnt
"""
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment(), check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_log_file_is_the_users_alone(image: Path, tmp_path: Path) -> None:
    """A new one has mode 0600; one that is there keeps its mode, and is appended to."""
    for mode, before in ((0o600, ""), (0o640, "before\n")):
        log = tmp_path / f"log-{mode:o}"
        if before:
            log.write_text(before)
            log.chmod(mode)
        done = run_qcowfuse("--log-file", log, image, tmp_path / "mnt")
        assert done.returncode == 0, done.stderr
        pid = daemon_pid(tmp_path / "mnt")
        subprocess.run(["fusermount3", "-u", tmp_path / "mnt"], check=True)
        assert pid is not None
        wait_until(lambda pid=pid: not is_alive(pid), "the end")  # type: ignore[misc]
        assert stat.S_IMODE(log.stat().st_mode) == mode
        assert log.read_text().startswith(before)
        assert "closed" in log.read_text()
