"""What the user can say: parsed, checked, and turned into the settings of driver and export.

1. Nothing that serves is imported here: wrong arguments are told at once, and the process that waits for a daemon
   to be ready, while that one imports it, stays small.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn, TypeVar

from ...daemon.settings import MountSettings, User
from ...driver.options import DelayModel, DetectZeroes, L2CacheSize, OpenOptions
from ...printable import printable
from ..exit_codes import ExitCode
from ..image_names import backing_format, check_names, configured_folders
from .mount_options import MountOptionError, sort_options

DEFAULT_LOCK_WAIT = 5.0
"""Seconds. After an unmount, the old daemon may still write back and flush: a new one waits for it."""

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_MAX_LOCK_WAIT = 7 * 86400.0

T = TypeVar("T")


class Arguments(NamedTuple):
    """A command line that makes sense. From ``file_name`` to ``user`` it is for :meth:`mount_settings`."""

    image: str
    mount_point: str
    open_options: OpenOptions
    foreground: bool
    debug: bool
    log_file: str | None
    key_file: str | None
    file_name: str
    fuse_options: frozenset[str]
    source: str | None
    writeback_cache: bool
    allow_non_empty: bool
    uid: int | None
    gid: int | None
    umask: int | None
    counts_allocated: bool
    growable: bool
    uses_sandbox: bool
    user: User | None

    @property
    def descriptors(self) -> frozenset[int]:
        """Inherited descriptors that are named as files (``/dev/fd/63``, a shell's process substitution)."""
        names = (self.image, self.mount_point, self.key_file, self.log_file, self.open_options.data_file)
        found = (re.fullmatch(r"/(?:dev|proc/self)/fd/(\d{1,9})", name) for name in names if name is not None)
        return frozenset(int(match[1]) for match in found if match)

    def mount_settings(self) -> MountSettings:
        """Where and how to serve."""
        return MountSettings(
            mount_point=self.mount_point,
            file_name=self.file_name,
            fuse_options=self.fuse_options,
            source=self.source,
            writeback_cache=self.writeback_cache,
            allow_non_empty=self.allow_non_empty,
            uid=self.uid,
            gid=self.gid,
            umask=self.umask,
            ends_on_hangup=self.foreground,
            counts_allocated=self.counts_allocated,
            growable=self.growable,
            uses_sandbox=self.uses_sandbox,
            user=self.user,
        )


def parse_cache_size(text: str) -> L2CacheSize:
    """``64M``, ``512KiB``, ``0``, or ``128t`` for tables. Raises ValueError."""
    word = text.strip()
    if match := re.fullmatch(r"(\d{1,9})t", word, re.ASCII):
        return L2CacheSize(n_tables=int(match[1]))
    match = re.fullmatch(r"(\d{1,15})([KMGT]?)(?:i?B)?", word.upper().replace("IB", "iB"), re.ASCII)
    if match is None:
        raise ValueError(f"bad size {text!r}: expected bytes such as 65536, 512K or 64M, or tables such as 128t")
    return L2CacheSize(n_bytes=int(match[1]) * _SUFFIXES[match[2]])


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _MAX_LOCK_WAIT:
        raise ValueError(f"bad time {text!r}: expected seconds, such as 0 or 2.5")
    return seconds


def _file_name(text: str) -> str:
    if text in (".", "..") or "/" in text or not 0 < len(os.fsencode(text)) <= 255:
        raise ValueError(f"bad file name {text!r}: expected one name without a slash")
    return text


def _user_or_group(text: str) -> int:
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or int(text) >= (1 << 32) - 1:
        raise ValueError(f"bad id {text!r}: expected a number")
    return int(text)


def _user(text: str) -> User:
    import pwd

    if os.geteuid() != 0:
        raise ValueError("only root can become another user")
    try:
        entry = pwd.getpwnam(text)
    except (KeyError, ValueError):
        raise ValueError(f"there is no user {text!r}") from None
    return User(entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(text, entry.pw_gid)))


def _umask(text: str) -> int:
    if not re.fullmatch(r"[0-7]{1,4}", text, re.ASCII) or int(text, 8) > 0o777:
        raise ValueError(f"bad umask {text!r}: expected an octal number such as 022")
    return int(text, 8)


def _discards(text: str) -> bool:
    if text not in ("unmap", "ignore"):
        raise ValueError(f"{text!r} is neither unmap nor ignore")
    return text == "unmap"


