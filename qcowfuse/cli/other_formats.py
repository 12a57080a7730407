"""What a file is that turned out to be no QCOW image, in words: for the message of a failure only.

1. This decides nothing: what is served is decided by the header, and what a backing file is by its image.
"""

from __future__ import annotations

import os
import stat

_MAGIC = b"QFI\xfb"
_N_BYTES = 0x9000
_HEADER_BYTES = {b"\0\0\0\1": 48, b"\0\0\0\2": 72, b"\0\0\0\3": 104}
"""What the header takes at least, by the version."""
_CONVERT = "qemu-img convert -O qcow2 makes a QCOW2 image of it"
_UNPACK = "unpack it first"
_RAW = "it needs no qcowfuse: losetup, QEMU and others use it as it is"

# (offset, bytes there, what it is, what to do): the first that fits. Offsets are from the specifications of each.
_SIGNATURES = (
    (0, b"KDMV", "a VMDK image", _CONVERT),
    (0, b"COWD", "a VMDK image", _CONVERT),
    (0, b"# Disk DescriptorFile", "the descriptor of a VMDK image", _CONVERT),
    (0x40, b"\x7f\x10\xda\xbe", "a VDI image", _CONVERT),
    (0, b"vhdxfile", "a VHDX image", _CONVERT),
    (0, b"conectix", "a VHD image", _CONVERT),
    (0, b"QED\0", "a QED image", _CONVERT),
    (0, b"WithoutFreeSpace", "a Parallels image", _CONVERT),
    (0, b"WithouFreSpacExt", "a Parallels image", _CONVERT),
    (0, b"Bochs Virtual HD Image", "a Bochs image", _CONVERT),
    (0, b"\x1f\x8b", "packed by gzip", _UNPACK),
    (0, b"\xfd7zXZ\0", "packed by xz", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "packed by zstd", _UNPACK),
    (0, b"BZh", "packed by bzip2", _UNPACK),
    (0, b"PK\x03\x04", "a ZIP archive", _UNPACK),
    (0x101, b"ustar", "a tar archive (an OVA is one)", _UNPACK),
    (0x8001, b"CD001", "an ISO image", _RAW),
    (0, b"LUKS\xba\xbe", "a raw disk image with LUKS", _RAW),
    (0x200, b"EFI PART", "a raw disk image with a GPT", _RAW),
    (0x1000, b"EFI PART", "a raw disk image with a GPT", _RAW),
    (0x1FE, b"\x55\xaa", "a raw disk image with an MBR", _RAW),
    (0x438, b"\x53\xef", "a raw disk image with an ext file system", _RAW),
    (0, b"XFSB", "a raw disk image with an XFS file system", _RAW),
)


def what_it_is(path: str) -> str | None:
    """``a VMDK image: ...`` with what to do; None for a QCOW image and for what cannot be told."""
    start, footer, size = _ends_of(path)
    if start is None:
        return None
    if start.startswith(_MAGIC):
        is_whole = size >= _HEADER_BYTES.get(start[4:8], 8)
        return None if is_whole else f"cut off after {size} bytes, in the header of a QCOW image"
    for offset, signature, name, advice in _SIGNATURES:
        if start.startswith(signature, offset):
            return f"{name}, no QCOW image: {advice}"
    if footer.startswith(b"conectix"):
        return f"a VHD image, no QCOW image: {_CONVERT}"
    if not size:
        return "an empty file, no QCOW image"
    if not start.strip(b"\0"):
        return f"a raw disk image, as it seems, no QCOW image: {_RAW}"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page, no QCOW image: a download gave that in place of the image"
    return "a text file, no QCOW image" if _is_text(start) else None


def _is_text(start: bytes) -> bool:
    """Whether all of it is UTF-8, with no control character but those of text."""
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as exc:
        if len(start) < _N_BYTES or exc.start < len(start) - 3:  # else a character of which the end is not here
            return False
        text = start[: exc.start].decode("utf-8")
    return all(character >= " " or character in "\n\r\t\f" for character in text)


def is_qcow(path: str) -> bool:
    """Whether a file begins as a QCOW image does."""
    start, _, _ = _ends_of(path)
    return start is not None and start.startswith(_MAGIC)


def _ends_of(path: str) -> tuple[bytes | None, bytes, int]:
    """The first bytes, the last 512, the size; None for what cannot be read, or may wait."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            mode = os.fstat(fd).st_mode
            if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
                size = os.lseek(fd, 0, os.SEEK_END)
                return os.pread(fd, _N_BYTES, 0), os.pread(fd, 512, max(0, size - 512)), size
        finally:
            os.close(fd)
    except (OSError, ValueError):
        pass
    return None, b"", 0
