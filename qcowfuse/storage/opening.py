"""From a path, or a descriptor, to what reads and writes the file: with the event loop, or without one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeAlias

from ..system.alone import check_stopped, is_alone, run_blocking
from .blocking_file import BlockingFile
from .opened import open_descriptor

if TYPE_CHECKING:
    from .file import FileStorage

AnyFile: TypeAlias = "FileStorage | BlockingFile"


async def open_file(path: str, *, writable: bool, io_uring: bool = False) -> AnyFile:
    """Open a regular file or block device; ``io_uring``: for what must wait, where it can be had. Without an event
    loop it can only be read.

    Raises OSError, with the file name, for anything else, and EROFS for a read-only device that shall be written.
    """

    def opens() -> int:
        return open_descriptor(path, writable=writable, before_wait=check_stopped)

    return file_on(await run_blocking(opens), path, writable=writable, io_uring=io_uring)


def file_on(fd: int, path: str, *, writable: bool, io_uring: bool = False) -> AnyFile:
    """As :func:`open_file`, for a descriptor, which it owns from now on. Raises OSError."""
    try:
        if is_alone():
            assert not writable, f"{path}: what writes it needs an event loop"
            return BlockingFile(fd, path)
        from .file import FileStorage

        return FileStorage(fd, path, writable=writable, io_uring=io_uring)
    except BaseException:
        os.close(fd)
        raise
