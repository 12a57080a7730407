"""Packages on clean systems: installed, used, upgraded while a disk is in use, purged."""

from __future__ import annotations

import shutil
from pathlib import Path

from .folders import own_folder
from .roots import build_in_root, checked, clean_root, enter

_STEPS = r"""
set -eu
step() { echo "-- $*"; }
read_back() { head -c 6 "$1"; }
refuses() { if "$@"; then echo "expected a failure of: $*" >&2; exit 1; fi; }
expect() { [ "$1" = "$2" ] || { echo "expected '$2', got '$1'" >&2; exit 1; }; }

step "a system without a compiler, without Python and without FUSE"
for tool in gcc pip qcowfuse python3 fusermount3; do refuses command -v $tool; done

step "install: one command"
apt-get -q update
apt-get -q -y --no-install-recommends install "$1"
qcowfuse --version
qcowfuse-img --version
test -f /usr/lib/systemd/system/qcowfuse@.service
test -f /usr/lib/systemd/user/qcowfuse@.service
zcat /usr/share/man/man1/qcowfuse.1.gz | grep -q 'SH NAME'
bash -c '. /usr/share/bash-completion/completions/qcowfuse && complete -p qcowfuse'
# A Python of the user's does not get in between, nor does the package get into other programs.
mkdir /tmp/own && echo 'raise SystemExit("mine")' >/tmp/own/trio.py
(cd /tmp/own && PYTHONPATH=/tmp/own qcowfuse --version)
refuses python3 -c 'import qcowfuse' 2>/dev/null

step "use"
cd /root
qcowfuse-img create -q disk.qcow2 64M
mkdir /srv/disk
qcowfuse disk.qcow2 /srv/disk
printf 'hello\n' | dd of=/srv/disk/disk.raw conv=notrunc status=none
fusermount3 -u /srv/disk
qcowfuse-img check disk.qcow2
mount -t fuse.qcowfuse /root/disk.qcow2 /srv/disk -o ro,nosuid
expect "$(read_back /srv/disk/disk.raw)" hello
umount /srv/disk
mount -t qcowfuse /root/disk.qcow2 /srv/disk -o ro,name=d
expect "$(read_back /srv/disk/d)" hello
umount /srv/disk
mount -t qcowfuse /root/nothing /srv/disk 2>/tmp/said && exit 1 || expect $? 32
grep 'qcowfuse: .*No such file' /tmp/said
mount -t qcowfuse /root/disk.qcow2 /srv/disk -o nonsense 2>/tmp/said && exit 1 || expect $? 1
printf '%s\n' '/root/disk.qcow2 /srv/disk qcowfuse nofail,name=d 0 0' >>/etc/fstab
mount /srv/disk
expect "$(read_back /srv/disk/d)" hello
grep ' /srv/disk fuse.qcowfuse ' /proc/self/mounts

step "upgrade while the disk is in use; the administrator has changed the configuration"
echo 'allow-dir = /srv/bases' >>/etc/qcowfuse/qcowfuse.conf
printf 'IMAGE=/root/disk.qcow2\n' >/etc/qcowfuse/mine.conf
exec 3<>/srv/disk/d
apt-get -q -y --no-install-recommends install "$2"
dpkg-query -W -f='${Version}\n' qcowfuse | grep -- '-2~'
printf 'world\n' >&3
expect "$(read_back /srv/disk/d)" world
exec 3>&-
umount /srv/disk
grep allow-dir.*bases /etc/qcowfuse/qcowfuse.conf
qcowfuse /root/disk.qcow2 /srv/disk
expect "$(read_back /srv/disk/disk.raw)" world
fusermount3 -u /srv/disk

step "remove, then purge"
apt-get -q -y remove qcowfuse
test -f /etc/qcowfuse/qcowfuse.conf
hash -r
refuses command -v qcowfuse
apt-get -q -y purge qcowfuse
expect "$(find /usr /etc /var /lib -xdev -name '*qcowfuse*')" /etc/qcowfuse
expect "$(ls /etc/qcowfuse)" mine.conf
step "all is well"
"""


def try_package(suite: str, output: Path) -> str:
    """Build two revisions of the package for a suite and go through a package's life. Raises BuildError."""
    first, second = (build_in_root(suite, output, revision) for revision in (1, 2))
    print(f"trying {first.name} on a clean {suite}", flush=True)
    with own_folder("qcowfuse-trial-") as folder:
        root = clean_root(suite, folder)
        for package in (first, second):
            shutil.copy(package, root / "root")
        done = enter(root, "bash", "-c", _STEPS, "trial", *(f"/root/{package.name}" for package in (first, second)))
    second.unlink()
    checked(done)
    return f"{first}: installed, used, upgraded and purged on {suite}"
