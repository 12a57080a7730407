"""Who uses a mount, in whatever mount namespace: loop devices, processes, and namespaces that have it mounted.

1. Nothing here holds a descriptor or a path in the mount, which would itself make it busy: mounts are told apart by
   their ids, which /proc/PID/fdinfo and /proc/PID/mountinfo give away.
2. It is a best effort: what another user's processes have open is shown to root alone.
3. A path from another namespace means nothing here but behind /proc/PID/root.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from ..system.mountinfo import MountEntry, mount_table
from .mountpoint import FILE_SYSTEM_TYPE

_N_USERS_SHOWN = 5
_OWN_NAMESPACE = "/proc/self/ns/mnt"
_BLOCK_DEVICES = "/sys/block"
_MOUNT_ID = re.compile(rb"^mnt_id:\s*(\d+)", re.MULTILINE)


class _Process(NamedTuple):
    """One that exists, with what its mount namespace has; ``is_elsewhere``: not in this process's namespace."""

    pid: int
    is_elsewhere: bool
    mounts: list[MountEntry]

    @property
    def name(self) -> str:
        try:
            name = _read(f"/proc/{self.pid}/comm").decode(errors="replace").strip()
        except OSError:
            name = "a process"
        return f"{name} (pid {self.pid})"


def users_of(file_path: str, device: int) -> str:
    """Who uses the mount of ``device``, as far as this process can see, for a message: ``file_path`` on loop devices,
    processes, and other mount namespaces."""
    is_here = any(mount.device == device for mount in mount_table())
    holders: list[str] = []
    elsewhere: list[str] = []
    for process, is_first in _processes():
        there = next((mount.path for mount in process.mounts if mount.device == device), None)
        # As long as it is mounted here, an unmount here reaches those that got it from here.
        if there is not None and is_first and process.is_elsewhere and not is_here:
            elsewhere.append(f"the mount namespace of {process.name}, at {there}")
        if next(_descriptors_in(process, device), None) is not None or _stands_in(process, device):
            holders.append(process.name)
    users = [*_loop_devices_on(file_path), *holders, *elsewhere]
    if not users:
        return "unknown users (another user's processes, or another mount namespace)"
    more = f" and {len(users) - _N_USERS_SHOWN} more" if len(users) > _N_USERS_SHOWN else ""
    return ", ".join(users[:_N_USERS_SHOWN]) + more


def paths_elsewhere(device: int, name: str | None) -> Iterator[str]:
    """Paths that may lead to the file ``name`` (None: the root) of ``device``, from a process that still has it."""
    for process, is_first in _processes():
        if is_first and process.is_elsewhere:
            for mount in process.mounts:
                if mount.device == device:
                    root = f"/proc/{process.pid}/root{mount.path}"
                    yield root if name is None else f"{root}/{name}"
        for number in _descriptors_in(process, device):
            yield f"/proc/{process.pid}/fd/{number}"


def where_mounted(image: str) -> tuple[list[str], list[str]]:
    """Where the image at the absolute path ``image`` is mounted by this program: the mount points of this namespace,
    and those of others, each with a process that lives there."""

    def is_it(mount: MountEntry) -> bool:
        return mount.file_system == FILE_SYSTEM_TYPE and mount.source in (image, os.path.realpath(image))

    here = [mount.path for mount in mount_table() if is_it(mount)]
    elsewhere = [
        f"{mount.path} in the mount namespace of {process.name}"
        for process, is_first in _processes()
        if is_first and process.is_elsewhere
        for mount in process.mounts
        if is_it(mount)
    ]
    return here, elsewhere


def _processes() -> Iterator[tuple[_Process, bool]]:
    """Every process but this one, and whether it is the first of its mount namespace."""
    own, own_table = _namespace(_OWN_NAMESPACE), list(mount_table())
    tables: dict[object, list[MountEntry]] = {}
    for pid in sorted(int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
        if pid == os.getpid():
            continue
        try:
            namespace = _namespace(f"/proc/{pid}/ns/mnt")
            table = tables.get(namespace) if namespace is not None else None
            if table is None:
                table = list(mount_table(str(pid)))
        except OSError:
            continue
        # Of another user's process the namespace is not shown, but the table is: equal tables stand for the same.
        key: object = namespace if namespace is not None else tuple(table)
        is_first = key not in tables
        tables[key] = table
        is_elsewhere = table != own_table if namespace is None or own is None else namespace != own
        yield _Process(pid, is_elsewhere, table), is_first


def _namespace(path: str) -> str | None:
    try:
        return os.readlink(path)
    except PermissionError:
        return None


def _loop_devices_on(path: str) -> Iterator[str]:
    """Loop devices with the file at ``path``, or with one of the partitions beside it, and where they are mounted."""
    partition = re.compile(re.escape(path) + r"\.p\d+", re.ASCII)
    for name in _names_in(_BLOCK_DEVICES, "loop"):
        with suppress(OSError):
            file = os.fsdecode(_read(f"{_BLOCK_DEVICES}/{name}/loop/backing_file")).rstrip("\n")
            if file == path or partition.fullmatch(file):
                yield f"/dev/{name}{_what_stands_on(name)}"


def _what_stands_on(device: str) -> str:
    """`` (mounted at /data)``, or the devices that hold ``device`` or its partitions."""
    folder = f"{_BLOCK_DEVICES}/{device}"
    parts = {device: folder} | {name: f"{folder}/{name}" for name in _names_in(folder, f"{device}p")}
    holders = {name: f"{part}/holders/{name}" for part in parts.values() for name in _names_in(f"{part}/holders")}
    numbers, names = set(), {f"/dev/{name}" for name in (*parts, *holders)}
    for part in (*parts.values(), *holders.values()):
        with suppress(OSError, ValueError):
            major, minor = _read(f"{part}/dev").split(b":")
            numbers.add(os.makedev(int(major), int(minor)))
    places = {mount.path: None for mount in mount_table() if mount.device in numbers or mount.source in names}
    if places:
        return f" (mounted at {', '.join(places)})"
    return f" (held by {', '.join(holders)})" if holders else ""


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _names_in(folder: str, start: str = "") -> list[str]:
    """Names in a folder that begin with ``start``; none where there is no such folder."""
    try:
        return [name for name in os.listdir(folder) if name.startswith(start)]
    except OSError:
        return []


def _descriptors_in(process: _Process, device: int) -> Iterator[int]:
    """The descriptors of a process that lead into ``device``."""
    known = {mount.mount_id: mount.device for mount in process.mounts}
    folder = f"/proc/{process.pid}"
    with suppress(OSError):
        for number in os.listdir(f"{folder}/fd"):
            with suppress(OSError, ValueError):
                found = _MOUNT_ID.search(_read(f"{folder}/fdinfo/{number}"))
                mount_id = int(found[1]) if found else -1
                if mount_id in known:
                    if known[mount_id] == device:
                        yield int(number)
                elif _is_in_detached_mount(f"{folder}/fd/{number}", device):
                    yield int(number)


def _is_in_detached_mount(link: str, device: int) -> bool:
    """For a descriptor of which no table has the mount (umount -l): nobody can unmount that, so the file may be
    asked."""
    return os.readlink(link).startswith("/") and os.stat(link).st_dev == device


def _stands_in(process: _Process, device: int) -> bool:
    """Whether the working or root directory of a process is the folder of ``device``: there is only one in it."""
    for link in ("cwd", "root"):
        with suppress(OSError):
            path = os.readlink(f"/proc/{process.pid}/{link}")
            there = [mount.device for mount in process.mounts if mount.path == path]
            if there and there[-1] == device:
                return True
    return False
