"""The systemd unit, mount(8) and fstab under a real systemd: a container on a throw-away overlay of this machine."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import qemu
from tests.support.booting import NEEDS_A_BOOT, REPOSITORY, run_booted, throw_away_root
from tests.support.container import need_loop_devices

UNIT = REPOSITORY / "qcowfuse/data/qcowfuse@.service"
pytestmark = NEEDS_A_BOOT


@pytest.fixture
def machine() -> Iterator[Path]:
    """The root directory of a container that is this machine, with the unit and the command installed."""
    with throw_away_root() as root:
        shutil.copy(UNIT, root / "etc/systemd/system")
        (root / "etc/qcowfuse").mkdir()
        yield root


@pytest.fixture
def boot(machine: Path) -> Callable[[str], None]:
    """A function that boots the container, runs a script in it and fails with the log where the script fails."""
    return functools.partial(run_booted, machine)


@pytest.fixture
def instance(machine: Path) -> Path:
    """Instance "one": an empty 64 MiB image and its mount point, both with a blank in their paths."""
    image = machine / "srv/image one.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"], check=True)
    (machine / "srv/mount one").mkdir()
    conf = 'IMAGE="/srv/image one.qcow2"\nMOUNTPOINT="/srv/mount one"\n'
    (machine / "etc/qcowfuse/one.conf").write_text(conf)
    return image


def test_unit_is_well_formed(machine: Path) -> None:
    """systemd-analyze verify has nothing to say about the unit."""
    unit = "/etc/systemd/system/qcowfuse@one.service"
    done = subprocess.run(
        ["chroot", machine, "systemd-analyze", "verify", "--man=no", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if "qcowfuse" in line]
    assert (done.returncode, complaints) == (0, [])


def test_unit_gives_itself_no_mount_namespace() -> None:
    """No directive that would hide the mount from the rest of the system."""
    settings = [line for line in UNIT.read_text().splitlines() if not line.startswith("#")]
    # These have other namespaces than that of mounts, or none; the first would imply the one of mounts.
    harmless = {"PrivateNetwork", "PrivateMounts", "ProtectClock", "ProtectHostname"}
    assert "PrivateMounts=no" in settings
    keys = {line.split("=")[0] for line in settings} - harmless
    hiding = (
        "Private",
        "Protect",
        "ReadOnly",
        "ReadWrite",
        "Inaccessible",
        "Bind",
        "Root",
        "Temporary",
        "MountFlags",
    )
    assert not {key for key in keys if key.startswith(hiding)}


def test_unit_is_confined(machine: Path) -> None:
    """systemd's own judgement of what the service may do is 4.0 at most, from 0 (least) to 10."""
    unit = "qcowfuse@one.service"
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=40", f"--root={machine}", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


@pytest.mark.usefixtures("instance")
def test_start_serve_stop(boot: Callable[[str], None]) -> None:
    """Active when the disk can be used; after stop the mount is gone and the image closed, clean and complete."""
    boot(r"""
systemctl start qcowfuse@one || fail start
expect "$(state qcowfuse@one)" active
[ -n "$(systemctl show -P StatusText qcowfuse@one)" ] || fail "no status text"
disk="/srv/mount one/disk.raw"
expect "$(stat -c %s "$disk")" $((64 << 20))
pid=$(systemctl show -P MainPID qcowfuse@one)
grep -q "Seccomp:.2" /proc/$pid/status && grep -q "CapEff:.0000000000000000" /proc/$pid/status || fail "no sandbox"
namespace() { readlink "/proc/$1/ns/$2"; }
expect "$(namespace $pid mnt)" "$(namespace 1 mnt)"
[ "$(namespace $pid net)" != "$(namespace 1 net)" ] || fail "it has the network"
systemd-analyze --no-pager security --threshold=40 qcowfuse@one || fail "exposed"
head -c 5000000 /dev/urandom >/srv/data
dd if=/srv/data of="$disk" bs=64k seek=16 conv=notrunc status=none || fail write
cmp -n 5000000 /srv/data "$disk" 0 1048576 || fail "what was written is not read"
qemu-io -f qcow2 -c 'write 0 512' "/srv/image one.qcow2" && fail "QEMU may write to an image that is being served"
systemctl stop qcowfuse@one || fail stop
expect "$(state qcowfuse@one)" inactive
expect "$(systemctl show -P Result qcowfuse@one)" success
gone "/srv/mount.040one" || fail "still mounted"
no_daemon || fail "stop returned before the daemon had ended"
checked "/srv/image one.qcow2"
qemu-img convert -O raw "/srv/image one.qcow2" /srv/copy || fail "image is locked"
cmp -n 5000000 /srv/data /srv/copy 0 1048576 || fail "what was written is not in the image"
systemctl start qcowfuse@one && cmp -n 5000000 /srv/data "$disk" 0 1048576 || fail "second start"
fusermount3 -u "/srv/mount one"
wait_for eval '[ "$(state qcowfuse@one)" = inactive ]'
expect "$(systemctl show -P Result qcowfuse@one)" success
""")


