"""Where the passphrase of an encrypted image comes from: a file, a credential of systemd's, or a prompt.

1. A file is taken as a whole, a newline at its end included, as QEMU takes the file of a secret.
2. The prompt comes before the process goes into the background, and only when the image is seen to need it.
3. The caller overwrites the passphrase; nothing is kept here, printed or logged.
4. What is typed is typed into a process of its own, which ends, and waits in a pipe for the process that opens or
   makes the image. No other process ever has it in its memory: neither the starter nor the process outside of the
   mount. The one that waits for it passes stop signals on, for as long as it takes: one process alone can miss them.
5. A process that has a passphrase leaves no core dump.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

from ..driver.options import OpenOptions
from ..errors import ImageUsageError, WrongKeyError
from ..printable import printable
from ..system.privileges import forbid_core_dumps
from ..tools.peek import may_need_passphrase

CREDENTIAL_NAME = "qcowfuse.key"
"""The credential (``LoadCredential=``) that is used where no file is given."""
MAX_KEY_BYTES = 1 << 20
_PIPE_BYTES = 1 << 16
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
_AGAIN_SECONDS = 1.0
_LOOK_SECONDS = 0.02
_ASKED, _NOT_ASKED, _INTERRUPTED = 0, 1, 2


class KeySource:
    """Gives the passphrase when it is called with the path of an encrypted layer, once; for ``OpenOptions``."""

    def __init__(self, key_file: str | None, environment: Mapping[str, str]) -> None:
        credentials = environment.get("CREDENTIALS_DIRECTORY")
        if key_file is None and credentials is not None:
            credential = os.path.join(credentials, CREDENTIAL_NAME)
            key_file = credential if os.path.exists(credential) else None
        self._key_file = key_file
        self._is_empty = self._ends_with_newline = False
        self._typed = -1
        """The pipe in which a typed passphrase waits."""

    def prepare(self, image: str, options: OpenOptions) -> None:
        """Ask on the terminal if the image needs a passphrase and no file has it.

        What else is wrong with the image is found when the image is opened. Raises ImageUsageError.
        """
        if self._key_file is not None or self._typed >= 0 or not may_need_passphrase(image):
            return
        from .trimmed_trio import import_trio

        import_trio()
        import trio

        from ..driver.chain import first_encrypted_layer

        try:
            layer = trio.run(lambda: first_encrypted_layer(image, options._replace(force_share=True)))
        except Exception:
            return  # the real opening meets it again, and can say so properly
        if layer is not None:
            self._typed = _ask_elsewhere(layer)

    def __call__(self, path: str) -> bytearray:
        """The passphrase. Raises ImageUsageError."""
        if self._key_file is not None:
            key = read_key_file(self._key_file)
            self._is_empty, self._ends_with_newline = not key, key.endswith(b"\n")
            return key
        if self._typed < 0:
            raise _no_key(path)
        forbid_core_dumps()
        try:
            return _read_secret(self._typed, _PIPE_BYTES)
        finally:
            self.close()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What goes wrong with the passphrase inside of the block is raised with what may be the reason."""
        try:
            yield
        except WrongKeyError as exc:
            if self._is_empty:
                raise WrongKeyError(f"{exc} (key file {self._key_file} is empty)") from None
            if self._ends_with_newline:
                hint = f"key file {self._key_file} ends with a newline, which counts: printf %s writes none"
                raise WrongKeyError(f"{exc} ({hint})") from None
            raise

    @property
    def descriptors(self) -> frozenset[int]:
        """Descriptors that the process which opens the image needs."""
        return frozenset({self._typed} - {-1})

    def close(self) -> None:
        """This process will not ask for the passphrase (any more)."""
        if self._typed >= 0:
            os.close(self._typed)
            self._typed = -1


def read_key_file(path: str) -> bytearray:
    """All of a file, or of standard input (``-``). Raises ImageUsageError where it cannot be read, or is too long to
    be a passphrase."""
    forbid_core_dumps()
    try:
        fd = os.dup(0) if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            key = _read_secret(fd, MAX_KEY_BYTES + 1)
        finally:
            os.close(fd)
    except OSError as exc:
        raise ImageUsageError(f"key file {path}: {exc.strerror}") from exc
    if len(key) > MAX_KEY_BYTES:
        raise ImageUsageError(f"key file {path}: longer than {MAX_KEY_BYTES} bytes")
    return key


