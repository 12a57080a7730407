"""Finding writes that hold nothing but zeroes: they need no space (``detect-zeroes``).

1. A whole request counts, as in QEMU's ``detect-zeroes``: the parts of a larger one are not looked at.
2. The comparison stops at the first byte that differs, so that data costs next to nothing.
"""

from __future__ import annotations

from functools import lru_cache

from ...buffer import Buffer


@lru_cache(maxsize=8)
def _zeroes(n_bytes: int) -> bytes:
    return bytes(n_bytes)


def is_zero(data: Buffer) -> bool:
    """Whether ``data`` is zeroes and nothing else; at most a few MiB of them."""
    # Only bytes are compared with memcmp; a memoryview would be compared item by item.
    return len(data) > 0 and not data[0] and (data if isinstance(data, bytes) else bytes(data)) == _zeroes(len(data))
