"""Cases that were wrong once, or that show a decision: ``scripts/fuzz`` prints such lines for what it finds."""

from __future__ import annotations

from tests.support.fuzzing.cases import Case

REPRODUCERS = (
    # Version 1: a new cluster was put where the rest of a cluster would be that the end of the file cuts off.
    Case("whole", "v1-4k", (("cut", 51069),), (("rw",), ("write", 39835, 4096, 222))),
    Case("whole", "v1-4k", (("cut", 53248),), (("rw",), ("write", 39835, 4096, 222))),
    # Version 1: bit 63 of an L1 entry was passed over, and an entry of nothing else read as nothing at all.
    Case("qemu", "v1-backing", (("l1[1]", 1 << 63),)),
    # An entry of the bitmap directory that says that it has a name behind the end of the directory.
    Case("whole", "v3-bitmaps", (("bitmap[1].extra_size", 2721049513),), (("rw",), ("write", 20480, 1, 176))),
    # Extensions end where the backing file's name begins, be there a name or not.
    Case("whole", "v3-bitmaps", (("header.backing_file_offset", 64),), (("rw",), ("write", 25718, 1, 218))),
    # Names that make the snapshot table longer than what is counted for it.
    Case("whole", "v2-snapshot-4k", (("snapshot[0].id_size", 4097), ("refcount_table[1]", 0)), (("repair-all",),)),
    # More snapshots than there are.
    Case("whole", "v2-snapshot-4k", (("header.n_snapshots", 999),), (("repair-all",), ("info",))),
    # A reference far behind the end: the table for counts behind it was itself to be counted, without an end.
    Case("whole", "v2-aes", (("header.l1_size", 25600),), (("repair-all",),)),
    # Two bitmaps of one name: both have their clusters.
    Case("whole", "v3-bitmaps", (("bitmap[0].name[0]", 98),), (("repair-leaks",),)),
    # A disk of no bytes.
    Case("whole", "v2-snapshot-4k", (("header.size", 0),), (("rw",), ("map",), ("write", 0, 1, 1))),
)
"""Nothing may be found in them."""

DECIDED = {
    "damaged bitmaps": (
        Case("qemu", "v3-bitmaps", (("bitmaps.directory_offset", 1 << 63),)),
        Case("qemu", "v3-bitmaps", (("bitmap[0].name_size", 512),)),
        Case("qemu", "v3-bitmaps", (("bitmap[0].type", 0),)),
        Case("qemu", "v3-bitmaps", (("bitmap[0].table[0]", (1 << 64) - 1),)),
        Case("qemu", "v3-bitmaps", (("bitmaps.n_bitmaps", 6),)),
        Case("qemu", "v3-bitmaps", (("bitmaps.directory_size", 0),)),
    ),
    "damaged snapshot table": (
        Case("qemu", "v2-snapshot-4k", (("snapshot[0].extra_size", 94208),)),
        Case("qemu", "v3-snapshots", (("header.n_snapshots", 9), ("snapshot[1].extra_size", 1 << 31))),
    ),
    "version 1: tables and clusters beyond 2^56": (
        Case("qemu", "v1-backing", (("l2[0][36]", 1 << 62),)),
        Case("qemu", "v1-4k", (("header.l1_table_offset", 0),)),
    ),
    "version 1: a backing name of no bytes, at a place that no file has": (
        Case("qemu", "v1-deflate", (("header.backing_file_offset", 1 << 63),)),
    ),
    "backing name inside of the header": (
        Case("qemu", "v2", (("header.backing_file_offset", 40), ("header.backing_file_size", 2))),
        Case("qemu", "v3-512", (("header.backing_file_offset", 96), ("header.backing_file_size", 4))),
    ),
    "version 1: backing name far behind the header": (
        Case("qemu", "v1-backing", (("header.backing_file_offset", 17179869232),)),
    ),
}
"""By the name of the decision: images that QEMU and qcowfuse disagree on."""
