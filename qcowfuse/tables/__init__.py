"""The tables of an image as they lie in its file, read through a storage: what the disk and the tools both need.

1. A table is read piece by piece, and no more of it is held than a named limit allows: its size comes from the image.
2. Nothing is written here, and nothing is judged: what is damaged raises ``FormatError``.

Modules: ``header``, ``refcount_table``, ``snapshot_table`` (internal snapshots, one by one), ``bitmap_listing``
(persistent dirty bitmaps, one by one), ``paged_table`` (an L1 table in pages), ``large_table`` (the L1 table of a
large disk of version 1).
"""
