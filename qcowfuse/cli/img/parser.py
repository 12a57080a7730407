"""The command line of qcowfuse-img. Options are those of qemu-img where it has them."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ..._version import __version__
from ...printable import printable
from ..argument_parser import ArgumentParser
from ..image_names import NAME_OPTIONS
from ..near_misses import with_near_misses
from ..option_table import add_options
from .exit_codes import EXPLANATIONS, ImgExit

_IGNORE_LOCKS = "change an image that is in use, for lock managers that are dead: a second writer destroys it"

_KEY_FILE = "the passphrase of an encrypted image, the whole file, - for standard input; default: a prompt"


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = with_near_misses(message, self)
        self.exit(ImgExit.FAILED, printable(f"{self.prog}: {message} (--help says more)") + "\n")


def build_parser() -> _Parser:
    """The parser of qcowfuse-img's command line."""
    codes = "\n".join(f"  {code:2}  {text}" for code, text in EXPLANATIONS.items())
    parser = _Parser(
        prog="qcowfuse-img",
        description="Look at QCOW images, check and mend them, make new ones, and handle their snapshots.",
        epilog=f"exit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"qcowfuse-img {__version__}")
    commands = parser.add_subparsers(
        prog=parser.prog, dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for name, text in (
        ("info", "what an image says about itself"),
        ("map", "where the bytes of the virtual disk are"),
        ("check", "whether the image is consistent, and mending it"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".", allow_abbrev=False)
        command.add_argument("image", metavar="IMAGE")
        command.add_argument("--output", choices=("human", "json"), default="human", help="default: human")
        command.add_argument(
            "-U", "--force-share", action="store_true", help="look at an image in use; what is seen may be torn"
        )
        if name == "check":
            command.add_argument("--ignore-locks", action="store_true", help=_IGNORE_LOCKS)
            command.add_argument("-q", "--quiet", action="store_true", help="print nothing but failures")
            command.add_argument(
                "-r",
                "--repair",
                choices=("leaks", "all"),
                help="mend leaked clusters, or all that can be mended; nobody else may use the image meanwhile",
            )
        if name == "map":
            command.add_argument("--snapshot", metavar="NAME_OR_ID", help="of an internal snapshot")
            add_options(command, NAME_OPTIONS)
    create = commands.add_parser(
        "create", help="make an empty image", description="Make an empty image.", allow_abbrev=False
    )
    create.add_argument("-f", dest="format", choices=("qcow2", "qcow"), default="qcow2", help="default: qcow2")
    create.add_argument(
        "-o",
        dest="options",
        metavar="NAME=VALUE,...",
        action="append",
        default=[],
        help="cluster_size (64k), compat (1.1 or 0.10), refcount_bits (16), extended_l2, lazy_refcounts (off), "
        "compression_type (zlib or zstd), preallocation (off, metadata, falloc, full), data_file, "
        "data_file_raw (off), backing_file, backing_fmt, size, encrypt.format (luks or aes), and for luks "
        "encrypt.cipher-alg (aes-256), encrypt.cipher-mode (xts), encrypt.ivgen-alg (plain64), "
        "encrypt.ivgen-hash-alg, encrypt.hash-alg (sha256), encrypt.iter-time (2000 milliseconds)",
    )
    create.add_argument("-b", "--backing", metavar="FILE", help="backing file, as seen from the new image's folder")
    create.add_argument("-F", "--backing-format", metavar="FMT", help="its format: raw, qcow or qcow2")
    create.add_argument("--key-file", metavar="PATH", help=_KEY_FILE)
    create.add_argument("-q", "--quiet", action="store_true", help="say nothing")
    create.add_argument("--force", action="store_true", help="overwrite a file that exists")
    create.add_argument("image", metavar="FILE")
    create.add_argument("size", metavar="SIZE", nargs="?", help="bytes, or with a suffix: k, M, G, T, P, E")
    resize = commands.add_parser(
        "resize",
        help="make the disk larger",
        description="Make the disk in an image that is not in use larger; the new part reads as zeroes. A crash "
        "leaves the old size or the new one. A disk is never made smaller.",
        allow_abbrev=False,
    )
    resize.add_argument("--key-file", metavar="PATH", help=_KEY_FILE)
    add_options(resize, NAME_OPTIONS)
    resize.add_argument("-q", "--quiet", action="store_true", help="say nothing")
    resize.add_argument("--ignore-locks", action="store_true", help=_IGNORE_LOCKS)
    resize.add_argument("image", metavar="IMAGE")
    resize.add_argument(
        "size", metavar="[+]SIZE", help="the new size, with + what is added to it: bytes, or k, M, G, T, P, E"
    )
    _add_snapshot_command(commands)
    _add_partitions_command(commands)
    return parser


def _add_snapshot_command(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = commands.add_parser(
        "snapshot",
        help="list, create, apply and delete internal snapshots",
        description="List, create, apply and delete the snapshots inside an image that is not in use. Each change "
        "happens as a whole or not at all, even when the power fails.",
        allow_abbrev=False,
    )
    action = command.add_mutually_exclusive_group()
    action.add_argument("-l", "--list", action="store_true", help="what there is; the default")
    action.add_argument("-c", "--create", metavar="NAME", help="keep what the disk holds now")
    action.add_argument(
        "-a",
        "--apply",
        metavar="SNAPSHOT",
        help="give the disk the contents and the size it had then; what it holds now is lost. An id or a name, "
        "the id goes first",
    )
    action.add_argument(
        "-d", "--delete", metavar="SNAPSHOT", help="forget it. A name or an id, the name goes first, as in qemu-img"
    )
    command.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    command.add_argument("--ignore-locks", action="store_true", help=_IGNORE_LOCKS)
    command.add_argument("--output", choices=("human", "json"), default="human", help="of a list; default: human")
    command.add_argument(
        "-U", "--force-share", action="store_true", help="list those of an image in use; what is seen may be torn"
    )
    command.add_argument("image", metavar="IMAGE")


def _add_partitions_command(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = commands.add_parser(
        "partitions",
        help="the partitions of the disk inside",
        description="List the partitions of the disk inside an image (GPT or MBR), and what is in them.",
        allow_abbrev=False,
    )
    command.add_argument("image", metavar="IMAGE")
    command.add_argument("--output", choices=("human", "json"), default="human", help="default: human")
    command.add_argument(
        "-U", "--force-share", action="store_true", help="look at an image in use; what is seen may be torn"
    )
    command.add_argument("--snapshot", metavar="NAME_OR_ID", help="of an internal snapshot")
    command.add_argument("--key-file", metavar="PATH", help=_KEY_FILE)
    add_options(command, NAME_OPTIONS)
