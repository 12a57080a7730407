"""The one way of names from images, and of other words that strangers chose, to a terminal, a log or a status line.

1. Whatever is printed or logged goes through :func:`printable` at the place where it is written, wherever it was put
   together. JSON has escapes of its own.
2. What it lets through can neither begin a line of its own, nor speak to a terminal, nor turn the text around.
"""

from __future__ import annotations

import sys
from contextlib import suppress


def printable(text: str) -> str:
    """``text`` as one line: newlines, control and format characters (escapes, bidi), separators other than a space,
    and bytes that are no text, as ``?``."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in text)


def print_error(line: str) -> None:
    """Print ``line`` to standard error, made printable. Where it can't be written, it is lost: a full disk, or a
    reader that is gone, must not change the exit code."""
    with suppress(OSError, ValueError):
        sys.stderr.write(printable(line) + "\n")
    flush_output()


def flush_output() -> None:
    """Write what was printed to standard output and standard error; what can't be written is lost."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
