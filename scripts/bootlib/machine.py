"""A Debian on a disk of its own, with qcowfuse's package, which boots in QEMU and runs one step in each boot.

1. Kernel and virtual machine are those of ``tests/support/guest.py``; the initramfs only mounts the disk and goes on
   with its systemd. So a boot is a real one, but for the boot loader.
2. A step is a script that a service starts when the machine is up. It says TRIAL-OK and powers the machine off, or
   cuts it off; what it says is on the serial line.
3. After a power-off, the images are taken out of the disk and looked at by QEMU and e2fsprogs of this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from packagelib.deb import BuildError
from packagelib.roots import CACHE, build_in_root, enter, make_root

from tests.support import qemu
from tests.support.guest import GuestSystem, boot, fetch_guest_system, make_initramfs
from tests.support.inner_file_systems import ext4_in_partition_2, is_whole

HERE = Path(__file__).resolve().parent
STEPS: dict[str, str | None] = {
    "first": "first",
    "killed": "killed",
    "cut": "",
    "after": "after",
    "volumes": None,
    "network": None,
}
"""Each step, and what the file x in the images holds when it has ended (empty: they are in use then; None: what it
held before)."""
PACKAGES = (
    *(
        "systemd",
        "systemd-sysv",
        "dbus",
        "libpam-systemd",
        "udev",
        "kmod",
        "procps",
        "fdisk",
        "e2fsprogs",
        "fuse3",
        "python3",
    ),
    *("qemu-utils", "lvm2", "thin-provisioning-tools", "nfs-kernel-server", "samba", "cifs-utils"),
)
FSTAB = """\
/srv/a.qcow2              /srv/a       fuse.qcowfuse  partition=2,nofail                             0  0
/srv/a/disk.raw           /data/a      ext4           loop,nofail                                    0  0
/srv/b/disk.raw           /data/b      ext4           loop,nofail,x-systemd.requires=qcowfuse@b.service  0  0
/run/qcowfuse-loop/c/part2  /data/c    ext4           nofail,x-systemd.requires=qcowfuse-loop@c.service  0  0
/srv/broken.qcow2         /srv/broken  fuse.qcowfuse  nofail                                         0  0
/srv/broken/disk.raw      /data/broken ext4           loop,nofail                                    0  0
"""
UNIT = """\
[Unit]
FailureAction=poweroff-force

[Service]
Type=exec
ExecStart=/srv/step

[Install]
WantedBy=multi-user.target
"""
DISK_SIZE = 3 << 30
SECOND_DISK_SIZE = 512 << 20
MIB_OF_MEMORY = 768
TIMEOUT = 600.0
MASKED = (
    "serial-getty@ttyS0",
    "getty@tty1",
    "nfs-blkmap",
    "e2scrub_reap",
    "systemd-timesyncd",
    "smbd",
    "nmbd",
    "samba-ad-dc",
)
"""What would take time or the serial line."""
SWITCH_ROOT = "mount -t ext4 /dev/vda /mnt && exec switch_root /mnt /sbin/init"


class TrialError(Exception):
    """What went wrong, for whom runs the script."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A disk with a system, and what boots it. ``folder`` has all of it."""

    folder: Path
    system: GuestSystem

    @classmethod
    def make(cls, suite: str, folder: Path) -> Machine:
        """The system of a Debian suite with qcowfuse's package, and three images with a file system inside."""
        system = fetch_guest_system()
        try:
            made = make_root(CACHE / "packages" / f"boot-{suite}", suite, PACKAGES)
            package = build_in_root(suite, folder, 1)
            root = folder / "root"
            subprocess.run(["cp", "-a", made, root], check=True)
            shutil.copy(package, root / "srv")
            done = enter(root, "dpkg", "-i", f"/srv/{package.name}")
        except BuildError as exc:
            raise TrialError(str(exc)) from None
        if done.returncode:
            raise TrialError(done.stdout + done.stderr)
        _install_modules(root, system)
        _install_images(root)
        _install_step(root)
        disk = folder / "disk"
        for path, size in ((disk, DISK_SIZE), (folder / "second", SECOND_DISK_SIZE)):
            path.touch()
            os.truncate(path, size)
        qemu.must_run("mke2fs", "-q", "-F", "-t", "ext4", "-d", root, disk)
        shutil.rmtree(root)
        make_initramfs(folder / "initrd", system, SWITCH_ROOT)
        return cls(folder, system)

    def go(self, step: str, content: str) -> str:
        """Boot, run a step, and look at the images. ``content`` is what the file x held before; returns what it holds
        now. Either is empty where that is not known. Raises TrialError."""
        began = time.monotonic()
        try:
            said = boot(
                self.system,
                self.folder / "initrd",
                self.folder / "disk",
                drive_options="cache=writeback,discard=unmap",
                words=[f"trial_step={step}", *(f"systemd.mask={unit}.service" for unit in MASKED)],
                timeout=TIMEOUT,
                memory=MIB_OF_MEMORY,
                arguments=[
                    *(
                        "-drive",
                        f"file={self.folder / 'second'},format=raw,if=none,id=d1,cache=writeback,discard=unmap",
                    ),
                    *("-device", "virtio-blk-pci,drive=d1"),
                ],
            )
            if "TRIAL-OK" not in said:
                raise TrialError(f"{step}: {said}")
            content = content if (written := STEPS[step]) is None else written
            if content:
                self._look(content, leaks=step not in ("first", "killed"))
        except (qemu.QemuError, AssertionError) as exc:
            raise TrialError(f"{step}: {exc}") from None
        rows = [line.removeprefix("ROW ") for line in said.splitlines() if line.startswith("ROW ")]
        print(f"{step}: {time.monotonic() - began:.0f} s", *rows, sep="\n", flush=True)
        return content

    def _look(self, content: str, *, leaks: bool) -> None:
        """Rule 3."""
        qemu.must_run("e2fsck", "-fn", self.folder / "disk")
        user_image = self.folder / "u.qcow2"
        qemu.must_run("debugfs", "-R", f"dump /home/maria/u.qcow2 {user_image}", self.folder / "disk")
        result = qemu.check(user_image)
        assert result.clean or (leaks and not result.corruptions), result.text
        for name in ("a", "b", "c"):
            image = self.folder / f"{name}.qcow2"
            qemu.must_run("debugfs", "-R", f"dump /srv/{name}.qcow2 {image}", self.folder / "disk")
            is_whole(image, self.folder, content, leaks=leaks)


