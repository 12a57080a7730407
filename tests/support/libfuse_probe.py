"""Serve a new image with this very Python, use it, and print as JSON what the mount has: for scripts/matrix."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pyfuse3

from qcowfuse.fuse.libfuse.features import Feature
from tests.support.mounting import Mounted, create_image

# pyfuse3 must never make a lock of trio's: none is needed, and 3.4 would make it before the wait is exchanged.
NO_LOCK = """
import trio
real = trio.Lock

def lock(*arguments):
    import sys
    # Compiled code has no frame of its own: a lock that pyfuse3 makes has the caller of pyfuse3 for its maker.
    assert not sys._getframe(1).f_code.co_filename.endswith('extended_session.py'), 'pyfuse3 made a lock'
    return real(*arguments)
trio.Lock = lock
"""


def use(file: Path) -> list[str]:
    """Write, read, discard, look for holes; what went wrong."""
    problems = []
    data = os.urandom(4 << 20)
    with file.open("r+b") as stream:
        stream.write(data)
        os.fsync(stream.fileno())
    with file.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if stream.read(4 << 20) != data:
            problems.append("other bytes were read than written")
        if subprocess.run(["fallocate", "-p", "-o", "1M", "-l", "1M", file], check=False).returncode:
            problems.append("no discard")
        elif os.pread(stream.fileno(), 1 << 20, 1 << 20) != bytes(1 << 20):
            problems.append("what was discarded is not zero")
        if os.lseek(stream.fileno(), 0, os.SEEK_HOLE) != 1 << 20:
            problems.append("the hole is not seen")
        if os.lseek(stream.fileno(), 1 << 20, os.SEEK_DATA) != 2 << 20:
            problems.append("the end of the hole is not seen")
    return problems


def main() -> None:
    """Print the state."""
    with tempfile.TemporaryDirectory() as folder:
        image, mount_point = create_image(Path(folder) / "image"), Path(folder) / "mnt"
        mount_point.mkdir()
        with Mounted(image, mount_point, "-d", patch=NO_LOCK) as mount:
            problems = use(mount.file)
            names = {feature: f"user.qcowfuse.libfuse.{feature}" for feature in Feature}
            features = {feature: int(os.getxattr(mount.file, name)) for feature, name in names.items()}
            version = int(os.getxattr(mount.file, "user.qcowfuse.libfuse.version"))
        problems += [line for line in mount.log.splitlines() if "Traceback" in line or "bug in qcowfuse" in line]
        if subprocess.run(["qemu-img", "check", "-q", image], check=False).returncode:
            problems.append("qemu-img check complains")
    state = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "libfuse": f"{version // 100}.{version % 100}",
        "pyfuse3": pyfuse3.__version__,
        "features": features,
        "problems": problems,
    }
    json.dump(state, sys.stdout)


if __name__ == "__main__":
    main()
