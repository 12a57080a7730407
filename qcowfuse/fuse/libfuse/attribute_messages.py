"""The two messages of linux/fuse.h that carry attributes: SETATTR of times alone, and what answers it.

1. Only the request that the kernel makes by itself is understood: both times, perhaps a handle, and nothing else. One
   that sets a size, an owner or "now" is for libfuse to take apart.
2. The lay-out is that of protocol 7.9 and later; libfuse 3 refuses an older kernel.
"""

from __future__ import annotations

import struct

from pyfuse3 import EntryAttributes

SETATTR_BYTES = 88
"""Length of ``struct fuse_setattr_in``, without the header."""

_FATTR_MTIME, _FATTR_FH, _FATTR_CTIME = 1 << 5, 1 << 6, 1 << 10
_TIMES = _FATTR_MTIME | _FATTR_CTIME
_VALID = struct.Struct("<I")
# mtime, ctime, atimensec, mtimensec, ctimensec
_SET_TIMES = struct.Struct("<QQIII")
_SET_TIMES_OFFSET = 40
# fuse_attr_out: attr_valid, attr_valid_nsec, dummy; then fuse_attr: ino, size, blocks, three times, their
# nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags
_ATTRIBUTES = struct.Struct("<QII6Q10I")
_NS = 1_000_000_000


def parse_set_times(view: memoryview, start: int) -> tuple[int, int] | None:
    """The times of last modification and change, in nanoseconds since 1970, of a ``fuse_setattr_in`` at ``start``;
    None by rule 1."""
    (valid,) = _VALID.unpack_from(view, start)
    if valid & ~_FATTR_FH != _TIMES:
        return None
    mtime, ctime, _, mtime_ns, ctime_ns = _SET_TIMES.unpack_from(view, start + _SET_TIMES_OFFSET)
    # The kernel's seconds are signed: those before 1970 are left to libfuse.
    if mtime >> 63 or ctime >> 63:
        return None
    return mtime * _NS + mtime_ns, ctime * _NS + ctime_ns


def pack_attributes(entry: EntryAttributes) -> bytes:
    """``struct fuse_attr_out``, as libfuse makes it."""
    timeout = entry.attr_timeout
    atime, atime_ns = divmod(entry.st_atime_ns, _NS)
    mtime, mtime_ns = divmod(entry.st_mtime_ns, _NS)
    ctime, ctime_ns = divmod(entry.st_ctime_ns, _NS)
    return _ATTRIBUTES.pack(
        int(timeout),
        int(timeout % 1 * _NS),
        0,
        entry.st_ino,
        entry.st_size,
        entry.st_blocks,
        atime & (1 << 64) - 1,
        mtime & (1 << 64) - 1,
        ctime & (1 << 64) - 1,
        atime_ns,
        mtime_ns,
        ctime_ns,
        entry.st_mode,
        entry.st_nlink,
        entry.st_uid,
        entry.st_gid,
        0,
        entry.st_blksize,
        0,
    )
