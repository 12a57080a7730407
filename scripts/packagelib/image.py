"""The container image: built out of Containerfile, then run as a container runtime runs it.

1. Building needs buildah. Running does not need an OCI runtime, which not every machine with buildah has or can use:
   the program is process 1 of its own process and mount namespaces, with the device and the capabilities that the
   documents tell a user to grant, and with no others.
2. What was served is looked at from outside, and the image is checked by the program that is in the container; by
   qemu-img too, where that is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .deb import REPOSITORY, BuildError
from .folders import own_folder
from .roots import checked, clean_root, lend_network

_SECONDS = 60
_LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096")  # buildah's own are more than some machines allow
_CAPABILITIES = (
    *("chown", "dac_override", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap", "net_bind_service"),
    *("sys_chroot", "setfcap", "sys_admin"),
)
"""What podman grants, and SYS_ADMIN."""
_RUN = """
set -e
root=$1 images=$2 capabilities=$3
shift 3
mkdir -p "$root/images" "$root/disk"
mount --bind "$images" "$root/images"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/dev"
mknod -m 666 "$root/dev/fuse" c 10 229
mknod -m 666 "$root/dev/null" c 1 3
exec chroot "$root" setpriv --bounding-set="$capabilities" --no-new-privs "$@"
"""


def try_image(suite: str) -> str:
    """Build Containerfile on a base made by mmdebstrap, and use what was built. Raises BuildError."""
    if shutil.which("buildah") is None:
        raise BuildError("needs the Debian package buildah")
    base, built = f"localhost/qcowfuse-base:{suite}", "localhost/qcowfuse:trial"
    with own_folder("qcowfuse-image-") as folder:
        root = clean_root(suite, folder)
        lend_network(root)
        container = _buildah("from", "scratch")
        _buildah("copy", "--quiet", container, str(root), "/")
        _buildah("commit", "--quiet", "--rm", container, base)
    arguments = ("--isolation=chroot", "--build-arg", f"BASE={base}", "--tag", built, "--layers=false", *_LIMITS)
    _buildah("build", *arguments, "--file", str(REPOSITORY / "Containerfile"), str(REPOSITORY))
    container = _buildah("from", *_LIMITS, built)
    try:
        entry_point = json.loads(_buildah("inspect", "--type=image", built))["OCIv1"]["config"]["Entrypoint"]
        with tempfile.TemporaryDirectory(prefix="qcowfuse-images-") as images:
            said = _use(Path(_buildah("mount", container)), Path(images), entry_point)
    finally:
        _buildah("rm", container)
    return f"{built}: {said}; mounted, written, ended and checked"


def _use(root: Path, images: Path, entry_point: list[str]) -> str:
    """Write to a disk through the container, stop it, and read the disk through the next; what --version says."""
    said = checked(_run(root, images, "qcowfuse", "--version")).strip()
    checked(_run(root, images, "qcowfuse-img", "create", "-q", "/images/disk.qcow2", "64M"))
    data = b"written through the container"
    with _served(root, images, *entry_point, "--allow-other", "/images/disk.qcow2", "/disk") as disk:
        with disk.open("r+b") as file:
            file.seek(1 << 20)
            file.write(data)
        with disk.open("rb") as file:
            file.seek(1 << 20)
            _expect(file.read(len(data)), data)
    checked(_run(root, images, "qcowfuse-img", "check", "/images/disk.qcow2"))
    if shutil.which("qemu-img"):
        command = ["qemu-img", "check", str(images / "disk.qcow2")]
        checked(subprocess.run(command, capture_output=True, text=True, check=False))
    with _served(root, images, *entry_point, "-r", "/images/disk.qcow2", "/disk") as disk, disk.open("rb") as file:
        file.seek(1 << 20)
        _expect(file.read(len(data)), data)
    return said


def _expect(found: bytes, wanted: bytes) -> None:
    if found != wanted:
        raise BuildError(f"the disk in the container reads {found!r} where {wanted!r} was written")


@contextmanager
def _served(root: Path, images: Path, *command: str) -> Iterator[Path]:
    """The disk that the command in the container serves, while it does; SIGTERM ends it, with exit code 0."""
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(_command(root, images, *command), stdin=subprocess.DEVNULL, stdout=log, stderr=log) as outer,
    ):

        def failed(what: str) -> BuildError:
            log.seek(0)
            return BuildError(f"the container {what}: {log.read()[-3000:]}")

        try:
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
            end = time.monotonic() + _SECONDS
            while (found := _disk_of(children)) is None:
                if outer.poll() is not None or time.monotonic() > end:
                    raise failed("serves nothing")
                time.sleep(0.05)
            process, disk = found
            yield disk
            os.kill(process, signal.SIGTERM)
            try:
                code = outer.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                raise failed("does not end at SIGTERM") from None
            if code:
                raise failed(f"ended with exit code {code}")
        finally:
            outer.kill()


def _disk_of(children: Path) -> tuple[int, Path] | None:
    """The process in the container, and the disk that it serves as this machine sees it; None while there is none."""
    try:
        process = int(children.read_text().split()[0])
        disk = Path(f"/proc/{process}/root/disk/disk.raw")
        disk.stat()
    except (OSError, IndexError):
        return None
    return process, disk


def _command(root: Path, images: Path, *command: str) -> list[str]:
    capabilities = ",".join(("-all", *(f"+{name}" for name in _CAPABILITIES)))
    namespaces = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child")
    return [*namespaces, "bash", "-c", _RUN, "container", str(root), str(images), capabilities, *command]


def _run(root: Path, images: Path, *command: str) -> subprocess.CompletedProcess[str]:
    words = _command(root, images, *command)
    return subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def _buildah(*arguments: str) -> str:
    command = ["buildah", "--storage-driver=vfs", *arguments]
    return checked(subprocess.run(command, capture_output=True, text=True, check=False)).strip()
