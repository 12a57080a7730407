"""What a container, a chroot, a strict system or an old kernel lacks: there a reason to skip, elsewhere a failure."""

from __future__ import annotations

import fcntl
import itertools
import os
import stat
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

from qcowfuse.system import landlock

LACKS = "this container lacks"
FORBIDS = "this system forbids"
OLDER_KERNEL = "this kernel is older than"
"""How the reasons begin; skips for them are declared."""

LOOP_CTL_ADD = 0x4C80
"""Of linux/loop.h: have the kernel add the loop device of a number."""
N_FREE_LOOP_DEVICES = 4
"""That a test may use at the same time."""

_MARKS = ("/run/systemd/container", "/run/host/container-manager", "/.dockerenv", "/run/.containerenv")


def is_contained() -> bool:
    """Whether this is a container, or a root directory that is not the machine's."""
    if "container" in os.environ or any(map(os.path.exists, _MARKS)):
        return True
    try:
        return not os.path.samefile("/proc/1/root", "/")
    except OSError:
        return False


def lacks(what: str) -> NoReturn:
    """Skip the test in a container, fail it elsewhere."""
    if is_contained():
        pytest.skip(f"{LACKS} {what}")
    pytest.fail(f"this machine lacks {what}")


def need_loop_devices() -> None:
    """Skip in a container without them. See that enough are free, whatever other programs use of them."""
    if not os.access("/dev/loop-control", os.R_OK | os.W_OK):
        lacks("loop devices (/dev/loop-control and /dev/loop*)")
    if not free_loop_devices():
        lacks("device nodes of loop devices that are free, and the right to make them")


def free_loop_devices() -> list[Path]:
    """The nodes of N_FREE_LOOP_DEVICES that no program uses now; fewer where this system does not let us make them.

    A container shares the kernel's loop devices with the whole machine, and its /dev keeps the nodes that it got when
    it began. The kernel gives the first free device to losetup, which fails where that has no node.
    """
    found: list[Path] = []
    numbers = itertools.count()
    while len(found) < N_FREE_LOOP_DEVICES:
        number = next(numbers)
        device, in_sysfs = Path(f"/dev/loop{number}"), Path(f"/sys/block/loop{number}")
        try:
            if not in_sysfs.exists():
                _add_loop_device(number)
            if not device.exists():
                major, minor = (in_sysfs / "dev").read_text().split(":")
                os.mknod(device, stat.S_IFBLK | 0o660, os.makedev(int(major), int(minor)))
        except FileExistsError:
            pass  # the kernel or another test was faster
        except OSError:
            break
        if not (in_sysfs / "loop/backing_file").exists():
            found.append(device)
    return found


def _add_loop_device(number: int) -> None:
    control = os.open("/dev/loop-control", os.O_RDWR)
    try:
        fcntl.ioctl(control, LOOP_CTL_ADD, number)
    finally:
        os.close(control)


def need_landlock() -> None:
    """Skip in a container whose filter of system calls hides it."""
    if not landlock.abi_version():
        lacks("Landlock, which filters of system calls keep from it")


def need_user_namespaces(identity: list[str]) -> None:
    """Skip where setpriv(1) with this identity may not become root in a namespace.

    Most containers forbid it, and Ubuntu's AppArmor does since 23.10.
    """
    done = subprocess.run(
        ["setpriv", *identity, "unshare", "-Urm", "true"], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return
    try:
        by_apparmor = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").read_text().strip() == "1"
    except OSError:
        by_apparmor = False
    if by_apparmor:
        pytest.skip(f"{FORBIDS} users to make namespaces (AppArmor)")
    lacks(f"namespaces that users may make: {done.stderr.strip()}")


def is_in_memory(folder: Path) -> bool:
    """Whether the folder's file system is a tmpfs, which has no pages that could be dropped."""
    done = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True)
    return done.stdout.strip() in ("tmpfs", "ramfs")
