"""How much memory a command of qcowfuse-img takes at most, and images whose headers ask for much of it.

The peak is what the kernel says of the process itself (VmHWM): that of ``resource.getrusage`` has in it what its
parent had when it started it.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

LIMIT_KIB = 64 << 10
"""What a command may take above one that has next to nothing to do."""
_RUN = """
import sys
from qcowfuse.cli.img.main import main
code = main(sys.argv[2:])
sys.stdout.flush()
with open("/proc/self/status") as status, open(sys.argv[1], "w") as result:
    result.write(next(line.split()[1] for line in status if line.startswith("VmHWM")))
sys.exit(code)
"""


class Outcome(NamedTuple):
    """``peak`` in KiB."""

    code: int
    stdout: bytes
    stderr: str
    peak: int


def run_img(folder: Path, *arguments: str | Path) -> Outcome:
    """Run qcowfuse-img in a process of its own; ``folder`` is for the figure."""
    figure = folder / "peak"
    command = [sys.executable, "-c", _RUN, figure, *arguments]
    done = subprocess.run(command, capture_output=True, timeout=120)
    return Outcome(done.returncode, done.stdout, done.stderr.decode(), int(figure.read_text()))


def header(
    *,
    cluster_bits: int = 16,
    size: int = 1 << 20,
    l1_size: int = 1,
    l1_offset: int = 1 << 20,
    refcount_order: int = 4,
    n_snapshots: int = 0,
    snapshots_offset: int = 0,
    incompatible: int = 0,
    autoclear: int = 0,
    crypt_method: int = 0,
    backing: bytes = b"",
    extensions: tuple[tuple[int, bytes], ...] = (),
) -> bytes:
    """The first cluster of a version 3 image with an empty refcount table in its second cluster."""
    behind = b"".join(struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8) for kind, data in extensions)
    behind += bytes(8)
    fields = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        b"QFI\xfb",
        3,
        104 + len(behind) if backing else 0,
        len(backing),
        cluster_bits,
        size,
        crypt_method,
        l1_size,
        l1_offset,
        1 << cluster_bits,
        1,
        n_snapshots,
        snapshots_offset,
        incompatible,
        0,
        autoclear,
        refcount_order,
        104,
    )
    return (fields + behind + backing).ljust(1 << cluster_bits, b"\0")


def write_sparse(path: Path, parts: dict[int, bytes], length: int = 0) -> Path:
    """A file with ``parts`` by offset, at least ``length`` bytes long, and holes elsewhere."""
    with path.open("wb") as file:
        for offset, data in parts.items():
            file.seek(offset)
            file.write(data)
        file.truncate(max(length, file.tell(), *(offset + len(data) for offset, data in parts.items())))
    return path