def _install_modules(root: Path, system: GuestSystem) -> None:
    """The modules of the kernel that is booted."""
    (modules,) = (path for path in system.folder.rglob("lib/modules/*") if path.is_dir())
    shutil.copytree(modules, root / "usr/lib/modules" / modules.name, symlinks=True)
    qemu.must_run("chroot", root, "depmod", modules.name)


def _install_images(root: Path) -> None:
    """Images, fstab and configurations."""
    for name in ("a", "b", "c"):
        ext4_in_partition_2(root / f"srv/{name}.qcow2")
    (root / "srv/broken.qcow2").write_bytes(b"QFI\xfb" + bytes(1000))
    for name in ("a", "b", "c", "broken"):
        for place in ("srv", "data"):
            (root / place / name).mkdir(parents=True)
    (root / "etc/fstab").write_text(FSTAB)
    _install_user(root)
    for name, options in (("b", "OPTIONS=--partition 2\n"), ("c", "")):
        conf = f"IMAGE=/srv/{name}.qcow2\nMOUNTPOINT=/srv/{name}\n{options}"
        (root / f"etc/qcowfuse/{name}.conf").write_text(conf)


def _install_user(root: Path) -> None:
    """A user whose services start with the machine, an image served by the unit for users among them."""
    qemu.must_run("chroot", root, "useradd", "-m", "-u", "1000", "maria")
    home = root / "home/maria"
    for folder in ("disk u", ".config/qcowfuse", ".config/systemd/user/default.target.wants"):
        (home / folder).mkdir(parents=True)
    qemu.create(home / "u.qcow2", "qcow2", 16 << 20)
    (home / ".config/qcowfuse/u.conf").write_text('IMAGE=u.qcow2\nMOUNTPOINT="disk u"\n')
    wanted = home / ".config/systemd/user/default.target.wants/qcowfuse@u.service"
    wanted.symlink_to("/usr/lib/systemd/user/qcowfuse@.service")
    for path in home.rglob("*"):
        os.chown(path, 1000, 1000, follow_symlinks=False)
    (root / "var/lib/systemd/linger").mkdir(parents=True)
    (root / "var/lib/systemd/linger/maria").touch()


def _install_step(root: Path) -> None:
    """The service that starts the step that the kernel's command line names, and what steps use."""
    shutil.copytree(HERE / "steps", root / "srv/steps")
    shutil.copy(HERE / "steps/prelude", root / "srv/step")
    (root / "srv/step").chmod(0o755)
    (root / "srv/scripts").mkdir()
    shutil.copy(HERE.parent / "file-system", root / "srv/scripts")
    (root / "etc/systemd/system/trial.service").write_text(UNIT)
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "trial.service").symlink_to("/etc/systemd/system/trial.service")
    (root / "etc/hostname").write_text("trial\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost trial\n")
    (wants / "nfs-server.service").unlink(missing_ok=True)  # a step starts it
