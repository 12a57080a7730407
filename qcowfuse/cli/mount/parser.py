"""argparse for qcowfuse: the table of ``options``, and what stands around it in the help."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from ..._version import __version__
from ...printable import printable
from ..argument_parser import ArgumentParser
from ..exit_codes import EXPLANATIONS, ExitCode
from ..near_misses import with_near_misses, without_mount_point
from ..option_table import add_options
from ..verb_names import VERBS
from .options import OPTIONS


class _Parser(ArgumentParser):
    words: Sequence[str] = ()
    """The command line, for hints."""

    def error(self, message: str) -> NoReturn:
        message = with_near_misses(message, self)
        if message.endswith("required: MOUNTPOINT"):
            message += without_mount_point(self.words)
        self.exit(ExitCode.USAGE, printable(f"qcowfuse: {message} (qcowfuse --help says more)") + "\n")


def build_parser(words: Sequence[str] = (), *, takes_mount_point: bool = True) -> argparse.ArgumentParser:
    """The parser of qcowfuse's command line ``words``; without the last argument, of what stands before ``--`` of
    ``run``."""
    codes = "\n".join(f"  {code.value}  {text}" for code, text in EXPLANATIONS.items())
    verbs = "\n".join(f"  {name:8}{text}" for name, text in VERBS.items())
    parser = _Parser(
        prog="qcowfuse",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="qcowfuse [OPTION]... IMAGE MOUNTPOINT\n       qcowfuse VERB [ARGUMENT]...",
        description="Serve a QCOW or QCOW2 image as one raw file of the size of its disk, read and write.\n"
        "Returns when the mount serves, and lives on in the background.",
        epilog=f"""verbs (qcowfuse VERB --help says more; an image of such a name is ./{next(iter(VERBS))}):
{verbs}

exit codes:
{codes}

examples:
  qcowfuse disk.qcow2 /mnt/x                     then: losetup -fP --show /mnt/x/disk.raw
  qcowfuse -r disk.qcow2 /tmp/disk.raw           mounted over an existing regular file
  qcowfuse -x disk.qcow2 /mnt/x                  what is written is thrown away in the end
  qcowfuse --overlay new.qcow2 disk.qcow2 /mnt/x it goes to new.qcow2
  qcowfuse -o ro,allow_other,umask=022 disk.qcow2 /mnt/x
  mount -t fuse.qcowfuse disk.qcow2 /mnt/x -o ro
  qcowfuse status /mnt/x                         counters of the L2 cache and the backend
  qcowfuse umount /mnt/x                         flush, close and unlock (or fusermount3 -u)

SIGTERM and SIGINT end it as fusermount3 -u does; while the file is in use, they flush it and wait
for its users. SIGUSR1 prints the counters to the log.""",
    )
    parser.words = words
    parser.add_argument("image", metavar="IMAGE", help="a QCOW (version 1) or QCOW2 (version 2, 3) image")
    if takes_mount_point:
        parser.add_argument(
            "mountpoint",
            metavar="MOUNTPOINT",
            help="an empty directory, in which the file appears, or a regular file, which it hides",
        )
    add_options(parser, OPTIONS)
    other = parser.add_argument_group("other")
    other.add_argument("-V", "--version", action="version", version=f"qcowfuse {__version__}")
    # argparse's own -h comes first, in a group of its own; that is where people look for it.
    return parser