@pytest.mark.usefixtures("instance")
def test_stop_waits_for_users(boot: Callable[[str], None]) -> None:
    """A stop takes nothing from a program that has the disk open; the status names it, and the stop ends with it."""
    boot(r"""
systemctl start qcowfuse@one || fail start
disk="/srv/mount one/disk.raw"
sleep 1000 <>"$disk" &
user=$!
systemctl stop --no-block qcowfuse@one
wait_for eval 'systemctl show -P StatusText qcowfuse@one | grep -q "$user"'
expect "$(state qcowfuse@one)" deactivating
echo still >"$disk" || fail "the disk was taken away"
expect "$(head -c 5 "$disk")" still
kill $user
wait_for eval '[ "$(state qcowfuse@one)" = inactive ]'
expect "$(systemctl show -P Result qcowfuse@one)" success
checked "/srv/image one.qcow2"
""")


@pytest.mark.usefixtures("instance")
def test_kill_removes_the_dead_mount(boot: Callable[[str], None]) -> None:
    """After kill -9 the unit has failed, the dead mount is removed, fsynced data is there and a new start works."""
    boot(r"""
systemctl start qcowfuse@one || fail start
disk="/srv/mount one/disk.raw"
head -c 1000000 /dev/urandom >/srv/data
dd if=/srv/data of="$disk" bs=64k conv=notrunc,fsync status=none || fail write
systemctl kill -s KILL --kill-whom=main qcowfuse@one
wait_for eval '[ "$(state qcowfuse@one)" = failed ]'
expect "$(systemctl show -P Result qcowfuse@one)" signal
wait_for gone '/srv/mount.040one'
ls "/srv/mount one" || fail "the mount point is dead"
qemu-img check -q "/srv/image one.qcow2"
case $? in 0|3) ;; *) fail "more than leaks" ;; esac
systemctl start qcowfuse@one || fail "start after kill"
cmp -n 1000000 /srv/data "$disk" || fail "fsynced data is lost"
systemctl stop qcowfuse@one || fail stop
checked "/srv/image one.qcow2"
""")


@pytest.mark.usefixtures("instance")
def test_refused_start_leaves_a_live_mount_alone(boot: Callable[[str], None]) -> None:
    """Where another qcowfuse serves already, the unit fails and that mount goes on; options reach the program."""
    boot(r"""
qcowfuse "/srv/image one.qcow2" "/srv/mount one" || fail "mount by hand"
systemctl start qcowfuse@one && fail "started twice on one image"
expect "$(state qcowfuse@one)" failed
cat "/srv/mount one/disk.raw" | cmp -n 1000 - /dev/zero || fail "the live mount was taken away"
fusermount3 -u "/srv/mount one"
wait_for no_daemon
echo 'OPTIONS=--read-only --name other.raw' >>/etc/qcowfuse/one.conf
systemctl start qcowfuse@one || fail "start with options"
[ -f "/srv/mount one/other.raw" ] || fail "--name did not arrive"
echo x 2>/dev/null >"/srv/mount one/other.raw" && fail "--read-only did not arrive"
systemctl stop qcowfuse@one || fail stop
systemctl start qcowfuse@missing && fail "started without a configuration"
true
""")


