"""``qcowfuse umount``: from a mount to a closed image.

1. An unmount takes nothing away from anybody: what uses the disk is named, and waited for only as long as was asked.
2. By force, all is written first (sync(2), in a process that may hang), the mount is detached, and the daemon is told
   to stop until it ends: at its second signal it writes what there is, and cuts off whoever is left.
3. Success is the daemon's own word that the image is closed, read after its end. Where it can't be read (an encrypted
   image of a plain user) its end has to do.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext, suppress

from ...daemon import mountpoint
from ...daemon.mount_users import users_of
from ...daemon.mountpoint import MountBusyError
from ...daemon.record import State
from ...printable import print_error
from ..exit_codes import ExitCode
from .look import Look, look_at
from .mounts import Mount, Server, server_of, waits

_SYNC_SECONDS = 30.0
_TELL_SECONDS = 5.0
_SIGNAL_SECONDS = 1.0
_ENDING = (State.CLOSING, State.CLOSED, State.FAILED)


def unmount(mount: Mount, *, timeout: float, force: bool) -> ExitCode:
    """Unmount, and return when the image is closed; otherwise one line to standard error says why not."""
    # The mount could hang, so it is asked for its server only where there is no record of one.
    look = Look() if mount.found is not None else look_at([mount])[0]
    server = server_of(mount, look.counters.get("pid"))
    with nullcontext() if server is None else server:
        busy = _take_away(mount, look, timeout)
        if busy and not force:
            return _tell(ExitCode.LOCKED, f"{mount.point}: in use by {busy} (--force cuts them off)")
        if busy:
            _sync()
            mountpoint.unmount(mount.device, is_lazy=True)
        if server is not None:
            return _wait(mount, look, server, timeout, force=force, is_cut_off=bool(busy))
    if look.problem == "dead":
        _say(f"{mount.point}: removed a dead mount, its daemon had been killed (qcowfuse-img check {mount.image})")
        return ExitCode.OK
    return _tell(
        ExitCode.MOUNT, f"{mount.point}: unmounted, but its daemon is not to be seen: the image may be open still"
    )


def _take_away(mount: Mount, look: Look, timeout: float) -> str:
    """Unmount; gives who stands in the way after ``timeout`` seconds. Raises MountError."""
    if not mount.is_here:
        return ""
    for left in waits(timeout):
        try:
            mountpoint.unmount(mount.device)
        except MountBusyError as exc:
            if left <= 0:
                on_top = "mounted on top" in str(exc)
                return "another mount on top of it" if on_top else users_of(_file_of(mount, look), mount.device)
        else:
            return ""
    raise AssertionError


def _wait(mount: Mount, look: Look, server: Server, timeout: float, *, force: bool, is_cut_off: bool) -> ExitCode:
    """Wait for the daemon's end, and say how that was."""
    began = time.monotonic()
    last_signal, is_told = -_SIGNAL_SECONDS, False
    while not server.has_ended(0.05):
        waited = time.monotonic() - began
        is_in_use = server.state in (State.SERVING, State.WAITING, State.STOPPING)
        if is_in_use and waited >= timeout and not is_cut_off:
            if not force:
                users = users_of(_file_of(mount, look), mount.device)
                rest = f"but in use by {users}; the image stays open (--force cuts them off)"
                return _tell(ExitCode.LOCKED, f"{mount.point}: not mounted here any more, {rest}")
            _sync()
            is_cut_off = True
        if is_cut_off and server.state not in _ENDING and waited - last_signal >= _SIGNAL_SECONDS:
            server.send(signal.SIGTERM)
            last_signal = waited
        if waited >= _TELL_SECONDS + timeout and not is_told:
            _say(f"{mount.image}: waiting for pid {server.pid} to write everything back")
            is_told = True
    record = server.record
    if record is None or record.state is State.CLOSED:
        return ExitCode.OK
    if record.state is State.FAILED:
        return _tell(ExitCode.SYSTEM, f"{mount.image}: {record.detail}")
    return _tell(ExitCode.MOUNT, f"{mount.image}: pid {server.pid} ended without closing it: it was killed")


def _file_of(mount: Mount, look: Look) -> str:
    return mount.found.record.file if mount.found is not None else look.file or mount.point


def _sync() -> None:
    """Write back all that the kernel holds of any file system, those on the disk too."""
    pid = os.fork()
    if pid == 0:
        try:
            os.sync()
        finally:
            os._exit(0)
    for left in waits(_SYNC_SECONDS):
        with suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
        if left <= 0:
            _say(f"what was written could not be flushed in {_SYNC_SECONDS:g} seconds")


def _say(text: str) -> None:
    print_error(f"qcowfuse umount: {text}")


def _tell(code: ExitCode, text: str) -> ExitCode:
    _say(text)
    return code
