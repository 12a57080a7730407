"""All options of qcowfuse and their help, for argparse."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ..._version import __version__
from ...printable import printable
from ..exit_codes import EXPLANATIONS, ExitCode
from ..image_names import add_name_options
from ..near_misses import with_near_misses


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = with_near_misses(message, self)
        self.exit(ExitCode.USAGE, printable(f"qcowfuse: {message} (qcowfuse --help says more)") + "\n")


def build_parser(default_lock_wait: float) -> argparse.ArgumentParser:
    """The parser of qcowfuse's command line; ``default_lock_wait`` in seconds, for the help."""
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
    common.add_argument(
        "--user", metavar="NAME", help="once it serves, run as this user (only root can; the mount stays root's)"
    )
    common.add_argument(
        "--no-sandbox",
        action="store_true",
        help="keep what serving does not need: other files, other system calls, capabilities",
    )
    add_name_options(parser.add_argument_group("names inside images"))
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
        help=f"how long to wait for an image that is in use ({default_lock_wait:g})",
    )
    tuning.add_argument(
        "--aio",
        metavar="io_uring|threads",
        help="how to wait for reads from the disk (default: io_uring, and threads where it is not to be had)",
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