def test_mount_and_fstab(boot: Callable[[str], None], machine: Path) -> None:
    """mount -t fuse.qcowfuse, a line in fstab by mount(8), and the mount unit that systemd makes from the line."""
    image = machine / "srv/one.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"], check=True)
    (machine / "srv/m").mkdir()
    (machine / "etc/fstab").write_text(
        "/srv/one.qcow2 /srv/m fuse.qcowfuse ro,noauto,nofail,x-systemd.mount-timeout=20 0 0\n"
    )
    boot(r"""
mount -t fuse.qcowfuse /srv/one.qcow2 /srv/m -o rw || fail "mount -t"
mounted /srv/m || fail "not mounted"
head -c 300000 /dev/urandom >/srv/data
dd if=/srv/data of=/srv/m/disk.raw conv=notrunc status=none || fail write
umount /srv/m || fail umount
wait_for no_daemon
checked /srv/one.qcow2

mount /srv/m || fail "mount by fstab"
cmp -n 300000 /srv/data /srv/m/disk.raw || fail "read"
echo x 2>/dev/null >/srv/m/disk.raw && fail "ro did not arrive"
umount /srv/m || fail umount
wait_for no_daemon

expect "$(systemctl show -P FragmentPath srv-m.mount)" /run/systemd/generator/srv-m.mount
systemctl start srv-m.mount || fail "start of the mount unit"
expect "$(state srv-m.mount)" active
cmp -n 300000 /srv/data /srv/m/disk.raw || fail "read"
systemctl stop srv-m.mount || fail "stop of the mount unit"
gone /srv/m || fail "still mounted"
wait_for no_daemon
checked /srv/one.qcow2
mount -t fuse.qcowfuse /srv/nothing.qcow2 /srv/m && fail "mounted what is not there"
true
""")


@pytest.mark.usefixtures("instance")
def test_the_passphrase_is_a_credential(machine: Path, boot: Callable[[str], None]) -> None:
    """With LoadCredential= in a drop-in an encrypted image is served, to all; without it the log says what to do."""
    key = machine / "etc/qcowfuse/one.key"
    key.write_text("open sesame")
    key.chmod(0o600)
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "--object", f"secret,id=s,file={key}"]
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1"
    qemu.must_run(*words, "-o", options, machine / "srv/image one.qcow2", "64M")
    boot(r"""
systemctl start qcowfuse@one && fail "started without a key"
wait_for eval 'journalctl -u qcowfuse@one | grep -q "systemd credential qcowfuse.key"'
systemctl reset-failed qcowfuse@one
drop_in=/etc/systemd/system/qcowfuse@one.service.d
mkdir -p $drop_in
printf '[Service]\nLoadCredential=qcowfuse.key:/etc/qcowfuse/%%i.key\n' >$drop_in/key.conf
systemctl daemon-reload
systemctl start qcowfuse@one || fail start
disk="/srv/mount one/disk.raw"
expect "$(stat -c %s "$disk")" $((64 << 20))
head -c 300000 /dev/urandom >/srv/data
dd if=/srv/data of="$disk" conv=notrunc status=none || fail write
systemctl stop qcowfuse@one || fail stop
systemctl start qcowfuse@one && cmp -n 300000 /srv/data "$disk" || fail "second start"
systemctl stop qcowfuse@one || fail stop
""")


