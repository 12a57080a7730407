"""A mount point in a folder of somebody else, who exchanges it between the look at it and the mount."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from qcowfuse.daemon.mountpoint import unmount_path
from qcowfuse.errors import MountError
from tests.support.mounting import Mounted, create_image, is_mounted

pytestmark = [pytest.mark.mount, pytest.mark.root]

# What the other user does while the image is being opened.
EXCHANGE = """
import os
from qcowfuse.driver import chain
from qcowfuse.cli.mount import serving

usual = serving.open_image

async def open_image(*args, **more):
    {what}
    return await usual(*args, **more)

serving.open_image = open_image
"""


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("os.rmdir('theirs/mnt'); os.symlink('../victim', 'theirs/mnt')", id="a link"),
        pytest.param("os.rename('theirs/mnt', 'theirs/away'); os.symlink('../victim', 'theirs/mnt')", id="moved"),
        pytest.param(
            "os.rename('theirs', 'away'); os.symlink('.', 'theirs'); os.mkdir('mnt')", id="the folder above"
        ),
        pytest.param("os.rename('theirs/mnt', 'theirs/away'); os.mkdir('theirs/mnt')", id="another folder"),
    ],
)
def test_an_exchanged_mount_point_is_not_mounted(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start fails with one line; nothing is mounted anywhere, and the victim is as it was."""
    image = create_image(tmp_path / "image.qcow2")
    (tmp_path / "theirs/mnt").mkdir(parents=True)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/file").write_text("untouched")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="was moved or replaced while the image was opened"):
        Mounted(image, tmp_path / "theirs/mnt", patch=EXCHANGE.format(what=what))
    assert (tmp_path / "victim/file").read_text() == "untouched"
    mounts = Path("/proc/self/mountinfo").read_text()
    assert str(tmp_path) not in mounts


def test_a_file_as_mount_point_is_held_too(tmp_path: Path) -> None:
    """A regular file is mounted over by its descriptor, and shown at its path."""
    image = create_image(tmp_path / "image.qcow2")
    place = tmp_path / "disk.raw"
    place.write_text("hidden")
    with Mounted(image, place) as mounted:
        assert is_mounted(place)
        assert os.stat(mounted.file).st_size == 64 << 20
    assert place.read_text() == "hidden"


def test_unmounting_follows_no_link_on_the_way(tmp_path: Path) -> None:
    """Where a folder on the way to a mount has become a link, what is mounted behind it stays."""
    victim = tmp_path / "victim/mnt"
    victim.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", victim], check=True)
    try:
        (tmp_path / "theirs").symlink_to("victim")
        with pytest.raises(MountError, match="leads elsewhere by now"):
            unmount_path(str(tmp_path / "theirs/mnt"))
        assert is_mounted(victim)
        unmount_path(str(victim))
        assert not is_mounted(victim)
    finally:
        if is_mounted(victim):
            subprocess.run(["umount", victim], check=True)
