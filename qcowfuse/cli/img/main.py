"""The program qcowfuse-img: look at images, check, make and enlarge them, handle their snapshots, without QEMU.

1. Output and options are those of qemu-img where it has them; ``--output=json`` has its shape.
2. Exit codes are qemu-img's too, so 1 is any failure, wrong arguments included: 2 and 3 have a meaning of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NoReturn

from ..._version import __version__
from ...consistency.compare import LEAK
from ...consistency.result import Fix
from ...driver.chain import open_image
from ...driver.files import open_ignoring_locks, open_storage
from ...errors import ImageUsageError, QcowFuseError
from ...printable import printable
from ...tools.check import check_image
from ...tools.create import create_image
from ...tools.extent_map import map_image
from ...tools.info import describing, is_version_1
from ...tools.snapshot_edit import apply_snapshot, create_snapshot, delete_snapshot, listing_snapshots
from .. import logs
from ..failures import describe_known, is_interrupt
from ..image_names import NAME_OPTIONS, options_of_names
from ..json_text import write_json
from ..near_misses import with_near_misses
from ..option_table import add_options
from ..passphrase import KeySource, ask_for_new, read_key_file
from ..size_text import size_text
from ..stopping import StoppedError, run_until_stopped
from . import output
from .create_options import parse_create_options, parse_size
from .progress import ProgressLine

MAX_LEAKS = 20
MAX_FINDINGS = 1000
"""Leaks, and other findings, of a check that are printed; all are counted."""


_IGNORE_LOCKS = "change an image that is in use, for lock managers that are dead: a second writer destroys it"


class ImgExit(IntEnum):
    """What the shell sees; part of the interface, and the same as qemu-img's."""

    OK = 0
    FAILED = 1
    CORRUPTIONS = 2
    LEAKS = 3
    NOT_SUPPORTED = 63


EXPLANATIONS = {
    ImgExit.OK: "done; check: no errors",
    ImgExit.FAILED: "failed: wrong arguments, or the image cannot be opened, read, understood or made",
    ImgExit.CORRUPTIONS: "check: the image is corrupted",
    ImgExit.LEAKS: "check: clusters are leaked, but nothing is corrupted",
    ImgExit.NOT_SUPPORTED: "check: the image's format (version 1) knows no checks",
}


_REPAIRS = {"leaks": Fix.LEAKS, "all": Fix.ALL}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = with_near_misses(message, self)
        self.exit(ImgExit.FAILED, printable(f"{self.prog}: {message} (--help says more)") + "\n")


