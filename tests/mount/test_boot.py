"""What boots and shuts down with the machine: file systems inside of images, loop devices, sockets."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import loops, qemu
from tests.support.booting import NEEDS_A_BOOT, REPOSITORY, run_booted, throw_away_root
from tests.support.container import lacks, need_loop_devices
from tests.support.inner_file_systems import ext4_in_partition_2, is_whole
from tests.support.mounting import Mounted

DATA = REPOSITORY / "qcowfuse/data"
LOOP_UNIT = DATA / "qcowfuse-loop@.service"
pytestmark = NEEDS_A_BOOT


@pytest.fixture
def machine() -> Iterator[Path]:
    """The root directory of a container that is this machine, with the units and the command installed."""
    with throw_away_root() as root:
        for unit in DATA.glob("*.service"):
            shutil.copy(unit, root / "etc/systemd/system")
        (root / "etc/qcowfuse").mkdir()
        yield root


def test_the_file_system_in_a_partition(machine: Path, tmp_path: Path) -> None:
    """Lines of fstab: mounted when the machine is up, ended in order with the machine, by the units as well; a broken
    image keeps the machine from nothing; after a kill of the daemon all can be started again."""
    need_loop_devices()
    for name in ("a", "b"):
        ext4_in_partition_2(machine / f"srv/{name}.qcow2")
        (machine / f"srv/{name}").mkdir()
    (machine / "srv/broken.qcow2").write_bytes(b"QFI\xfb" + bytes(1000))
    for name in ("srv/broken", "data/a", "data/b", "data/broken"):
        (machine / name).mkdir(parents=True)
    (machine / "etc/qcowfuse/b.conf").write_text("IMAGE=/srv/b.qcow2\nMOUNTPOINT=/srv/b\nOPTIONS=--partition 2\n")
    (machine / "etc/fstab").write_text(
        "/srv/a.qcow2 /srv/a fuse.qcowfuse partition=2,nofail 0 0\n"
        "/srv/a/disk.raw /data/a ext4 loop,nofail 0 0\n"
        "/srv/b/disk.raw /data/b ext4 loop,nofail,x-systemd.requires=qcowfuse@b.service 0 0\n"
        "/srv/broken.qcow2 /srv/broken fuse.qcowfuse nofail 0 0\n"
        "/srv/broken/disk.raw /data/broken ext4 loop,nofail 0 0\n"
    )
    run_booted(
        machine,
        r"""
