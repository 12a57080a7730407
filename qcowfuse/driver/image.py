"""The Image protocol: what the layers above see of a virtual disk, whatever its format.

1. A request is started by a plain function, which gives the answer or a pending object (:mod:`.pending`). The caller
   awaits ``finish`` of that, once, or calls ``abandon``. What goes wrong at the start is raised there; corruption is
   raised by ``finish``, since the image has to be marked first.
2. Requests must lie inside ``0 <= guest_offset, guest_offset + n_bytes <= size``; else OutOfRangeError.
3. A completed write is visible to every later read and durable after the next successful ``flush``.
4. Overlapping requests in flight may land in any order, but never mix inside one image sector of 512 bytes
   with bytes that none of them wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..buffer import Buffer
from .pending import PendingRead, PendingWrite

LARGE_READ = LARGE_WRITE = 512 << 10
"""Bytes. From here on copying takes so long that the caller may have another thread do that."""


def never() -> bool:
    """For ``is_alone``: somebody may be waiting."""
    return False


def always() -> bool:
    """For ``is_alone``: nobody waits."""
    return True


class StartRead(Protocol):
    """``start_read`` of an Image."""

    def __call__(
        self, guest_offset: int, n_bytes: int, is_alone: Callable[[], bool] = never, /
    ) -> Buffer | PendingRead:
        """The bytes when they can be had at once. ``is_alone`` tells whether nobody else waits for an answer, or no
        other thread could work on it; it is asked once at most, where the bytes could be computed or copied on the
        spot, which may take some 100 us. Raises OutOfRangeError, FormatError, OSError."""


class StartWrite(Protocol):
    """``start_write`` of an Image."""

    def __call__(
        self, guest_offset: int, data: Buffer, is_alone: Callable[[], bool] = never, /
    ) -> PendingWrite | None:
        """None when all of the data was written at once, into new clusters where that was needed. ``data`` is only
        lent to a write that ends here, and to a pending one until it is finished. ``is_alone``: as for a read.
        Raises OutOfRangeError, ReadOnlyImageError, OSError."""


class Image(Protocol):
    """An open virtual disk. All calls are made from one trio thread."""

    @property
    def path(self) -> str:
        """The image file as the user named it."""

    @property
    def format_name(self) -> str:
        """``raw``, ``qcow`` or ``qcow2``, and which part of the disk it is, for a person."""

    @property
    def size(self) -> int:
        """Virtual size in bytes."""

    @property
    def cluster_size(self) -> int:
        """Bytes per cluster, the natural unit of discard; 4096 for raw."""

    @property
    def read_only(self) -> bool:
        """True when opened read-only, and from the moment on that an error made it so."""

    @property
    def start_read(self) -> StartRead:
        """Starts reads."""

    @property
    def start_write(self) -> StartWrite:
        """Starts writes."""

    async def read(self, guest_offset: int, n_bytes: int) -> Buffer:
        """The bytes: :attr:`start_read`, and its pending read finished. Raises OutOfRangeError, CorruptImageError,
        FormatError, OSError."""

    async def write(self, guest_offset: int, data: Buffer) -> None:
        """Write: :attr:`start_write`, and its pending write finished. Raises OutOfRangeError, ReadOnlyImageError,
        CorruptImageError, OSError."""

    async def write_zeroes(self, guest_offset: int, n_bytes: int, *, unmap: bool) -> None:
        """Make the range read as zeroes; ``unmap``: whole clusters may give their space back. Raises as write."""

    async def allocate(self, guest_offset: int, n_bytes: int) -> None:
        """Set real space aside for the range, so that later writes to it find room; what is read stays. Raises as
        write; after an error (ENOSPC) a part may be set aside."""

    async def grow(self, size: int) -> None:
        """Make the disk ``size`` bytes, rounded up to 512, durably; the new part reads as zeroes. Raises
        ImageUsageError for less than it has, OSError (EFBIG: more than the format allows; EOPNOTSUPP: this image
        cannot grow), and as write."""

    async def find_extent(self, guest_offset: int, n_bytes: int, *, keep: bool = True) -> tuple[bool, int]:
        """Whether there is data at ``guest_offset`` (zeroes otherwise), and for how many of ``n_bytes`` (1 or more)
        that holds; the rest is to be asked again. One call does a bounded amount of work, and calls in a row let
        others have their turn. ``keep``: the caller comes back to this place, so that tables are worth keeping.
        Raises OutOfRangeError, CorruptImageError, OSError."""

    def try_find_extent(self, guest_offset: int, n_bytes: int) -> tuple[bool, int, bool] | None:
        """:meth:`find_extent` where that need not wait, else None; and whether a hole is known to follow the data, or
        data the hole, within ``n_bytes``: that saves the next look. Raises OutOfRangeError, CorruptImageError."""

    def try_write_zeroes(self, guest_offset: int, n_bytes: int, *, unmap: bool) -> bool:
        """:meth:`write_zeroes` where that need not wait, and is little work; False where nothing was done but for a
        part of a cluster. Raises OSError, where such a part could not be written."""

    def try_flush(self) -> bool:
        """:meth:`flush` where that need not wait, else False: no promise is made then, and nothing is lost."""

    async def flush(self) -> None:
        """Make every completed write durable. A failed flush is final: later ones fail too."""

    def allocated_bytes(self) -> int:
        """Bytes of the virtual disk that hold data somewhere in the chain (what ``du`` should say)."""

    async def count_allocated(self) -> None:
        """Find out what :meth:`allocated_bytes` is; until this has ended it is an estimate. To be run once, in the
        background. Raises OSError, FormatError."""

    def free_host_bytes(self) -> int:
        """Free bytes in the file system that holds the image (for statfs)."""

    def statistics(self) -> dict[str, int]:
        """Counters by dotted name: ``l2_cache.hits``, ``backend.reads`` ..."""

    async def aclose(self) -> None:
        """Flush (unless read-only or failed), close every layer, give up the locks. Raises what flush raises,
        after everything has been closed all the same. Idempotent."""
