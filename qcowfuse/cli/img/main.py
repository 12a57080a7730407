"""The program qcowfuse-img: look at images, check, make and enlarge them, handle their snapshots, without QEMU.

1. Output and options are those of qemu-img where it has them; ``--output=json`` has its shape.
2. A command imports what it needs, and no command what only another one does: for the short ones, the time that they
   take is the time of their imports.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from ...errors import QcowFuseError
from ...printable import print_error
from ...system.late_logging import before_messages
from ..failures import describe_known, is_interrupt, lacks_memory
from ..stopping import StoppedError
from .arguments import Given, parse
from .exit_codes import ImgExit


def main(argv: Sequence[str] | None = None) -> int:
    """Run with ``argv`` (without the program's name; by default the process's own); returns the exit code."""
    before_messages(_log_to_stderr)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        given = parse(words)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else ImgExit.FAILED
    run: Callable[[Given], int] = import_module(f".commands.{given.command}", __package__).run
    if not gc.isenabled():  # by the entry, while modules are imported
        gc.freeze()
        gc.enable()
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
        if lacks_memory(exc):
            return _fail(exc, given.image)
        raise


def _log_to_stderr() -> None:
    from ..logs import warn_to_stderr

    warn_to_stderr("qcowfuse-img")


def _fail(exc: BaseException, image: str) -> int:
    hint = " (qcowfuse-img create --force overwrites it)" if isinstance(exc, FileExistsError) else ""
    print_error(f"qcowfuse-img: {describe_known(exc, image)}{hint}")
    return ImgExit.FAILED
