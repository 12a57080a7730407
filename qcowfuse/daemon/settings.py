"""Where and how an image is served, as values."""

from __future__ import annotations

from typing import NamedTuple


class User(NamedTuple):
    """Whom a process becomes."""

    uid: int
    gid: int
    groups: tuple[int, ...]


class MountSettings(NamedTuple):
    """Where and how to serve. ``fuse_options`` are libfuse's own, as they would stand after its ``-o``.

    ``counts_allocated`` False leaves out the count of what is allocated, which reads all L2 tables in the background:
    for measurements. ``growable``: truncating to more, and writing past the end, makes the disk larger.
    ``serves_partitions``: beside the file of the disk, a file of each partition. ``image``: the whole path of the
    image that the user named, where another file takes the writes. ``uid``, ``gid`` and ``umask`` None: the user who
    mounts, and mode 0600. ``uses_sandbox``: once it serves, the daemon gives up what it does not need. ``user``: and
    becomes that user. ``idle_timeout``: seconds without use after which it unmounts. ``lifeline``: a descriptor; when
    it is at its end, the daemon stops. ``removes_mount_point``: the mount point is removed with the mount.
    """

    mount_point: str
    file_name: str = "disk.raw"
    fuse_options: frozenset[str] = frozenset()
    source: str | None = None
    image: str | None = None
    writeback_cache: bool = True
    allow_non_empty: bool = False
    uid: int | None = None
    gid: int | None = None
    umask: int | None = None
    ends_on_hangup: bool = False
    counts_allocated: bool = True
    growable: bool = False
    serves_partitions: bool = False
    uses_sandbox: bool = True
    user: User | None = None
    idle_timeout: float | None = None
    lifeline: int | None = None
    removes_mount_point: bool = False