def build_parser() -> _Parser:
    codes = "\n".join(f"  {code:2}  {text}" for code, text in EXPLANATIONS.items())
    parser = _Parser(
        prog="qcowfuse-img",
        description="Look at QCOW images, check and mend them, make new ones, and handle their snapshots.",
        epilog=f"exit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"qcowfuse-img {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, run, text in (
        ("info", _info, "what an image says about itself"),
        ("map", _map, "where the bytes of the virtual disk are"),
        ("check", _check, "whether the image is consistent, and mending it"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".", allow_abbrev=False)
        command.add_argument("image", metavar="IMAGE")
        command.add_argument("--output", choices=("human", "json"), default="human", help="default: human")
        command.add_argument(
            "-U", "--force-share", action="store_true", help="look at an image in use; what is seen may be torn"
        )
        command.set_defaults(run=run)
        if name == "check":
            command.add_argument("--ignore-locks", action="store_true", help=_IGNORE_LOCKS)
            command.add_argument("-q", "--quiet", action="store_true", help="print nothing but failures")
            command.add_argument(
                "-r",
                "--repair",
                choices=tuple(_REPAIRS),
                help="mend leaked clusters, or all that can be mended; nobody else may use the image meanwhile",
            )
        if name == "map":
            command.add_argument("--snapshot", metavar="NAME_OR_ID", help="of an internal snapshot")
            add_options(command, NAME_OPTIONS)
    create = commands.add_parser(
        "create", help="make an empty image", description="Make an empty image.", allow_abbrev=False
    )
    create.set_defaults(run=_create)
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
    create.add_argument(
        "--key-file", metavar="PATH", help="the passphrase of an encrypted image, the whole file; default: a prompt"
    )
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
    resize.set_defaults(run=_resize)
    resize.add_argument(
        "--key-file", metavar="PATH", help="the passphrase of an encrypted image, the whole file; default: a prompt"
    )
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
    command.set_defaults(run=_snapshot)
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
    command.set_defaults(run=_partitions)
    command.add_argument("image", metavar="IMAGE")
    command.add_argument("--output", choices=("human", "json"), default="human", help="default: human")
    command.add_argument(
        "-U", "--force-share", action="store_true", help="look at an image in use; what is seen may be torn"
    )
    command.add_argument("--snapshot", metavar="NAME_OR_ID", help="of an internal snapshot")
    command.add_argument(
        "--key-file", metavar="PATH", help="the passphrase of an encrypted image, the whole file; default: a prompt"
    )
    add_options(command, NAME_OPTIONS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with ``argv`` (without the program's name; by default the process's own); returns the exit code."""
    logs.warn_to_stderr("qcowfuse-img")
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser()
        if words and words[0].startswith("-") and words[0] not in parser._option_string_actions:
            parser.error("the command comes first: qcowfuse-img COMMAND [OPTION]...")
        given = parser.parse_args(words)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else ImgExit.FAILED
    run: Callable[[argparse.Namespace], int] = given.run
    try:
        code = run(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of our output has seen enough; the interpreter must not try to flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ImgExit.FAILED
    except StoppedError as exc:
        _fail(exc, given.image)
        return 128 + exc.number
    except (QcowFuseError, OSError) as exc:
        return _fail(exc, given.image)
    except BaseException as exc:
        if is_interrupt(exc):
            return 128 + 2
        raise


def _fail(exc: QcowFuseError | OSError, image: str) -> int:
    hint = " (qcowfuse-img create --force overwrites it)" if isinstance(exc, FileExistsError) else ""
    print(f"qcowfuse-img: {printable(describe_known(exc, image) + hint)}", file=sys.stderr)
    return ImgExit.FAILED


def _print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        print(line)


def _info(given: argparse.Namespace) -> int:
    async def run() -> int:
        async with describing(given.image, force_share=given.force_share) as described:
            if given.output == "json":
                await write_json(output.info_json(described), sys.stdout.write)
                print()
            else:
                await output.write_info(described, print)
        return ImgExit.OK

    return run_until_stopped(run)


def _map(given: argparse.Namespace) -> int:
    names = options_of_names(given)

    async def run() -> int:
        n_entries = 0
        options = names._replace(force_share=given.force_share, snapshot=given.snapshot)
        async with map_image(given.image, options) as entries:
            async for entry in entries:
                if given.output == "json":
                    # One line each, printed as found: the map of a large disk is long.
                    sys.stdout.write(("[" if not n_entries else ",\n") + json.dumps(output.map_json(entry)))
                else:
                    if not n_entries:
                        print(output.MAP_HEADING)
                    print(output.map_line(entry))
                n_entries += 1
        if given.output == "json":
            print("]")
        return ImgExit.OK

    return run_until_stopped(run)


def _check(given: argparse.Namespace) -> int:
    fix = _REPAIRS.get(given.repair, Fix.NOTHING)
    if fix and given.force_share:
        print(printable(f"qcowfuse-img: {given.image}: -r needs the image for itself: not with -U"), file=sys.stderr)
        return ImgExit.FAILED

    async def run() -> int:
        if await is_version_1(given.image, force_share=given.force_share or given.ignore_locks):
            print("qcowfuse-img: This image format does not support checks", file=sys.stderr)
            return ImgExit.NOT_SUPPORTED
        n_left_out = 0
        n_printable = {True: MAX_LEAKS, False: MAX_FINDINGS}
        with ProgressLine(sys.stderr, is_wanted=not given.quiet) as progress:

            def report(finding: str) -> None:
                nonlocal n_left_out
                is_leak = finding.startswith(LEAK)
                n_printable[is_leak] -= 1
                if n_printable[is_leak] < 0:
                    n_left_out += 1
                elif not given.quiet:
                    progress.print_above(printable(finding))

            result = await check_image(
                given.image,
                report=report,
                progress=progress.show,
                force_share=given.force_share,
                ignore_locks=given.ignore_locks,
                fix=fix,
            )
        if n_left_out and not given.quiet:
            print(f"... and {n_left_out} more", file=sys.stderr)
        if given.output == "json":
            print(output.to_text(output.check_json(given.image, result)))
        elif not given.quiet:
            _print_lines(list(output.check_lines(result)))
        if result.check_errors:
            return ImgExit.FAILED
        if result.corruptions:
            return ImgExit.CORRUPTIONS
        return ImgExit.LEAKS if result.leaks else ImgExit.OK

    return run_until_stopped(run)


def _snapshot(given: argparse.Namespace) -> int:
    image: str = given.image

    async def run() -> int:
        if given.create is None and given.apply is None and given.delete is None:
            shares = given.force_share or given.ignore_locks
            async with listing_snapshots(image, force_share=shares) as (n_snapshots, snapshots):
                if given.output == "json":
                    await write_json(output.snapshots_json(snapshots), sys.stdout.write)
                    print()
                elif n_snapshots:
                    print("Snapshot list:")
                    print(output.SNAPSHOT_HEADING)
                    async for snapshot in snapshots:
                        print(output.snapshot_line(snapshot))
            return ImgExit.OK
        if given.force_share:
            raise ImageUsageError(f"{image}: -U goes with -l alone: nobody else may have an image open that changes")
        opener = open_ignoring_locks if given.ignore_locks else open_storage
        with ProgressLine(sys.stderr, is_wanted=not given.quiet) as progress:
            if given.create is not None:
                await create_snapshot(image, given.create, progress=progress.show, opener=opener)
            elif given.apply is not None:
                await apply_snapshot(image, given.apply, progress=progress.show, opener=opener)
            else:
                await delete_snapshot(image, given.delete, progress=progress.show, opener=opener)
        return ImgExit.OK

    return run_until_stopped(run)


def _partitions(given: argparse.Namespace) -> int:
    from .partitions import print_partitions

    options = options_of_names(given)._replace(read_only=True, force_share=given.force_share, snapshot=given.snapshot)
    key = KeySource(given.key_file, os.environ)
    key.prepare(given.image, options)

    async def run() -> int:
        with key.explained():
            image = await open_image(given.image, options._replace(passphrase=key))
        try:
            await print_partitions(image, as_json=given.output == "json")
        finally:
            await image.aclose()
        return ImgExit.OK

    return run_until_stopped(run)


def _resize(given: argparse.Namespace) -> int:
    options = options_of_names(given)._replace(ignore_locks=given.ignore_locks)
    key = KeySource(given.key_file, os.environ)
    key.prepare(given.image, options)

    async def run() -> int:
        wanted = parse_size(given.size.removeprefix("+"))
        with key.explained():
            image = await open_image(given.image, options._replace(passphrase=key))
        try:
            before = image.size
            await image.grow(before + wanted if given.size.startswith("+") else wanted)
        finally:
            await image.aclose()
        if not given.quiet:
            change = "had that size already" if image.size == before else f"had {before}"
            print(printable(f"{given.image}: {size_text(image.size)} ({image.size} bytes), {change}"))
        return ImgExit.OK

    return run_until_stopped(run)


def _create(given: argparse.Namespace) -> int:
    options = parse_create_options(
        given.format, given.options, size=given.size, backing_file=given.backing, backing_format=given.backing_format
    )
    passphrase: bytearray | None = None
    if options.encryption is not None:
        passphrase = ask_for_new(given.image) if given.key_file is None else read_key_file(given.key_file)
    try:
        with ProgressLine(sys.stderr, is_wanted=not given.quiet) as progress:
            created = run_until_stopped(
                lambda: create_image(
                    given.image,
                    options,
                    overwrite=given.force,
                    progress=progress.show,
                    passphrase=passphrase,
                )
            )
    finally:
        if passphrase is not None:
            passphrase[:] = bytes(len(passphrase))
    if not given.quiet:
        print(printable(f"{given.image}: {given.format} image of {size_text(created)}"))
    return ImgExit.OK
