"""Where both programs begin: what Ctrl-C does and where output goes, before anything that takes time is imported.

1. From here until a program handles it, Ctrl-C ends the process as it ends any other, without a traceback.
2. No garbage is collected while modules are imported: nearly all that they make is there to stay. Each process that
   serves collects its own from then on (:func:`qcowfuse.daemon.process.collect_own_garbage`).
3. Descriptors 0, 1 and 2 are open. The image would get the number of one that is closed, and an error message of a
   library would be written into the image.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import sys

from .verb_names import VERBS


def qcowfuse() -> int:
    """The program qcowfuse; returns its exit code."""
    _let_interrupts_end_it()
    open_standard_streams()
    if len(sys.argv) > 1 and sys.argv[1] in VERBS:
        from .verbs.main import main as verb

        return verb(sys.argv[1:])
    gc.disable()
    from .mount.main import main

    return main()


def qcowfuse_img() -> int:
    """The program qcowfuse-img; returns its exit code."""
    _let_interrupts_end_it()
    open_standard_streams()
    gc.disable()
    from .img.main import main

    return main()


def _let_interrupts_end_it() -> None:
    # One that is ignored (nohup, a job in the background of a script) stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def open_standard_streams() -> None:
    """Rule 3: a stream that is closed (``>&-``) becomes /dev/null."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(_open_null(), True)  # it gets the lowest number that is free
    # Python has none of its own for a descriptor that was closed.
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        plain = sys.stdout
        encoding, errors, by_lines, at_once = plain.encoding, plain.errors, plain.line_buffering, plain.write_through
        sys.stdout = _Output(plain.detach(), encoding, errors, line_buffering=by_lines, write_through=at_once)


def _open_null() -> int:
    try:
        return os.open(os.devnull, os.O_RDWR)
    except OSError:  # a system without devices
        return os.memfd_create("null", 0)


class _Output(io.TextIOWrapper):
    """Standard output, whose failures name it as the place, as those of other files do."""

    def write(self, text: str) -> int:
        """See TextIOWrapper. Raises OSError."""
        try:
            return super().write(text)
        except OSError as exc:
            exc.filename = "standard output"
            raise

    def flush(self) -> None:
        """See TextIOWrapper. Raises OSError."""
        try:
            super().flush()
        except OSError as exc:
            exc.filename = "standard output"
            raise
