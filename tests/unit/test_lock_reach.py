"""Locks on network file systems: what their mount options tell of them."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from qcowfuse.driver.files import open_storage
from qcowfuse.driver.options import OpenOptions
from qcowfuse.storage import file_systems
from qcowfuse.system.mountinfo import MountEntry
from qcowfuse.tools.create import CreateOptions, create_image

NFS = "rw,vers=3,rsize=131072,hard,proto=tcp,mountproto=udp,addr=127.0.0.1,"
CIFS = "rw,vers=3.1.1,cache=strict,soft,nounix,serverino,mapposix,"
"""As Linux 6.1 shows them."""


def mounted(monkeypatch: pytest.MonkeyPatch, file_system: str, options: str) -> None:
    """Let all files lie on such a mount."""
    entry = MountEntry(1, 0, 0, "/mnt", file_system, "server:/x", tuple(options.split(",")))
    monkeypatch.setattr(file_systems, "mount_of", lambda _: entry)


@pytest.mark.parametrize(
    ("file_system", "options", "told"),
    [
        ("nfs", NFS + "local_lock=none", []),
        ("nfs", NFS + "local_lock=flock", []),  # those are other locks
        ("nfs", NFS + "nolock,local_lock=all", ["this machine alone (mount option nolock)"]),
        ("nfs", NFS + "local_lock=posix", ["this machine alone (mount option local_lock=posix)"]),
        ("nfs", NFS + "nosharecache,local_lock=none", ["by other mounts here (mount option nosharecache)"]),
        ("nfs4", "rw,vers=4.2,nosharecache,local_lock=none", []),  # the server keeps them apart
        ("cifs", CIFS + "nobrl", ["this machine alone (mount option nobrl)"]),
        ("cifs", CIFS, ["without the mount option nobrl"]),
        ("smb3", CIFS, ["without the mount option nobrl"]),
        ("cifs", "rw,vers=1.0,unix,posixpaths", []),
        ("cifs", "rw,vers=1.0,unix,posixpaths,forcemand", ["without the mount option nobrl"]),
        ("ext4", "rw,nolock", []),
    ],
)
@pytest.mark.parametrize("writable", [False, True])
async def test_what_is_said_at_open(
    file_system: str,
    options: str,
    told: list[str],
    writable: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line each, to those that write: a reader does no harm."""
    path = tmp_path / "image"
    path.write_bytes(b"x")
    mounted(monkeypatch, file_system, options)
    with caplog.at_level(logging.WARNING):
        await (await open_storage(str(path), writable, OpenOptions())).aclose()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (len(told) if writable else 0)
    for text, expected in zip(said, told, strict=False):
        assert text.startswith(f"{path}: ")
        assert expected in text


async def test_nothing_is_said_where_no_lock_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With --ignore-locks the warning of that is enough."""
    (tmp_path / "image").write_bytes(b"x")
    mounted(monkeypatch, "cifs", CIFS)
    await (await open_storage(str(tmp_path / "image"), True, OpenOptions(ignore_locks=True))).aclose()
    assert "nobrl" not in caplog.text


@pytest.mark.parametrize(("options", "is_told"), [(CIFS, True), (CIFS + "nobrl", False)])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
async def test_a_new_image_that_is_kept_by_its_lock(
    options: str, is_told: bool, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where locks are mandatory, "Permission denied" names the option; nothing is left of the file."""

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    mounted(monkeypatch, "cifs", options)
    monkeypatch.setattr(os, "pwrite", refuse)
    monkeypatch.setattr(os, "pwritev", refuse)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        await create_image(str(tmp_path / "new"), CreateOptions(size=1 << 20))
    assert (
        "(CIFS keeps what is locked from being written: mount it with the option nobrl)" in str(caught.value)
    ) == (is_told and number == errno.EACCES)
    assert list(tmp_path.iterdir()) == []


def test_the_mount_of_a_file(tmp_path: Path) -> None:
    """A real one is found, and names the type that :func:`~qcowfuse.storage.file_systems.type_of` gives."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        mount = file_systems.mount_of(fd)
        assert mount is not None
        assert mount.device == os.fstat(fd).st_dev or mount.file_system in ("btrfs", "overlay")
        assert file_systems.type_of(fd) == mount.file_system
    finally:
        os.close(fd)
