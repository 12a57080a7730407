"""The unit for users, under the service manager of an ordinary user, in a container that boots a systemd."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import qemu
from tests.support.booting import NEEDS_A_BOOT, REPOSITORY, run_booted, throw_away_root
from tests.support.container import lacks

UNIT = REPOSITORY / "qcowfuse/data/user/qcowfuse@.service"
USER = "maria"
# as_user COMMAND: with what a login would give it; ctl: systemctl --user
PRELUDE = f"""
uid=$(id -u {USER})
as_user() {{ runuser -u {USER} -- env HOME=/home/{USER} XDG_RUNTIME_DIR=/run/user/$uid "$@"; }}
ctl() {{ as_user systemctl --user "$@"; }}
ustate() {{ ctl show -P ActiveState "$1"; }}
said() {{ journalctl -q _UID=$uid SYSLOG_IDENTIFIER=qcowfuse -o cat | grep -v INFO:; }}
cd /home/{USER}
"""
pytestmark = NEEDS_A_BOOT


@pytest.fixture
def machine() -> Iterator[Path]:
    """The root directory of a container that is this machine, with the unit, and a user with the command."""
    if not list(Path("/usr/lib").glob("*/security/pam_systemd.so")):
        lacks("a service manager for users (package libpam-systemd)")
    with throw_away_root() as root:
        folder = root / "etc/systemd/user"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(UNIT, folder)
        # The interpreter and the project may lie below a directory that is root's alone.
        for path in (Path(sys.base_prefix), Path(sys.prefix), REPOSITORY):
            for parent in path.parents:
                inside = root / parent.relative_to("/")
                inside.mkdir(exist_ok=True)
                inside.chmod(inside.stat().st_mode | 0o111)
        subprocess.run(["chroot", root, "useradd", "-m", "-s", "/bin/bash", USER], check=True)
        # Where pipx puts it for this user alone.
        programs = root / f"home/{USER}/.local/bin"
        programs.mkdir(parents=True)
        shutil.move(root / "usr/local/bin/qcowfuse", programs)
        yield root


def test_start_stop_kill(machine: Path) -> None:
    """Started by the user, with blanks in the paths below the home directory; a stop and a log-out close the image;
    a killed daemon leaves nothing; a broken image gives one line in the journal."""
    home = machine / f"home/{USER}"
    qemu.create(home / "disk one.qcow2", "qcow2", 16 << 20)
    (home / "broken.qcow2").write_bytes(b"QFI\xfb" + bytes(1000))
    (home / "disk one").mkdir()
    folder = home / ".config/qcowfuse"
    folder.mkdir(parents=True)
    options = 'OPTIONS="--name d.raw --l2-cache-size 1M"\n'
    (folder / "one.conf").write_text(f'IMAGE="disk one.qcow2"\nMOUNTPOINT="disk one"\n{options}')
    (folder / "broken.conf").write_text('IMAGE=broken.qcow2\nMOUNTPOINT="disk one"\n')
    owner = home.stat()
    for path in home.rglob("*"):
        os.chown(path, owner.st_uid, owner.st_gid)
    run_booted(
        machine,
        PRELUDE
        + r"""
systemctl start dbus.socket || fail "no bus"
chmod 666 /dev/fuse  # as udev does
systemctl start user@$uid.service || fail "no service manager for the user"
# It does not look where ExecSearchPath= does.
complaints=$(as_user sh -c "systemd-analyze verify --user --man=no qcowfuse@one.service 2>&1" | grep qcowfuse |
    grep -v "Command qcowfuse is not executable")
expect "$complaints" ""
ctl start qcowfuse@one || fail start
expect "$(ustate qcowfuse@one)" active
[ -n "$(ctl show -P StatusText qcowfuse@one)" ] || fail "no status text"
expect "$(stat -c %U /proc/$(ctl show -P MainPID qcowfuse@one))" maria
disk="/home/maria/disk one/d.raw"
expect "$(as_user stat -c %s "$disk")" $((16 << 20))
head -c 3000000 /dev/urandom >/srv/data
as_user dd if=/srv/data of="$disk" bs=64k conv=notrunc status=none || fail write
as_user cmp -n 3000000 /srv/data "$disk" || fail read
ctl stop qcowfuse@one || fail stop
expect "$(ustate qcowfuse@one)" inactive
gone '/home/maria/disk.040one' || fail "still mounted"
no_daemon || fail "stop returned before the daemon had ended"
checked "/home/maria/disk one.qcow2"
qemu-img convert -O raw "/home/maria/disk one.qcow2" /srv/copy || fail "image is locked"
cmp -n 3000000 /srv/data /srv/copy || fail "what was written is not in the image"

ctl start qcowfuse@one || fail "second start"
head -c 1000000 /dev/urandom >/srv/data
as_user dd if=/srv/data of="$disk" bs=64k conv=notrunc,fsync status=none || fail write
ctl kill -s KILL --kill-whom=main qcowfuse@one
wait_for eval '[ "$(ustate qcowfuse@one)" = failed ]'
expect "$(ctl show -P Result qcowfuse@one)" signal
wait_for gone '/home/maria/disk.040one'
ctl start qcowfuse@one || fail "start after a kill"
as_user cmp -n 1000000 /srv/data "$disk" || fail "fsynced data is lost"
as_user dd if=/dev/zero of="$disk" bs=64k count=10 conv=notrunc status=none || fail write
systemctl stop user@$uid.service || fail log-out
gone '/home/maria/disk.040one' || fail "still mounted after the log-out"
no_daemon || fail "the daemon outlived its manager"
checked "/home/maria/disk one.qcow2"

systemctl start user@$uid.service || fail log-in
expect "$(said)" ""
ctl start qcowfuse@broken && fail "a broken image was started"
expect "$(ustate qcowfuse@broken)" failed
wait_for eval '[ -n "$(said)" ]'
said
expect "$(said | wc -l)" 1
said | grep -q '^qcowfuse: broken.qcow2: ' || fail "the line does not name the image"
ctl start qcowfuse@one || fail "start after the broken one"
ctl stop qcowfuse@one || fail stop
ctl start qcowfuse@missing && fail "started without a configuration"
true
""",
    )
