"""What a partition holds, by a look at few magic numbers.

1. A name is given only where the bytes in their places say so, and never more than a name: this decides nothing but
   what is shown.
2. Names are those of blkid(8). What wraps other things (LUKS, LVM) goes before file systems, and FAT, whose signs are
   weak, comes last.
"""

from __future__ import annotations

import struct

from .values import Look

_START_BYTES = 4096
_ISO_PLACE, _FAR_PLACE, _FAR_BYTES = 0x8001, 65526, 82
"""The last two: the end of a first page of 64 KiB (swap), and the magic of btrfs behind it."""
_BTRFS_PLACE = 0x10040
_EXT_PLACE = 1024

# fs/ext4/ext4.h
_HAS_JOURNAL = 0x4
_JOURNAL_DEVICE = 0x8
_EXT3_INCOMPATIBLE = 0x2 | 0x4 | 0x8 | 0x10
_EXT3_READ_ONLY = 0x1 | 0x2 | 0x4

_BY_START = (
    ("crypto_LUKS", 0, b"LUKS\xba\xbe"),
    *(("LVM2_member", 512 * sector + 24, b"LVM2 001") for sector in range(4)),
    ("BitLocker", 3, b"-FVE-FS-"),
    ("ntfs", 3, b"NTFS    "),
    ("exfat", 3, b"EXFAT   "),
    ("xfs", 0, b"XFSB"),
    ("squashfs", 0, b"hsqs"),
    ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
)
_SWAP = (b"SWAPSPACE2", b"SWAP-SPACE")


def is_boot_sector(sector: bytes) -> bool:
    """Whether the first sector of a disk belongs to a file system for all of it (FAT, NTFS, exFAT)."""
    return _is_fat(sector) or sector[3:11] in (b"NTFS    ", b"EXFAT   ", b"-FVE-FS-")


def find_file_system(n_bytes: int) -> Look[str]:
    """What is in ``n_bytes``, of which offsets count from 0; empty where nothing is recognised."""
    start = (yield 0, min(n_bytes, _START_BYTES)) if n_bytes else b""
    for name, place, magic in _BY_START:
        if start.startswith(magic, place):
            return name
    if start[_EXT_PLACE + 0x38 : _EXT_PLACE + 0x3A] == b"\x53\xef" and len(start) >= _EXT_PLACE + 0x68:
        return _ext_version(start)
    if start[4086:4096] in _SWAP:
        return "swap"
    if n_bytes >= _FAR_PLACE + _FAR_BYTES:
        far = yield _FAR_PLACE, _FAR_BYTES
        if far[:10] in _SWAP:
            return "swap"
        if far.startswith(b"_BHRfS_M", _BTRFS_PLACE - _FAR_PLACE):
            return "btrfs"
    if n_bytes >= _ISO_PLACE + 5 and (yield _ISO_PLACE, 5) == b"CD001":
        return "iso9660"
    return "vfat" if _is_fat(start) else ""


def _ext_version(start: bytes) -> str:
    compatible, incompatible, read_only = struct.unpack_from("<III", start, _EXT_PLACE + 0x5C)
    if incompatible & _JOURNAL_DEVICE:
        return "jbd"
    if incompatible & ~_EXT3_INCOMPATIBLE or read_only & ~_EXT3_READ_ONLY:
        return "ext4"
    return "ext3" if compatible & _HAS_JOURNAL else "ext2"


def _is_fat(start: bytes) -> bool:
    is_named = start[54:59] in (b"FAT12", b"FAT16") or start[82:87] == b"FAT32"
    return is_named and start[510:512] == b"\x55\xaa" and start[:1] in (b"\xeb", b"\xe9")
