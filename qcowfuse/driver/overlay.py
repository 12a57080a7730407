"""What lies over an image and takes its writes: what is said of the image, and how the overlay is asked for.

1. The image and all below it are open by then, for reading only, and unlocked.
2. Where anything below is encrypted the overlay is encrypted as well: what a guest writes to an encrypted disk never
   reaches the host's disk as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..format.geometry import MAX_CLUSTER_BITS, WORD_SIZE, divide_up
from ..format.header_fields import MAX_L1_SIZE
from .files import ChainFile, ChainFiles

if TYPE_CHECKING:
    from ..format.crypto import SectorCipher
    from ..format.luks import LuksHeader

_CLUSTER_BITS = 16
"""QEMU's default. Larger clusters would copy more for each first write."""


class OverlayBase(NamedTuple):
    """The image below: ``size`` of its disk in bytes, ``status`` of its file (None for what is no real file).

    ``is_encrypted``: some layer is; ``luks`` is how, where one has LUKS.
    """

    path: str
    format_name: str
    size: int
    status: os.stat_result | None
    is_encrypted: bool
    luks: LuksHeader | None

    @property
    def cluster_bits(self) -> int:
        """For an overlay: 64 KiB, and more only where the disk is too large for that."""
        bits = _CLUSTER_BITS
        while bits < MAX_CLUSTER_BITS and divide_up(self.size, 1 << 2 * bits - 3) * WORD_SIZE > MAX_L1_SIZE:
            bits += 1
        return bits


class OverlayFile(NamedTuple):
    """An overlay, open. ``cipher``: of its data, where the key is nowhere in the file."""

    file: ChainFile
    cipher: SectorCipher | None = None


class Overlay(Protocol):
    """Where the writes go."""

    async def open(self, files: ChainFiles, base: OverlayBase, passphrase: Callable[[], bytearray]) -> OverlayFile:
        """Open it, and make it where it has to be made. ``passphrase``: that of what is below, not to be kept.

        Raises ImageUsageError, ImageLockedError, OSError.
        """
