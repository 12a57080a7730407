"""The exit codes of qcowfuse-img.

They are qemu-img's, so 1 is any failure, wrong arguments included: 2 and 3 have a meaning of their own.
"""

from __future__ import annotations

from enum import IntEnum


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
