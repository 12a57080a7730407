"""A booted virtual machine whose disk is the served file."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tests.support import loops, qemu
from tests.support.guest import BOOT_TIMEOUT, GuestSystem, boot, fetch_guest_system, make_initramfs
from tests.support.loops import EXT4, served

pytestmark = [pytest.mark.mount, pytest.mark.root]

SIZE = 64 << 20

# Eight writers at once, each with 2 MiB of its own; then all is read back from the disk, not from memory.
SCRIPT = """
fail() { echo "GUEST-FAIL $*"; poweroff -f; sleep 60; }
run=$(sed -n 's/.*guest_run=\\([0-9]*\\).*/\\1/p' /proc/cmdline)
[ -b /dev/vda ] || fail "no disk"
mount -t ext4 /dev/vda /mnt || fail mount
[ ! -e /mnt/sums ] || (cd /mnt && sha256sum -c -s sums) || fail "files of the last boot"
mkdir /mnt/run$run
dd if=/dev/urandom of=/mnt/seed bs=1M count=1 2>/dev/null
for i in 1 2 3 4 5 6 7 8; do
    (echo $run $i; cat /mnt/seed; echo $i $run; cat /mnt/seed) >/mnt/run$run/$i &
done
wait
(cd /mnt && sha256sum run$run/* >>sums) || fail sums
sync
echo 3 >/proc/sys/vm/drop_caches
(cd /mnt && sha256sum -c -s sums) || fail checksum
sed 's/^/GUEST-SUM /' /mnt/sums
umount /mnt || fail umount
echo GUEST-OK
"""


@pytest.fixture(scope="module")
def guest_system() -> GuestSystem:
    """Kernel and busybox of the distribution."""
    return fetch_guest_system()


def boot_and_collect(system: GuestSystem, folder: Path, disk: Path, drive_options: str, run: int) -> dict[str, str]:
    """Boot, and give the sums that the guest has of its files."""
    said = boot(system, folder / "initrd", disk, drive_options=drive_options, words=[f"guest_run={run}"])
    assert "GUEST-OK" in said, said
    lines = [line.split() for line in said.splitlines() if line.startswith("GUEST-SUM")]
    return {name: value for _, value, name in lines}


@pytest.mark.timeout(3 * BOOT_TIMEOUT)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernel package that is booted is for x86_64")
@pytest.mark.parametrize(
    ("drive_options", "image_options", "n_boots"),
    [("cache=none,aio=native", "compat=1.1", 2), ("cache=writeback,aio=threads", "cluster_size=512", 1)],
)
def test_guest_keeps_its_files(
    tmp_path: Path, guest_system: GuestSystem, drive_options: str, image_options: str, n_boots: int
) -> None:
    """What eight parallel writers in a guest write has the same sums in the guest, at its next boot and here."""
    image = tmp_path / "i.qcow2"
    qemu.create(image, "qcow2", SIZE, options=image_options)
    make_initramfs(tmp_path / "initrd", guest_system, SCRIPT)
    with served(image) as mount:
        qemu.must_run(*EXT4.make, mount.file)
    for number in range(n_boots):
        with served(image) as mount:
            sums = boot_and_collect(guest_system, tmp_path, mount.file, drive_options, number)
        assert len(sums) == 8 * (number + 1)
        result = qemu.check(image)
        assert result.clean, result.text
    with served(image, "-r") as mount:
        qemu.must_run(*EXT4.check, mount.file)
        with loops.loop_device(mount.file, read_only=True) as device:
            with loops.mounted_file_system(device, tmp_path / "point", "ro") as point:
                assert {name: loops.sha256_of(point / name) for name in sums} == sums
