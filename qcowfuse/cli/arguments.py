"""What the user can say: parsed, checked, and turned into the settings of driver and export."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from .._version import __version__
from ..driver.options import DelayModel, DetectZeroes, L2CacheSize, OpenOptions
from ..export.mount import MountSettings
from .exit_codes import EXPLANATIONS, ExitCode
from .mount_options import MountOptionError, sort_options

DEFAULT_LOCK_WAIT = 5.0
"""Seconds. After an unmount, the old daemon may still write back and flush: a new one waits for it."""

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_MAX_LOCK_WAIT = 7 * 86400.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Arguments:
    """A command line that makes sense."""

    image: str
    open_options: OpenOptions
    mount: MountSettings
    foreground: bool
    debug: bool
    log_file: str | None
    key_file: str | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.USAGE, f"qcowfuse: {message} (qcowfuse --help says more)\n")


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


def _umask(text: str) -> int:
    if not re.fullmatch(r"[0-7]{1,4}", text, re.ASCII) or int(text, 8) > 0o777:
        raise ValueError(f"bad umask {text!r}: expected an octal number such as 022")
    return int(text, 8)


def _build_parser() -> argparse.ArgumentParser:
    codes = "\n".join(f"  {code.value}  {text}" for code, text in EXPLANATIONS.items())
    parser = _Parser(
        prog="qcowfuse",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="qcowfuse [OPTION]... IMAGE MOUNTPOINT",
        description="Serve a QCOW or QCOW2 image as one raw file of the size of its disk, read and write.\n"
        "Returns when the mount serves, and lives on in the background.",
        epilog=f"""exit codes:
{codes}

examples:
  qcowfuse disk.qcow2 /mnt/x                     then: losetup -fP --show /mnt/x/disk.raw
  qcowfuse -r disk.qcow2 /tmp/disk.raw           mounted over an existing regular file
  qcowfuse -o ro,allow_other,umask=022 disk.qcow2 /mnt/x
  mount -t fuse.qcowfuse disk.qcow2 /mnt/x -o ro
  getfattr -d /mnt/x/disk.raw                    counters of the L2 cache and the backend
  fusermount3 -u /mnt/x                          the end: flushes, closes, unlocks

