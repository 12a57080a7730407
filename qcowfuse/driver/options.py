"""How an image is to be opened: plain values that cli fills in and driver reads."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from ..storage.measuring.delay_model import DelayModel as DelayModel  # cli takes it from here

MAX_BACKING_DEPTH = 200
"""Layers below the top one. QEMU has no limit of its own; beyond this a chain is taken for hostile."""


class DetectZeroes(Enum):
    """``ON``: zeroes are not stored; ``UNMAP``: their clusters are given back as well, as by a discard."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


PassphraseSource = Callable[[str], bytearray]
"""Path of an encrypted layer to the passphrase, which the caller overwrites. Raises ImageUsageError, OSError."""


class L2CacheSize(NamedTuple):
    """The budget of the L2 cache: ``n_bytes``, or ``n_tables`` whole tables of the top image; 0 is off."""

    n_bytes: int | None = None
    n_tables: int | None = None


class OpenOptions(NamedTuple):
    """``l2_cache_size`` None: cover the whole disk, 32 MiB at most. ``lock_wait`` in seconds: how long to
    wait for a lock that another process holds. ``discard`` False: nothing is given back to the file system.
    ``detect_zeroes``: what a write of zeroes becomes.
    ``snapshot``: id or name of the internal snapshot to serve instead of the disk as it is; implies ``read_only``.
    ``backing_format``: ``raw``, ``qcow2`` (of any version) or ``auto`` (by content) for backing files whose format
    the image leaves open.
    ``backing_file``, ``data_file``: those of the image itself, where they are not the ones that it names.
    ``allow_dirs``: folders beneath which images may name files; ``no_backing``: images may name none.
    ``force_share``: what is only read is read without locks, though others may be writing it. ``ignore_locks``: so is
    what is written, for which there has to be a good reason.
    ``io_uring``: what must wait for the disk is read and flushed by io_uring, where that can be had.
    ``passphrase`` is asked once when a layer is encrypted; ``tables_only``: encrypted layers stay locked, and their
    data cannot be read.
    ``io_delay`` and ``image_in_memory`` are for measuring."""

    read_only: bool = False
    l2_cache_size: L2CacheSize | None = None
    lock_wait: float = 0.0
    discard: bool = True
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    snapshot: str | None = None
    backing_format: str | None = None
    backing_file: str | None = None
    data_file: str | None = None
    allow_dirs: tuple[str, ...] = ()
    no_backing: bool = False
    force_share: bool = False
    ignore_locks: bool = False
    passphrase: PassphraseSource | None = None
    tables_only: bool = False
    io_uring: bool = False
    io_delay: DelayModel | None = None
    image_in_memory: bool = False

    def __repr__(self) -> str:
        shown = (f"{name}={value!r}" for name, value in self._asdict().items() if name != "passphrase")
        return f"OpenOptions({', '.join(shown)})"
