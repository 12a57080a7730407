"""Images with an ext4 in their second partition, and whether both are whole."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support import qemu


def ext4_in_partition_2(image: Path) -> None:
    """An image with a GPT and an ext4 in its second partition."""
    disk, inner = image.with_suffix(".raw"), image.with_suffix(".ext4")
    for path, size in ((disk, 32 << 20), (inner, 16 << 20)):
        path.touch()
        os.truncate(path, size)
    subprocess.run(["mkfs.ext4", "-q", "-F", inner], check=True)
    table = "label: gpt\nstart=2048,size=4096\nstart=8192,size=32768\n"
    subprocess.run(["sfdisk", "-q", disk], input=table, text=True, check=True)
    subprocess.run(["dd", f"if={inner}", f"of={disk}", "bs=4M", "seek=1", "conv=notrunc", "status=none"], check=True)
    qemu.must_run("qemu-img", "convert", "-O", "qcow2", disk, image)
    disk.unlink()
    inner.unlink()


def is_whole(image: Path, folder: Path, content: str, *, leaks: bool = False) -> None:
    """The image is clean, and so is the ext4 in its second partition, which has ``content`` in the file x.

    With ``leaks`` the image may have leaked clusters.
    """
    result = qemu.check(image)
    assert result.clean or (leaks and not result.corruptions), result.text
    inner = folder / "inner"
    qemu.must_run("qemu-img", "convert", "-O", "raw", image, folder / "raw")
    qemu.must_run("dd", f"if={folder / 'raw'}", f"of={inner}", "bs=4M", "skip=1", "count=4", "status=none")
    qemu.must_run("e2fsck", "-fn", inner)
    assert qemu.must_run("debugfs", "-R", "cat /x", inner).startswith(content)
