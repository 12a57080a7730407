"""A tiny Linux machine for tests: the distribution's cloud kernel, busybox and an init of ours, booted by QEMU.

1. Kernel and busybox are Debian or Ubuntu packages that apt fetches from the mirrors of this machine, once: they
   are kept in ``$XDG_CACHE_HOME/qcowfuse-tests``, else in ``/var/cache/qcowfuse-tests``. Nothing is installed.
2. The machine needs no KVM: it is emulated, so it is the same everywhere that an x86-64 kernel package is to be had.
3. A loaded machine emulates time unevenly: the kernel is told not to test its timer, since it panics when that fails.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import zstandard

from . import qemu

KERNEL_PACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual")
BOOT_TIMEOUT = 240.0
"""Seconds; it takes 4 on a machine with nothing else to do."""

# In the order in which they need each other; a kernel that has one built in has no file for it.
_MODULES = (*("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk"),)
_NEWC = "070701"


@dataclass(frozen=True, slots=True)
class GuestSystem:
    """What to boot: a kernel, a static busybox, and kernel modules in the order to load them.

    ``folder`` has all that was unpacked.
    """

    folder: Path
    kernel: Path
    busybox: Path
    modules: tuple[Path, ...]


def cache_folder() -> Path:
    """Where fetched packages are kept."""
    top = os.environ.get("XDG_CACHE_HOME")
    return Path(top or "/var/cache") / "qcowfuse-tests"


def fetch_guest_system() -> GuestSystem:
    """Kernel and busybox, from the cache or by apt. Raises QemuError where apt can't get them."""
    fetched = sorted(cache_folder().glob("linux-image-*"))
    if fetched:
        folder = fetched[-1]
    else:
        try:
            folder = _fetch()
        except qemu.QemuError:  # apt's lists of packages have been deleted, or are old
            qemu.must_run("apt-get", "-q", "update")
            folder = _fetch()
    found = {re.split(r"\.ko\b", path.name)[0]: path for path in folder.rglob("virtio*.ko*")}
    return GuestSystem(
        folder=folder,
        kernel=next(folder.glob("boot/vmlinuz-*")),
        busybox=next(path for path in folder.rglob("busybox") if path.is_file() and os.access(path, os.X_OK)),
        modules=tuple(found[module] for module in _MODULES if module in found),
    )


def _fetch() -> Path:
    """Download and unpack into the cache."""
    name = _kernel_package()
    target = cache_folder() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    # Ubuntu keeps the modules apart.
    modules = [name.replace("linux-image-", "linux-modules-")] if name.endswith("-generic") else []
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        qemu.must_run("apt-get", "-q", "download", name, *modules, "busybox-static", cwd=Path(scratch))
        for package in Path(scratch).glob("*.deb"):
            qemu.must_run("dpkg-deb", "-x", package, Path(scratch) / "root")
        os.rename(Path(scratch) / "root", target)
    return target


def _kernel_package() -> str:
    """The package with the kernel that the distribution's cloud package stands for at present."""
    for package in KERNEL_PACKAGES:
        if match := re.search(r"Depends: (linux-image-\d\S+)", qemu.run("apt-cache", "depends", package).stdout):
            return match[1]
    raise qemu.QemuError(f"apt knows none of {', '.join(KERNEL_PACKAGES)}")


def make_initramfs(target: Path, system: GuestSystem, script: str) -> None:
    """An initramfs whose init loads the modules, runs ``script`` with busybox's sh, then powers off."""
    members = [_member("bin", 0o40755), _member("bin/busybox", 0o100755, system.busybox.read_bytes())]
    members += [_member(folder, 0o40755) for folder in ("proc", "sys", "dev", "mnt", "modules")]
    loads = []
    for module in system.modules:
        name = re.split(r"\.ko\b", module.name)[0]
        members.append(_member(f"modules/{name}.ko", 0o100644, _module_bytes(module)))
        loads.append(f"insmod /modules/{name}.ko")
    init = "\n".join(
        [
            "#!/bin/busybox sh",
            "/bin/busybox --install -s /bin",
            "export PATH=/bin",
            "mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev",
            *loads,
            script,
            "poweroff -f",
            "",
        ]
    )
    members += [_member("init", 0o100755, init.encode()), _member("TRAILER!!!", 0)]
    target.write_bytes(gzip.compress(b"".join(members), 1))


def _module_bytes(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
    return path.read_bytes()


def _member(name: str, mode: int, data: bytes = b"") -> bytes:
    """One file of a cpio archive in the format that the kernel unpacks."""
    encoded = name.encode() + b"\0"
    n_links = 2 if mode & 0o40000 else 1
    fields = (0, mode, 0, 0, n_links, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    head = (_NEWC + "".join(f"{field:08x}" for field in fields)).encode() + encoded
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def boot(
    system: GuestSystem,
    initramfs: Path,
    disk: Path,
    *,
    drive_options: str,
    words: Iterable[str] = (),
    memory: int = 256,
    arguments: Iterable[str] = (),
    timeout: float = BOOT_TIMEOUT,
) -> str:
    """Boot with ``disk`` as /dev/vda (raw) until power-off; what the machine wrote to its serial line.

    ``words`` go to the kernel's command line, ``arguments`` to QEMU; ``memory`` is in MiB. Raises QemuError when the
    machine fails, or does not end within ``timeout`` seconds.
    """
    log = initramfs.with_name("serial.log")
    command = [
        *("setpriv", "--pdeathsig", "KILL"),  # else the machine would outlive a killed test, and go on writing
        *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", str(memory), "-smp", "1", "-machine", "q35"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-monitor", "none"),
        *("-kernel", str(system.kernel), "-initrd", str(initramfs), "-serial", f"file:{log}"),
        *("-append", " ".join(["console=ttyS0 panic=-1 quiet no_timer_check", *words])),
        *("-drive", f"file={disk},format=raw,if=none,id=d0,{drive_options}"),
        *("-device", "virtio-blk-pci,drive=d0", *arguments),
    ]
    assert shutil.which("qemu-system-x86_64"), "needs qemu-system-x86_64 (package qemu-system-x86)"
    log.unlink(missing_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        said = log.read_text(errors="replace") if log.exists() else ""
        raise qemu.QemuError(f"the machine did not power off within {timeout:g} s:\n{said}") from None
    if done.returncode:
        raise qemu.QemuError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return log.read_text(errors="replace")