@pytest.mark.usefixtures("instance")
def test_a_start_right_behind_an_unmount(boot: Callable[[str], None]) -> None:
    """The start waits for the daemon that is on its way out, and then there is a new one.

    umount(8) returns before the daemon has heard of it, and so before systemd has: until then a start has no effect.
    """
    boot(r"""
not_active() { [ "$(state qcowfuse@one)" != active ]; }
systemctl start qcowfuse@one || fail start
disk="/srv/mount one/disk.raw"
for i in $(seq 9); do
    dd if=/dev/urandom of="$disk" bs=1M count=8 conv=notrunc status=none || fail "write $i"
    case $((i % 3)) in
    0)
        umount "/srv/mount one" || fail "umount $i"
        systemctl restart qcowfuse@one || fail "restart $i"
        ;;
    1)
        umount "/srv/mount one" || fail "umount $i"
        wait_for not_active
        systemctl start qcowfuse@one || fail "start $i"
        ;;
    2)
        qcowfuse umount "/srv/mount one" || fail "qcowfuse umount $i"
        systemctl start qcowfuse@one || fail "start $i"
        ;;
    esac
    expect "$(stat -c %s "$disk")" $((64 << 20))
    sleep 0.2
    expect "$(state qcowfuse@one)" active
done
systemctl stop qcowfuse@one || fail stop
checked "/srv/image one.qcow2"
""")


@pytest.mark.usefixtures("instance")
def test_a_configuration_without_image(boot: Callable[[str], None]) -> None:
    """The journal says which file is incomplete."""
    boot(r"""
echo 'MOUNTPOINT="/srv/mount one"' >/etc/qcowfuse/one.conf
systemctl start qcowfuse@one && fail "started without an image"
wait_for eval 'journalctl -u qcowfuse@one | grep -q "IMAGE or MOUNTPOINT is empty; in /etc/qcowfuse/NAME.conf"'
expect "$(systemctl show -P ExecMainStatus qcowfuse@one)" 2
""")


def test_a_daemon_started_by_a_service(boot: Callable[[str], None], machine: Path) -> None:
    """By hand it is in the service's group, and ends with it; by systemd-run it is a service of its own."""
    for name in ("one", "two"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", machine / f"srv/{name}.qcow2", "4M"], check=True)
        (machine / f"srv/{name}").mkdir()
    boot(r"""
cat >/srv/script <<'END'
#!/bin/bash -e
qcowfuse /srv/one.qcow2 /srv/one
systemd-run --unit=disk-two -p Type=notify -p KillMode=mixed -p TimeoutStopSec=5min \
    qcowfuse -f /srv/two.qcow2 /srv/two
test -f /srv/one/disk.raw
test -f /srv/two/disk.raw
END
chmod +x /srv/script
systemd-run --unit=job -p Type=oneshot /srv/script || fail "the script"
wait_for gone /srv/one
mounted /srv/two || fail "systemd-run does not keep it"
test -f /srv/two/disk.raw || fail "it does not serve"
systemctl stop disk-two || fail stop
gone /srv/two || fail "still mounted"
checked /srv/two.qcow2
""")


@pytest.mark.parametrize("outer", ["qcowfuse@d.service", "srv-d.mount"])
def test_the_file_system_inside_at_boot(boot: Callable[[str], None], machine: Path, outer: str) -> None:
    """Lines of fstab mount the disk and the file system in it; a stop of the outer one ends the inner one first."""
    need_loop_devices()
    image, raw = machine / "srv/d.qcow2", machine / "srv/raw"
    raw.touch()
    os.truncate(raw, 16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", raw], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, image], check=True)
    (machine / "srv/d").mkdir()
    (machine / "data").mkdir()
    if outer.endswith(".service"):
        (machine / "etc/qcowfuse/d.conf").write_text("IMAGE=/srv/d.qcow2\nMOUNTPOINT=/srv/d\n")
        lines = "/srv/d/disk.raw /data ext4 loop,nofail,x-systemd.requires=qcowfuse@d.service 0 0\n"
    else:
        lines = "/srv/d.qcow2 /srv/d fuse.qcowfuse nofail 0 0\n/srv/d/disk.raw /data ext4 loop,nofail 0 0\n"
    (machine / "etc/fstab").write_text(lines)
    boot(rf"""
wait_for mountpoint -q /data
echo hello >/data/x || fail write
systemctl stop {outer} || fail stop
mountpoint -q /data && fail "the inner one is still mounted"
gone /srv/d || fail "the outer one is still mounted"
wait_for no_daemon
checked /srv/d.qcow2
systemctl start data.mount || fail "start again"
expect "$(cat /data/x)" hello
systemctl stop {outer} || fail "stop again"
wait_for no_daemon
""")
