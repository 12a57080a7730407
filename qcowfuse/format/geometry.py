"""Addresses and sizes of a QCOW image: every shift and mask that the rest of the code uses.

1. An address says by its name which side it is on: ``guest_`` (the virtual disk) or ``host_`` (the image file).
2. Everything here is arithmetic on validated numbers; nothing reads bytes.
"""

from __future__ import annotations

from ..errors import FormatError

SECTOR_SIZE = 512
MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MAX_REFCOUNT_ORDER = 6
WORD_SIZE = 8
"""Bytes of a table word: an L1 or standard L2 entry has one, an extended L2 entry two."""
SECTOR_WORDS = SECTOR_SIZE // WORD_SIZE
"""Words of a table in one sector."""
MAX_SLICE_SIZE = 64 * 1024
"""Bytes of an L2 table that are read, cached and evicted as one; smaller tables are one slice."""


def divide_up(value: int, divisor: int) -> int:
    """``value / divisor``, rounded up."""
    return -(-value // divisor)


def round_up(value: int, unit: int) -> int:
    """The least multiple of ``unit`` that is not below ``value``."""
    return -(-value // unit) * unit


class Geometry:
    """Sizes and shifts of one image.

    ``cluster_bits`` 9 to 21; ``l2_bits`` log2 of the entries per L2 table; ``size`` virtual size in bytes;
    ``words_per_entry`` 1, or 2 with extended L2 entries.
    Raises FormatError for numbers that no valid image has.
    """

    __slots__ = ("cluster_bits", "l2_bits", "size", "words_per_entry")

    def __init__(self, *, cluster_bits: int, l2_bits: int, size: int, words_per_entry: int = 1) -> None:
        self.cluster_bits = cluster_bits
        self.l2_bits = l2_bits
        self.size = size
        self.words_per_entry = words_per_entry
        if not MIN_CLUSTER_BITS <= self.cluster_bits <= MAX_CLUSTER_BITS:
            raise FormatError("header", 20, f"cluster_bits {self.cluster_bits}, expected 9 to 21")
        if not 1 <= self.l2_bits <= MAX_CLUSTER_BITS - 3:
            raise FormatError("header", None, f"l2_bits {self.l2_bits}, expected 1 to 18")
        if self.size < 0 or self.size >= 1 << 63:
            raise FormatError("header", 24, f"virtual size {self.size:#x}, expected less than 2^63")

    def with_size(self, size: int) -> Geometry:
        """The same image with a disk of ``size`` bytes. Raises FormatError."""
        return Geometry(
            cluster_bits=self.cluster_bits, l2_bits=self.l2_bits, size=size, words_per_entry=self.words_per_entry
        )

    @property
    def cluster_size(self) -> int:
        """Bytes per cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_entries(self) -> int:
        """Entries per L2 table."""
        return 1 << self.l2_bits

    @property
    def l2_table_size(self) -> int:
        """Bytes per L2 table."""
        return self.l2_entries * self.words_per_entry * WORD_SIZE

    @property
    def slice_size(self) -> int:
        """Bytes per L2 slice: the table, or 64 KiB of it."""
        return min(self.l2_table_size, MAX_SLICE_SIZE)

    @property
    def slice_bits(self) -> int:
        """log2 of the entries per L2 slice."""
        return (self.slice_size // (self.words_per_entry * WORD_SIZE)).bit_length() - 1

    @property
    def l1_shift(self) -> int:
        """Guest offset to L1 index is a right shift by this."""
        return self.cluster_bits + self.l2_bits

    @property
    def n_l1_entries(self) -> int:
        """L1 entries that the virtual size needs."""
        return divide_up(self.size, 1 << self.l1_shift)
