"""A look at the first bytes of an image, before there is an event loop: is it worth asking for a passphrase?

1. The answer may be a yes too many, never a no too few: only an image that says that it is not encrypted, and that
   there is nothing below it, is told apart. What is wrong with an image is left to whoever opens it.
2. Nothing is locked or kept open, and little imported: the process that looks goes on to fork.
"""

from __future__ import annotations

import os
import struct

_MAGIC = b"QFI\xfb"
_HEADS = {1: struct.Struct(">8xQ20xI"), 2: struct.Struct(">8xQ16xI"), 3: struct.Struct(">8xQ16xI")}
"""By version: the offset of the backing file's name, and the method of encryption."""
_N_BYTES = 40


def may_need_passphrase(path: str) -> bool:
    """Whether some layer of the chain at ``path`` may be encrypted; False for what cannot be read at all."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            start = os.pread(fd, _N_BYTES, 0)
        finally:
            os.close(fd)
    except (OSError, ValueError):
        return False
    if len(start) < _N_BYTES or start[:4] != _MAGIC:
        return False
    head = _HEADS.get(int.from_bytes(start[4:8], "big"))
    return head is not None and any(head.unpack_from(start))