wait_for mountpoint -q /data/a
wait_for mountpoint -q /data/b
wait_for eval '[ "$(state srv-broken.mount)" = failed ]'
mountpoint -q /data/broken && fail "what is in the broken one is mounted"
systemctl stop qcowfuse@b || fail stop
mountpoint -q /data/b && fail "the file system is still mounted"
gone /srv/b || fail "the disk is still mounted"
checked /srv/b.qcow2
systemctl start data-b.mount || fail "start right behind it"
echo synced >/data/b/x && sync /data/b/x || fail write
systemctl kill -s KILL --kill-whom=main qcowfuse@b
wait_for eval '[ "$(state qcowfuse@b)" = failed ]'
systemctl stop data-b.mount
wait_for eval '! mountpoint -q /data/b'
wait_for gone /srv/b
systemctl start data-b.mount || fail "start after a kill"
expect "$(cat /data/b/x)" synced
qcowfuse list
echo shutdown >/data/a/x
echo shutdown >/data/b/x
""",
    )
    is_whole(machine / "srv/a.qcow2", tmp_path, "shutdown")
    is_whole(machine / "srv/b.qcow2", tmp_path, "shutdown")


def test_the_loop_unit_and_a_socket_for_metrics(machine: Path) -> None:
    """The loop device comes and goes with the disk, a file system on it too; writes that
    are thrown away; metrics by a socket of systemd's, though the service has no network."""
    need_loop_devices()
    raw = machine / "srv/raw"
    raw.touch()
    os.truncate(raw, 16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", raw], check=True)
    qemu.must_run("qemu-img", "convert", "-O", "qcow2", raw, machine / "srv/l.qcow2")
    raw.unlink()
    (machine / "srv/l").mkdir()
    (machine / "data/l").mkdir(parents=True)
    (machine / "etc/qcowfuse/l.conf").write_text("IMAGE=/srv/l.qcow2\nMOUNTPOINT=/srv/l\n")
    for name, options in (("t", "--ephemeral --metrics systemd"), ("u", "--ephemeral=/var/tmp")):
        (machine / "srv" / name).mkdir()
        conf = f"IMAGE=/srv/l.qcow2\nMOUNTPOINT=/srv/{name}\nOPTIONS={options}\n"
        (machine / f"etc/qcowfuse/{name}.conf").write_text(conf)
    (machine / "etc/systemd/system/qcowfuse@t.socket").write_text(
        "[Socket]\nListenStream=127.0.0.1:9109\n[Install]\nWantedBy=sockets.target\n"
    )
    (machine / "etc/fstab").write_text(
        "/run/qcowfuse-loop/l/disk /data/l ext4 nofail,noauto,x-systemd.requires=qcowfuse-loop@l.service 0 0\n"
    )
    run_booted(
        machine,
        r"""
systemctl start data-l.mount || fail "the file system on the loop device"
echo hello >/data/l/x
systemctl stop qcowfuse@l || fail stop
mountpoint -q /data/l && fail "the file system is still mounted"
expect "$(state qcowfuse-loop@l)" inactive
[ -e /run/qcowfuse-loop/l ] && fail "a name of the loop device is left"
losetup -a | grep /srv/l/ && fail "the loop device is left"
checked /srv/l.qcow2
systemctl start data-l.mount || fail "start right behind it"
expect "$(cat /data/l/x)" hello
systemctl kill -s KILL --kill-whom=main qcowfuse@l
wait_for eval '[ "$(state data-l.mount)" != active ]'
wait_for eval '[ "$(state qcowfuse-loop@l)" != active ]'
wait_for eval '! losetup -a | grep -q /srv/l/'
systemctl start data-l.mount || fail "start after a kill"
expect "$(cat /data/l/x)" hello
systemctl stop qcowfuse@l || fail stop

sum=$(sha256sum /srv/l.qcow2)
others=$(ls -A /var/tmp | grep -v systemd-private || :)
systemctl enable --now qcowfuse@t.socket && systemctl start qcowfuse@t || fail "start with a socket"
echo thrown away >/srv/t/disk.raw || fail write
scraped=$(exec 3<>/dev/tcp/127.0.0.1/9109; printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3; cat <&3)
grep -q '^qcowfuse_open_files{.*/srv/t/disk.raw' <<<"$scraped" || fail "no metrics: $scraped"
systemctl start qcowfuse@u || fail "a second one on the same image"
expect "$(head -c 11 /srv/u/disk.raw | tr -d '\0')" ""
echo as well >/srv/u/disk.raw || fail write
expect "$(head -c 7 /srv/t/disk.raw)" "thrown "
files() { ls -l /proc/$(systemctl show -P MainPID $1)/fd; }
files qcowfuse@u | grep -q ' /var/tmp/.*(deleted)' || fail "no file without a name: $(files qcowfuse@u)"
files qcowfuse@t | grep -q ' /srv/.*(deleted)' || fail "no file without a name: $(files qcowfuse@t)"
systemctl kill -s KILL --kill-whom=main qcowfuse@u
wait_for eval '[ "$(state qcowfuse@u)" = failed ]'
wait_for gone /srv/u
systemctl start qcowfuse@u || fail "start after a kill"
expect "$(head -c 7 /srv/u/disk.raw | tr -d '\0')" ""
systemctl stop qcowfuse@t.socket qcowfuse@t qcowfuse@u || fail stop
expect "$(ls -A /var/tmp | grep -v systemd-private)" "$others"
expect "$(sha256sum /srv/l.qcow2)" "$sum"
""",
    )


def test_the_unit_is_well_formed() -> None:
    """systemd-analyze verify has nothing to say about it."""
    words = ["systemd-analyze", "verify", "--system", "--man=no", str(LOOP_UNIT)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if "qcowfuse" in line]
    assert (done.returncode, complaints) == (0, [])


def test_the_loop_unit_names_the_partitions(tmp_path: Path) -> None:
    """Its commands, run here, where partitions get device nodes."""
    need_loop_devices()
    image, point, names = tmp_path / "i.qcow2", tmp_path / "m", tmp_path / "names"
    ext4_in_partition_2(image)
    point.mkdir()
    names.mkdir()
    start, stop = commands_of(LOOP_UNIT, "ExecStart"), commands_of(LOOP_UNIT, "ExecStopPost")
    with Mounted(image, point, "--partitions"):
        run_unit_command(start, point, names)
        device = (names / "disk").readlink()
        try:
            assert loops.backing_file(device) == str(point / "disk.raw")
            if not Path(f"{device}p2").exists():
                lacks("device nodes of partitions")
            assert (names / "part2").readlink() == Path(f"{device}p2")
            assert "ext4" in qemu.must_run("blkid", "-p", names / "part2")
        finally:
            run_unit_command(stop, point, names)
        assert loops.backing_file(device) == ""


def commands_of(unit: Path, key: str) -> str:
    """The script of a line that runs sh, as sh gets it."""
    text = unit.read_text().replace("\\\n", "")
    line = next(line for line in text.splitlines() if line.startswith(f"{key}="))
    return line.split("'")[1].replace("$$", "$")


def run_unit_command(script: str, point: Path, names: Path) -> None:
    arguments = [point, names] if "$2" in script else [names]
    subprocess.run(["sh", "-euc", script, "sh", *arguments], check=True)