def _uses_io_uring(text: str) -> bool:
    if text not in ("io_uring", "threads"):
        raise ValueError(f"{text!r} is neither io_uring nor threads")
    return text == "io_uring"


def _detect_zeroes(text: str) -> DetectZeroes:
    try:
        return DetectZeroes(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither off, on nor unmap") from None


def _plain(argv: Sequence[str]) -> SimpleNamespace | None:
    """What argparse would make of IMAGE and MOUNTPOINT with at most -f and -r; None for any other command line.
    To get argparse ready for all options takes as long as to open and mount the image."""
    names = [word for word in argv if not word.startswith("-")]
    flags = {word for word in argv if word.startswith("-")}
    if len(names) != 2 or not flags <= {"-f", "-r"}:
        return None
    return SimpleNamespace(
        image=names[0],
        mountpoint=names[1],
        foreground="-f" in flags,
        read_only="-r" in flags,
        allow_other=False,
        allow_dir=[],
        debug_io_delay=None,
        options=[],
    )


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(printable(f"qcowfuse: {message} (qcowfuse --help says more)") + "\n")
    raise SystemExit(ExitCode.USAGE)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse a command line. Raises SystemExit, after one line to standard error or the help to standard output."""
    given: Any = _plain(argv)
    if given is None:
        from .parser import build_parser

        given = build_parser(DEFAULT_LOCK_WAIT).parse_args(argv)
    if not given.image or not given.mountpoint:
        _refuse("IMAGE or MOUNTPOINT is empty; in /etc/qcowfuse/NAME.conf of qcowfuse@NAME both must be set")
    try:
        listed = sort_options(given.options)
    except MountOptionError as exc:
        _refuse(str(exc))

    def flag(name: str) -> bool:
        return bool(getattr(given, name.replace("-", "_"), False)) or name in listed.flags

    def value(name: str, convert: Callable[[str], T]) -> T | None:
        text = getattr(given, name.replace("-", "_"), None)
        text = listed.values.get(name) if text is None else text
        if text is None:
            return None
        try:
            return convert(text)
        except ValueError as exc:
            _refuse(f"{name}: {exc}")

    fuse_options = set(listed.fuse)
    if given.allow_other:
        fuse_options.add("allow_other")
    if {"allow_other", "allow_root"} <= fuse_options:
        _refuse("allow_other and allow_root exclude each other")
    lock_wait = value("lock-wait", _seconds)
    discard = value("discard", _discards) is not False
    detect_zeroes = value("detect-zeroes", _detect_zeroes) or DetectZeroes.OFF
    if detect_zeroes is DetectZeroes.UNMAP and not discard:
        _refuse("--detect-zeroes unmap and --discard ignore exclude each other")
    backing_file, no_backing = value("backing-file", str), flag("no-backing")
    allow_dirs = (*given.allow_dir, *listed.repeated["allow-dir"])
    try:
        check_names(backing_file=backing_file, allow_dirs=allow_dirs, no_backing=no_backing)
    except ValueError as exc:
        _refuse(str(exc))
    return Arguments(
        image=given.image,
        mount_point=given.mountpoint,
        open_options=OpenOptions(
            read_only=flag("read-only"),
            l2_cache_size=value("l2-cache-size", parse_cache_size),
            discard=discard,
            detect_zeroes=detect_zeroes,
            snapshot=value("snapshot", str),
            backing_format=value("backing-format", backing_format),
            backing_file=backing_file,
            data_file=value("data-file", str),
            allow_dirs=(*allow_dirs, *configured_folders()),
            no_backing=no_backing,
            lock_wait=DEFAULT_LOCK_WAIT if lock_wait is None else lock_wait,
            io_uring=value("aio", _uses_io_uring) is not False,
            io_delay=value("debug-io-delay", DelayModel.parse),
            image_in_memory=flag("debug-image-in-memory"),
        ),
        foreground=flag("foreground") or flag("debug"),
        debug=flag("debug"),
        log_file=value("log-file", str),
        key_file=value("key-file", str),
        file_name=value("name", _file_name) or "disk.raw",
        fuse_options=frozenset(fuse_options),
        source=value("fsname", str),
        writeback_cache=not flag("no-writeback-cache"),
        allow_non_empty=flag("nonempty"),
        uid=value("uid", _user_or_group),
        gid=value("gid", _user_or_group),
        umask=value("umask", _umask),
        counts_allocated=given.debug_io_delay is None and "debug-io-delay" not in listed.values,
        growable=flag("growable"),
        uses_sandbox=not flag("no-sandbox"),
        user=value("user", _user),
    )
