"""The one way of names from images, and of other words that strangers chose, to a terminal, a log or a status line.

1. Whatever is printed or logged goes through :func:`printable` at the place where it is written, wherever it was put
   together. JSON has escapes of its own.
2. What it lets through can neither begin a line of its own, nor speak to a terminal, nor turn the text around.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


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
        try:
            stream.flush()
        except ValueError:  # it is closed
            pass
        except OSError:
            _give_up(stream)


def _give_up(stream: TextIO) -> None:
    """Let the rest of what was printed go nowhere. Python would write it once more when the process ends, complain,
    and make the exit code 120 (Python 3.13)."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
