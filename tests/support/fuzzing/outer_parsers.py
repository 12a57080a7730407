"""What no image is parsed by: command lines, names on the file system, and requests to the process outside.

A target is as in :mod:`.parsers`. The text of its subject seeds a generator too: a change of a byte is another case,
and most of them are well formed enough to get past the first look.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import random
import shutil
import stat
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from qcowfuse.cli.exit_codes import ExitCode
from qcowfuse.cli.mount.arguments import parse_arguments
from qcowfuse.cli.mount.parser import build_parser
from qcowfuse.daemon import mount_users, mountpoint, outside, outside_process, served_file
from qcowfuse.daemon.mount_client import MountClient
from qcowfuse.errors import MountError
from qcowfuse.storage.beneath import OutsideError, UnfitFileError, find_file, open_folder, open_folders

from .subjects import Subject

_NUMBERS = (
    0,
    1,
    -1,
    2,
    511,
    512,
    1 << 31,
    1 << 32,
    -(1 << 31),
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
    -(1 << 63),
    10**4000,
)
_ODD: tuple[object, ...] = (None, "", "x", [], [1], {}, {"a": 1}, 1.5, "adopt", True, False)


def _chooser(given: Subject) -> random.Random:
    return random.Random(bytes(given.data))


# Command lines

_WORDS = (
    "",
    "-",
    "--",
    "64M",
    "128t",
    "-1",
    "0",
    "0x10",
    "1e9",
    "99999999999999999999",
    "ro",
    "a=b",
    "=",
    ",",
    "unmap",
    "\n",
)


def arguments(given: Subject) -> None:
    """Arguments, or the end of the program: with the help, or with one line for what is wrong."""
    chooser = _chooser(given)
    words = [word.decode("utf-8", "surrogateescape") for word in bytes(given.data).split(b"\0")]
    options = sorted(build_parser()._option_string_actions)
    for _ in range(chooser.randrange(6)):
        option = chooser.choice(options)
        value = chooser.choice((*_WORDS, *words))
        new = chooser.choice(([option], [option, value], [f"{option}={value}"], [option[: chooser.randrange(9)]]))
        at = chooser.randrange(len(words) + 1)
        words[at:at] = new
    if chooser.random() < 0.3:
        del words[chooser.randrange(len(words))]
    said, shown = io.StringIO(), io.StringIO()
    with redirect_stderr(said), redirect_stdout(shown):
        try:
            found = parse_arguments(words)
        except SystemExit as end:
            _judge_end(end.code, said.getvalue(), shown.getvalue())
            return
    assert not said.getvalue()
    assert found.image
    assert found.mount_point
    assert found.file_name


def _judge_end(code: object, said: str, shown: str) -> None:
    assert code in (0, ExitCode.USAGE), code
    if code == 0:
        assert shown
        assert not said
        return
    assert said.startswith("qcowfuse: "), said
    assert said.endswith("\n"), said
    assert said[:-1].isprintable(), f"not fit to be shown: {said!r}"


# Names


def _openat2_beneath(folder: int, name: str) -> int | None:
    """What the kernel finds below the folder; None where it has no such call, or finds nothing."""
    how = (ctypes.c_uint64 * 3)(os.O_PATH | os.O_CLOEXEC, 0, 0x08 | 0x02)  # RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(437, folder, os.fsencode(name), ctypes.byref(how), ctypes.sizeof(how))
    return fd if fd >= 0 else None


_TARGETS = ("../out/f", "../../out/f", "../out", "..", "../../more/a/f", "../in/f", "a", "a/b/f", "b/..", "f/", "l0")
_NAMES = (
    "l0",
    "l1",
    "l2",
    "a/l0",
    "a/l1",
    "a/b/l2",
    "a/../l3",
    "a/b/../../l0",
    "l1/f",
    "l2/../f",
    "a/l3/a/f",
    "f",
    "f/",
)


def _random_name(chooser: random.Random, root: str, words: Sequence[str], usual: Sequence[str]) -> str:
    kind = chooser.random()
    if kind < 0.5:
        return chooser.choice(usual)
    start = chooser.choice(("", "", "/", root + "/in/", root + "/out/", root + "/more/", root + "/in/../"))
    if kind < 0.7:
        return start + chooser.choice(usual)
    parts = [chooser.choice((*words, "a", "b", "..", "..", ".", "", "f", "l0", "l1", "l2", "l3")) for _ in range(7)]
    return start + "/".join(parts[: chooser.randint(1, 7)])


def names(given: Subject) -> None:
    """A name, and links on its way: what is found lies in the folder or in an allowed one, and is what the kernel
    finds there; nothing stays open."""
    chooser = _chooser(given)
    words = [word.decode("utf-8", "surrogateescape") for word in bytes(given.data).split(b"\0") if word] or ["f"]
    root = tempfile.mkdtemp(prefix="names-")
    try:
        for folder in ("in/a/b", "in/c", "out", "more/a"):
            os.makedirs(f"{root}/{folder}")
        for file in ("in/f", "in/a/f", "in/a/b/f", "out/f", "more/f", "more/a/f"):
            Path(root, file).write_text(file.split("/", maxsplit=1)[0])
        for number in range(4):
            where = chooser.choice(("in", "in/a", "in/a/b", "more"))
            target = _random_name(chooser, root, words, _TARGETS) or "f"
            _unless_refused(os.symlink, target, f"{root}/{where}/l{number}")
        for _ in range(12):
            _judge_name(root, _random_name(chooser, root, words, _NAMES), chooser.random() < 0.4)
    finally:
        shutil.rmtree(root)


def _unless_refused(call: Callable[..., object], *args: object) -> None:
    try:
        call(*args)
    except (OSError, ValueError):
        return


def _judge_name(root: str, name: str, is_wide: bool) -> None:
    n_open = len(os.listdir("/proc/self/fd"))
    start, allowed = open_folder(f"{root}/in"), open_folders([f"{root}/more"] if is_wide else [])
    kernel = _openat2_beneath(start.fd, name)
    try:
        if kernel is not None and not stat.S_ISREG(os.fstat(kernel).st_mode):
            os.close(kernel)
            kernel = None
        try:
            found = find_file(start, name, allowed)
        except (OutsideError, UnfitFileError) as error:
            failure: Exception | None = error
        except OSError as error:
            failure = None if error.errno == errno.ELOOP else error
        else:
            fd = found.open(writable=False)
            where, content = os.readlink(f"/proc/self/fd/{fd}"), os.read(fd, 100)
            if kernel is not None:
                assert os.path.sameopenfile(fd, kernel), f"{name!r}: another file than the kernel's"
            os.close(fd)
            found.close()
            assert where.startswith((f"{root}/in/", *([f"{root}/more/"] if is_wide else []))), (
                f"{name!r} led to {where}"
            )
            assert content in (b"in", b"more")
            assert os.path.realpath(found.path) == where, (found.path, where)
            failure = None
        assert kernel is None or failure is None, f"the kernel finds {name!r}: {failure}"
    finally:
        for folder in (start, *allowed):
            folder.close()
        if kernel is not None:
            os.close(kernel)
    assert len(os.listdir("/proc/self/fd")) == n_open, f"{name!r}: descriptors are left open"


# Requests to the process outside


class _Place:
    path = "/nowhere"
    is_folder = True

    def __init__(self, device: int) -> None:
        self._device = device

    def device_on_top(self) -> int:
        return self._device


class _Answers:
    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, data: bytes) -> None:
        self.sent.append(data)


_DONE = {
    served_file: ("check_served", "mend_served", "sync_served", "sync_everything"),
    mountpoint: ("unmount",),
    mount_users: ("users_of",),
}


def requests(given: Subject) -> None:
    """A request is a verb with numbers, or nothing; whatever becomes of it, the daemon can take the answer."""
    chooser = _chooser(given)
    texts = [*bytes(given.data).split(b"\n")]
    verbs = (*sorted(MountClient.VERBS), outside_process.LEAVE_SESSION, "__init__", "_file", "_place")
    for _ in range(6):
        args = [chooser.choice(_NUMBERS if chooser.random() < 0.8 else _ODD) for _ in range(chooser.randrange(6))]
        name = chooser.choice(verbs) if chooser.random() < 0.9 else chooser.choice(_ODD)
        texts.append(
            json.dumps([chooser.choice((*_NUMBERS, *_ODD)), name, args][: chooser.choice((3, 3, 3, 3, 2))]).encode()
        )
    done: list[tuple[object, ...]] = []

    def outcome(*args: object) -> object:
        done.append(args)
        return chooser.choice(
            (_failing(OSError(errno.EBUSY, "busy", "/x")), _failing(MountError("no")), lambda: True)
        )()

    with ExitStack() as stack:
        for module, functions in _DONE.items():
            for name in functions:
                stack.enter_context(patch.object(module, name, outcome))
        client = MountClient(_Place(chooser.choice((-1, 77))), "disk.raw")  # type: ignore[arg-type]
        for text in texts:
            _judge_request(text, client, done)


def _failing(error: Exception) -> Callable[[], object]:
    def fail() -> object:
        raise error

    return fail


def _judge_request(text: bytes, client: MountClient, done: list[tuple[object, ...]]) -> None:
    call = outside_process.parse_request(text, MountClient.VERBS)
    if call is None:
        return
    number, name, args = call
    assert isinstance(number, int)
    assert all(isinstance(value, int) for value in args)
    if name == outside_process.LEAVE_SESSION:
        return
    assert name in MountClient.VERBS
    answers = _Answers()
    done.clear()
    outside_process.answer(answers, client, number, name, args)  # type: ignore[arg-type]
    assert len(answers.sent) == 1
    assert len(answers.sent[0]) <= outside_process.MAX_MESSAGE
    echoed, failure, _ = json.loads(answers.sent[0])
    assert echoed == number
    for did in done:  # on the mount that was settled before, and with numbers
        place, *others = did
        assert getattr(place, "device", place) in (-1, 77, "/nowhere/disk.raw"), did
        assert all(isinstance(value, int) for value in others), did
    if failure is not None:
        assert failure[0] in ("OSError", "MountError", "TypeError"), failure
        assert isinstance(outside._exception(*failure), (OSError, MountError))
