"""A look at the first bytes of an image, before there is an event loop: is it worth asking for a passphrase?

1. The answer is no only for an image whose header says that it is not encrypted and names no backing file. It may be
   yes for an image that needs no passphrase. A damaged image is judged when it is opened.
2. Nothing is locked or kept open, and little imported: the process that looks goes on to fork.
"""

from __future__ import annotations

import os
import struct

from ..storage.opened import open_descriptor

_MAGIC = b"QFI\xfb"
_HEADS = {1: struct.Struct(">8xQ20xI"), 2: struct.Struct(">8xQ16xI"), 3: struct.Struct(">8xQ16xI")}
"""By version: the offset of the backing file's name, and the method of encryption."""
_N_BYTES = 40


def may_need_passphrase(path: str) -> bool:
    """Whether some layer of the chain at ``path`` may be encrypted; False for what cannot be read at all."""
    try:
        fd = open_descriptor(path, writable=False)
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
