"""Root file systems of other releases, made with mmdebstrap, and commands that run in them. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from .deb import BUILD_PACKAGES, REPOSITORY, BuildError, maintainer

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qcowfuse"
PROJECT = "/mnt"
"""Where the project is in a root file system."""
_FROM_HOST = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
_SOURCES = ("qcowfuse", "docs", "packaging", "scripts", "pyproject.toml", "README.md", "SECURITY.md", "CHANGELOG.md")
_ENTER = """
set -e
mount --bind "$2" "$1/mnt"
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
mount -t sysfs -o ro sysfs "$1/sys"
mount -t tmpfs tmpfs "$1/tmp"
root=$1
shift 2
exec chroot "$root" "$@"
"""


def lend_network(root: Path) -> None:
    """Give a root file system this machine's names, certificates and package index."""
    for file in map(Path, _FROM_HOST):
        if file.exists():
            target = root / file.relative_to("/")
            target.unlink(missing_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def enter(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a root file system, with the project at PROJECT. Its mounts and processes end with it."""
    lend_network(root)
    name, _, address = maintainer().rpartition(" ")
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
        "DEBFULLNAME": name,
        "DEBEMAIL": address.strip("<>"),
        "PIP_CERT": _FROM_HOST[-1],
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    namespace = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child")
    return subprocess.run(
        [*namespace, "bash", "-c", _ENTER, "enter", str(root), str(REPOSITORY), *command],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env=environment,
    )


def checked(done: subprocess.CompletedProcess[str]) -> str:
    """The output. Raises BuildError with the end of it, where the command failed."""
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, done.args))[:300]}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def make_root(root: Path, suite: str, packages: tuple[str, ...]) -> Path:
    """A minimal Debian of a suite in the folder ``root``, if it is not there yet. Raises BuildError."""
    if os.geteuid() != 0:
        raise BuildError("needs to be root, for file systems of other releases")
    if shutil.which("mmdebstrap") is None:
        raise BuildError("needs the Debian package mmdebstrap")
    done = root / ".made"
    wanted = f"{suite} {' '.join(packages)}"
    if not done.exists() or done.read_text() != wanted:
        print(f"making {suite} in {root}", flush=True)
        shutil.rmtree(root, ignore_errors=True)
        root.parent.mkdir(parents=True, exist_ok=True)
        command = [
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            f"--include={','.join(packages)}",
            suite,
            str(root),
        ]
        checked(subprocess.run(command, capture_output=True, text=True, check=False))
        done.write_text(wanted)
    return root


def clean_root(suite: str, folder: Path) -> Path:
    """A copy in ``folder`` of a system with nothing installed, for use once. Raises BuildError."""
    made = make_root(CACHE / "packages" / f"clean-{suite}", suite, ("ca-certificates",))
    copy = folder / suite
    checked(subprocess.run(["cp", "-a", str(made), str(copy)], capture_output=True, text=True, check=False))
    return copy


def build_in_root(suite: str, output: Path, revision: int) -> Path:
    """The Debian package for a suite, built in a root file system; its path in ``output``. Raises BuildError."""
    root = make_root(CACHE / "packages" / f"build-{suite}", suite, BUILD_PACKAGES)
    print(f"building for {suite}", flush=True)
    # pip and dpkg write beside what they read: the tree itself is not written to.
    script = (
        f"rm -rf /srv/dist; mkdir /tmp/copy; cd {PROJECT} && cp -r LICENSE {' '.join(_SOURCES)} /tmp/copy/ &&"
        f" python3 -B /tmp/copy/scripts/package --output /srv/dist deb --revision {revision}"
    )
    checked(enter(root, "sh", "-c", script))
    (package,) = (root / "srv/dist").glob("*.deb")
    output.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(package, output))