def _read_secret(fd: int, n_bytes_max: int) -> bytearray:
    """All that there is, up to a limit, without copies that nobody overwrites. Raises OSError."""
    buffer = bytearray(n_bytes_max)
    view = memoryview(buffer)
    n_bytes = 0
    while n_bytes < n_bytes_max and (n_read := os.readv(fd, [view[n_bytes:]])):
        n_bytes += n_read
    secret = buffer[:n_bytes]
    view[:n_bytes] = bytes(n_bytes)
    return secret


def ask_for_new(image: str) -> bytearray:
    """A new passphrase for ``image``, typed twice. Raises ImageUsageError."""
    typed = _ask_elsewhere(image, twice=True)
    forbid_core_dumps()
    try:
        return _read_secret(typed, _PIPE_BYTES)
    finally:
        os.close(typed)


def ask(image: str, *, twice: bool = False) -> bytearray:
    """The passphrase for ``image``, as it was typed; ``twice``: it is a new one. Raises ImageUsageError."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        if twice:
            raise ImageUsageError(
                f"{image}: there is no terminal to ask for a passphrase: give --key-file PATH"
            ) from None
        raise _no_key(image) from None
    import getpass

    try:
        with _stop_signals_to(_interrupt):
            typed = getpass.getpass(f"Passphrase of {printable(image)}: ")
            if twice and typed != getpass.getpass("Once more: "):
                raise ImageUsageError(f"{image}: the passphrases differ")
    except EOFError:
        raise ImageUsageError(f"{image}: no passphrase was given") from None
    except KeyboardInterrupt:
        sys.stderr.write("\n")  # what comes next shall not stand behind the question
        raise
    return bytearray(os.fsencode(typed))


def _ask_elsewhere(image: str, *, twice: bool = False) -> int:
    """:func:`ask` in a child process; the read end of the pipe into which it has written the passphrase.

    Raises ImageUsageError.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    early: list[int] = []  # signals that came, the child may be asking by then
    try:
        # The child ends first, and the terminal is in order then.
        with _stop_signals_to(early.append):
            pid = os.fork()
            if pid == 0:
                _ask_into(write_end, image, early, twice=twice)
            os.close(write_end)
            code = _wait_for_child(pid, early)
        if early or code == _INTERRUPTED or code < 0:
            raise KeyboardInterrupt
        if code != _ASKED:
            message = os.read(read_end, _PIPE_BYTES)
            raise ImageUsageError(os.fsdecode(message) or f"{image}: no passphrase was given")
    except BaseException:
        os.close(read_end)
        raise
    return read_end


def _wait_for_child(pid: int, stop_signals: list[int]) -> int:
    """The exit code of the child. The last of ``stop_signals``, which grow meanwhile, is passed on until it ends.

    Python runs no handler of a signal that comes right before a system call that blocks, until the call has ended. So
    nothing here waits for long, and a child that has begun to read at that moment is sent the signal once more.
    """
    last_sent = -_AGAIN_SECONDS
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if stop_signals and time.monotonic() - last_sent >= _AGAIN_SECONDS:
            os.kill(pid, stop_signals[-1])
            last_sent = time.monotonic()
        time.sleep(_LOOK_SECONDS)


def _ask_into(pipe: int, image: str, early: list[int], *, twice: bool) -> NoReturn:
    """``early``: gets the stop signals that come before the prompt and after it."""
    code = _NOT_ASKED
    try:
        forbid_core_dumps()
        try:
            with _stop_signals_to(_interrupt):
                if early:
                    raise KeyboardInterrupt
                answer, code = bytes(ask(image, twice=twice)), _ASKED
        except ImageUsageError as exc:
            answer = os.fsencode(str(exc))
        except KeyboardInterrupt:
            answer, code = b"", _INTERRUPTED
        os.write(pipe, answer)
    finally:
        os._exit(_INTERRUPTED if early else code)


def _interrupt(_number: int) -> NoReturn:
    """To end there and then would leave the terminal without echo; so would another signal in the middle of this."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def _stop_signals_to(handler: Callable[[int], None]) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGQUIT go to ``handler`` inside of the block."""
    before = {number: signal.signal(number, lambda number, _frame: handler(number)) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _no_key(image: str) -> ImageUsageError:
    return ImageUsageError(
        f"{image}: is encrypted, and there is no terminal to ask for the passphrase: give --key-file PATH "
        f"(in a mount table: key-file=PATH), or the systemd credential {CREDENTIAL_NAME}"
    )
