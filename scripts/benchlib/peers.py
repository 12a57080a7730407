"""The newest builds of the other programs, unpacked beside the system."""

from __future__ import annotations

import shutil
from pathlib import Path

from .tools import run

_BACKPORTS = "qemu-utils/{0}-backports,qemu-system-common/{0}-backports,nbdkit,libnbd-bin,libqcow-utils"
_WRAPPER = """#!/bin/sh
r={root}
exec $r/usr/lib64/ld-linux-x86-64.so.2 --library-path $r/usr/lib/x86_64-linux-gnu $r/usr/bin/{name} "$@"
"""


def get_peers(folder: Path, suite: str) -> None:
    """Unpack Debian's newest builds of the contenders beside the system; nothing is installed.

    The mirror is the one that the machine's own apt sources name.
    """
    if shutil.which("mmdebstrap") is None:
        raise SystemExit("bench: needs mmdebstrap (apt install mmdebstrap)")
    sites = run("apt-get", "indextargets", "--format", "$(REPO_URI)").splitlines()
    mirrors = [site for site in sites if site.rstrip("/").endswith("/debian")]
    if not mirrors:
        raise SystemExit("bench: apt's sources name no Debian mirror")
    folder.mkdir(parents=True, exist_ok=True)
    root = folder.resolve() / "root"
    lines = [f"deb {mirrors[0]} {suite} main", f"deb {mirrors[0]} {suite}-backports main"]
    include = _BACKPORTS.format(suite)
    run("mmdebstrap", "--quiet", "--variant=extract", f"--include={include}", suite, str(root), *lines)
    for name in ("qemu-storage-daemon", "qemu-nbd", "nbdkit", "nbdfuse", "qcowmount"):
        if (root / "usr/bin" / name).exists():
            wrapper = folder / name
            wrapper.write_text(_WRAPPER.format(root=root, name=name))
            wrapper.chmod(0o755)
            print(wrapper)
