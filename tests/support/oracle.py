"""What an image must read as: QEMU's answer, or a bytearray that every write is applied to."""

from __future__ import annotations

from pathlib import Path

from qcowfuse.buffer import Buffer

from . import qemu


def reference_bytes(path: Path, format_name: str) -> bytes:
    """All bytes of the virtual disk as ``qemu-img convert -O raw`` gives them; for small disks."""
    raw = path.with_name(path.name + ".reference")
    qemu.convert(path, raw, "raw", source_format=format_name)
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


def reference_window(path: Path, format_name: str, *, guest_offset: int, n_bytes: int) -> bytes:
    """Bytes of a disk of any size; both numbers are multiples of 64 KiB, as ``qemu-img dd`` counts in blocks."""
    block = 64 * 1024
    assert guest_offset % block == 0
    assert n_bytes % block == 0
    raw = path.with_name(path.name + ".window")
    qemu.must_run(
        "qemu-img",
        "dd",
        "-f",
        format_name,
        "-O",
        "raw",
        f"bs={block}",
        f"skip={guest_offset // block}",
        f"count={(guest_offset + n_bytes) // block}",  # qemu-img counts the skipped blocks too
        f"if={path}",
        f"of={raw}",
    )
    try:
        return raw.read_bytes()[:n_bytes]
    finally:
        raw.unlink()


class DiskModel:
    """A virtual disk as a bytearray: ``data`` is the truth that an image is compared with."""

    def __init__(self, data: Buffer) -> None:
        self.data = bytearray(data)

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return len(self.data)

    def write(self, guest_offset: int, data: Buffer) -> None:
        """Apply a write inside the disk."""
        assert 0 <= guest_offset <= len(self.data) - len(data)
        self.data[guest_offset : guest_offset + len(data)] = data

    def read(self, guest_offset: int, n_bytes: int) -> bytes:
        """The bytes."""
        return bytes(self.data[guest_offset : guest_offset + n_bytes])


def first_difference(found: Buffer, expected: Buffer) -> str:
    """A line for a person on where two byte strings part; empty when they are the same."""
    if found == expected:
        return ""
    if len(found) != len(expected):
        return f"{len(found)} bytes, expected {len(expected)}"
    low, high = 0, len(expected)
    while high - low > 1:
        middle = (low + high) // 2
        if found[low:middle] != expected[low:middle]:
            high = middle
        else:
            low = middle
    return f"at {low:#x}: found {bytes(found[low : low + 8]).hex()}, expected {bytes(expected[low : low + 8]).hex()}"