SIGTERM and SIGINT end it as fusermount3 -u does; while the file is in use, they flush it and wait
for its users. SIGUSR1 prints the counters to the log.""",
    )
    parser.add_argument("image", metavar="IMAGE", help="a QCOW (version 1) or QCOW2 (version 2, 3) image")
    parser.add_argument(
        "mountpoint",
        metavar="MOUNTPOINT",
        help="an empty directory, in which the file appears, or a regular file, which it hides",
    )
    common = parser.add_argument_group("common options")
    common.add_argument("-r", "--read-only", action="store_true", help="do not write to the image")
    common.add_argument(
        "--snapshot", metavar="NAME_OR_ID", help="serve an internal snapshot, with its own size; implies -r"
    )
    common.add_argument(
        "--backing-format",
        metavar="raw|qcow2",
        help="the format of a backing file for which the image names none (raw; refused if it looks like QCOW)",
    )
    common.add_argument(
        "--data-file", metavar="PATH", help="the external data file, where it is not the one that the image names"
    )
    common.add_argument(
        "--key-file",
        metavar="PATH",
        help="the passphrase of an encrypted image, the whole file (a newline counts); "
        "default: systemd's credential qcowfuse.key, else a prompt",
    )
    common.add_argument(
        "--growable",
        action="store_true",
        help="truncate -s and writes past the end make the disk larger; it is never made smaller",
    )
    common.add_argument("-n", "--name", metavar="NAME", help="name of the file in the directory (disk.raw)")
    common.add_argument(
        "--allow-other", action="store_true", help="let other users in, as far as file modes let them"
    )
    common.add_argument(
        "-f", "--foreground", action="store_true", help="stay in the foreground, log to standard error"
    )
    common.add_argument("-d", "--debug", action="store_true", help="log much more, show tracebacks; implies -f")
    common.add_argument("--log-file", metavar="PATH", help="append the log to a file instead of syslog")
    common.add_argument(
        "-o",
        metavar="OPT,OPT...",
        action="append",
        default=[],
        dest="options",
        help="any long option without its dashes, and: ro, allow_other, allow_root, uid=N, gid=N, umask=OCTAL, "
        "nonempty, fsname=TEXT, nosuid, nodev, noexec, noatime, sync; what mount(8) adds is accepted",
    )
    tuning = parser.add_argument_group("tuning")
    tuning.add_argument(
        "--l2-cache-size",
        metavar="SIZE",
        help="memory for L2 tables: bytes (64M) or tables (128t); 0 is off (default: the whole disk, up to 32M)",
    )
    tuning.add_argument("--no-writeback-cache", action="store_true", help="send each write to the image at once")
    tuning.add_argument(
        "--lock-wait",
        metavar="SECONDS",
        help=f"how long to wait for an image that is in use ({DEFAULT_LOCK_WAIT:g})",
    )
    tuning.add_argument(
        "--discard",
        metavar="unmap|ignore",
        help="what a discard (fstrim) does: give space back to the host (unmap, the default), or only zero (ignore)",
    )
    tuning.add_argument(
        "--detect-zeroes",
        metavar="off|on|unmap",
        help="writes of nothing but zeroes are stored (off, the default), only noted (on), or give space back as a "
        "discard does (unmap)",
    )
    measuring = parser.add_argument_group("for measuring")
    measuring.add_argument(
        "--debug-io-delay", metavar="DELAY", help="delay each access to the image: 1ms, 250us or disk"
    )
    measuring.add_argument(
        "--debug-image-in-memory", action="store_true", help="hold the whole image in locked memory"
    )
    other = parser.add_argument_group("other")
    other.add_argument("-V", "--version", action="version", version=f"qcowfuse {__version__}")
    # argparse's own -h comes first, in a group of its own; that is where people look for it.
    return parser


def _discards(text: str) -> bool:
    if text not in ("unmap", "ignore"):
        raise ValueError(f"{text!r} is neither unmap nor ignore")
    return text == "unmap"


def _backing_format(text: str) -> str:
    if text not in ("raw", "qcow2"):
        raise ValueError(f"{text!r} is neither raw nor qcow2")
    return text


def _detect_zeroes(text: str) -> DetectZeroes:
    try:
        return DetectZeroes(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither off, on nor unmap") from None


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse a command line. Raises SystemExit, after one line to standard error or the help to standard output."""
    parser = _build_parser()
    given = parser.parse_args(argv)
    try:
        listed = sort_options(given.options)
    except MountOptionError as exc:
        parser.error(str(exc))

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
            parser.error(f"{name}: {exc}")

    fuse_options = set(listed.fuse)
    if given.allow_other:
        fuse_options.add("allow_other")
    if {"allow_other", "allow_root"} <= fuse_options:
        parser.error("allow_other and allow_root exclude each other")
    lock_wait = value("lock-wait", _seconds)
    discard = value("discard", _discards) is not False
    detect_zeroes = value("detect-zeroes", _detect_zeroes) or DetectZeroes.OFF
    if detect_zeroes is DetectZeroes.UNMAP and not discard:
        parser.error("--detect-zeroes unmap and --discard ignore exclude each other")
    foreground = flag("foreground") or flag("debug")
    return Arguments(
        image=given.image,
        open_options=OpenOptions(
            read_only=flag("read-only"),
            l2_cache_size=value("l2-cache-size", parse_cache_size),
            discard=discard,
            detect_zeroes=detect_zeroes,
            snapshot=value("snapshot", str),
            backing_format=value("backing-format", _backing_format),
            data_file=value("data-file", str),
            lock_wait=DEFAULT_LOCK_WAIT if lock_wait is None else lock_wait,
            io_delay=value("debug-io-delay", DelayModel.parse),
            image_in_memory=flag("debug-image-in-memory"),
        ),
        mount=MountSettings(
            mount_point=given.mountpoint,
            file_name=value("name", _file_name) or "disk.raw",
            fuse_options=frozenset(fuse_options),
            source=value("fsname", str),
            writeback_cache=not flag("no-writeback-cache"),
            allow_non_empty=flag("nonempty"),
            uid=value("uid", _user_or_group),
            gid=value("gid", _user_or_group),
            umask=value("umask", _umask),
            ends_on_hangup=foreground,
            growable=flag("growable"),
            counts_allocated=given.debug_io_delay is None and "debug-io-delay" not in listed.values,
        ),
        foreground=foreground,
        debug=flag("debug"),
        log_file=value("log-file", str),
        key_file=value("key-file", str),
    )
